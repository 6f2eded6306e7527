"""Distillation, and fine-tuning as its special case, on the one training loop."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset

from kdc.data import LatentDataset, cache_latents
from kdc.losses import DistillationLoss, FeatureTaps, LossWeights, min_snr_weight, tap_names
from kdc.models import save_student
from kdc.training import TrainSettings, train

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


class Lesson:
    """One step's loss terms: noise on a batch, the student's prediction and its guide's.

    `guide` is the U-Net that the output, soft and feature terms of `weights` follow; it is not
    trained, and not called where no such term is on. Call `close` when done: it removes the hooks.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        guide: UNet2DConditionModel | None,
        process: DDPMScheduler,
        weights: LossWeights,
    ):
        self.guide, self.process, self.weights = guide, process, weights
        self.criterion, self.device = DistillationLoss(weights), PartialState().device
        self.snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
        self.taps = ()
        if weights.feature:
            pairs = tap_names(student, guide)
            self.taps = (
                FeatureTaps(student, [s for s, _ in pairs]),
                FeatureTaps(guide, [t for _, t in pairs]),
            )
        if weights.needs_teacher:
            guide.eval()

    def __call__(
        self, model: torch.nn.Module, latents: Tensor, words: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Terms as `DistillationLoss` names them, for latents (B, C, h, w), words (B, L, D)."""
        process, weights, device = self.process, self.weights, self.device
        noise = torch.randn(latents.shape, generator=generator)
        count = process.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), generator=generator)
        noisy = process.add_noise(latents, noise, timesteps)
        target = noise_target(process, latents, noise, timesteps)
        inputs = noisy.to(device), timesteps.to(device), words.to(device)
        predicted, guide = model(*inputs, return_dict=False)[0], None
        if weights.needs_teacher:
            with torch.no_grad():
                guide = self.guide(*(_like(self.guide, x) for x in inputs), return_dict=False)
                guide = guide[0].float()
        task_weight = None
        if weights.min_snr:
            task_weight = min_snr_weight(
                self.snr[timesteps], weights.min_snr, process.config.prediction_type
            ).to(device)
        collected = [tap.take() for tap in self.taps] if self.taps else [(), ()]
        return self.criterion(
            predicted, target.to(device), guide, *collected, task_weight=task_weight
        )

    def close(self) -> None:
        for tap in self.taps:
            tap.close()


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
    check_fit(student, teacher.unet, process, weights)
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
    lesson = Lesson(student, teacher.unet, process, weights)

    def loss(model, generator):
        return lesson(model, *data.draw(batch_size, generator, caption_dropout), generator)

    try:
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
        lesson.close()
    if output_dir and PartialState().is_main_process:
        notes = {"weights": dataclasses.asdict(weights), "steps": steps, "batch_size": batch_size}
        save_student(student, output_dir, **notes, seed=seed, learning_rate=learning_rate)
    return log


@torch.no_grad()
def output_error(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    *,
    count: int = 48,
    levels: int = 8,
    guidance: float = 1.0,
    seed: int = 12345,
) -> pd.Series:
    """How far a student's predictions are from its teacher's: E |s - u|^2 by timestep.

    The same `count` pictures' noise and captions for every student of one seed, at `levels`
    timesteps spread evenly over the process. The mean of the series is the score, lower is nearer.

    With `guidance` w other than 1 both predictions are those that the sampler follows, e(empty) +
    w (e(caption) - e(empty)) (Ho & Salimans 2207.12598): what a student makes of the caption then
    counts w^2 times.
    """
    process, generator = forward_process(teacher), torch.Generator().manual_seed(seed)
    last = process.config.num_train_timesteps - 1
    errors = {}
    for level in torch.linspace(0.06 * last, 0.96 * last, levels).long().tolist():
        latents, words = data.draw(count, generator, 0.0)
        timesteps = torch.full((count,), level)
        noise = torch.randn(latents.shape, generator=generator)
        inputs = (process.add_noise(latents, noise, timesteps), timesteps, words)
        inputs = [x.to(teacher.device) for x in inputs]
        difference = _difference(student, teacher.unet, *inputs)
        if guidance != 1:
            empty = data.empty.expand_as(words).to(teacher.device)
            unguided = _difference(student, teacher.unet, *inputs[:2], empty)
            difference = unguided + guidance * (difference - unguided)
        errors[level] = difference.square().mean().item()
    return pd.Series(errors, name="output error").rename_axis("timestep")


def _difference(student: torch.nn.Module, teacher: torch.nn.Module, *inputs: Tensor) -> Tensor:
    """Student's minus teacher's prediction, each made in the network's own precision."""
    s, u = (
        unet(*(_like(unet, x) for x in inputs), return_dict=False)[0].float()
        for unet in (student, teacher)
    )
    return s - u


def _like(module: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the module's precision; whole numbers stay whole."""
    return tensor.to(module.dtype) if tensor.is_floating_point() else tensor


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
