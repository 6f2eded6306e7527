"""Stable Diffusion's own U-Net, with random weights: costs and plans need no trained ones."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

SD_V1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers reads it as the number of heads
}


def sd_unet(
    device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.x, 859,520,964 parameters, random; no memory on "meta"."""
    with torch.device(device):
        unet = UNet2DConditionModel(**SD_V1).eval()
    return unet if dtype == unet.dtype else unet.to(dtype=dtype)
