"""The mini teacher: a U-Net of Stable Diffusion v1's layout at a tenth of its width.

Text encoder and U-Net are trained together from nothing, with the autoencoder frozen and every
training image encoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel

from kdc.data.worlds import TEMPLATES, caption
from kdc.distillation.losses import min_snr_weight
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from studies.mini.images import to_signed, world_images
from studies.mini.text import new_text_encoder, new_tokenizer, tokenize

NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CAPTION_DROPOUT = 0.1
MIN_SNR = 5.0


def new_unet(
    cross_attention_dim: int = 96,
    widths: tuple[int, ...] = (32, 64, 128, 128),
    side: int = 16,
) -> UNet2DConditionModel:
    """The mini teacher's U-Net, randomly initialised: 8.69M parameters.

    Two heads instead of eight: at this width eight heads would hold four channels each, and
    attention would take most of the time.
    """
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def noise_scheduler() -> DDPMScheduler:
    """The forward process, Stable Diffusion's: 1,000 steps, scaled-linear betas."""
    return DDPMScheduler(1000, clip_sample=False, **NOISE)


def sampling_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler in the pipeline. Trailing steps start from pure noise, as in training."""
    return DPMSolverMultistepScheduler(1000, timestep_spacing="trailing", steps_offset=1, **NOISE)


class TextToNoise(nn.Module):
    """U-Net and text encoder as one module, so that one loop trains both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        embeddings = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timesteps, embeddings, return_dict=False)[0]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch_size: int = 64) -> tuple:
    """Means and deviations (N, 4, 16, 16) of the scaled latents of uint8 images."""
    means, deviations = [], []
    for batch in tqdm(images.split(batch_size), desc="encoding", mininterval=2):
        posterior = vae.encode(to_signed(batch).to(vae.device)).latent_dist
        means.append(posterior.mean.cpu() * vae.config.scaling_factor)
        deviations.append(posterior.std.cpu() * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


def train_teacher(
    vae: AutoencoderKL,
    output_dir: Path,
    steps: int = 6500,
    batch_size: int = 16,
    pool: int = 16000,
    learning_rate: float = 8e-4,
    seed: int = 0,
    draw: Callable = world_images,
    said: Callable = caption,
    **layout,
) -> tuple[TextToNoise, object, object]:
    """Train U-Net and text encoder on training combinations; returns them, tokenizer and log.

    `draw` is `world_images`, or `scene_images` with `said` for its captions; `layout` is that of
    `new_unet`.
    """
    torch.manual_seed(seed)
    images, shown = draw(pool, "train", seed=seed + 1)
    means, deviations = encode_images(vae.eval(), images)
    del images
    texts = [[said(a, t) for a in shown] for t in range(len(TEMPLATES))]
    tokenizer = new_tokenizer(texts[-1] if draw is not world_images else ())
    ids = torch.stack([tokenize(tokenizer, each) for each in texts])
    empty = tokenize(tokenizer, [""])[0]
    forward_process = noise_scheduler()
    snr = forward_process.alphas_cumprod / (1 - forward_process.alphas_cumprod)
    model = TextToNoise(new_unet(**layout), new_text_encoder(tokenizer))

    def loss(model, generator):
        draw = lambda high: torch.randint(high, (batch_size,), generator=generator)  # noqa: E731
        index, template, timesteps = draw(len(means)), draw(len(TEMPLATES)), draw(1000)
        noise, spread = torch.randn((2, batch_size, *means.shape[1:]), generator=generator)
        latents = means[index] + deviations[index] * spread
        token_ids = ids[template, index]
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        token_ids = torch.where(dropped[:, None], empty, token_ids)
        noisy = forward_process.add_noise(latents, noise, timesteps)
        device = next(model.parameters()).device
        predicted = model(noisy.to(device), timesteps.to(device), token_ids.to(device))
        error = (predicted.float() - noise.to(device)).square().mean(dim=(1, 2, 3))
        weighted = error * min_snr_weight(snr[timesteps], MIN_SNR).to(device)
        return {"loss": weighted.mean(), "task": error.mean().detach()}

    settings = TrainSettings(
        steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=200,
        ema_decay=0.9995,
        seed=seed,
    )
    log = train(model, loss, settings, output_dir, resume=True, label="teacher")
    return model, tokenizer, log


def as_pipeline(vae: AutoencoderKL, model: TextToNoise, tokenizer) -> StableDiffusionPipeline:
    """The trained parts as a diffusers pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=sampling_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
