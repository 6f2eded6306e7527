"""Distillation, and fine-tuning as its special case, on the one training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.data import Dataset

from kdc.data.latents import LatentDataset, cache_latents
from kdc.data.shards import Shards
from kdc.distillation.features import feature_pairs
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import DistillationStep, forward_process
from kdc.io import fingerprint, hash_text, plain, read_json, refuse_other_settings
from kdc.paths import STUDENT_FILES
from kdc.pipelines import check_teacher, load_unet, save_student
from kdc.processes import locked, own_part, this_process
from kdc.training.checkpoints import checkpoints, forget_checkpoints
from kdc.training.efficiency import quickened, reduced, refuse_unusable
from kdc.training.loop import (
    check_run,
    identity_of_run,
    make_accelerator,
    precision_on,
    train,
)
from kdc.training.settings import TrainSettings
from kdc.unet.slimming import refuse_adapters

LAYOUT = ("down_block_types", "mid_block_type", "up_block_types", "layers_per_block")


def distill(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    dataset: Dataset | LatentDataset,
    *,
    settings: TrainSettings | None = None,
    weights: LossWeights | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    label: str = "distilling",
    **changes,
) -> pd.DataFrame:
    """Train `student` in place to generate as `teacher` does; returns the log of the loss terms.

    `changes` are fields of `TrainSettings` put over `settings`: steps=200, batch_size=16,
    learning_rate=1e-4, seed=1, ... `dataset` is encoded with the teacher's autoencoder and text
    encoder unless it is a `LatentDataset` already. With `LossWeights.only("task")` the teacher's
    U-Net is never called: that is plain fine-tuning, and `student` may then be `teacher.unet`
    itself. The same seed gives the same weights, bit for bit, on one CPU with the same number of
    threads. Teacher and student are moved to the device that Accelerate chose, each process's own.

    With an `output_dir` the run leaves checkpoints there (see `training.loop.train` for when), and
    at the end the student as `output_dir/unet`, a plain diffusers folder. A run that was stopped
    goes on with `resume=True`; one that is through is given more steps by `resume=True` and larger
    `steps`, from the checkpoint that `keep_state` leaves beside the student.

    With bf16 a teacher in float32 is copied to bf16 once. `compile` runs both networks through
    `torch.compile` (minutes before the first step on a CPU, then steps are shorter and take less
    memory), `gradient_checkpointing` trades time for memory: see `training.efficiency.quickened`. A
    compiled run rounds differently, so it is resumed only by a compiled one.

    Everything is looked at before the first image is encoded. Raises `TypeError` for an unknown
    setting; `ValueError` for a student whose inputs or outputs do not fit the teacher's, whose
    weights are of half precision or all frozen, that is its own teacher or has adapters, for a
    teacher of another kind than Stable Diffusion 1.x and 2.x, and for a run that would resume from
    a checkpoint of other data, teacher, student, loss or settings; `FileExistsError` where a new
    run would mix with an earlier one or write over its student; and another `OSError` where nothing
    can be written. `FloatingPointError` ends a run whose loss or weights are not finite.
    """
    settings = TrainSettings.given(settings, changes)
    weights = weights or LossWeights()
    process = forward_process(teacher)
    check_fit(student, teacher, process, weights)
    device = this_process().device
    options = {
        "compile": settings.compile,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    refuse_unusable(**options, device=device)
    identity = {"weights": weights.to_dict()} | identity_of(student, teacher, process)
    folder = check_run(output_dir, resume, settings, STUDENT_FILES, identity)
    check_finished(folder, resume, settings, identity)
    accelerator = make_accelerator(settings.precision)
    with locked(folder):
        teacher.to(device)
        data = dataset if isinstance(dataset, LatentDataset) else cache_latents(teacher, dataset)
        identity["data"] = identity_of_data(data)
        if folder and resume and is_finished(folder) and not checkpoints(folder):
            return _finished(student, folder, settings, identity)
        followed = teacher.unet
        if weights.needs_teacher and precision_on(device, settings.precision) == "bf16":
            followed = reduced(followed, torch.bfloat16)
        distillation_step = DistillationStep(student, followed, process, weights, settings.seed)

        images = settings.batch_size * this_process().num_processes
        part = own_part(images)

        def loss(model, generator):
            batch = data.draw(images, generator, settings.caption_dropout, part)
            return distillation_step(model, *batch, generator)

        try:
            with quickened(student, followed, distillation_step.hooks, **options):
                log = train(
                    student,
                    loss,
                    settings,
                    folder,
                    resume=resume,
                    identity=identity,
                    accelerator=accelerator,
                    label=label,
                )
        finally:
            distillation_step.close()
            student.eval()
        if folder and accelerator.is_main_process:
            notes = {"weights": weights.to_dict(), "training": dataclasses.asdict(settings)}
            save_student(student, folder, **notes, made_with=identity_of_run(settings) | identity)
            if not settings.keep_state:
                forget_checkpoints(folder)
        accelerator.wait_for_everyone()  # until the student is there
    return log


def identity_of(
    student: UNet2DConditionModel, teacher: StableDiffusionPipeline, process: DDPMScheduler
) -> dict[str, Any]:
    """What of the networks a run that resumes must share, in plain values."""
    return plain(
        {
            "student": {name: str(student.config[name]) for name in LAYOUT},
            "teacher": fingerprint(*teacher.unet.state_dict().values()),
            "noise": {
                name: str(process.config.get(name))
                for name in ("prediction_type", "num_train_timesteps", "rescale_betas_zero_snr")
            }
            | {"alphas": fingerprint(process.alphas_cumprod)},
        }
    )


def identity_of_data(data: LatentDataset) -> str:
    """A fingerprint of all that training draws from; of a cache on disk nothing is read."""
    large = [data.mean, data.std, data.embeddings]
    small = [data.caption_index, data.empty] + ([] if data.choices is None else [data.choices])
    tensors = [part for part in large if not isinstance(part, Shards)]
    stored = [part.identity() for part in large if isinstance(part, Shards)]
    found = fingerprint(*tensors, *small)
    return hash_text(found, *stored) if stored else found


def is_finished(folder: Path) -> bool:
    """Whether a run left its student there."""
    return (folder / "unet" / "config.json").is_file()


def check_finished(
    folder: Path | None, resume: bool, settings: TrainSettings, identity: dict[str, Any]
) -> None:
    """Refuse to write over a student; raises as `distill` does."""
    if folder is None or not is_finished(folder):
        return
    if not resume:
        raise FileExistsError(
            f"{folder} holds a student already: go on with resume=True, or give another output_dir"
        )
    if checkpoints(folder):
        return
    note = read_json(folder / "kdc.json") if (folder / "kdc.json").is_file() else {}
    steps = note.get("training", {}).get("steps")
    if steps != settings.steps:
        raise ValueError(
            f"the run in {folder} is through after {steps} steps and left no checkpoint to go on "
            f"from, now steps={settings.steps}: give another output_dir, and begin from its student"
        )
    _check_note(folder, note, identity_of_run(settings) | identity)


def _check_note(folder: Path, note: dict, made_with: dict[str, Any]) -> None:
    before = note.get("made_with")
    if not before:
        raise ValueError(
            f"{folder / 'kdc.json'} does not say how its student was made, perhaps by an earlier "
            "version: give another output_dir, or load it with kdc.load_student"
        )
    refuse_other_settings(folder, before, made_with, partly=True)


def _finished(
    student: UNet2DConditionModel, folder: Path, settings: TrainSettings, identity: dict[str, Any]
) -> pd.DataFrame:
    """The student takes the weights that the run left, which is all that there is left to do."""
    _check_note(folder, read_json(folder / "kdc.json"), identity_of_run(settings) | identity)
    student.load_state_dict(load_unet(folder).state_dict())
    student.eval()
    return pd.read_csv(folder / "log.csv")


def check_fit(
    student: UNet2DConditionModel,
    pipeline: StableDiffusionPipeline,
    process: DDPMScheduler,
    weights: LossWeights,
) -> None:
    """Raise `ValueError` where a student cannot be trained beside that teacher; see `distill`."""
    check_teacher(pipeline)
    teacher = pipeline.unet
    refuse_adapters(student, "the student")
    for name in ("in_channels", "out_channels", "cross_attention_dim", "sample_size"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"student and teacher differ in {name}: {ours} and {theirs}")
    if student.dtype != torch.float32:
        raise ValueError(f"weights are trained in float32, not {student.dtype}: student.float()")
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "nothing to train: all weights of the student are frozen, see student.requires_grad_()"
        )
    if student is teacher and weights.needs_teacher:
        raise ValueError("the student is its own teacher: cut one with kdc.slim, or train the task")
    prediction = process.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {prediction!r}: only epsilon and v_prediction are known")
    if weights.needs("features"):
        feature_pairs(student, teacher, weights.features_at)
