"""The mini autoencoder: 64x64 images to 16x16x4 latents (or 32x32), Stable Diffusion's by 8."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from studies.mini.images import leaf_images, scene_images, to_signed

KL_WEIGHT = 1e-6


def new_autoencoder(factor: int = 4) -> AutoencoderKL:
    """A randomly initialised autoencoder, of 0.65M parameters by 4 and 0.16M by 2."""
    widths = {4: (16, 32, 64), 2: (16, 32)}[factor]
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def autoencoder_loss(vae: nn.Module, images: Tensor, generator: torch.Generator) -> dict:
    """Squared error of the reconstruction plus a small penalty towards N(0, 1).

    images (B, 3, 64, 64) in [-1, 1].
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    restored = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (restored - images).square().mean()
    kl = posterior.kl().mean()
    return {"loss": error + KL_WEIGHT * kl, "error": error.detach(), "kl": kl.detach()}


def train_autoencoder(
    output_dir: Path,
    steps: int = 9000,
    batch_size: int = 16,
    pool: int = 12_000,
    seed: int = 0,
    factor: int = 4,
) -> tuple[AutoencoderKL, object]:
    """Train on scenes and dead leaves, half and half; returns the model and its log.

    `factor` is what sides are divided by, 4 or 2.
    The scale that makes latents of unit deviation is measured and stored in the configuration.
    """
    torch.manual_seed(seed)
    rendered, _ = scene_images(pool, "train", seed=seed)
    leaves = leaf_images(pool // 2, seed)
    vae = new_autoencoder(factor)

    def loss(model, generator):
        half = batch_size // 2
        a = rendered[torch.randint(len(rendered), (half,), generator=generator)]
        b = leaves[torch.randint(len(leaves), (batch_size - half,), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            b = b.flip(2)
        if torch.rand((), generator=generator) < 0.5:
            b = b.transpose(2, 3)
        batch = torch.cat([a, b])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        device = next(model.parameters()).device
        return autoencoder_loss(model, to_signed(batch).to(device), generator)

    settings = TrainSettings(
        steps, batch_size=batch_size, learning_rate=2e-3, warmup=100, ema_decay=0.998, seed=seed
    )
    log = train(vae, loss, settings, output_dir, resume=True, label="autoencoder")
    with torch.no_grad():
        sample = to_signed(rendered[:512]).to(vae.device)
        latents = vae.encode(sample).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, log
