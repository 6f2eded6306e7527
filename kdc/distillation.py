"""Distillation, and fine-tuning as its special case, on the one training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset

from kdc.data import LatentDataset, cache_latents
from kdc.losses import DistillationLoss, LossWeights, min_snr_weight
from kdc.models import save_student
from kdc.slimming import slim
from kdc.taps import FeatureTaps, projections, tap_names
from kdc.training import LossFunction, TrainSettings, train

PROJECTIONS = "feature_projections"  # the student's submodule while it is trained
LAYOUT = ("down_block_types", "mid_block_type", "up_block_types", "layers_per_block")


def forward_process(pipeline: StableDiffusionPipeline) -> DDPMScheduler:
    """The noising process that the pipeline's U-Net was trained for."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def noise_target(process: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor):
    """What a U-Net of that process is trained to predict: the noise, or the velocity."""
    if process.config.prediction_type == "v_prediction":
        return process.get_velocity(latents, noise, timesteps)
    return noise


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of the tensors' bytes, by which a run knows its data and teacher again."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


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

    Raises `ValueError` for a student whose inputs or outputs do not fit the teacher's, whose
    weights are of half precision, or that is its own teacher, and for a run that would resume from
    a checkpoint of other data, teacher, student or loss.
    """
    weights = weights or LossWeights()
    process = forward_process(teacher)
    _check_fit(student, teacher.unet, process, weights)
    if batch_size < 1 or not 0 <= caption_dropout <= 1:
        raise ValueError("batch_size must be at least 1 and caption_dropout between 0 and 1")
    settings = TrainSettings(
        steps, learning_rate, warmup=min(20, steps), ema_decay=ema_decay, save_every=save_every
    )
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    device = PartialState().device
    teacher.to(device)
    data = dataset if isinstance(dataset, LatentDataset) else cache_latents(teacher, dataset)
    identity = {
        "weights": dataclasses.asdict(weights),
        "batch_size": batch_size,
        "caption_dropout": caption_dropout,
        "student": {n: str(student.config[n]) for n in LAYOUT},
        "data": fingerprint(data.mean, data.embeddings, data.caption_index),
        "teacher": fingerprint(*teacher.unet.state_dict().values()),
    }
    settings_of_loss = {"batch_size": batch_size, "caption_dropout": caption_dropout, "seed": seed}
    with distillation_loss(student.to(device), teacher, data, weights, **settings_of_loss) as loss:
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
    if output_dir and PartialState().is_main_process:
        notes = {"weights": dataclasses.asdict(weights), "steps": steps, "batch_size": batch_size}
        save_student(student, output_dir, **notes, seed=seed, learning_rate=learning_rate)
    return log


@contextlib.contextmanager
def distillation_loss(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    weights: LossWeights,
    *,
    batch_size: int,
    caption_dropout: float = 0.1,
    seed: int = 0,
) -> Iterator[LossFunction]:
    """What `train` minimises: a function that draws a batch, runs both networks, gives the terms.

    A context, because the taps hook into both networks until it is left. Where student and teacher
    differ in width, the student has projections of its taps as a submodule for as long, drawn from
    `seed` and trained with it. The function is called with the student, wrapped or not, and a
    generator.
    """
    process, criterion = forward_process(teacher), DistillationLoss(weights)
    device = teacher.unet.device
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    count = process.config.num_train_timesteps
    if weights.needs_teacher:
        teacher.unet.eval()

    def forward_teacher(inputs: list[Tensor]) -> Tensor:
        with torch.no_grad():
            inputs = [like(teacher.unet, x) for x in inputs]
            return teacher.unet(*inputs, return_dict=False)[0].float()

    def loss(model: torch.nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        latents, words = data.draw(batch_size, generator, caption_dropout)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(count, (batch_size,), generator=generator)
        noisy = process.add_noise(latents, noise, timesteps)
        target = noise_target(process, latents, noise, timesteps).to(device)
        inputs = [x.to(device) for x in (noisy, timesteps, words)]
        predicted = model(*inputs, return_dict=False)[0]
        guide = forward_teacher(inputs) if weights.needs_teacher else None
        task_weight = None
        if weights.min_snr:
            prediction = process.config.prediction_type
            task_weight = min_snr_weight(snr[timesteps], weights.min_snr, prediction).to(device)
        ours, theirs = (tap.take() for tap in taps) if taps else ((), ())
        if hasattr(student, PROJECTIONS):
            layers = getattr(student, PROJECTIONS)
            ours = [layer(tap) for layer, tap in zip(layers, ours, strict=True)]
        return criterion(predicted, target, guide, ours, theirs, task_weight=task_weight)

    taps = []
    try:
        if weights.feature:
            pairs = zip(*tap_names(student, teacher.unet, weights.taps), strict=True)
            unets = student, teacher.unet
            taps = [FeatureTaps(unet, names) for unet, names in zip(unets, pairs, strict=True)]
            widths = [unet.config.block_out_channels for unet in unets]
            if list(widths[0]) != list(widths[1])[: len(widths[0])]:
                one = data.mean[:1].to(device), 0, data.embeddings[:1].to(device)
                with torch.no_grad():
                    for unet in unets:
                        unet(*(like(unet, x) if torch.is_tensor(x) else x for x in one))
                layers = projections(*(tap.take() for tap in taps), seed=seed).to(device)
                student.add_module(PROJECTIONS, layers)
        yield loss
    finally:
        for tap in taps:
            tap.close()
        if hasattr(student, PROJECTIONS):
            delattr(student, PROJECTIONS)


def published_recipe(
    teacher: UNet2DConditionModel, newest: bool = False, seed: int = 0
) -> tuple[UNet2DConditionModel, LossWeights]:
    """The student and the loss of KDC-Diff's public code, as an audit of it found them.

    The earlier configuration is the paper's: the plan "kdc" with the teacher's weights copied, all
    four terms. The newest commit starts from random weights on the plan "kdc-v2", without features.
    """
    plan, init = ("kdc-v2", "random") if newest else ("kdc", "copy")
    return slim(teacher, plan, init, seed), LossWeights.as_published(newest)


def like(module: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the module's precision; whole numbers stay whole."""
    return tensor.to(module.dtype) if tensor.is_floating_point() else tensor


def _check_fit(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    process: DDPMScheduler,
    weights: LossWeights,
) -> None:
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
