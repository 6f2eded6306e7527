"""Consistency distillation against diffusers' samplers and a Gaussian whose paths are known."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import nn

import kdc
from kdc.distillation.few_steps import ConsistencyStep, boundary, distill_few_steps, grid_of
from kdc.distillation.step import forward_process
from kdc.pipelines import in_few_steps

MEAN, SPREAD = 0.7, 0.4  # of the Gaussian that all clean latents come from


@pytest.fixture(scope="module")
def process(teacher):
    return forward_process(teacher)


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, kdc.load_dataset("worlds", count=8))


class Exact(nn.Module):
    """What the best network would predict of N(MEAN, SPREAD^2): the mean of the noise given z."""

    dtype = torch.float32

    def __init__(self, process):
        super().__init__()
        self.kept = process.alphas_cumprod.double()

    def moments(self, timesteps):
        kept = self.kept[timesteps].reshape(-1, 1, 1, 1)
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        return alpha, sigma, alpha**2 * SPREAD**2 + sigma**2

    def forward(self, noisy, timesteps, words, return_dict=False):
        alpha, sigma, variance = self.moments(timesteps)
        return (sigma * (noisy - alpha * MEAN) / variance,)


class ExactJump(Exact):
    """Predicts the noise with which `ConsistencyStep.clean` is the end of the exact path."""

    def forward(self, noisy, timesteps, words, return_dict=False):
        alpha, sigma, variance = self.moments(timesteps)
        first = self.kept[0].sqrt(), (self.kept[0] * SPREAD**2 + 1 - self.kept[0])
        end = first[0] * MEAN + (noisy - alpha * MEAN) * (first[1] / variance).sqrt()
        skip, out = boundary(timesteps)
        clean = torch.where(out > 0, (end - skip * noisy) / out.clamp_min(1e-9), noisy)
        return ((noisy - alpha * clean) / sigma,)


def loss_of(student, process, grid, teacher=None, guidance=1.0):
    teacher = teacher or Exact(process)
    step = ConsistencyStep(teacher, process, torch.zeros(1, 1), guidance=guidance, grid=grid)
    latents = MEAN + SPREAD * torch.randn(512, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    return step(student, latents, torch.zeros(512, 1, 1), generator)["loss"].item()


def test_the_exact_jump_has_a_loss_that_vanishes_with_the_grid(process):
    """The rest is the error of a step of DDIM, of second order; other answers have more."""
    coarse, middle, fine = (loss_of(ExactJump(process), process, grid) for grid in (25, 50, 100))
    assert fine < 0.5 * middle < 0.25 * coarse
    assert loss_of(Exact(process), process, 50) > 10 * middle


def test_one_step_and_the_boundary_are_diffusers(process, teacher):
    """A step of DDIM, and what `LCMScheduler` takes the clean latent to be."""
    grid, network = 50, Exact(process)
    step = ConsistencyStep(network, process, torch.zeros(1, 1), guidance=1.0, grid=grid)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.zeros(2, 1, 1)
    ddim = DDIMScheduler.from_config(process.config, timestep_spacing="trailing", clip_sample=False)
    ddim.set_timesteps(grid)
    times = grid_of(process, grid)
    assert ddim.timesteps.tolist() == times[1:].flip(0).tolist()
    lcm = in_few_steps(teacher).scheduler
    assert isinstance(lcm, LCMScheduler)
    lcm.set_timesteps(grid)
    assert lcm.timesteps.tolist() == times[1:].flip(0).tolist()
    for place in (1, 20, 50):
        now, then = (times[p].repeat(2) for p in (place, place - 1))
        predicted = network(noisy, now, words)[0].float()
        clean = step.clean(network, noisy, now, words)
        denoised = lcm.step(predicted, times[place], noisy).denoised
        assert torch.allclose(clean.float(), denoised.float(), atol=1e-5)
        if place > 1:  # diffusers' last step goes to alpha = 1, the grid's to timestep 0
            nearer = step.one_step(noisy, now, then, words)
            expected = ddim.step(predicted, times[place], noisy).prev_sample
            assert torch.allclose(nearer.float(), expected.float(), atol=1e-5)


def test_at_timestep_0_the_function_is_the_identity(process):
    skip, out = boundary(torch.tensor([0]))
    assert skip.item() == 1 and out.item() == 0
    step = ConsistencyStep(Exact(process), process, torch.zeros(1, 1), guidance=1.0, grid=10)
    noisy = torch.randn(3, 4, 2, 2)
    clean = step.clean(step.teacher, noisy, torch.zeros(3).long(), torch.zeros(3, 1, 1))
    assert torch.allclose(clean.float(), noisy, atol=1e-6)


def test_the_exact_jump_samples_the_gaussian_in_one_step(process, teacher):
    sampler = in_few_steps(teacher).scheduler
    sampler.set_timesteps(1)
    noise, clean = torch.randn(2, 20_000, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    (last,) = sampler.timesteps
    noisy = process.add_noise(MEAN + SPREAD * clean, noise, last.repeat(len(noise)))
    predicted = ExactJump(process)(noisy, last.repeat(len(noise)), None)[0].float()
    drawn = sampler.step(predicted, last, noisy).prev_sample
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(SPREAD, abs=0.02)


def test_guidance_is_that_of_the_sampler(process):
    """The guided teacher goes w times as far from the empty caption's prediction."""

    class Words(nn.Module):
        dtype = torch.float32

        def forward(self, noisy, timesteps, words, return_dict=False):
            return (words[:, :, :1, None].expand_as(noisy),)

    step = ConsistencyStep(Words(), process, torch.zeros(1, 1), guidance=3.0, grid=10)
    noisy, words = torch.zeros(2, 4, 1, 1), torch.ones(2, 1, 1)
    now, then = (grid_of(process, 10)[p].repeat(2) for p in (5, 4))
    nearer = step.one_step(noisy, now, then, words)
    alone = ConsistencyStep(Words(), process, torch.zeros(1, 1), guidance=1.0, grid=10)
    assert torch.allclose(nearer, 3 * alone.one_step(noisy, now, then, words), atol=1e-6)


def test_velocity_means_the_same_as_noise(process):
    """A network of velocity, v = alpha e - sigma x, splits into the same latent and noise."""
    other = type(process).from_config(process.config, prediction_type="v_prediction")
    clean, noise = (torch.randn(3, 4, 2, 2) for _ in range(2))
    times = torch.tensor([10, 500, 900])
    velocity = other.get_velocity(clean, noise, times)
    step = ConsistencyStep(Exact(other), other, torch.zeros(1, 1), guidance=1.0, grid=10)
    found = step.split(other.add_noise(clean, noise, times), velocity, times)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, (clean, noise), strict=True))


@pytest.mark.long
def test_a_student_learns_resumes_and_is_opened_with_its_sampler(teacher, data, tmp_path):
    """Two parts give the weights of one run; the folder knows how it is drawn with."""

    def train(steps, folder, student, resume=False):
        return distill_few_steps(
            student, teacher, data, guidance=3.0, grid=20, steps=steps, batch_size=2,
            output_dir=folder, resume=resume, learning_rate=1e-4, schedule="constant", warmup=0,
        )  # fmt: skip

    whole, parts = (kdc.load_student("mini", teacher).unet for _ in range(2))
    before = whole.conv_in.weight.clone()
    log = train(4, tmp_path / "whole", whole)
    assert {"loss", "consistency"} <= set(log) and not torch.equal(before, whole.conv_in.weight)
    train(2, tmp_path / "parts", parts)
    train(4, tmp_path / "parts", parts, resume=True)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )
    note = json.loads((tmp_path / "whole" / "kdc.json").read_text())
    assert note["few_steps"] == {"guidance": 3.0, "grid": 20}
    opened = kdc.load_student(tmp_path / "whole", teacher)
    assert opened.scheduler.config.original_inference_steps == 20
    prompts = ["a red rose on a night background"]
    ours = in_few_steps(kdc.with_unet(teacher, whole), 20)
    how = {"steps": 2, "guidance": 1.0, "decode": False}
    drawn = [kdc.generate(pipeline, prompts, **how) for pipeline in (opened, ours)]
    assert torch.allclose(*drawn, atol=1e-3)
    with pytest.raises(ValueError, match="other settings|few_steps"):
        distill_few_steps(
            parts, teacher, data, guidance=5.0, grid=20, steps=6, batch_size=2,
            output_dir=tmp_path / "parts", resume=True, learning_rate=1e-4,
            schedule="constant", warmup=0,
        )  # fmt: skip


def test_what_cannot_be_is_refused_before_any_work(teacher, data, process):
    student = kdc.slim(teacher.unet, "kdc")
    for wrong, message in (({"guidance": 0.5}, "at least 1"), ({"grid": 1001}, "at most 1000")):
        with pytest.raises(ValueError, match=message):
            distill_few_steps(student, teacher, data, steps=1, **wrong)
