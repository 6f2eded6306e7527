"""The plain distillation loop that `distill_step.py` measures against; nothing in `kdc` uses it.

It does what BK-SDM's training script does (Kim et al., arXiv 2305.15798): in every step the image
goes through the autoencoder and the caption through the tokenizer and the text encoder, all is in
float32, every block has a forward hook, the student runs before the teacher, AdamW is PyTorch's
default one, and the loss is fetched for the log. Loss terms, learning rates and the order of the
random draws are those of `kdc.distill`, so that the same seed must give the same loss curve. Two
things are kinder to it than that script is: images are in memory, not in files, and the teacher
runs under `no_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from kdc import LossWeights
from kdc.distillation.features import feature_pairs
from kdc.unet.costs import block_of

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Draws:
    """What is random in a step: images (B,), spread of the posterior (B, C, h, w), captions left
    out (B,), noise (B, C, h, w) and timesteps (B,)."""

    index: Tensor
    spread: Tensor
    dropped: Tensor
    noise: Tensor
    timesteps: Tensor


def draw(
    count: int, images: int, shape: Sequence[int], generator: torch.Generator, levels: int = 1000
) -> Draws:
    """A step's draws in the order in which `kdc.distill` makes them; `shape` (C, h, w)."""
    return Draws(
        torch.randint(images, (count,), generator=generator),
        torch.randn((count, *shape), generator=generator),
        torch.rand(count, generator=generator) < CAPTION_DROPOUT,
        torch.randn((count, *shape), generator=generator),
        torch.randint(levels, (count,), generator=generator),
    )


@torch.no_grad()
def encode(
    pipeline: StableDiffusionPipeline, images: Tensor, captions: list[str], spread: Tensor
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], (B, L, D) of captions."""
    posterior = pipeline.vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * spread.to(images.device)
    ids = pipeline.tokenizer(
        captions,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    prompt_embeds = pipeline.text_encoder(ids.to(images.device))[0]
    return latents * pipeline.vae.config.scaling_factor, prompt_embeds


def hook_every_block(unet: UNet2DConditionModel) -> tuple[dict[str, Tensor], list]:
    """Forward hooks on every stage and every block of it; a dictionary that they fill."""
    seen: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    names = {block_of(name) for name, _ in unet.named_parameters()}
    names |= {name.rsplit(".", 2)[0] for name in names if name.count(".") == 3}
    names |= {"mid_block"} & set(dict(unet.named_modules()))
    return seen, [unet.get_submodule(n).register_forward_hook(keep(n)) for n in sorted(names)]


def plain_terms(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    seen: tuple[dict, dict],
    noisy: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    target: Tensor,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """The loss of `kdc.distill`, written out once more from its definition."""
    predicted = student(noisy, timesteps, prompt_embeds).sample
    with torch.no_grad():
        taught = teacher(noisy, timesteps, prompt_embeds).sample
    temperature, features = weights.temperature, []
    for ours, theirs in feature_pairs(student, teacher):
        s, t = seen[0][ours], seen[1][theirs]
        features.append(F.mse_loss(s, t) / (t.pow(2).mean() + 1e-6))
    divergence = F.kl_div(
        F.log_softmax(predicted / temperature, dim=1),
        F.softmax(taught / temperature, dim=1),
        reduction="none",
    )
    terms = {
        "task": F.mse_loss(predicted, target),
        "output": F.mse_loss(predicted, taught),
        "soft": temperature**2 * divergence.sum(dim=1).mean(),
        "feature": sum(features) / len(features),
    }
    terms["loss"] = sum(weights.terms[name] * value for name, value in terms.items())
    return terms


def train_plainly(
    student: UNet2DConditionModel,
    pipeline: StableDiffusionPipeline,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float,
    seed: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train `student` in place as above; returns the loss of every step.

    images (N, 3, H, W) uint8. `wait` is called before every step.
    """
    device, weights = pipeline.device, LossWeights()
    process = DDPMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(seed * 1009)
    optimizer = torch.optim.AdamW(
        student.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(20, steps), num_training_steps=steps
    )
    ema = None
    if ema_decay:
        warmup = {"use_ema_warmup": True, "inv_gamma": 10.0, "power": 0.9}
        ema = EMAModel(student.parameters(), decay=ema_decay, **warmup)
    hooked = [hook_every_block(student), hook_every_block(pipeline.unet)]
    seen = tuple(one for one, _ in hooked)
    shape = (student.config.in_channels, *[student.config.sample_size] * 2)
    student.train()
    losses = []
    try:
        for _ in range(steps):
            wait()
            d = draw(batch_size, len(images), shape, generator)
            batch = images[d.index].to(device).float() / 127.5 - 1
            asked = zip(d.index.tolist(), d.dropped.tolist(), strict=True)
            texts = ["" if dropped else captions[i] for i, dropped in asked]
            latents, prompt_embeds = encode(pipeline, batch, texts, d.spread)
            noise, timesteps = d.noise.to(device), d.timesteps.to(device)
            noisy = process.add_noise(latents, noise, timesteps)
            terms = plain_terms(
                student, pipeline.unet, seen, noisy, timesteps, prompt_embeds, noise, weights
            )
            terms["loss"].backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema:
                ema.step(student.parameters())
            losses.append(terms["loss"].item())
    finally:
        for _, handles in hooked:
            for handle in handles:
                handle.remove()
    if ema:
        ema.copy_to(student.parameters())
    return losses
