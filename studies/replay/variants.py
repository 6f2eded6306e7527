"""The variants of the study of forgetting, stage by stage: strategies, each with its buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from kdc.continual.strategies import STRATEGIES, Strategy
from kdc.distillation.losses import LossWeights
from kdc.replay.buffer import ReplayBuffer


@dataclass(frozen=True)
class Variant:
    """A strategy with the buffer that it fills, if it does."""

    strategy: Strategy
    capacity: int = 64
    policy: str = "reservoir"
    dtype: str = "float16"

    def to_dict(self) -> dict:
        """Plain values, by which stored rows are known again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"strategy": self.strategy.to_dict()}

    def buffer(self, seed: int) -> ReplayBuffer | None:
        if not self.strategy.mechanism.uses_buffer:
            return None
        return ReplayBuffer(self.capacity, self.policy, self.dtype, seed=seed)


def _with(**changed) -> Variant:
    return dataclasses.replace(Variant(STRATEGIES["replay"]), **changed)


def _replay(**changed) -> Variant:
    return Variant(STRATEGIES["replay"].replace(**changed))


# The study was made before A-GEM was there; it takes part from the next round on.
DOMAINS = {name: Variant(s) for name, s in STRATEGIES.items() if name != "agem"}
BUFFERS = {f"replay {n}": _with(capacity=n) for n in (4, 256)}
BUFFERS |= {f"replay {n} int8": _with(capacity=n, dtype="int8") for n in (4, 64)}
BUFFERS |= {f"replay 64 {p}": _with(policy=p) for p in ("class_balanced", "fifo")}
RATIOS = {f"replay ratio {ratio:g}": _replay(ratio=ratio) for ratio in (0.25, 2.0)}
PLAIN = LossWeights.only("task")
# In "replay" all terms follow the teacher, in "replay+distil" two of them follow the old model.
TEACHERS = {
    "replay, task only": _replay(old_weights=PLAIN),
    # Four times the task's gradient has the norm of that of all terms, on a freshly cut student.
    "replay, task times 4": _replay(old_weights=PLAIN.replace(task=4.0)),
    "replay, task and output": _replay(old_weights=LossWeights.only("task", "output")),
    "replay, old model, all terms": _replay(old_target="old model"),
    "generated, all terms": Variant(
        STRATEGIES["generative_distillation"].replace(old_weights=None)
    ),
}
IN_CLASSES = ("finetune", "last_sample", "replay", "joint")  # the other strategies, by domains
CLASSES = {name: Variant(STRATEGIES[name], capacity=48) for name in IN_CLASSES}
CLASSES |= {
    f"replay {policy}": _with(capacity=48, policy=policy)
    for policy in ("class_balanced", "fifo", "herding")
}
STAGES: dict[str, Mapping[str, Variant]] = {
    "domains": DOMAINS,
    "buffers": BUFFERS,
    "ratios": RATIOS,
    "teachers": TEACHERS,
    "plain": {n: DOMAINS[n] for n in ("finetune", "replay", "joint")},
    "classes": CLASSES,
    "photos": {
        n: DOMAINS[n] for n in ("finetune", "last_sample", "replay", "replay+distil", "joint")
    },
    "species": {n: DOMAINS[n] for n in ("finetune", "replay", "joint")},
}
