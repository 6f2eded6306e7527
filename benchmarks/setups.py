"""What the benchmark trains: the mini teacher, and Stable Diffusion 1.x at full size, random."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import kdc
from kdc.data.latents import LatentDataset
from kdc.pipelines import with_unet
from kdc.unet.layouts import sd_unet

PLAN = "kdc"


@dataclass
class Setup:
    """A teacher, images (N, 3, H, W) uint8 with captions for the reference loop, and the same
    encoded once for ours. `learning_rate` and `ema_decay` are those of both loops.

    `shared` says that all loops train the weights of one student in turn, because memory does not
    hold one for each.
    """

    pipeline: StableDiffusionPipeline
    images: Tensor
    captions: list[str]
    cache: LatentDataset
    learning_rate: float
    ema_decay: float
    shared: bool

    def alone(self) -> Setup:
        """The same, with a teacher that nobody else hooks or compiles; weights are shared."""
        return dataclasses.replace(
            self, pipeline=with_unet(self.pipeline, twin(self.pipeline.unet))
        )


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Modules of its own around the same parameters."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def mini(device: torch.device, count: int = 256) -> Setup:
    """The mini teacher and renderings of both worlds."""
    pipeline = kdc.load_teacher("mini", device=device)
    items = list(kdc.load_dataset("worlds", count=count))
    return _setup(pipeline, items, 5e-4, 0.999, shared=False)


def sd_pipeline(device: torch.device) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x's four networks with random weights, for images of 512 x 512.

    The tokenizer is the mini teacher's, padded to 77 words.
    """
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
    tokenizer = kdc.load_teacher("mini", device="cpu").tokenizer
    tokenizer.model_max_length = 77
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=sd_unet(device),
        scheduler=DDPMScheduler(
            1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def full(device: torch.device, count: int = 2) -> Setup:
    """Stable Diffusion 1.x with random weights (`sd_pipeline`), and random images of 512 x 512.

    Training random weights at this size teaches nothing, so the rate is next to nothing, which
    keeps all values in range; no step is cheaper for it. No average of weights, as in BK-SDM's
    script by default.
    """
    pipeline = sd_pipeline(device)
    pipeline.vae.decoder = torch.nn.Identity()  # never called here
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((count, 3, 512, 512), generator=generator) * 2 - 1
    captions = [f"a red daisy number {i}" for i in range(count)]
    pairs = zip(images, captions, strict=True)
    items = [{"image": image, "caption": caption} for image, caption in pairs]
    return _setup(pipeline, items, 1e-9, 0.0, shared=True)


def _setup(pipeline, items: list[dict], learning_rate: float, ema_decay: float, shared: bool):
    images = torch.stack([item["image"] for item in items])
    whole = ((images + 1) * 127.5).round().to(torch.uint8)
    captions = [item["caption"] for item in items]
    rounded = [
        {"image": image.float() / 127.5 - 1, "caption": caption}
        for image, caption in zip(whole, captions, strict=True)
    ]
    cache = kdc.cache_latents(pipeline, rounded, batch_size=1 if shared else 32)
    return Setup(pipeline, whole, captions, cache, learning_rate, ema_decay, shared)
