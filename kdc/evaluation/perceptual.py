"""Perceptual distances by name: the embedded one, or the published weights of `lpips`."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import lpips
import torch
from torch import Tensor

from kdc.evaluation.metrics import BATCH, mini_lpips
from kdc.io import fingerprint

NETS = {"lpips-alex": "alex", "lpips-vgg": "vgg"}


@dataclass(frozen=True, eq=False)
class Perceptual:
    """Paired distance of uint8 images (N, 3, H, W): (N,), lower is nearer."""

    name: str
    model: lpips.LPIPS

    @functools.cached_property
    def checksum(self) -> str:
        """A hash of the weights."""
        return fingerprint(*self.model.state_dict().values())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
            raise ValueError(
                f"expected two batches of uint8 images of one shape, got {a.dtype} "
                f"{tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
            )
        if self.model.training:
            raise RuntimeError(f"{self.name} is in training mode: call .eval() on it")
        pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
        with torch.inference_mode():
            signed = (tuple(x.float() / 127.5 - 1 for x in pair) for pair in pairs)
            return torch.cat([self.model(x, y).flatten() for x, y in signed])


@functools.cache
def find_perceptual(name: str) -> Perceptual:
    """The distance of that name: "mini-lpips", "lpips-alex" or "lpips-vgg", loaded once.

    Raises `ValueError` for another name, `RuntimeError` where the published backbone is neither in
    the local cache nor to be had from the network.
    """
    if name == "mini-lpips":
        return Perceptual(name, mini_lpips())
    if name not in NETS:
        raise ValueError(f"unknown distance {name!r}; there are mini-lpips, {', '.join(NETS)}")
    try:
        with warnings.catch_warnings(action="ignore"):  # that lpips calls torchvision by old names
            return Perceptual(name, lpips.LPIPS(net=NETS[name], verbose=False).eval())
    except Exception as error:  # torchvision raises what its downloader does
        raise RuntimeError(
            f"{name!r} cannot be loaded: its backbone is neither in the local cache nor to be had "
            "from the network. Go online once, or take perceptual='mini-lpips', whose values are "
            f"its own and do not compare. It said: {type(error).__name__}: {error}"
        ) from error
