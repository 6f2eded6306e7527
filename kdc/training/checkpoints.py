"""What a training run needs to go on, in folders of safetensors and JSON.

`checkpoint-<step>` is written beside and then renamed, so that none is ever half there; the newest
two stay.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdc.io import refuse_other_settings, write_json

Terms = dict[str, Tensor]


class Companion(Protocol):
    """State that the loss function changes; its dictionary holds tensors only."""

    def state_dict(self) -> Terms: ...

    def load_state_dict(self, state: Terms) -> None: ...


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The folder of the last complete checkpoint below `output_dir`, or None."""
    found = _checkpoints(Path(output_dir))
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("checkpoint-*") if p.suffix != ".partial")


@dataclasses.dataclass
class TrainingState:
    """Everything a run needs to go on: weights, average, moments, schedule, generators, log."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    generator: torch.Generator
    made_with: dict
    companion: Companion | None

    def save(self, output_dir: Path, step: int, rows: list[dict], accelerator: Accelerator) -> None:
        """Write `output_dir/checkpoint-<step>`, with the log's `rows`; the newest two stay.

        Every process calls it, for its own generator.
        """
        final = output_dir / f"checkpoint-{step:07d}"
        partial = final.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        own = {"generator": self.generator.get_state()}
        save_file(own, partial / f"generator-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            weights = {k: v.contiguous() for k, v in self.model.state_dict().items()}
            save_file(weights, partial / "model.safetensors")
            moments = {
                f"{index}.{name}": value.contiguous()
                for index, entry in self.optimizer.state_dict()["state"].items()
                for name, value in entry.items()
            }
            save_file(moments, partial / "optimizer.safetensors")
            if self.ema:
                shadow = {str(i): p.contiguous() for i, p in enumerate(self.ema.shadow_params)}
                save_file(shadow, partial / "ema.safetensors")
            if self.companion:
                save_file(self.companion.state_dict(), partial / "companion.safetensors")
            note = {
                "step": step,
                "made_with": self.made_with,
                "schedule": self.schedule.state_dict(),
                "ema_steps": self.ema.optimization_step if self.ema else 0,
                "rows": rows,
            }
            write_json(partial / "state.json", note, indent=None)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(final)
            for old in _checkpoints(output_dir)[:-2]:
                shutil.rmtree(old)

    def load(self, checkpoint: Path, accelerator: Accelerator) -> tuple[int, list[dict]]:
        """Become what `save` wrote there; the step and the log's rows.

        Raises `ValueError` where that was `made_with` something else.
        """
        note = json.loads((checkpoint / "state.json").read_text())
        refuse_other_settings(
            checkpoint, note.get("made_with", {}), self.made_with, "use the same, or another folder"
        )
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        saved: dict[int, dict] = {}
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            saved.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved, "param_groups": groups})
        self.schedule.load_state_dict(note["schedule"])
        rates = note["schedule"]["_last_lr"]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema:
            shadow = load_file(checkpoint / "ema.safetensors")
            self.ema.shadow_params = [
                shadow[str(i)].to(accelerator.device) for i in range(len(shadow))
            ]
            self.ema.optimization_step = note["ema_steps"]
        own = load_file(checkpoint / f"generator-{accelerator.process_index}.safetensors")
        self.generator.set_state(own["generator"])
        if self.companion:
            self.companion.load_state_dict(load_file(checkpoint / "companion.safetensors"))
        return note["step"], note["rows"]
