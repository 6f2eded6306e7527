"""What a model can do against forgetting while it learns the next task, as settings of one loop.

The loop is in `kdc.continual`. Here: the settings with their published names, the images that an
old model draws of its own tasks, and the rank-1 Fisher penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from kdc.continual.tasks import Task
from kdc.data.latents import LatentDataset
from kdc.distillation.losses import LossWeights
from kdc.replay.buffer import ReplayBuffer

SOURCES = (None, "buffer", "last_sample", "generated")


@dataclass(frozen=True)
class Strategy:
    """Settings of the loop that all strategies share; every one sees the same new data.

    `source` is where old images come from: nowhere, the "buffer", "last_sample" (one image of
    the previous step) or "generated" by the old student, the one before the task. `ratio` says how
    many of them go with each new image; old and new count by their number. `old_weights` is the
    loss on them (None: that of the new images), whose output, soft and feature terms follow
    `guide`, the "teacher" or the "old" student. `ewc` weighs the rank-1 Fisher penalty. `joint`
    draws the new images from all tasks at once: the bound above.

    `pool` images are generated before each task, in `sampling_steps` at `guidance`; the Fisher
    is estimated on `fisher_samples` images of each task.
    """

    name: str
    source: str | None = None
    ratio: float = 1.0
    guide: str = "teacher"
    old_weights: LossWeights | None = None
    ewc: float = 0.0
    joint: bool = False
    pool: int = 256
    sampling_steps: int = 10
    guidance: float = 1.5
    fisher_samples: int = 64

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {SOURCES}, not {self.source!r}")
        if self.guide not in ("teacher", "old"):
            raise ValueError(f"guide must be teacher or old, not {self.guide!r}")
        if not 0 < self.ratio < math.inf:  # which refuses NaN too
            raise ValueError(f"ratio must be positive and finite, not {self.ratio}")
        if not 0 <= self.ewc < math.inf:
            raise ValueError(f"ewc must be finite and not negative, not {self.ewc}; 0 is without")
        if self.joint and (self.source or self.ewc):
            raise ValueError("joint sees the images of all tasks: it goes with nothing else")
        for name in ("pool", "sampling_steps", "fisher_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    @property
    def begins_its_own_way(self) -> bool:
        """Whether it learns even the first task unlike plain fine-tuning."""
        return self.joint or self.source == "last_sample"

    def replayed(self, batch_size: int) -> int:
        """Old images that go with a batch of new ones."""
        if self.source is None:
            return 0
        return 1 if self.source == "last_sample" else max(1, round(self.ratio * batch_size))


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("finetune"),
        Strategy("last_sample", "last_sample"),
        Strategy("replay", "buffer"),
        Strategy(
            "replay+distil", "buffer", guide="old", old_weights=LossWeights.only("task", "output")
        ),
        Strategy("generative_replay", "generated", old_weights=LossWeights.only("task")),
        Strategy(
            "generative_distillation",
            "generated",
            guide="old",
            old_weights=LossWeights.only("output"),
        ),
        Strategy("ewc", ewc=100.0),
        Strategy("joint", joint=True),
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


@torch.no_grad()
def generate_pool(
    pipeline: StableDiffusionPipeline,
    tasks: Sequence[Task],
    strategy: Strategy,
    seed: int,
    batch_size: int = 32,
) -> ReplayBuffer:
    """Latents that the pipeline draws for captions of `tasks`, equally many of each task.

    They lie in a `ReplayBuffer` of their own, with deviation 0, and nothing is decoded.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = ReplayBuffer(strategy.pool, "fifo", "float32", seed=seed)
    unet = pipeline.unet.config
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    pipeline.set_progress_bar_config(disable=True)
    for number, task in enumerate(tasks):
        data, count = (
            task.train,
            strategy.pool // len(tasks) + (number < strategy.pool % len(tasks)),
        )
        rows = torch.randint(len(data), (count,), generator=generator)
        generated = []
        for index in rows.split(batch_size):
            like = dict(device=pipeline.device, dtype=pipeline.dtype)
            prompt_embeds = data.embeddings[data.caption_index[index]].to(**like)
            noise = torch.randn((len(index), *shape), generator=generator).to(**like)
            out = pipeline(
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=data.empty.to(**like).expand_as(prompt_embeds),
                latents=noise,
                num_inference_steps=strategy.sampling_steps,
                guidance_scale=strategy.guidance,
                output_type="latent",
            )
            generated.append(out.images.float().cpu())
        if count:
            mean = torch.cat(generated)
            captions = data.caption_index[rows]
            made = LatentDataset(
                mean, torch.zeros_like(mean), data.embeddings, captions, data.empty, data.captions
            )
            pool.add(made, task=number)
    return pool


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
        return sum(
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
        self.directions.append(mean)
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
