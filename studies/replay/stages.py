"""The stages of the study of forgetting: which tasks in which orders, and where results go."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.utils.data import ConcatDataset

from kdc import pipelines
from kdc.continual.tasks import Task
from kdc.data import worlds
from kdc.data.datasets import load_dataset
from kdc.distillation.distill import distill
from kdc.distillation.losses import LossWeights
from kdc.io import write_image
from studies.common import ledger
from studies.common.protocol import strip
from studies.common.runner import Context, Stage
from studies.replay import variants
from studies.replay.study import SHOWN, Settings, stem_of, study
from studies.replay.tasks import (
    Scorer,
    beyond,
    check_dataset,
    class_tasks,
    domain_tasks,
    judge_of,
)

# What a stage has instead of the usual settings.
OVER: dict[str, dict] = {
    # At the usual rate the shipped student forgets too little to show anything; this one was chosen
    # on a seed that is not reported, by what fine-tuning forgets alone.
    "plain": {"recipe": "task", "learning_rate": 2e-3},
    # Long enough that the first half is learnt before the second comes, and 24 images of each of
    # twelve species. Set before anything was measured.
    "species": {"steps": 450, "tuning": 2000, "generated_photos": 288},
}
# The stages that need photographs, and where each keeps the teacher that was fine-tuned on them.
OF_PHOTOS = {"photos": "teacher", "species": "teacher-species"}


def _stage(stage: str, context: Context) -> list[Path]:
    """Measure one stage; writes `forgetting_<stage>.json`, and where images are shown a sheet."""
    if stage in OF_PHOTOS:
        check_dataset(context.photos)  # what is wrong with the folder is said at once
    teacher = pipelines.load_teacher("mini")
    used = Settings(**(OVER.get(stage, {}) | context.settings))
    values = _measure(stage, teacher, used, context.folder, context.photos)
    path = ledger.write(f"forgetting_{stage}", values, context.results, **vars(used))
    if values["shown"]:
        sheet = _sheet(teacher, stage, values, used, context.folder)
        write_image(path.with_suffix(".png"), sheet)
    return [path]


def _measure(stage: str, teacher, settings: Settings, folder: Path, photos) -> dict:
    """The `rows` of a stage, the prompts `shown` after each task, and what else belongs to them."""
    sizes = {k: getattr(settings, k) for k in ("images", "test_images", "generated")}
    common = dict(variants=variants.STAGES[stage], teacher=teacher, folder=folder)
    # what is known before a task is learnt, domains and photographs tell
    common |= {"ahead": stage in ("domains", *OF_PHOTOS)}
    if stage == "classes":  # an order for every seed
        rows = []
        for seed in settings.seeds:
            orders = {f"order {seed}": class_tasks(teacher, "flora", order=seed, **sizes)}
            one = dataclasses.replace(settings, seeds=(seed,))
            rows += study(stage, orders, settings=one, steps=settings.class_steps, **common)
        return {"rows": rows, "shown": ()}
    if stage in OF_PHOTOS:
        fine_tune(teacher, [photos], settings, folder / OF_PHOTOS[stage])
        sizes["generated"] = settings.generated_photos
        size = teacher.unet.config.sample_size * teacher.vae_scale_factor
        judge = judge_of(photos, size) if stage == "species" else None
        tasks = class_tasks(teacher, photos, per_task=None, judge=judge, **sizes)
        shown = tuple(name for task in tasks for name in sorted(set(task.prompts))[:4])
        common |= {"steps": settings.steps, "shown": shown}
        values = {"rows": study(stage, {"halves": tasks}, settings=settings, **common)}
        values |= {"shown": shown}
        return values | (_of_the_teacher(teacher, tasks, settings) if judge else {})
    names = tuple(worlds.WORLDS)
    both = domain_tasks(teacher, names, **sizes)
    orders = {f"{names[0]} first": both}
    if stage == "domains":
        orders[f"{names[1]} first"] = both[::-1]
    if stage == "plain":
        common["start"] = pipelines.load_student("mini", teacher).unet
    shown = SHOWN if stage == "domains" else ()
    if shown:
        common["reference"] = beyond(teacher, names, both[0])
    common |= {"steps": settings.steps, "shown": shown}
    return {"rows": study(stage, orders, settings=settings, **common), "shown": shown}


def _of_the_teacher(teacher, tasks: Sequence[Task], settings: Settings) -> dict:
    """What the judge of species reports of itself, and what it says of the teacher's own images."""
    judge, found = tasks[0].test.judge, {}
    for seed in settings.seeds:
        scorer = Scorer(teacher, tasks[0], seed, settings.sampling_steps)
        found[seed] = [scorer(teacher, task)["species"] for task in tasks]
    about = {"held_out": judge.held_out, "species": len(judge.names)}
    return {"judge": about, "teacher": found}


def fine_tune(
    teacher: StableDiffusionPipeline, names: Sequence[str | Path], settings: Settings, folder: Path
) -> None:
    """Teach the mini teacher these folders, with the task term alone; it goes on where it was."""
    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    distill(
        teacher.unet,
        teacher,
        ConcatDataset([load_dataset(name, "train", size) for name in names]),
        steps=settings.tuning,
        batch_size=settings.batch_size,
        weights=LossWeights.only("task"),
        learning_rate=settings.learning_rate,
        output_dir=folder,
        resume=True,
        label="fine-tuning the teacher",
    )


def _sheet(teacher, stage: str, values: dict, settings: Settings, folder: Path) -> Image.Image:
    """Strips, one below the other: see `retention.shown`."""
    where, seed = (stage, values["rows"][0]["order"]), settings.seeds[0]
    stems = [stem_of(folder, *where, name, seed) for name in variants.STAGES[stage]]
    halves = [np.split(np.asarray(Image.open(s.with_suffix(".png"))), 2) for s in stems]
    strips = [strip(teacher, values["shown"], settings.sampling_steps), halves[0][0]]
    return Image.fromarray(np.concatenate([*strips, *(after for _, after in halves)]))


HELP = {
    "domains": "all strategies on two domains in both orders",
    "buffers": "buffers by size, precision and policy",
    "ratios": "old images for each new one",
    "teachers": "which network old images follow, by which terms",
    "plain": "the task term alone, from the shipped student, which can generate already",
    "classes": "six classes one after the other, an order for each seed",
    "photos": "two halves of a folder's classes, after the teacher was fine-tuned on all of them",
    "species": "the same with longer tasks, judged by whether the species asked for is shown",
}
STAGES = {
    name: Stage(
        functools.partial(_stage, name),
        HELP[name],
        (f"forgetting_{name}.json",),
        needs_photos=name in OF_PHOTOS,
    )
    for name in variants.STAGES
}
