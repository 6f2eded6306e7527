import pytest
import torch
from diffusers import DDPMScheduler

import kdc
from kdc.data.datasets import WorldDataset
from kdc.distillation.fidelity import drawing_judge


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, WorldDataset(["flora", "lepidoptera"], count=48))


def test_the_output_error_is_the_mean_squared_difference_of_predictions(teacher, data):
    assert kdc.output_error(teacher.unet, teacher, data, count=4, levels=2).eq(0).all()
    student = kdc.slim(teacher.unet, "kdc")
    errors = kdc.output_error(student, teacher, data, count=6, levels=1, seed=5)
    g = torch.Generator().manual_seed(5)
    latents, prompt_embeds = data.draw(6, g, 0.0)
    t = torch.full((6,), errors.index[0])
    noise = torch.randn(latents.shape, generator=g)
    a = DDPMScheduler.from_config(teacher.scheduler.config).alphas_cumprod[t][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    with torch.no_grad():
        difference = (
            student(noisy, t, prompt_embeds).sample - teacher.unet(noisy, t, prompt_embeds).sample
        )
    assert errors.iloc[0] == pytest.approx(difference.square().mean().item(), rel=1e-4)


def test_the_guided_output_error_is_that_of_the_prediction_the_sampler_follows(teacher, data):
    student = kdc.slim(teacher.unet, "kdc")
    errors = kdc.output_error(student, teacher, data, count=4, levels=1, guidance=3.0, seed=5)
    g = torch.Generator().manual_seed(5)
    latents, prompt_embeds = data.draw(4, g, 0.0)
    t = torch.full((4,), errors.index[0])
    noise = torch.randn(latents.shape, generator=g)
    noisy = DDPMScheduler.from_config(teacher.scheduler.config).add_noise(latents, noise, t)
    both = torch.cat([data.empty.expand_as(prompt_embeds), prompt_embeds])
    guided = []
    with torch.no_grad():
        for unet in (student, teacher.unet):
            empty, full = unet(noisy.repeat(2, 1, 1, 1), t.repeat(2), both).sample.chunk(2)
            guided.append(empty + 3.0 * (full - empty))
    expected = (guided[0] - guided[1]).square().mean().item()
    assert errors.iloc[0] == pytest.approx(expected, rel=1e-3)


def test_a_student_is_judged_by_the_latents_it_draws(teacher):
    captions = ["a red rose on a night background", "a white daisy on a sand background"]
    how = {"steps": 2, "guidance": 3.0, "seed": 4}
    judge = drawing_judge(teacher, captions, **how)
    assert judge(kdc.slim(teacher.unet, "full")) == pytest.approx(0, abs=1e-9)
    student = kdc.slim(teacher.unet, "kdc")
    generated = [
        kdc.generate(one, captions, decode=False, **how)
        for one in (teacher, kdc.with_unet(teacher, student))
    ]
    assert generated[0].shape == (2, 4, 16, 16)
    assert judge(student) == pytest.approx(
        (generated[0] - generated[1]).square().mean().item(), rel=1e-5
    )


def test_latents_decode_to_the_images(teacher):
    caption = "a red rose on a night background"
    latents = kdc.generate(teacher, caption, steps=2, decode=False)
    with torch.no_grad():
        decoded = teacher.vae.decode(latents / teacher.vae.config.scaling_factor).sample
    images = kdc.generate(teacher, caption, steps=2)
    error = (decoded.clamp(-1, 1) + 1) * 127.5 - images.float()
    assert error.abs().max() <= 0.6
