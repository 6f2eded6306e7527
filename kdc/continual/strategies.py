"""Strategies against forgetting: rows of settings, each naming the mechanism behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdc.continual.mechanisms.agem import AGEM
from kdc.continual.mechanisms.base import Mechanism, changed_options
from kdc.continual.mechanisms.buffer import BufferReplay
from kdc.continual.mechanisms.ewc import RankOneEWC
from kdc.continual.mechanisms.generated import Generated
from kdc.continual.mechanisms.joint import Joint
from kdc.continual.mechanisms.last_sample import LastSample
from kdc.distillation.losses import LossWeights

OLD_TARGETS = ("teacher", "old model")


@dataclass(frozen=True)
class Strategy:
    """One way of learning task after task; every one sees the same new images.

    Raises `ValueError` or `TypeError` for settings and options that nothing could be done with.
    """

    name: str
    # What it adds to fine-tuning; `Mechanism` itself adds nothing.
    mechanism: type[Mechanism] = Mechanism
    # Old images for each new one; old and new count by their number.
    ratio: float = 1.0
    # Which network the terms on old images follow, one of `OLD_TARGETS`.
    old_target: str = "teacher"
    # The loss on old images; None: that of the new ones.
    old_weights: LossWeights | None = None
    # Options of the mechanism that differ from its defaults.
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.old_target not in OLD_TARGETS:
            raise ValueError(
                f"old_target must be one of {', '.join(OLD_TARGETS)}, not {self.old_target!r}"
            )
        if not 0 < self.ratio < math.inf:  # which refuses NaN too
            raise ValueError(f"ratio must be positive and finite, not {self.ratio}")
        object.__setattr__(self, "options", changed_options(self.mechanism, dict(self.options)))

    def replace(self, **changes: Any) -> Strategy:
        """The same with other fields, or other options of its mechanism."""
        fields = {f.name for f in dataclasses.fields(self)}
        options = {name: value for name, value in changes.items() if name not in fields}
        changes = {name: value for name, value in changes.items() if name in fields}
        options = dict(changes.pop("options", self.options)) | options
        return dataclasses.replace(self, **changes, options=options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by which a run knows its strategy again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["mechanism"] = self.mechanism.__name__
        values["old_weights"] = self.old_weights.to_dict() if self.old_weights else None
        return values


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("finetune"),
        Strategy("last_sample", LastSample),
        Strategy("replay", BufferReplay),
        Strategy(
            "replay+distil",
            BufferReplay,
            old_target="old model",
            old_weights=LossWeights.only("task", "output"),
        ),
        Strategy("generative_replay", Generated, old_weights=LossWeights.only("task")),
        Strategy(
            "generative_distillation",
            Generated,
            old_target="old model",
            old_weights=LossWeights.only("output"),
        ),
        Strategy("ewc", RankOneEWC),
        Strategy("agem", AGEM),
        Strategy("joint", Joint),
    )
}


def find_strategy(strategy: str | Strategy) -> Strategy:
    """The strategy of that name. Raises `ValueError` naming the known ones."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unknown strategy {strategy!r}; the strategies are {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[strategy]
