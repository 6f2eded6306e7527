"""The trials of the study of forgetting, stage by stage: strategies, each with its buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from kdc.continual.sequence import STRATEGIES, Strategy
from kdc.distillation.losses import LossWeights
from kdc.replay.buffer import ReplayBuffer


@dataclass(frozen=True)
class Trial:
    """A strategy with the buffer that it fills, if it does."""

    strategy: Strategy
    capacity: int = 64
    policy: str = "reservoir"
    dtype: str = "float16"

    def buffer(self, seed: int) -> ReplayBuffer | None:
        if self.strategy.source != "buffer":
            return None
        return ReplayBuffer(self.capacity, self.policy, self.dtype, seed=seed)


def _with(**changed) -> Trial:
    return dataclasses.replace(Trial(STRATEGIES["replay"]), **changed)


def _replay(**changed) -> Trial:
    return Trial(dataclasses.replace(STRATEGIES["replay"], **changed))


DOMAINS = {name: Trial(strategy) for name, strategy in STRATEGIES.items()}
BUFFERS = {f"replay {n}": _with(capacity=n) for n in (4, 256)}
BUFFERS |= {f"replay {n} int8": _with(capacity=n, dtype="int8") for n in (4, 64)}
BUFFERS |= {f"replay 64 {p}": _with(policy=p) for p in ("class_balanced", "fifo")}
RATIOS = {f"replay ratio {ratio:g}": _replay(ratio=ratio) for ratio in (0.25, 2.0)}
PLAIN = LossWeights.only("task")
# replay lets the teacher guide by all terms, replay+distil the old student by two of them
TEACHERS = {
    "replay, task only": _replay(old_weights=PLAIN),
    # four times the task's gradient is as long as that of all terms, on a freshly cut student
    "replay, task times 4": _replay(old_weights=dataclasses.replace(PLAIN, task=4.0)),
    "replay, task and output": _replay(old_weights=LossWeights.only("task", "output")),
    "replay, old model, all terms": _replay(guide="old"),
    "generated, all terms": Trial(
        dataclasses.replace(STRATEGIES["generative_distillation"], old_weights=None)
    ),
}
IN_CLASSES = ("finetune", "last_sample", "replay", "joint")  # the other strategies, by domains
CLASSES = {name: Trial(STRATEGIES[name], capacity=48) for name in IN_CLASSES}
CLASSES |= {
    f"replay {policy}": _with(capacity=48, policy=policy)
    for policy in ("class_balanced", "fifo", "herding")
}
STAGES: dict[str, Mapping[str, Trial]] = {
    "domains": DOMAINS,
    "buffers": BUFFERS,
    "ratios": RATIOS,
    "teachers": TEACHERS,
    "plain": {n: DOMAINS[n] for n in ("finetune", "replay", "joint")},
    "classes": CLASSES,
    "photos": {
        n: DOMAINS[n] for n in ("finetune", "last_sample", "replay", "replay+distil", "joint")
    },
}
