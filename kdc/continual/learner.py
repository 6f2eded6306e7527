"""Learning one task of a sequence: new images, old images, and what is stored afterwards."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.continual.mechanisms.base import Counts, Items, Mechanism, Run, join
from kdc.continual.records import Progress, Records
from kdc.continual.strategies import Strategy
from kdc.data.latents import sample_posterior
from kdc.distillation.step import DistillationStep, forward_process
from kdc.pipelines import sample_grid
from kdc.processes import mean_over_processes, own_part, this_process
from kdc.training.efficiency import quickened
from kdc.training.loop import precision_on, train


@dataclass(frozen=True)
class Learnt:
    """The student after the first task, and what that cost: see `sequence.learn_first`."""

    weights: dict[str, Tensor]
    counts: Counts
    log: pd.DataFrame


@dataclass
class Learner:
    """How the tasks of a run are learnt, one at a time."""

    run: Run
    strategy: Strategy
    mechanism: Mechanism
    # The student after the first task where that was learnt before.
    first: Learnt | None = None

    def learn(self, t: int, records: Records) -> tuple[Counts, pd.DataFrame]:
        """Train on task t, let the mechanism store what it needs; the costs and the log."""
        run, mechanism = self.run, self.mechanism
        student, settings = run.student, run.settings
        started = time.perf_counter()
        counts = mechanism.counts = Counts()
        if t == 0 and self.first:
            student.load_state_dict(self.first.weights)
            counts = mechanism.counts = dataclasses.replace(self.first.counts)
            mechanism.finish(t)
            return counts, self.first.log
        folder = records.folder(t)
        replays = mechanism.replays(t)
        old_model = self._old_model(replays)
        mechanism.start(t, old_model, folder)
        own = mechanism.trainable()  # without the projections that a step may add
        new_step, old_step = self._steps(replays, old_model)
        latest: dict = {}

        images = run.images  # of all processes, each of which learns its part

        def loss(model, generator):
            latest.update(generator=generator)
            batch, rows = self._new(t, generator)
            terms = new_step(model, *self._posterior(batch, generator), generator)
            counts.new_images += images
            counts.teacher_images += images * run.weights.needs_teacher
            count = mechanism.old_count(images)
            items = mechanism.old_items(t, count) if replays else None
            if items is not None:
                old = self._old_terms(old_step, model, items, _aside(generator))
                share = count / (images + count)
                total = (1 - share) * terms["loss"] + share * old["loss"]
                terms |= {f"old_{name}": value for name, value in old.items()}
                terms |= {"new_loss": terms["loss"], "loss": total}
            penalty = mechanism.penalty(t, own)
            if penalty is not None:
                terms |= {"penalty": penalty, "loss": terms["loss"] + penalty}
            mechanism.saw(t, rows)
            return terms

        def old_gradient(items: Items) -> list[Tensor]:
            parameters = mechanism.trainable()
            # Not of the model that several processes wrap, which would wait for a backward pass.
            terms = self._old_terms(old_step, run.student, items, _aside(latest["generator"]))
            found = torch.autograd.grad(terms["loss"], parameters, allow_unused=True)
            return [
                torch.zeros_like(p) if g is None else mean_over_processes(g)
                for p, g in zip(parameters, found, strict=True)
            ]

        progress = Progress(counts, mechanism, started)
        steps = [new_step] if old_step in (None, new_step) else [new_step, old_step]
        hooks = [hook for step in steps for hook in step.hooks]
        options = {
            "compile": settings.compile,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "bf16": precision_on(this_process().device, settings.precision) == "bf16",
        }
        try:
            with quickened(student, run.teacher.unet, hooks, **options):
                log = train(
                    student,
                    loss,
                    # The state of the last step would go with the other checkpoints, see `finish`.
                    dataclasses.replace(settings, seed=run.seed_of(t), keep_state=False),
                    folder,
                    resume=folder is not None,
                    companion=progress,
                    before_step=lambda: mechanism.before_step(t, old_gradient),
                    samples=lambda: self._samples(t),
                    label=f"{self.strategy.name}: {run.tasks[t].name}",
                )
        finally:
            for step in steps:
                step.close()
        mechanism.finish(t)
        progress.stop()
        return counts, log

    def _samples(self, t: int) -> Tensor:
        """What the student makes of captions of the tasks so far."""
        run = self.run
        captions = [caption for task in run.tasks[: t + 1] for caption in task.train.captions]
        return sample_grid(run.teacher, run.student, captions, run.seed_of(t))

    def _new(self, t: int, generator: torch.Generator) -> tuple[Items, list[tuple[int, Tensor]]]:
        """A batch of new images, and where they stand: numbers of tasks with rows of their data."""
        rows = self.mechanism.new_rows(t, self.run.images, generator)
        data = [self.run.tasks[number].train.pick(index, generator) for number, index in rows]
        return join(data), rows

    def _old_model(self, replays: bool) -> UNet2DConditionModel | None:
        """A frozen copy of the student as it is, where old images need one."""
        follows = self.strategy.old_target == "old model"
        if not (replays and (follows or self.mechanism.needs_old_model)):
            return None
        old = copy.deepcopy(self.run.student).requires_grad_(False).eval()
        size = sum(p.numel() * p.element_size() for p in old.parameters())
        self.mechanism.counts.model_bytes = size
        return old

    def _steps(
        self, replays: bool, old_model: UNet2DConditionModel | None
    ) -> tuple[DistillationStep, DistillationStep | None]:
        """The distillation step of new images and that of old ones, one and the same if it can.

        Then old and new images share what projections of features there are.
        """
        run, process = self.run, forward_process(self.run.teacher)
        new_step = DistillationStep(run.student, run.teacher.unet, process, run.weights)
        if not replays:
            return new_step, None
        weights = self.strategy.old_weights or run.weights
        followed = old_model if self.strategy.old_target == "old model" else run.teacher.unet
        if followed is run.teacher.unet and weights == run.weights:
            return new_step, new_step
        return new_step, DistillationStep(run.student, followed, process, weights)

    def _old_terms(
        self, step: DistillationStep, model, items: Items, generator: torch.Generator
    ) -> dict[str, Tensor]:
        count = len(items["mean"])
        self.mechanism.counts.old_images += count
        self.mechanism.counts.old_teacher_images += count * step.weights.needs_teacher
        return step(model, *self._posterior(items, generator), generator)

    def _posterior(self, batch: Items, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and embeddings of a batch of all processes: this one's part."""
        drawn = sample_posterior(
            batch["mean"],
            batch["std"],
            batch["embedding"],
            empty=self.run.tasks[0].train.empty,
            generator=generator,
            drop=self.run.settings.caption_dropout,
        )
        part = own_part(len(batch["mean"]))
        return drawn[0][part], drawn[1][part]


def _aside(generator: torch.Generator) -> torch.Generator:
    """A generator for old images, seeded by the state of that of new ones, which stays as it is.

    So the same new images, noise and timesteps come with every strategy.
    """
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=copied)))
