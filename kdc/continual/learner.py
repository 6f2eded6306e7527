"""Learning one task of a sequence: new images, old images, and what is kept afterwards."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from kdc.continual.records import Counts, Progress, Records
from kdc.continual.strategies import RankOneFisher, Strategy, generate_pool
from kdc.continual.tasks import Task
from kdc.data.latents import LatentDataset, sample_posterior
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import DistillationStep, forward_process
from kdc.pipelines import with_unet
from kdc.replay.buffer import ReplayBuffer
from kdc.training.loop import train
from kdc.training.settings import TrainSettings


def in_pipeline(
    teacher: StableDiffusionPipeline, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """`with_unet`, but a teacher of another precision gets a copy: the weights stay as they are."""
    return with_unet(teacher, unet if unet.dtype == teacher.dtype else copy.deepcopy(unet))


@dataclasses.dataclass(frozen=True)
class Learnt:
    """The student after the first task, and what that cost: see `continual.learn_first`."""

    weights: dict[str, Tensor]
    counts: Counts


@dataclasses.dataclass
class Learner:
    """What every task of a sequence shares, and how one of them is learnt."""

    tasks: Sequence[Task]
    strategy: Strategy
    student: UNet2DConditionModel
    teacher: StableDiffusionPipeline
    buffer: ReplayBuffer | None
    fisher: RankOneFisher | None
    weights: LossWeights
    settings: TrainSettings
    batch_size: int
    dropout: float
    seed: int
    first: Learnt | None = None

    def __post_init__(self):
        texts = dict.fromkeys(label for task in self.tasks for label in task.labels)
        self.label_numbers = {text: number for number, text in enumerate(texts)}

    def learn(self, t: int, records: Records) -> Counts:
        """Train on task t, let buffer and Fisher take it in; what that cost."""
        strategy, task, counts = self.strategy, self.tasks[t], Counts()
        process, count = forward_process(self.teacher), strategy.replayed(self.batch_size)
        started, old, source = time.perf_counter(), None, self.buffer
        generates = strategy.source == "generated" and t > 0
        if t == 0 and self.first:
            self.student.load_state_dict(self.first.weights)
            counts = dataclasses.replace(self.first.counts)
            self._take_in(t, process, counts)
            return counts
        rehearses = generates or strategy.source == "last_sample" or bool(source)
        if generates or (rehearses and strategy.guide == "old"):
            old = copy.deepcopy(self.student).requires_grad_(False).eval()
            counts.model_bytes = sum(p.numel() * p.element_size() for p in old.parameters())
        if generates:
            source = self._pool(t, old, records, counts)
        old_weights = strategy.old_weights or self.weights
        held = [p for p in self.student.parameters() if p.requires_grad]  # without projections
        distillation_step = DistillationStep(self.student, self.teacher.unet, process, self.weights)
        rehearsal = None
        if rehearses:
            guide = old if strategy.guide == "old" else self.teacher.unet
            rehearsal = (
                distillation_step  # so that old and new images share what projections there are
            )
            if guide is old or old_weights != self.weights:
                rehearsal = DistillationStep(self.student, guide, process, old_weights)

        def loss(model, generator):
            batch, rows = self._new(t, generator)
            terms = distillation_step(model, *self._posterior(batch, generator), generator)
            counts.new_images += self.batch_size
            counts.teacher_images += self.batch_size * self.weights.needs_teacher
            if rehearsal and len(source):
                past, aside = _draw(source, count), _aside(generator)
                past = rehearsal(model, *self._posterior(past, aside), aside)
                counts.old_images += count
                counts.old_teacher_images += count * old_weights.needs_teacher
                share = count / (self.batch_size + count)
                total = (1 - share) * terms["loss"] + share * past["loss"]
                terms |= {f"old_{name}": value for name, value in past.items()}
                terms |= {"new_loss": terms["loss"], "loss": total}
            if self.fisher and t > 0:
                terms["ewc"] = self.fisher.penalty(held)
                terms["loss"] = terms["loss"] + strategy.ewc * terms["ewc"]
            if strategy.source == "last_sample":
                source.add(task.train, rows[-1:], task=t)
            return terms

        whole = strategy.source == "last_sample"
        progress = Progress(counts, source, whole, started)
        folder = records.folder(t)
        try:
            train(
                self.student,
                loss,
                self.settings,
                folder,
                seed=1000 * self.seed + t,
                resume=folder is not None,
                companion=progress,
                label=f"{strategy.name}: {task.name}",
            )
        finally:
            for each in (distillation_step, rehearsal):
                if each:
                    each.close()
        self._take_in(t, process, counts)
        progress.stop()
        return counts

    def _new(self, t: int, generator: torch.Generator) -> tuple[dict, Tensor]:
        """A batch of new images, and their rows in the task's data (of the last of them)."""
        generated = [t] * self.batch_size
        if self.strategy.joint:
            generated = torch.randint(
                len(self.tasks), (self.batch_size,), generator=generator
            ).tolist()
        parts = []
        for number in sorted(set(generated)):
            data = self.tasks[number].train
            rows = torch.randint(len(data), (generated.count(number),), generator=generator)
            parts.append(data[rows])
        return _join(parts), rows

    def _posterior(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        names = ("mean", "std", "embedding")
        return sample_posterior(
            **{name: batch[name] for name in names},
            empty=self.tasks[0].train.empty,
            generator=generator,
            drop=self.dropout,
        )

    def _pool(
        self, t: int, old: UNet2DConditionModel, records: Records, counts: Counts
    ) -> ReplayBuffer:
        """Images that the old student draws of the tasks before t, from a file on resume."""
        strategy, file = self.strategy, records.file(t, "pool")
        counts.generated_images = strategy.pool
        guided = 1 if strategy.guidance == 1 else 2
        counts.sampler_images = strategy.pool * strategy.sampling_steps * guided
        if file and file.is_file():
            pool = ReplayBuffer.load(file)
        else:
            seed = 1000 * self.seed + t
            pool = generate_pool(in_pipeline(self.teacher, old), self.tasks[:t], strategy, seed)
            if file:
                pool.save(file)
        counts.buffer_bytes = pool.sizes()["items"]
        return pool

    def _take_in(self, t: int, process: DDPMScheduler, counts: Counts) -> None:
        """What buffer and Fisher keep of a task that was learnt, and the bytes they then take."""
        task, source = self.tasks[t], self.strategy.source
        if source == "buffer":
            generator = torch.Generator().manual_seed(1000 * self.seed + t)
            order = torch.randperm(len(task.train), generator=generator)
            numbers = torch.tensor([self.label_numbers[label] for label in task.labels])
            self.buffer.add(task.train, order, task=t, labels=numbers[order])
        if source in ("buffer", "last_sample"):
            counts.buffer_bytes = self.buffer.sizes()["items"]
            counts.embedding_bytes = self.buffer.sizes()["embeddings"]
        if self.fisher:
            samples = self.strategy.fisher_samples
            distillation_step = DistillationStep(
                self.student, None, process, LossWeights.only("task")
            )
            self.fisher.learn(self.student, self._single(task.train, distillation_step, t), samples)
            counts.fisher_images = 2 * samples
            counts.model_bytes += self.fisher.bytes

    def _single(
        self, data: LatentDataset, distillation_step: DistillationStep, t: int
    ) -> Callable[[int], Tensor]:
        def loss(i: int) -> Tensor:
            seed = (1000 * self.seed + t) * 100_003 + i
            generator = torch.Generator().manual_seed(seed)
            latents, prompt_embeds = data.draw(1, generator, 0.0)
            return distillation_step(self.student, latents, prompt_embeds, generator)["loss"]

        return loss


def _aside(generator: torch.Generator) -> torch.Generator:
    """A generator for old images, seeded by the state of that of new ones, which stays as it is.

    So the same new images, noise and timesteps come with every strategy.
    """
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    return torch.Generator().manual_seed(torch.randint(2**62, (), generator=copied).item())


def _draw(source: ReplayBuffer, count: int) -> dict:
    """`count` items, none twice before all had their turn: a small buffer is gone through again."""
    whole, rest = divmod(count, len(source))
    sizes = [len(source)] * whole + ([rest] if rest else [])
    return _join([source.sample(size) for size in sizes])


def _join(parts: list[dict]) -> dict:
    return {name: torch.cat([p[name] for p in parts]) for name in ("mean", "std", "embedding")}
