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
from kdc.continual.tasks import half_of_classes, names_of, split_classes
from kdc.data import worlds
from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.data.latents import LatentDataset
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.images import as_bytes
from kdc.evaluation.metrics import METRICS, Evidence, means, score
from kdc.evaluation.species import SpeciesJudge, fit_species
from kdc.evaluation.statistics import share_nearer
from kdc.io import fingerprint
from kdc.replay.buffer import ReplayBuffer
from studies.common.renderings import renderings_of
from studies.common.teacher_cache import Answer, remembering

ENOUGH = 2 * 64  # samples of the embedded CLIP's features, below which there is no Fréchet distance


@dataclass(frozen=True)
class TaskTest:
    """The test of a task: latents held back, and real images to compare generated ones with."""

    # Latents that no training sees.
    latents: LatentDataset
    # The attributes of the task's prompts, empty where they are not known.
    attributes: Sequence[worlds.Attributes] = ()
    # Features (N, 64) of real images; None where they are too few for a Fréchet distance.
    reference: Tensor | None = None
    # What names the species that the task's prompts ask for; None where nothing does.
    judge: SpeciesJudge | None = None


class Scorer:
    """`evaluate` for `run_sequence` on tasks whose `test` is a `TaskTest`.

    It scores what a test allows: the output error on the held-back latents, the accuracy of
    generated images, and their Fréchet distance to real ones in the features of the embedded CLIP.
    `higher_is_better` are the metrics that the test of `task` gives; for another task that lacks
    one it is NaN. A student that was scored before generates nothing again. `last` is the pipeline
    that was scored last, `generated` its images by task.
    """

    def __init__(self, teacher: StableDiffusionPipeline, task: Task, seed: int, steps: int = 10):
        self.teacher, self.seed, self.steps = teacher, seed, steps
        names = ["output_error"]
        names += ["accuracy"] if task.test.attributes else []
        names += ["species"] if task.test.judge is not None else []
        names += ["fd"] if task.test.reference is not None else []
        self.higher_is_better = {name: METRICS[name].higher_is_better for name in names}
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
        images = pipelines.generate(
            pipeline, task.prompts, seed=self.seed, steps=self.steps, progress=False
        )
        evidence = Evidence(
            images=images,
            extractor=find_extractor("mini-clip"),
            attributes=task.test.attributes,
            reference=task.test.reference,
            species=task.prompts if task.test.judge is not None else (),
            species_judge=task.test.judge,
            latents=task.test.latents,
            pipeline=pipeline,
            teacher=self.teacher,
        )
        with remembering(self.teacher.unet, [], self._answers):
            values, _ = score(evidence, tuple(self.higher_is_better), strict=False)
        found = means(values)
        return {name: found.get(name, float("nan")) for name in self.higher_is_better}, images


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
    judge: SpeciesJudge | None = None,
) -> list[Task]:
    """The classes of a world (its kinds) or folder as tasks of `per_task`, each with a `TaskTest`.

    `per_task` None makes two tasks, of half the classes each. `order` is that of
    `split_classes`; None is alphabetical, for a folder that of its images. `generated` counts the
    images of all tasks together. A `judge` of a folder's species scores what is generated.
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
            test = TaskTest(task.test, (), _features(real) if enough else None, judge)
        done.append(dataclasses.replace(task, prompts=prompts, test=test))
    return done


def judge_of(folder: str | Path, size: int) -> SpeciesJudge:
    """A judge of the folder's species at that size: the captions of its images are their names."""
    real = []
    for split in ("train", "test"):
        dataset = load_dataset(folder, split, size)
        images = as_bytes(torch.stack([item["image"] for item in dataset]))
        real.append((images, [dataset.caption(i) for i in range(len(dataset))]))
    return fit_species(*real[0], held_out=real[1])


def tasks_of(teacher: StableDiffusionPipeline, dataset: str | Path, **sizes: int) -> list[Task]:
    """Two tasks by one text.

    "worlds" are flora and then lepidoptera; "A then B" two worlds or folders of images, one after
    the other; a world or folder alone is half of its classes and then the other half. `sizes` are
    `images`, `test_images` and `generated`.
    """
    names = check_dataset(dataset)  # before the first is encoded
    if len(names) == 1:
        return class_tasks(teacher, names[0], per_task=None, **sizes)
    return domain_tasks(teacher, names, **sizes)


def check_dataset(dataset: str | Path) -> list[str]:
    """The names in a text as `tasks_of` takes it; nothing is encoded.

    Raises as `names_of`, `load_dataset` and `half_of_classes` do.
    """
    names = names_of(dataset)
    loaded = {
        name: [load_dataset(name, split) for split in ("train", "test")]
        for name in names
        if name not in worlds.WORLDS
    }
    if len(names) == 1 and loaded:
        train, test = ([data.caption(i) for i in range(len(data))] for data in loaded[names[0]])
        half_of_classes(names[0], train, test, list(dict.fromkeys(train)))
    return names


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
        reference = find_extractor("mini-clip")(renderings_of(asked, seed=3))
    return TaskTest(latents, asked, reference), [worlds.caption(a) for a in asked]


def _features(real: Tensor) -> Tensor | None:
    if len(real) < ENOUGH:
        return None
    return find_extractor("mini-clip")(as_bytes(real))


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
        return find_extractor("mini-clip")(as_bytes(real))

    generated = find_extractor("mini-clip")(scorer.generated[task.name])
    share = share_nearer(generated, seen(mean[:count]), seen(other[:count]))
    return {"share": share, "items": count, "generated": len(generated)}
