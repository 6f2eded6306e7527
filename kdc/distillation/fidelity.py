"""How near a student is to its teacher, in single predictions and in what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from kdc.data.latents import LatentDataset
from kdc.distillation.step import forward_process, like
from kdc.pipelines import generate, with_unet


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
    """How far a student's predictions are from its teacher's: `E |s - u|^2` by timestep.

    The same `count` images' noise and captions for every student of one seed, at `levels`
    timesteps spread evenly over the process. The mean of the series is the score, lower is nearer.

    With `guidance` w other than 1 both predictions are those that the sampler follows, e(empty) +
    w (e(caption) - e(empty)) (Ho & Salimans 2207.12598): what a student makes of the caption then
    counts w^2 times.
    """
    process, generator = forward_process(teacher), torch.Generator().manual_seed(seed)
    last = process.config.num_train_timesteps - 1
    errors = {}
    for level in torch.linspace(0.06 * last, 0.96 * last, levels).long().tolist():
        latents, prompt_embeds = data.draw(count, generator, 0.0)
        timesteps = torch.full((count,), level)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = process.add_noise(latents, noise, timesteps)
        inputs = [x.to(teacher.device) for x in (noisy, timesteps, prompt_embeds)]
        difference = _difference(student, teacher.unet, *inputs)
        if guidance != 1:
            empty = data.empty.expand_as(prompt_embeds).to(teacher.device)
            unguided = _difference(student, teacher.unet, *inputs[:2], empty)
            difference = unguided + guidance * (difference - unguided)
        errors[level] = difference.square().mean().item()
    return pd.Series(errors, name="output error").rename_axis("timestep")


def drawing_judge(
    teacher: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    steps: int = 10,
    guidance: float = 7.5,
    seed: int = 0,
) -> Callable[[UNet2DConditionModel], float]:
    """A function that says how far from the teacher's a student's drawings are, lower is nearer.

    Both draw every caption from the same noise with the pipeline's own sampler; the value is the
    mean squared difference of the final latents. This is what `output_error` is a stand-in for: it
    weighs the timesteps and the caption as the sampler does. The teacher draws once.
    """
    how: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "decode": False,
        "progress": False,
    }
    target = generate(teacher, captions, **how)

    def judge(student: UNet2DConditionModel) -> float:
        generated = generate(with_unet(teacher, student), captions, **how)
        return (generated - target).square().mean().item()

    return judge


def _difference(student: torch.nn.Module, teacher: torch.nn.Module, *inputs: Tensor) -> Tensor:
    """Student's minus teacher's prediction, each made in the network's own precision."""
    s, u = (
        unet(*(like(unet, x) for x in inputs), return_dict=False)[0].float()
        for unet in (student, teacher)
    )
    return s - u
