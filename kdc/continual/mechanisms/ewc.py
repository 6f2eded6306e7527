"""Elastic weight consolidation: a penalty on the weights, with a rank-1 Fisher information."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kdc.continual.mechanisms.base import Mechanism, Run
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import DistillationStep, forward_process
from kdc.io import read_tensors, write_tensors

FILE, FORMAT, VERSION = "fisher.safetensors", "kdc-fisher", "1"


class RankOneEWC(Mechanism):
    """After each task, hold the weights along the direction that its loss is most sensitive to.

    `weight` is that of the penalty; the Fisher information is estimated on `fisher_samples` images
    of each task.
    """

    def __init__(self, run: Run, weight: float = 100.0, fisher_samples: int = 64):
        super().__init__(run)
        self.weight, self.samples, self.fisher = weight, fisher_samples, RankOneFisher()

    @staticmethod
    def check(weight: float, fisher_samples: int) -> None:
        if not 0 <= weight < math.inf:  # which refuses NaN too
            raise ValueError(f"weight must be finite and not negative, not {weight}")
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, not {fisher_samples}")

    def penalty(self, t: int, parameters: Sequence[Tensor]) -> Tensor | None:
        return self.weight * self.fisher.penalty(parameters) if t > 0 else None

    def finish(self, t: int) -> None:
        self.fisher.learn(self.run.student, self._single_loss(t), self.samples)
        self.counts.fisher_images = 2 * self.samples
        self.counts.model_bytes += self.fisher.bytes

    def _single_loss(self, t: int) -> Callable[[int], Tensor]:
        """The task term of one image, the i-th of a fixed draw."""
        data, student = self.run.tasks[t].train, self.run.student
        process = forward_process(self.run.teacher)
        step = DistillationStep(student, None, process, LossWeights.only("task"), shared=False)

        def loss(i: int) -> Tensor:
            generator = torch.Generator().manual_seed(self.run.seed_of(t) * 100_003 + i)
            return step(student, *data.draw(1, generator, 0.0), generator)["loss"]

        return loss

    def save(self, folder: Path) -> None:
        write_tensors(folder / FILE, self.fisher.state_dict(), FORMAT, VERSION)

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / FILE, FORMAT, VERSION)
        self.fisher.load_state_dict(state, self.run.student.device)


class RankOneFisher:
    """Elastic weight consolidation with a Fisher information of one direction a task.

    Gradients of a diffusion loss are nearly collinear (2509.23593), so that F = E[g g^T] is taken
    as c m m^T with m = E[g] and c = E[(g . m)^2] / |m|^4, the nearest to F of that form. The
    penalty is 1/2 sum over tasks of c (m . (w - w*))^2; the anchor w* moves to the weights after
    the latest task, the directions stay.
    """

    def __init__(self):
        self.anchor = torch.zeros(0)
        self.directions: list[Tensor] = []
        self.scales: list[float] = []

    def penalty(self, parameters: Iterable[Tensor]) -> Tensor:
        """What holds these weights: those that `learn` saw, in the same order."""
        moved = _flat(parameters) - self.anchor
        return sum(  # type: ignore[return-value]
            0.5 * c * (m * moved).sum().square()  # a product of matrices would be in bf16
            for c, m in zip(self.scales, self.directions, strict=True)
        )

    def learn(self, model: nn.Module, loss: Callable[[int], Tensor], samples: int) -> None:
        """Take in a task: `loss(i)` is the loss of its i-th image alone, the same every time.

        Runs `samples` images forwards and backwards twice, once for m and once for c.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]

        def gradient(i: int) -> Tensor:
            return _flat(torch.autograd.grad(loss(i), parameters))

        mean = sum(gradient(i) for i in range(samples)) / samples
        size = mean.square().sum().clamp_min(1e-30)
        along = sum((gradient(i) @ mean).square() for i in range(samples)) / samples
        self.anchor = _flat(parameters).detach().clone()
        self.directions.append(mean)  # type: ignore[arg-type]
        self.scales.append((along / size**2).item())

    @property
    def bytes(self) -> int:
        return 4 * len(self.anchor) * (1 + len(self.directions))

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "anchor": self.anchor,
            "directions": torch.stack(self.directions) if self.directions else torch.zeros(0),
            "scales": torch.tensor(self.scales, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor], device="cpu") -> None:
        self.anchor = state["anchor"].to(device)
        self.directions = list(state["directions"].to(device))
        self.scales = state["scales"].tolist()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten().float() for t in tensors])
