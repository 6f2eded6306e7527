"""Generated images as the metrics take them: uint8, (N, 3, H, W), on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_bytes(signed: Tensor) -> Tensor:
    """Images in [-1, 1] (values outside are clipped) as uint8, on the CPU."""
    return ((signed.float().cpu().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise `ValueError` for what is not a batch of uint8 images, and say how to make it one."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (N, 3, H, W), got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        seen = f"[{images.min().item():.3g}, {images.max().item():.3g}]" if len(images) else ""
        raise ValueError(
            f"expected uint8 images in 0..255, got {images.dtype} in {seen}: from [0, 1] make "
            "them with (x * 255 + 0.5).to(torch.uint8)"
        )


def to_signed(images: Tensor, size: int = 64) -> Tensor:
    """uint8 images of any size as float32 in [-1, 1], resized to `size` x `size`."""
    check_images(images)
    x = images.float() / 127.5 - 1
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return x
