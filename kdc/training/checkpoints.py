"""What a training run needs to go on, in folders of safetensors and JSON with checksums.

`checkpoint-<step>` is written beside, brought to the disk and then renamed, so that none is ever
half there; the newest two stay. One that was damaged afterwards is known by its checksums, and the
one before it is used instead. Folders of such names that hold no `manifest.json` of ours are
somebody else's, and stay as they are.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdc.io import (
    MANIFEST,
    check_sealed,
    disk_errors,
    hash_text,
    is_sealed_as,
    plain,
    read_json,
    refuse_infinite_weights,
    refuse_other_settings,
    seal,
    sync,
    write_json,
)
from kdc.training.sharding import own, part_of, shared_as, whole

KIND = "kdc-checkpoint"
NUMBER = "#"  # behind the name of a moment that is a number and no tensor
NAME = re.compile(r"checkpoint-(\d{7,})")
PARTIAL = re.compile(NAME.pattern + r"\.partial")

Terms = dict[str, Tensor]


class Companion(Protocol):
    """State that the loss function changes; its dictionary holds tensors only."""

    def state_dict(self) -> Terms: ...

    def load_state_dict(self, state: Terms) -> None: ...


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders named `checkpoint-<step>` below `output_dir`, by step, whole or damaged."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted((p for p in found if p.is_dir()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The last whole checkpoint below `output_dir`, or None where there is none at all.

    One that is damaged is passed over with a warning that says what is wrong with it. Raises
    `ValueError` where there are checkpoints and none is whole.
    """
    wrong = []
    for checkpoint in reversed(checkpoints(output_dir)):
        try:
            check_sealed(checkpoint, KIND)
        except ValueError as error:
            wrong.append(str(error))
            continue
        for reason in wrong:
            warnings.warn(f"{reason}. Going on from {checkpoint} instead", stacklevel=2)
        return checkpoint
    if wrong:
        raise ValueError(
            "no checkpoint can be used:\n  "
            + "\n  ".join(wrong)
            + "\nDelete them to begin anew, or give another output_dir"
        )
    return None


def check_earlier_run(
    output_dir: str | Path, resume: bool, made_with: Mapping[str, Any], steps: int
) -> None:
    """Look at what an earlier run left, before any costly step; nothing is hashed or loaded.

    `made_with` are settings that the run will have, not necessarily all. Raises `FileExistsError`
    where there is a run that is not to be resumed, `ValueError` where it was made with something
    else or has gone further than `steps`.
    """
    found = checkpoints(output_dir)
    if not found:
        return
    if not resume:
        raise FileExistsError(
            f"{found[-1]} is of an earlier run: go on with resume=True, or give another output_dir"
        )
    try:
        note = read_json(found[-1] / "state.json")
    except (OSError, ValueError):
        return  # damaged: an older one may do, which is seen when it is loaded
    _check_note(found[-1], note, made_with, steps)


def _check_note(checkpoint: Path, note: dict, made_with: Mapping[str, Any], steps: int) -> None:
    refuse_other_settings(checkpoint, note.get("made_with", {}), made_with, partly=True)
    if note.get("step", 0) > steps:
        raise ValueError(
            f"{checkpoint} has {note['step']} steps behind it, now steps={steps}: give at least as "
            "many, or another output_dir"
        )


def clean(output_dir: str | Path) -> None:
    """Remove what a run that was killed while it wrote a checkpoint left behind."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if PARTIAL.fullmatch(folder.name) and folder.is_dir():
            # Killed at its first moment it holds nothing yet, or half a manifest.
            begun = {p.name for p in folder.iterdir()} <= {MANIFEST + ".partial"}
            if begun or is_sealed_as(folder, KIND):
                shutil.rmtree(folder)


def forget_checkpoints(output_dir: str | Path, but_newest: int = 0) -> None:
    """Delete the checkpoints that a run wrote below `output_dir`, `but_newest` of them not."""
    own = [p for p in checkpoints(output_dir) if is_sealed_as(p, KIND)]
    for old in own[: len(own) - but_newest]:
        shutil.rmtree(old)


@dataclasses.dataclass
class TrainingState:
    """Everything a run needs to go on: weights, average, moments, schedule, generators, log."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    generator: torch.Generator
    # Whatever the next step depends on, in plain values.
    made_with: dict
    companion: Companion | None

    def __post_init__(self):
        # Moments and averages are filed by these names, in the optimiser's order.
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        layout = [(n, list(x.shape)) for n, x in self.model.state_dict().items()]
        digest = hash_text(repr((layout, self.trained)))
        said = f"{len(self.trained)} of {len(layout)} tensors trained ({digest})"
        self.made_with = plain(self.made_with | {"parameters": said})

    def save(self, output_dir: Path, step: int, rows: list[dict], accelerator: Accelerator) -> None:
        """Write `output_dir/checkpoint-<step>`, with the log's `rows`; the newest two stay.

        Every process calls it, and the first one writes. Raises `FloatingPointError` before weights
        that are not finite would be stored, and `OSError` where the disk is full; nothing is left
        of this checkpoint then, and the ones before it stay.
        """
        main = accelerator.is_main_process
        weights = ((name, whole(p.detach())) for name, p in self.model.named_parameters())
        refuse_infinite_weights(weights, f"step {step}")
        tensors = self._tensors(main)
        final = output_dir / f"checkpoint-{step:07d}"
        partial = final.with_name(final.name + ".partial")
        said = (
            f"the checkpoint of step {step} could not be written; the ones before it are whole: "
            "make room and go on with resume=True"
        )
        with disk_errors(said, final, partial if main else None):
            if main:
                clean(output_dir)
                _move_aside(partial)
                partial.mkdir(parents=True)
                seal(partial, KIND, ())  # from now on it is known to be ours
            accelerator.wait_for_everyone()
            if main:
                self._write(partial, step, rows, tensors)
            accelerator.wait_for_everyone()
            if main:
                seal(partial, KIND)
                _put_in_place(partial, final)
        if main:
            for later in checkpoints(output_dir):
                if _step(later) > step and is_sealed_as(later, KIND):
                    shutil.rmtree(later)  # damaged, and passed over when this run began
            forget_checkpoints(output_dir, but_newest=2)

    def _parameters(self) -> list[Tensor]:
        """What is trained, in the optimiser's order; shared out where the weights are."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.trained]

    def _tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """What each file of a checkpoint holds; every process calls it, those that `keep` have it.

        Of weights that are shared out one tensor after the other is put together.
        """
        found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}

        def put(file: str, name: str, tensor: Tensor) -> None:
            put_together = whole(tensor)
            if keep:
                shared = put_together is not tensor
                found[file][name] = put_together.cpu() if shared else tensor.contiguous()

        for name, value in self.model.state_dict().items():
            put("model", name, value)
        # Some optimisers count their steps in whole numbers, others in tensors.
        for index, entry in self.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                is_tensor = isinstance(value, Tensor)
                key = f"{name}{'' if is_tensor else NUMBER}/{self.trained[index]}"
                put("optimizer", key, value if is_tensor else torch.tensor(value))
        shadows = self.ema.shadow_params if self.ema else []
        for name, shadow, parameter in zip(self.trained, shadows, self._parameters(), strict=False):
            put("ema", name, part_of(shadow, parameter))
        return found

    def _write(
        self, folder: Path, step: int, rows: list[dict], tensors: dict[str, dict[str, Tensor]]
    ) -> None:
        for name, held in tensors.items():
            if name != "ema" or self.ema:
                save_file(held, folder / f"{name}.safetensors")
        if self.companion:
            save_file(self.companion.state_dict(), folder / "companion.safetensors")
        save_file({"generator": self.generator.get_state()}, folder / "generator.safetensors")
        note = {
            "step": step,
            "made_with": self.made_with,
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "ema_steps": self.ema.optimization_step if self.ema else 0,
            "rows": rows,
        }
        write_json(folder / "state.json", note, indent=None)

    def resume(
        self, output_dir: Path, steps: int, accelerator: Accelerator
    ) -> tuple[int, list[dict]]:
        """Become what the newest whole checkpoint holds; its step and the log's rows.

        (0, []) where there is none. Raises `ValueError` where it was `made_with` something else or
        has gone further than `steps`, and where there are checkpoints and none is whole.
        """
        found: list[Path | str | None] = [None]
        if accelerator.is_main_process:
            try:
                found = [newest_checkpoint(output_dir)]
            except ValueError as error:
                found = [str(error)]
        if accelerator.num_processes > 1:
            broadcast_object_list(found)
        checkpoint = found[0]
        if isinstance(checkpoint, str):
            raise ValueError(checkpoint)
        if checkpoint is None:
            return 0, []
        note = read_json(checkpoint / "state.json")
        names = dict.fromkeys([*note.get("made_with", {}), *self.made_with])
        made_with = {name: self.made_with.get(name) for name in names}
        _check_note(checkpoint, note, made_with, steps)
        self._read(checkpoint, note, accelerator)
        return note["step"], note["rows"]

    def _read(self, folder: Path, note: dict, accelerator: Accelerator) -> None:
        now, parameters = self.model.state_dict(), self._parameters()
        weights = load_file(folder / "model.safetensors")
        self.model.load_state_dict(
            {name: shared_as(value, now.get(name, value)) for name, value in weights.items()}
        )
        place = {name: index for index, name in enumerate(self.trained)}
        saved: dict[int, dict] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, parameter = key.split("/", 1)
            index = place[parameter]
            read = value.item() if name.endswith(NUMBER) else shared_as(value, parameters[index])
            saved.setdefault(index, {})[name.removesuffix(NUMBER)] = read
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved, "param_groups": groups})
        # The rate of the next step follows this run's schedule, which may be a longer one.
        self.schedule.last_epoch = note["schedule"]["last_epoch"]
        rates = [
            base * rate(self.schedule.last_epoch)
            for base, rate in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        self.schedule._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema:
            shadow = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [
                own(shared_as(shadow[name], parameter)).to(old.device)
                for name, parameter, old in zip(
                    self.trained, parameters, self.ema.shadow_params, strict=True
                )
            ]
            self.ema.optimization_step = note["ema_steps"]
        drawn = load_file(folder / "generator.safetensors")
        self.generator.set_state(drawn["generator"])
        if self.companion:
            self.companion.load_state_dict(load_file(folder / "companion.safetensors"))


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a checkpoint that is on the disk; what has its name already goes or moves aside."""
    if final.exists():
        if final.is_dir() and (is_sealed_as(final, KIND) or not any(final.iterdir())):
            shutil.rmtree(final)
        else:
            _move_aside(final)
    partial.rename(final)
    sync(final.parent)


def _move_aside(place: Path) -> None:
    """Give what is there, and is not ours, another name."""
    if not place.exists():
        return
    number = 1
    while (aside := place.with_name(f"{place.name}.aside-{number}")).exists():
        number += 1
    place.rename(aside)
    warnings.warn(f"{place} was no checkpoint of this run: it is now {aside}", stacklevel=4)
