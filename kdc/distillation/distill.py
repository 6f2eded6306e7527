"""Distillation, and fine-tuning as its special case, on the one training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.data import Dataset

from kdc.data.latents import LatentDataset, cache_latents
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import DistillationStep, forward_process
from kdc.io import fingerprint
from kdc.pipelines import save_student
from kdc.training.efficiency import quickened, reduced, refuse_unusable
from kdc.training.loop import has_bf16, train
from kdc.training.settings import TrainSettings

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
    itself. With an `output_dir` the run leaves checkpoints there (see `training.loop.train` for
    `resume`), and at the end the student as `output_dir/unet`, a plain diffusers folder. The same
    seed gives the same weights, bit for bit, on one CPU with the same number of threads. Teacher
    and student are moved to the device that Accelerate chose, each process's own.

    With bf16 a teacher in float32 is copied to bf16 once. `compile` runs both networks through
    `torch.compile` (minutes before the first step on a CPU, then steps are shorter and take less
    memory), `gradient_checkpointing` trades time for memory: see `training.efficiency.quickened`. A
    compiled run rounds differently, so it is resumed only by a compiled one.

    Raises `TypeError` for an unknown setting, `ValueError` for a student whose inputs or outputs do
    not fit the teacher's, whose weights are of half precision, or that is its own teacher, and for
    a run that would resume from a checkpoint of other data, teacher, student, loss or settings.
    """
    settings = TrainSettings.given(settings, changes)
    weights = weights or LossWeights()
    process = forward_process(teacher)
    check_fit(student, teacher.unet, process, weights)
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    device = PartialState().device
    options = {
        "compile": settings.compile,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    refuse_unusable(**options, device=device)
    teacher.to(device)
    data = dataset if isinstance(dataset, LatentDataset) else cache_latents(teacher, dataset)
    identity = {
        "weights": weights.to_dict(),
        "student": {name: str(student.config[name]) for name in LAYOUT},
        "data": fingerprint(data.mean, data.embeddings, data.caption_index),
        "teacher": fingerprint(*teacher.unet.state_dict().values()),
    }
    followed = teacher.unet
    in_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    if weights.needs_teacher and in_bf16:
        followed = reduced(followed, torch.bfloat16)
    distillation_step = DistillationStep(student, followed, process, weights, settings.seed)

    def loss(model, generator):
        batch = data.draw(settings.batch_size, generator, settings.caption_dropout)
        return distillation_step(model, *batch, generator)

    try:
        with quickened(student, followed, distillation_step.hooks, **options):
            log = train(
                student,
                loss,
                settings,
                output_dir,
                resume=resume,
                identity=identity,
                label=label,
            )
    finally:
        distillation_step.close()
    if output_dir and PartialState().is_main_process:
        notes = {"weights": weights.to_dict(), "training": dataclasses.asdict(settings)}
        save_student(student, output_dir, **notes)
    return log


def check_fit(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    process: DDPMScheduler,
    weights: LossWeights,
) -> None:
    """Raise `ValueError` where a student cannot be trained beside that teacher; see `distill`."""
    for name in ("in_channels", "out_channels", "cross_attention_dim", "sample_size"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"student and teacher differ in {name}: {ours} and {theirs}")
    if student.dtype != torch.float32:
        raise ValueError(f"weights are trained in float32, not {student.dtype}: student.float()")
    if student is teacher and weights.needs_teacher:
        raise ValueError("the student is its own teacher: cut one with kdc.slim, or train the task")
    prediction = process.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {prediction!r}: only epsilon and v_prediction are known")
