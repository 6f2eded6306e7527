"""The one training loop: every network of the project, mini or full size, is trained by `train`.

The loop knows nothing about diffusion. It is given a module and a function that draws a batch and
returns named loss terms; it adds Accelerate (devices, several processes, bf16), AdamW, clipping,
EMA, a log, and checkpoints from which a stopped run goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdc.io import refuse_infinite_weights, write_image
from kdc.paths import try_writing
from kdc.processes import locked, this_process
from kdc.training.checkpoints import (
    Companion,
    Terms,
    TrainingState,
    check_earlier_run,
    clean,
    forget_checkpoints,
)
from kdc.training.efficiency import (
    average,
    find_bitsandbytes,
    make_optimizer,
    refuse_infinite,
)
from kdc.training.interrupt import Stop
from kdc.training.logs import FILE as LOG
from kdc.training.logs import RunLog, find_writer, without_speed
from kdc.training.settings import TrainSettings
from kdc.training.sharding import gather, own, share_out, whole

# Accelerate's own ways of sharing weights out; here `shard_weights` does it.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SAMPLES = "samples"  # the folder of grids
LossFunction = Callable[[nn.Module, torch.Generator], Terms]
FILES = (LOG, "checkpoint-0000000/state.json")  # what `train` writes


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there (autocast only slows others down)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def precision_on(device: torch.device, precision: str) -> str:
    """What `precision` means on that device: "bf16" or "no"."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "no"
    return precision


def identity_of_run(settings: TrainSettings) -> dict[str, Any]:
    """What of the settings, and of the processes here, a run that resumes must share."""
    process, known = this_process(), settings.identity()
    known["batch_size"] *= process.num_processes  # of all, who draw together what one would draw
    return known | {"precision": precision_on(process.device, settings.precision)}


def make_accelerator(precision: str = "auto") -> Accelerator:
    """An Accelerator whose mixed precision suits the device it found."""
    precision = precision_on(this_process().device, precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # the state of an earlier run in this process
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.distributed_type in SHARDING:
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: launch with --multi_gpu, and"
            " set shard_weights, which shares weights, moments and averages out among the processes"
        )
    # The environment can set this, and every gradient would then be divided by it. `train`
    # accumulates by itself, as its settings say.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def check_run(
    output_dir: str | Path | None,
    resume: bool,
    settings: TrainSettings,
    files: tuple[str, ...] = (),
    identity: dict[str, Any] | None = None,
) -> Path | None:
    """All that can be known of a run before its first costly step; its folder, with `~` resolved.

    `files` are what the run will write beside `FILES`, `identity` what is known of it so far.
    Raises as `try_writing` and `check_earlier_run` do.
    """
    if not isinstance(resume, bool):
        raise TypeError(f"resume must be True or False, not {resume!r}")
    if settings.optimizer == "adamw8bit":
        find_bitsandbytes()
    if settings.tensorboard:
        find_writer()
    if output_dir is None:
        if resume:
            raise ValueError("resume=True needs the output_dir of the run that is to go on")
        if settings.tensorboard or settings.sample_every:
            raise ValueError("tensorboard and sample_every write into an output_dir: give one")
        return None
    folder = try_writing(output_dir, (*FILES, *files, *_also_written(settings)))
    made_with = identity_of_run(settings) | (identity or {})
    check_earlier_run(folder, resume, made_with, settings.steps)
    return folder


def _also_written(settings: TrainSettings) -> list[str]:
    written = ["tensorboard/events"] if settings.tensorboard else []
    return written + ([f"{SAMPLES}/step-0000000.png"] if settings.sample_every else [])


def train(
    model: nn.Module,
    compute_loss: LossFunction,
    settings: TrainSettings,
    output_dir: str | Path | None = None,
    *,
    resume: bool = False,
    identity: dict | None = None,
    companion: Companion | None = None,
    accelerator: Accelerator | None = None,
    before_step: Callable[[], None] | None = None,
    samples: Callable[[], Tensor] | None = None,
    label: str = "training",
) -> pd.DataFrame:
    """Train `model` in place and return its log, a row every `log_every` steps.

    `compute_loss(model, generator)` draws everything random from `generator` (on the CPU, so that
    a seed means the same on every device, and the same in each process: see `own_part`) and returns
    scalar terms; `terms["loss"]` is minimised and all of them are logged, as means over processes,
    beside the number of `images` that all processes have seen, at `settings.batch_size` each. With
    `settings.accumulation` above 1 it is called so often for one step, and the gradients and logged
    terms are the means. `before_step()` may look at and change the gradients, after they are
    complete and before they are clipped. At the end the model holds the averaged weights; however
    the run ends, it is in evaluation mode, as it was otherwise, and holds no gradients.

    With `settings.shard_weights` several processes share out gradients, moments and averages, and
    what is trained is a twin of `model`, see `sharding.share_out`. So `before_step` must not look
    at gradients then, nor `compute_loss` at weights.

    With an `output_dir`, checkpoints go to `output_dir/checkpoint-<step>`, every
    `settings.saves_after` steps, at least every `save_minutes`, and at the end (the last one stays
    where `settings.keep_state` is set). Ctrl-C and SIGTERM write one after the step they meet, and
    then stop the run. `resume` goes on from the newest whole one and gives, on one device, bit for
    bit the weights of a run that was never stopped. It may be given more `steps`, also when the run
    was through: from there on the learning rate is that of the longer run. `identity` says what
    else must not have changed, such as the data or the loss, in plain values. What `compute_loss`
    changes besides is a `companion`, whose state goes into the checkpoints with the rest.

    The log is also in `output_dir/log.csv`, as it comes, with images per second and the memory's
    peak beside each row, and with `tensorboard` in its events. Every `sample_every` steps the first
    process writes the image (3, H, W) uint8 that `samples()` gives of the averaged weights to
    `output_dir/samples`.

    Raises, before the first step, `ValueError` if that checkpoint was made with other settings or
    another identity, where none of several is whole, and where nothing is to be trained;
    `FileExistsError` where a new run would mix its checkpoints with those of an earlier one;
    another `OSError` where nothing can be written, and `RuntimeError` where another process writes
    there. Raises `FloatingPointError` on a loss or weights that are not finite, on an accelerator
    up to `log_every` steps late; they are never stored.
    """
    folder = check_run(output_dir, resume, settings)
    if settings.sample_every and samples is None:
        raise ValueError("sample_every is given, and nothing says what to show: samples=...")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("nothing to train: no parameter requires a gradient")
    accelerator = accelerator or make_accelerator(settings.precision)
    with locked(folder):
        if folder and accelerator.is_main_process:
            clean(folder)
        run = _Run(model, parameters, settings, folder, accelerator, identity, companion, label)
        if folder and resume:
            run.resume()
        try:
            with Stop(active=folder is not None) as stop:
                run.go(compute_loss, before_step, samples, stop)
        finally:
            run.close()
        return run.finish()


class _Run:
    """One call of `train`: what it holds, step by step."""

    def __init__(
        self, model, parameters, settings, folder, accelerator, identity, companion, label
    ):
        self.model, self.parameters = model, parameters
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.label = label
        generator = torch.Generator().manual_seed(settings.seed * 1009)  # the same in each process
        model.to(accelerator.device)
        self.given = model  # what the caller has: `model` itself, or what its parts came from
        self.shares = settings.shard_weights and accelerator.num_processes > 1
        if self.shares:
            self.model = model = share_out(model)
            self.parameters = parameters = [p for p in model.parameters() if p.requires_grad]
        self.own = [own(p) for p in parameters]  # what this process holds of them
        self.optimizer = make_optimizer(
            settings.optimizer,
            parameters,
            settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.schedule = get_scheduler(
            settings.schedule,
            self.optimizer,
            num_warmup_steps=min(settings.warmup, settings.steps),
            num_training_steps=settings.steps,
        )
        self.ema = None
        if settings.ema_decay:
            self.ema = EMAModel(
                self.own,
                decay=settings.ema_decay,
                use_ema_warmup=True,
                inv_gamma=10.0,
                power=0.9,
                foreach=True,
            )
            if settings.ema_on_cpu:
                self.ema.to("cpu")
        made_with = identity_of_run(settings) | (identity or {})
        self.state = TrainingState(
            model, self.optimizer, self.schedule, self.ema, generator, made_with, companion
        )
        self.generator = generator
        # New images in one update, of all processes; `batch_size` is that of each.
        self.images_a_step = settings.batch_size * settings.accumulation * accelerator.num_processes
        self.rows: list[dict] = []
        self.log: RunLog | None = None
        self.start = self.done = self.saved = 0
        self.prepared: nn.Module | None = None

    def resume(self) -> None:
        """Go back to the newest whole checkpoint, if there is one."""
        found = self.state.resume(self.folder, self.settings.steps, self.accelerator)
        self.start, self.rows = found
        self.done = self.saved = self.start

    def go(self, compute_loss: LossFunction, before_step, samples, stop: Stop) -> None:
        """All steps that are left."""
        settings, accelerator = self.settings, self.accelerator
        if self.shares:
            self.prepared, optimizer = self.model, accelerator.prepare(self.optimizer)
        else:
            self.prepared, optimizer = accelerator.prepare(self.model, self.optimizer)
        self.prepared.train()
        main = accelerator.is_main_process
        place = self.folder if main else None
        self.log = RunLog(place, self.rows, accelerator.device, settings.tensorboard)
        if main and accelerator.num_processes > 1:
            tqdm.write(self._of_one_update(), file=sys.stderr)
        bar = tqdm(
            range(self.start, settings.steps),
            initial=self.start,
            total=settings.steps,
            desc=self.label,
            disable=not main,
            mininterval=2.0,
        )
        unseen: list[tuple[int, Tensor]] = []
        last_saved = time.monotonic()
        with contextlib.closing(bar):
            for step in bar:
                done = step + 1
                logs = done % settings.log_every == 0 or done == settings.steps or step == 0
                saves = bool(self.folder) and done % settings.saves_after == 0
                parts: list[Terms] = []
                for number in range(1, settings.accumulation + 1):
                    last = number == settings.accumulation
                    with contextlib.nullcontext() if last else accelerator.no_sync(self.prepared):
                        with accelerator.autocast():
                            terms = compute_loss(self.prepared, self.generator)
                        unseen.append((step, terms["loss"].detach()))
                        if (last and (logs or saves)) or accelerator.device.type == "cpu":
                            refuse_infinite(unseen, self.label)
                        accelerator.backward(terms["loss"] / settings.accumulation)
                    parts.append({name: value.detach() for name, value in terms.items()})
                if before_step:
                    before_step()
                norm = accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                optimizer.step()
                self.schedule.step()
                optimizer.zero_grad()
                if self.ema:
                    average(self.ema, self.own)
                self.done = done
                if logs:
                    row = {"step": done} | self._means(parts)
                    row |= {
                        "grad_norm": float(whole(norm)),
                        "learning_rate": self.schedule.get_last_lr()[0],
                        "images": done * self.images_a_step,
                    }
                    self.log.add(row)
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if not self.folder:
                    continue
                if settings.sample_every and done % settings.sample_every == 0:
                    self._sample(done, samples)
                late = time.monotonic() - last_saved > 60 * settings.save_minutes
                stops, late = self._agreed(stop.asked is not None, late, logs)
                if stops or late or (saves and done < settings.steps):
                    if unseen:
                        refuse_infinite(unseen, self.label)
                    self._save()
                    last_saved = time.monotonic()
                if stops:
                    stop.leave(
                        f"stopped after step {done}, and saved in {self.folder}: go on with "
                        "resume=True"
                    )

    def _of_one_update(self) -> str:
        """How many images an update sees, in words."""
        settings = self.settings
        parts = [f"{self.accelerator.num_processes} processes x {settings.batch_size} images"]
        parts += [f"{settings.accumulation} passes"] if settings.accumulation > 1 else []
        return (
            f"{self.label}: {' x '.join(parts)} = {self.images_a_step} images an update, at a"
            f" learning rate of {settings.learning_rate:g}, which is not scaled by their number"
        )

    @torch.no_grad()
    def _sample(self, step: int, samples: Callable[[], Tensor]) -> None:
        """The first process writes what `samples` shows of the averaged weights."""
        if self.ema:
            self.ema.store(self.own)
            self.ema.copy_to(self.own)
        try:
            if self.shares:
                gather(self.model, self.given)
            if self.accelerator.is_main_process:
                self.given.eval()
                image = samples()
                write_image(self.folder / SAMPLES / f"step-{step:07d}.png", image)
                self.log.add_image("samples", image, step)
        finally:
            self.model.train()
            if self.ema:
                self.ema.restore(self.own)

    def _agreed(self, stops: bool, late: bool, logs: bool) -> tuple[bool, bool]:
        """Whether any process wants to stop or save; several ask each other where they log."""
        if self.accelerator.num_processes == 1:
            return stops, late
        if not logs:
            return False, False
        asked = torch.tensor([float(stops), float(late)], device=self.accelerator.device)
        stops, late = (self.accelerator.reduce(asked, "sum") > 0).tolist()
        return stops, late

    def _save(self) -> None:
        self.state.save(self.folder, self.done, self.rows, self.accelerator)
        self.saved = self.done

    def _means(self, parts: list[Terms]) -> dict[str, float]:
        """The mean of each term over the micro-batches that have it, and over processes."""
        names = dict.fromkeys(name for terms in parts for name in terms)
        means = {}
        for name in names:
            values = torch.stack([t[name].double().mean() for t in parts if name in t]).mean()
            means[name] = self.accelerator.reduce(values, "mean").item()
        return means

    def close(self) -> None:
        """Take off what training put on, however it ended."""
        if self.log:
            self.log.close()
        if self.prepared is None:
            return
        # The wrapper for mixed precision, so that the model computes as it did before.
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False).eval()
        self.given.eval()
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self) -> pd.DataFrame:
        """The averaged weights, looked at; the last checkpoint; the log."""
        weights = ((name, whole(p.detach())) for name, p in self.model.named_parameters())
        refuse_infinite_weights(weights, f"{self.label}, at its end")
        if self.folder and self.settings.keep_state:
            if self.saved < self.settings.steps:
                self._save()
        if self.ema:
            self.ema.copy_to(self.own)
        if self.shares:
            gather(self.model, self.given)
        if self.folder and self.accelerator.is_main_process and self.settings.keep_state:
            forget_checkpoints(self.folder, but_newest=1)
        return without_speed(self.rows)
