"""Few steps: a student that jumps to the end of the sampler's path, with guidance folded in.

Consistency distillation (Song et al. 2303.01469) in the latent space and with guidance (Luo et al.
2310.04378). On the path that the teacher's sampler follows under guidance, all points lead to one
clean latent. The student learns to name it from any of them: its answers at two neighbouring points
of the path are made equal. Then one call of the network gives an image, and two to four a better
one, without the second call that guidance costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset

from kdc.checks import finite_number, whole_number
from kdc.data.latents import LatentDataset
from kdc.distillation.distill import check_fit, train_student
from kdc.distillation.losses import LossWeights
from kdc.distillation.step import forward_process, like
from kdc.pipelines import in_few_steps
from kdc.processes import own_part, this_process
from kdc.training.efficiency import send
from kdc.training.settings import TrainSettings

DEVIATION = 0.5  # of clean latents, in the boundary condition of `LCMScheduler`
SCALING = 10.0  # of timesteps there
HUBER = 1e-3  # where the distance turns from a square into an absolute value
NO_DROPOUT = {"caption_dropout": 0.0}  # where no settings are given
SHOWN_STEPS = 4  # of the grids of images while it trains


def distill_few_steps(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    dataset: Dataset | LatentDataset,
    *,
    guidance: float = 7.5,
    grid: int = 50,
    settings: TrainSettings | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    cache_dir: str | Path | None = None,
    sample_prompts: list[str] | tuple[str, ...] = (),
    label: str = "distilling to few steps",
    **changes: Any,
) -> pd.DataFrame:
    """Train `student` in place to draw in few steps what `teacher` draws under `guidance` in many.

    The student begins as a network that predicts noise well: a distilled one, or a copy of the
    teacher's. `grid` is the number of steps of DDIM whose path it learns to shorten. Without
    `settings`, captions are not dropped: the guided teacher sees the empty one anyway. Use what was
    trained with `kdc.pipelines.in_few_steps`, which `kdc.load_student` does by itself.

    All else is as in `distill`, and so is what is raised; and `ValueError` for a guidance below 1
    and for a grid that the noising process does not have.
    """
    settings = TrainSettings.given(settings, changes if settings else NO_DROPOUT | changes)
    if not finite_number("guidance", guidance) >= 1:
        raise ValueError(f"guidance must be at least 1, which is none: {guidance}")
    process = forward_process(teacher)
    grid_of(process, grid)
    check_fit(student, teacher, process, LossWeights.only("output"))

    def make_step(followed: UNet2DConditionModel, data: LatentDataset) -> ConsistencyStep:
        return ConsistencyStep(followed, process, data.empty, guidance=guidance, grid=grid)

    return train_student(
        student,
        teacher,
        dataset,
        make_step,
        settings=settings,
        follows=True,
        made_with={"few_steps": {"guidance": guidance, "grid": grid}},
        output_dir=output_dir,
        resume=resume,
        cache_dir=cache_dir,
        sample_prompts=sample_prompts,
        label=label,
        in_steps=lambda pipeline: in_few_steps(pipeline, grid),
        steps=SHOWN_STEPS,
        guidance=1.0,
    )


def grid_of(process: DDPMScheduler, grid: int) -> Tensor:
    """The timesteps (grid + 1,) between which answers are compared, from 0 upwards.

    Raises `ValueError` for a grid that the process does not have.
    """
    total = process.config.num_train_timesteps
    if whole_number("grid", grid, 1) > total:
        raise ValueError(f"a grid of at most {total} steps is needed, not {grid}")
    return torch.cat([torch.zeros(1).long(), torch.arange(1, grid + 1) * (total // grid) - 1])


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1), with which a consistency function is the identity at t = 0.

    c_skip = d^2 / (t^2 + d^2) and c_out = t / sqrt(t^2 + d^2), t the timestep times `SCALING` and d
    the `DEVIATION` (2303.01469, appendix C).
    """
    scaled = SCALING * timesteps.float().reshape(-1, 1, 1, 1)
    total = scaled.square() + DEVIATION**2
    return DEVIATION**2 / total, scaled / total.sqrt()


class ConsistencyStep:
    """The consistency loss of a batch, as `train_student` takes it.

    With the student's clean latent f(z, t) = c_skip z + c_out x(z, t), x what its prediction means,
    a point z_t of the noising process, and z_s one step of the guided teacher's DDIM further:

        sqrt(|f(z_t, t) - f(z_s, s)|^2 + h^2) - h,  averaged over all values,

    h = `HUBER`, and no gradient through f(z_s, s) (2310.04378, equation 10, with the student itself
    as its target: Song & Dhariwal 2310.14189). Several processes share the images of a step.
    """

    hooks: tuple = ()

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        process: DDPMScheduler,
        empty: Tensor,
        *,
        guidance: float,
        grid: int,
    ):
        self.teacher, self.guidance, self.device = teacher.eval(), guidance, this_process().device
        self.times, self.process = grid_of(process, grid), process
        self.empty = send(empty, self.device)
        self.velocity = process.config.prediction_type == "v_prediction"
        kept = process.alphas_cumprod.to(self.device)
        self.alphas, self.sigmas = kept.sqrt(), (1 - kept).sqrt()

    def __call__(
        self,
        model: torch.nn.Module,
        latents: Tensor,
        prompt_embeds: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The loss of latents (B, C, h, w) with embeddings (B, L, D); `generator` is on the CPU."""
        total = len(latents) * this_process().num_processes
        part = own_part(total)
        noise = torch.randn((total, *latents.shape[1:]), generator=generator)[part]
        place = torch.randint(1, len(self.times), (total,), generator=generator)[part]
        now, then = (send(self.times[p], self.device) for p in (place, place - 1))
        noisy = send(self.process.add_noise(latents, noise, self.times[place]), self.device)
        words = send(prompt_embeds, self.device)
        with torch.no_grad():
            with torch.autocast(self.device.type, enabled=False):
                nearer = self.one_step(noisy, now, then, words)
            target = self.clean(model, nearer, then, words)
        found = self.clean(model, noisy, now, words)
        loss = ((found - target).square() + HUBER**2).sqrt().sub(HUBER).mean()
        return {"loss": loss, "consistency": loss.detach()}

    def close(self) -> None:
        """Nothing hangs in the networks."""

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1, 1, 1) of z_t = alpha x + sigma e."""
        return tuple(x[timesteps].reshape(-1, 1, 1, 1) for x in (self.alphas, self.sigmas))

    def split(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction, of noise or velocity, means."""
        alpha, sigma = self.coefficients(timesteps)
        if self.velocity:
            return alpha * noisy - sigma * predicted, alpha * predicted + sigma * noisy
        return (noisy - sigma * predicted) / alpha, predicted

    def one_step(self, noisy: Tensor, now: Tensor, then: Tensor, words: Tensor) -> Tensor:
        """One step of DDIM (Song et al. 2010.02502) of the guided teacher."""
        inputs = [noisy, now, words]
        if self.guidance != 1:
            without = self.empty.to(words.dtype).expand_as(words)
            inputs = [torch.cat(two) for two in ((noisy, noisy), (now, now), (words, without))]
        inputs = [like(self.teacher, x) for x in inputs]
        predicted = self.teacher(*inputs, return_dict=False)[0].float()
        if self.guidance != 1:
            with_words, plain = predicted.chunk(2)
            predicted = plain + self.guidance * (with_words - plain)
        clean, noise = self.split(noisy, predicted, now)
        alpha, sigma = self.coefficients(then)
        return alpha * clean + sigma * noise

    def clean(self, model: torch.nn.Module, noisy: Tensor, timesteps: Tensor, words: Tensor):
        """The student's consistency function f(z, t)."""
        predicted = model(noisy, timesteps, words, return_dict=False)[0].float()
        skip, out = boundary(timesteps)
        return skip * noisy + out * self.split(noisy, predicted, timesteps)[0]
