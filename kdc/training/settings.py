"""The settings of training: one object for `distill`, `run_sequence` and the command line.

This module imports nothing heavy, so that `python -m kdc distill --help` can list the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from kdc.checks import MOST_SEEDS, finite_number, whole_number

SCHEDULES = ("cosine", "constant", "constant_with_warmup", "linear", "polynomial")
PRECISIONS = ("auto", "no", "bf16")
# What may change while a run goes on: how long it is, and what it writes on its way.
FREE = (
    "steps", "log_every", "save_every", "save_minutes", "sample_every", "tensorboard", "keep_state",
    "shard_weights",
)  # fmt: skip
SWITCHES = (
    "compile", "gradient_checkpointing", "keep_state", "ema_on_cpu", "tensorboard", "shard_weights",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and how a network is trained.

    Raises `ValueError` or `TypeError` for values that no run can have.
    """

    steps: Annotated[int, "updates of the weights"]
    _: KW_ONLY
    batch_size: Annotated[int, "images in one forward pass, of each process"] = 32
    accumulation: Annotated[int, "forward passes whose gradients are averaged for one update"] = 1
    learning_rate: Annotated[float, "AdamW's highest learning rate"] = 5e-4
    warmup: Annotated[int, "updates in which the learning rate rises from 0; at most `steps`"] = 20
    schedule: Annotated[str, "what the learning rate does after the warm-up"] = "cosine"
    betas: Annotated[tuple[float, float], "AdamW's decay of the first and second moment"] = (
        0.9,
        0.99,
    )
    optimizer: Annotated[str, "adamw, or adamw8bit: moments in 8 bits, of bitsandbytes"] = "adamw"
    weight_decay: Annotated[float, "AdamW's decoupled weight decay"] = 0.0
    max_grad_norm: Annotated[float, "gradients of a larger norm are scaled down to it"] = 1.0
    caption_dropout: Annotated[float, "share of captions replaced by the empty one, 0 to 1"] = 0.1
    ema_decay: Annotated[float, "decay of the averaged weights, itself warmed up; 0: none"] = 0.999
    ema_on_cpu: Annotated[bool, "averaged weights in the host's memory: less on the GPU"] = False
    seed: Annotated[int, "of everything that training draws at random"] = 0
    precision: Annotated[str, "auto: bf16 where the device has units for it; or no, bf16"] = "auto"
    compile: Annotated[bool, "run the networks through torch.compile"] = False
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory, more time"] = False
    shard_weights: Annotated[bool, "share weights and moments among processes (FSDP)"] = False
    log_every: Annotated[int, "updates between two rows of the log"] = 10
    save_every: Annotated[
        int | None, "updates between two checkpoints; None: a tenth of the run, at least 20"
    ] = None
    save_minutes: Annotated[float, "a checkpoint at least so often, whatever the updates"] = 15.0
    sample_every: Annotated[int | None, "updates between two grids of images; None: none"] = None
    tensorboard: Annotated[bool, "write events for TensorBoard beside log.csv"] = False
    keep_state: Annotated[bool, "leave the last checkpoint, so that the run can be extended"] = True

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            whole_number(name, getattr(self, name), 1)
        for name in ("save_every", "sample_every"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        whole_number("warmup", self.warmup, 0)
        whole_number("seed", self.seed, 0, 1024 * MOST_SEEDS)  # that of a task too
        for name in ("learning_rate", "max_grad_norm", "save_minutes"):
            finite_number(name, getattr(self, name))
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        finite_number("weight_decay", self.weight_decay)
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative: {self.weight_decay}")
        for name in ("caption_dropout", "ema_decay"):
            finite_number(name, getattr(self, name))
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share of 0 to 1, not {self.caption_dropout}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {self.betas}")
        for name, known in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.shard_weights and (self.compile or self.optimizer == "adamw8bit"):
            raise ValueError(
                "shard_weights goes with neither compile nor optimizer='adamw8bit': leave one out"
            )

    @property
    def saves_after(self) -> int:
        """Updates between two checkpoints."""
        return self.save_every or max(20, math.ceil(self.steps / 10))

    def identity(self) -> dict[str, Any]:
        """What the next step depends on: a run that resumes must share it.

        How long the run goes on and what it writes on its way may change.
        """
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}

    @classmethod
    def given(cls, settings: TrainSettings | None, changes: Mapping[str, Any]) -> TrainSettings:
        """`settings` (default: the defaults) with `changes` of single fields put over them.

        Raises `TypeError` for a name that is not a field, with the closest known one, and where
        neither says how many steps to train.
        """
        refuse_unknown(changes, [field.name for field in dataclasses.fields(cls)])
        if settings is not None:
            return dataclasses.replace(settings, **changes)
        if "steps" not in changes:
            raise TypeError("say how long to train: steps=... or settings=TrainSettings(...)")
        return cls(**changes)


def refuse_unknown(given: Mapping[str, Any], known: list[str]) -> None:
    """Raise `TypeError` for names that are not known, with the closest known one."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise TypeError(f"unknown setting {name!r}: {hint}The settings are {', '.join(known)}")
