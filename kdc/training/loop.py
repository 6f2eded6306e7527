"""The one training loop: every network of the project, mini or full size, is trained by `train`.

The loop knows nothing about diffusion. It is given a module and a function that draws a batch and
returns named loss terms; it adds Accelerate (devices, several processes, bf16), AdamW, clipping,
EMA, a log, and checkpoints from which a stopped run goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdc.io import write_text
from kdc.training.checkpoints import Companion, Terms, TrainingState, newest_checkpoint
from kdc.training.efficiency import average, refuse_infinite
from kdc.training.settings import TrainSettings

LossFunction = Callable[[nn.Module, torch.Generator], Terms]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there (autocast only slows others down)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def make_accelerator(precision: str = "auto") -> Accelerator:
    """An Accelerator whose mixed precision suits the device it found."""
    if precision == "auto":
        precision = "bf16" if has_bf16(PartialState().device) else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # the state of an earlier run in this process
    accelerator = Accelerator(mixed_precision=precision)
    # The environment can set this, and every gradient would then be divided by it. `train`
    # accumulates by itself, as its settings say.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


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
    label: str = "training",
) -> pd.DataFrame:
    """Train `model` in place and return its log, a row every `log_every` steps.

    `compute_loss(model, generator)` draws everything random from `generator` (on the CPU, so that
    a seed means the same on every device) and returns scalar terms; `terms["loss"]` is minimised
    and all of them are logged. With `settings.accumulation` above 1 it is called so often for one
    step, and the gradients and logged terms are the means. `before_step()` may look at and change
    the gradients, after they are complete and before they are clipped. At the end the model holds
    the averaged weights.

    With an `output_dir`, checkpoints go to `output_dir/checkpoint-<step>`, written beside and then
    renamed; `resume` goes on from the newest one and gives, on one device, bit for bit the weights
    of a run that was never stopped. `identity` says what else must not have changed, such as the
    data or the loss, in plain values. What `compute_loss` changes besides is a `companion`, whose
    state goes into the checkpoints with the rest. Raises `ValueError` if that checkpoint was made
    with other settings or another identity, `FileExistsError` where a new run would mix its
    checkpoints with those of an earlier one, and `FloatingPointError` on a loss that is not finite,
    on an accelerator up to `log_every` steps late.
    """
    accelerator = accelerator or make_accelerator(settings.precision)
    checkpoint = newest_checkpoint(output_dir) if output_dir else None
    if checkpoint and not resume:
        raise FileExistsError(
            f"{checkpoint} is of an earlier run: go on with resume=True, or give another output_dir"
        )
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(settings.seed * 1009 + accelerator.process_index)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=min(settings.warmup, settings.steps),
        num_training_steps=settings.steps,
    )
    model.to(accelerator.device)
    ema = None
    if settings.ema_decay:
        ema = EMAModel(
            parameters,
            decay=settings.ema_decay,
            use_ema_warmup=True,
            inv_gamma=10.0,
            power=0.9,
            foreach=True,
        )
    made_with = dataclasses.asdict(settings) | (identity or {})
    state = TrainingState(model, optimizer, schedule, ema, generator, made_with, companion)
    rows: list[dict] = []
    start = 0
    if checkpoint:
        start, rows = state.load(checkpoint, accelerator)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    prepared.train()
    bar = tqdm(
        range(start, settings.steps),
        initial=start,
        total=settings.steps,
        desc=label,
        disable=not accelerator.is_main_process,
        mininterval=2.0,
    )
    unseen: list[tuple[int, Tensor]] = []
    for step in bar:
        done = step + 1
        logs = done % settings.log_every == 0 or done == settings.steps or step == 0
        saves = bool(output_dir) and done % settings.save_every == 0 and done < settings.steps
        parts: list[Terms] = []
        for number in range(1, settings.accumulation + 1):
            last = number == settings.accumulation
            with contextlib.nullcontext() if last else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    terms = compute_loss(prepared, generator)
                unseen.append((step, terms["loss"].detach()))
                if (last and (logs or saves)) or accelerator.device.type == "cpu":
                    refuse_infinite(unseen, label)
                accelerator.backward(terms["loss"] / settings.accumulation)
            parts.append({name: value.detach() for name, value in terms.items()})
        if before_step:
            before_step()
        norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            average(ema, parameters)
        if logs:
            row = {"step": done} | _means(parts)
            row |= {"grad_norm": float(norm), "learning_rate": schedule.get_last_lr()[0]}
            rows.append(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if saves:
            state.save(Path(output_dir), done, rows, accelerator)
    if ema:
        ema.copy_to(parameters)
    # Takes the wrapper for mixed precision off again, so that the model computes as it did before.
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    if accelerator.is_main_process and output_dir:
        write_text(Path(output_dir) / "log.csv", pd.DataFrame(rows).to_csv(index=False))
    return pd.DataFrame(rows)


def _means(parts: list[Terms]) -> dict[str, float]:
    """The mean of each term over the micro-batches of a step that have it."""
    names = dict.fromkeys(name for terms in parts for name in terms)
    means = {}
    for name in names:
        values = [terms[name].item() for terms in parts if name in terms]
        means[name] = sum(values) / len(values)
    return means
