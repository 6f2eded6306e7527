"""Makes the embedded mini models from nothing: `make mini`, or `python -m studies mini`.

Stages stand in the order in which they need one another. A stage whose result lies in the output
folder is not trained again, and one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from kdc.data.cache import cache_latents
from kdc.data.datasets import load_dataset
from kdc.distillation.distill import distill
from kdc.pipelines import ASSETS, load_teacher, save_student
from kdc.processes import own_part, this_process
from kdc.unet.slimming import slim
from studies.common.recipes import RECIPES, STUDENT_RECIPE, images_of
from studies.mini.autoencoder import train_autoencoder
from studies.mini.judges import train_classifier, train_clip, train_scene_judge, train_trunk
from studies.mini.teacher import as_pipeline, train_teacher


def make_autoencoder(out: Path, **settings) -> None:
    vae, _ = train_autoencoder(out / "run", **settings)
    vae.half().save_pretrained(out / "new")


def make_classifier(out: Path, **settings) -> None:
    model, _ = train_classifier(out / "run", **settings)
    _save_module(model, out / "new")


def make_trunk(out: Path, **settings) -> None:
    model, _ = train_trunk(out / "run", **settings)
    _save_module(model, out / "new")


def make_clip(out: Path, **settings) -> None:
    (model, tokenizer), _ = train_clip(out / "run", **settings)
    model.half().save_pretrained(out / "new")
    tokenizer.save_pretrained(out / "new")


def make_scene_judge(out: Path, **settings) -> None:
    model, _ = train_scene_judge(out / "run", **settings)
    _save_module(model, out / "new")


def make_teacher(out: Path, **settings) -> None:
    vae = AutoencoderKL.from_pretrained(out.parent / "autoencoder" / "final", dtype=torch.float32)
    model, tokenizer, _ = train_teacher(vae, out / "run", **settings)
    pipeline = as_pipeline(vae, model, tokenizer)
    if this_process().is_main_process:
        pipeline.to(torch.float16).save_pretrained(out / "new", safe_serialization=True)


def make_student(out: Path, steps: int = 3600, batch_size: int = 16, **settings) -> None:
    """The student by a recipe of the study of chapter 03, with more steps and images.

    `batch_size` images an update, which several processes share.
    """
    state, part = this_process(), own_part(batch_size)
    recipe = RECIPES[STUDENT_RECIPE]
    teacher = load_teacher(out.parent / "teacher" / "final")
    student = slim(teacher.unet, recipe.plan, recipe.init)
    real = cache_latents(teacher, load_dataset("scenes", count=settings.pop("pool", 8000)))
    distill(
        student,
        teacher,
        images_of(recipe.data, teacher, real),
        steps=steps,
        batch_size=part.stop - part.start,
        weights=recipe.weights,
        output_dir=out / "run",
        resume=True,
        label="student",
        **dict(recipe.training) | settings,
    )
    if state.is_main_process:
        notes = {"recipe": STUDENT_RECIPE, "steps": steps, "batch_size": batch_size}
        save_student(student.half(), out / "new", **notes, processes=state.num_processes)


TRAININGS: dict[str, Callable] = {
    "autoencoder": make_autoencoder,
    "classifier": make_classifier,
    "clip": make_clip,
    "trunk": make_trunk,
    "scene-judge": make_scene_judge,
    "teacher": make_teacher,
    "student": make_student,
}

SHARED = ("teacher", "student")  # whose training several processes may share
# What differs on a GPU, where a step takes about as long for 16 images as for many: fewer, larger
# updates, at a higher rate. Sized by an H200's 22 ms for one U-Net call; not run there yet.
ON_CUDA: dict[str, dict] = {
    "autoencoder": {"steps": 2500, "batch_size": 64},
    "teacher": {"steps": 6000, "batch_size": 256, "learning_rate": 1.4e-3},
    "student": {"steps": 1200, "batch_size": 128},
}


def make(output_dir: str | Path, only: tuple[str, ...] = (), **settings) -> None:
    """Train the stages (default: all) below `output_dir`; finished ones stay.

    A stage writes `new` and is finished when that is renamed `final`. Those of `SHARED` may be
    trained by several processes (`accelerate launch`); the other stages by one.
    """
    state = this_process()
    if unknown := set(only) - set(TRAININGS):
        raise ValueError(f"unknown stages {sorted(unknown)}; the stages are {', '.join(TRAININGS)}")
    for name, stage in TRAININGS.items():
        if only and name not in only:
            continue
        out = Path(output_dir) / name
        if (out / "final").is_dir():
            print(f"{name}: found in {out / 'final'}, not trained again")
            continue
        if state.num_processes > 1 and name not in SHARED:
            raise ValueError(f"stage {name} is trained by one process, not {state.num_processes}")
        out.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:
            shutil.rmtree(out / "new", ignore_errors=True)
        stage(out, **settings)
        if state.is_main_process:
            (out / "new").rename(out / "final")
        state.wait_for_everyone()


def install(output_dir: str | Path, assets: str | Path = ASSETS) -> None:
    """Copy every finished stage and its log into the package; the cards there stay."""
    for name in TRAININGS:
        out = Path(output_dir) / name
        if name == "autoencoder" or not (out / "final").is_dir():
            continue  # the autoencoder is shipped inside the teacher
        target = Path(assets) / f"mini-{name}"
        shutil.copytree(out / "final", target, dirs_exist_ok=True)
        for file in target.rglob("config.json"):  # diffusers notes where it loaded a part from
            config = json.loads(file.read_text())
            if config.pop("_name_or_path", None):
                file.write_text(json.dumps(config, indent=2) + "\n")
    logs = Path(assets) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name in TRAININGS:
        log = Path(output_dir) / name / "run" / "log.csv"
        if log.is_file():
            shutil.copy(log, logs / f"{name}.csv")


def _save_module(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
