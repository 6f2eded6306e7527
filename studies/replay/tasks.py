"""Tasks with their tests: what is asked after each task, and how near drawings are to a buffer."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from kdc import pipelines
from kdc.continual.sequence import Task
from kdc.continual.tasks import split_classes
from kdc.data import worlds
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset, cache_latents
from kdc.distillation.fidelity import output_error
from kdc.evaluation import metrics
from kdc.evaluation.statistics import share_nearer
from kdc.io import fingerprint
from kdc.replay.buffer import ReplayBuffer
from studies.common.renderings import renderings_of
from studies.common.teacher_cache import Answer, remembering

ENOUGH = 2 * 64  # samples of the embedded CLIP's features, below which there is no Fréchet distance


@dataclass(frozen=True)
class TaskTest:
    """The test of a task: images held back, and real ones to compare drawings with.

    `asked` are the attributes of the task's prompts, empty where they are not known; `reference`
    (N, 64) features of real images, None where they are too few for a Fréchet distance.
    """

    latents: LatentDataset
    asked: Sequence[worlds.Attributes] = ()
    reference: Tensor | None = None


class Scorer:
    """`evaluate` for `run_sequence` on tasks whose `test` is an `TaskTest`; a memory of what it scored.

    `output_error` is the student's distance to the teacher on the images held back, `accuracy`
    the share of generated images that show all that was asked for, `fd` the distance of drawn
    to real images in the features of the embedded CLIP. A student that was scored before is not
    drawn from again. `higher_is_better` are the metrics that the test of `task` gives; for another task
    that lacks one it is NaN. `last` is the pipeline that was scored last, `generated` its images by
    task.
    """

    def __init__(self, teacher: StableDiffusionPipeline, task: Task, seed: int, steps: int = 10):
        self.teacher, self.seed, self.steps = teacher, seed, steps
        self.higher_is_better = {"output_error": False}
        if task.test.asked:
            self.higher_is_better["accuracy"] = True
        if task.test.reference is not None:
            self.higher_is_better["fd"] = False
        self.last: StableDiffusionPipeline | None = None
        self.generated: dict[str, Tensor] = {}
        self._known: dict[tuple[str, str], tuple[dict, Tensor]] = {}
        self._answers: dict[str, Answer] = {}

    def __call__(self, pipeline: StableDiffusionPipeline, task: Task) -> dict[str, float]:
        key = fingerprint(*pipeline.unet.state_dict().values()), task.name
        if key not in self._known:
            self._known[key] = self._score(pipeline, task)
        scores, self.generated[task.name] = self._known[key]
        self.last = pipeline
        return scores

    def _score(self, pipeline, task: Task) -> tuple[dict[str, float], Tensor]:
        test = task.test
        with remembering(self.teacher.unet, [], self._answers):
            error = output_error(pipeline.unet, self.teacher, test.latents).mean()
        scores = {"output_error": error}
        images = pipelines.generate(
            pipeline, task.prompts, seed=self.seed, steps=self.steps, progress=False
        )
        if test.asked:
            scores["accuracy"] = metrics.attribute_accuracy(images, test.asked)["all"]
        if test.reference is not None:
            features = metrics.clip_features(images)
            scores["fd"] = metrics.frechet_distance(features, test.reference)
        given = {name: float(scores.get(name, float("nan"))) for name in self.higher_is_better}
        return given, images


def domain_tasks(
    teacher: StableDiffusionPipeline,
    names: Sequence[str | Path],
    *,
    images: int = 800,
    test_images: int = 96,
    generated: int = 144,
) -> list[Task]:
    """A task for each name of a world or folder of images, with an `TaskTest`."""
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    tasks = []
    for name in names:
        train, test = (
            load_dataset(name, split, size, count=count)
            for split, count in (("train", images), ("test", test_images))
        )
        latents = cache_latents(teacher, train)
        if name in worlds.WORLDS:
            test, prompts = _world_test(cache_latents(teacher, test), str(name), generated)
            labels = [worlds.read_caption(train.caption(i)).kind for i in range(len(train))]
        else:
            real = torch.stack([train[i]["image"] for i in range(len(train))])
            test = TaskTest(cache_latents(teacher, test), (), _features(real))
            prompts, labels = _repeated(latents.captions, generated), ()
        tasks.append(Task(Path(name).name, latents, prompts, labels, test))
    return tasks


def class_tasks(
    teacher: StableDiffusionPipeline,
    name: str | Path,
    *,
    per_task: int | None = 1,
    order: int | Sequence[str] | None = None,
    images: int = 800,
    test_images: int = 96,
    generated: int = 144,
) -> list[Task]:
    """The classes of one world (its kinds) or folder as tasks of `per_task`, each with an `TaskTest`.

    `per_task` None makes two tasks, of half the classes each. `order` is that of
    `split_classes`; None is alphabetical, for a folder that of its images. `generated` images are
    drawn for all tasks together.
    """
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    loaded = [
        load_dataset(name, split, size, count=count)
        for split, count in (("train", images), ("test", test_images))
    ]
    train, test = (cache_latents(teacher, dataset) for dataset in loaded)
    world = name in worlds.WORLDS
    label_of = (lambda caption: worlds.read_caption(caption).kind) if world else str
    if not world and order is None:  # that of the folders, which no article disturbs
        order = list(dict.fromkeys(loaded[0].caption(i) for i in range(len(loaded[0]))))
    if per_task is None:
        per_task = math.ceil(len({label_of(caption) for caption in train.captions}) / 2)
    tasks = split_classes(train, label_of, per_task=per_task, order=order, test=test)
    if any(task.test is None for task in tasks):
        raise ValueError(f"{name}: a class has no test image; give it more images")
    done = []
    for task in tasks:
        if world:
            kinds = set(task.labels)
            share = generated * len(kinds) // len(worlds.world(str(name)).kinds)
            test, prompts = _world_test(task.test, str(name), share, kinds)
        else:
            mine = set(task.labels)
            rows = [i for i in range(len(loaded[0])) if loaded[0].caption(i) in mine]
            real = torch.stack([loaded[0][i]["image"] for i in rows])
            prompts = _repeated(task.train.captions, generated // len(tasks))
            enough = min(len(real), len(prompts)) >= ENOUGH
            test = TaskTest(task.test, (), _features(real) if enough else None)
        done.append(dataclasses.replace(task, prompts=prompts, test=test))
    return done


def tasks_of(teacher: StableDiffusionPipeline, dataset: str | Path, **sizes: int) -> list[Task]:
    """Two tasks by one text.

    "worlds" are flora and then lepidoptera; "A then B" two worlds or folders of images, one after
    the other; a world or folder alone is half of its classes and then the other half. `sizes` are
    `images`, `test_images` and `generated`.
    """
    names = tuple(worlds.WORLDS) if dataset == "worlds" else str(dataset).split(" then ")
    if len(names) == 1:
        return class_tasks(teacher, names[0], per_task=None, **sizes)
    for name in names:  # what is wrong with any of them is said before the first is encoded
        load_dataset(name, "test")
    return domain_tasks(teacher, names, **sizes)


def beyond(teacher: StableDiffusionPipeline, names: Sequence[str], like: Task) -> Task:
    """What the teacher knows beyond the tasks: combinations that no training image shows."""
    asked = [a for name in names for a in worlds.world(name).combinations(held_out=True)]
    test = TaskTest(like.test.latents, asked)
    return Task("beyond", like.train, [worlds.caption(a) for a in asked], like.labels, test)


def _world_test(
    latents: LatentDataset, name: str, generated: int, kinds: set[str] | None = None
) -> tuple[TaskTest, list[str]]:
    every = [a for a in worlds.world(name).combinations() if kinds is None or a.kind in kinds]
    asked = sorted(random.Random(0).sample(every, min(generated, len(every))))
    reference = None
    if len(asked) >= ENOUGH:
        reference = metrics.clip_features(renderings_of(asked, seed=3))
    return TaskTest(latents, asked, reference), [worlds.caption(a) for a in asked]


def _features(real: Tensor) -> Tensor | None:
    if len(real) < ENOUGH:
        return None
    return metrics.clip_features(metrics.as_bytes(real))


def _repeated(captions: Sequence[str], count: int) -> list[str]:
    """Every caption equally often, `count` in all or one more for some, never less than once."""
    count = max(count, len(captions))
    return [captions[i % len(captions)] for i in range(count)]


@torch.inference_mode()
def leakage(buffer: ReplayBuffer, task: Task, scorer: Scorer) -> dict[str, float] | None:
    """How near drawings of the first task are to what the buffer holds of it.

    Each drawing looks for its nearest image, in normalised features of the embedded CLIP, among
    the decoded items of the task and as many images held back. `share` is how many find it in the
    buffer: a half where nothing leaks. Items that later tasks pushed out are not seen. None where
    the buffer holds nothing of the task any more.
    """
    items = buffer.items()
    mean = items["mean"][items["task"] == 0]
    other = task.test.latents.mean
    count = min(len(mean), len(other))
    if not count:
        return None
    vae = scorer.teacher.vae

    def seen(latents: Tensor) -> Tensor:
        parts = latents.to(vae.device, vae.dtype).split(64)
        real = torch.cat([vae.decode(x / vae.config.scaling_factor).sample for x in parts])
        return metrics.clip_features(metrics.as_bytes(real))

    generated = metrics.clip_features(scorer.generated[task.name])
    share = share_nearer(generated, seen(mean[:count]), seen(other[:count]))
    return {"share": share, "items": count, "generated": len(generated)}
