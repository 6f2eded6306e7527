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
from kdc.training.loop import TrainSettings, has_bf16, train
from kdc.unet.slimming import slim

LAYOUT = ("down_block_types", "mid_block_type", "up_block_types", "layers_per_block")


def distill(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    dataset: Dataset | LatentDataset,
    *,
    steps: int,
    batch_size: int = 32,
    weights: LossWeights | None = None,
    learning_rate: float = 5e-4,
    caption_dropout: float = 0.1,
    ema_decay: float = 0.999,
    save_every: int = 500,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    precision: str = "auto",
    compile: bool = False,
    gradient_checkpointing: bool = False,
    label: str = "distilling",
) -> pd.DataFrame:
    """Train `student` in place to draw as `teacher` does; returns the log of the loss terms.

    `dataset` is encoded with the teacher's autoencoder and text encoder unless it is a
    `LatentDataset` already. With `LossWeights.only("task")` the teacher's U-Net is never called:
    that is plain fine-tuning, and `student` may then be `teacher.unet` itself. With an `output_dir`
    the run leaves checkpoints there (see `training.train` for `resume`), and at the end the
    student as `output_dir/unet`, a plain diffusers folder. The same seed gives the same weights,
    bit for bit, on one CPU with the same number of threads. Teacher and student are moved to the
    device that Accelerate chose, each process's own.

    `precision` is that of `TrainSettings`; with bf16 a teacher in float32 is copied to bf16 once.
    `compile` runs both networks through `torch.compile` (minutes before the first step on a CPU,
    then steps are shorter and hold less), `gradient_checkpointing` trades time for memory: see
    `speed.quickened`. A compiled run rounds differently, so it is resumed only by a compiled one.

    Raises `ValueError` for a student whose inputs or outputs do not fit the teacher's, whose
    weights are of half precision, or that is its own teacher, and for a run that would resume from
    a checkpoint of other data, teacher, student or loss.
    """
    weights = weights or LossWeights()
    process = forward_process(teacher)
    check_fit(student, teacher.unet, process, weights)
    if batch_size < 1 or not 0 <= caption_dropout <= 1:
        raise ValueError("batch_size must be at least 1 and caption_dropout between 0 and 1")
    settings = TrainSettings(
        steps,
        learning_rate,
        warmup=min(20, steps),
        ema_decay=ema_decay,
        precision=precision,
        save_every=save_every,
    )
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    device = PartialState().device
    refuse_unusable(compile, gradient_checkpointing, device)
    teacher.to(device)
    data = dataset if isinstance(dataset, LatentDataset) else cache_latents(teacher, dataset)
    identity = {
        "weights": dataclasses.asdict(weights),
        "batch_size": batch_size,
        "caption_dropout": caption_dropout,
        "student": {n: str(student.config[n]) for n in LAYOUT},
        "data": fingerprint(data.mean, data.embeddings, data.caption_index),
        "teacher": fingerprint(*teacher.unet.state_dict().values()),
    } | ({"compile": True} if compile else {})
    guide = teacher.unet
    in_bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    if weights.needs_teacher and in_bf16:
        guide = reduced(guide, torch.bfloat16)
    distillation_step = DistillationStep(student, guide, process, weights, seed)

    def loss(model, generator):
        return distillation_step(
            model, *data.draw(batch_size, generator, caption_dropout), generator
        )

    options = {"compile": compile, "gradient_checkpointing": gradient_checkpointing}
    try:
        with quickened(student, guide, distillation_step.hooks, **options):
            log = train(
                student,
                loss,
                settings,
                output_dir,
                seed=seed,
                resume=resume,
                identity=identity,
                label=label,
            )
    finally:
        distillation_step.close()
    if output_dir and PartialState().is_main_process:
        notes = {"weights": dataclasses.asdict(weights), "steps": steps, "batch_size": batch_size}
        save_student(student, output_dir, **notes, seed=seed, learning_rate=learning_rate)
    return log


def published_recipe(
    teacher: UNet2DConditionModel, newest: bool = False, seed: int = 0
) -> tuple[UNet2DConditionModel, LossWeights]:
    """The student and the loss of KDC-Diff's public code, as an audit of it found them.

    The earlier configuration is the paper's: the plan "kdc" with the teacher's weights copied, all
    four terms. The newest commit starts from random weights on the plan "kdc-v2", without features.
    """
    plan, init = ("kdc-v2", "random") if newest else ("kdc", "copy")
    return slim(teacher, plan, init, seed), LossWeights.as_published(newest)


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
