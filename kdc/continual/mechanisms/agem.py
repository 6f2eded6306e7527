"""Averaged gradient episodic memory, A-GEM (Chaudhry et al., arXiv 1812.00420)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdc.continual.mechanisms.base import Items, draw_items
from kdc.continual.mechanisms.buffer import BufferReplay


class AGEM(BufferReplay):
    """No step may raise, to first order, the loss on a batch of stored images.

    With g the gradient on new images and r that on a batch from the buffer, g is left alone where
    g . r >= 0 and else projected to g - (g . r / r . r) r, equation 11 of the paper. It acts on the
    complete gradient of a step, projections of features included, before that is clipped and handed
    to AdamW, whose moments and averaged weights so see projected gradients only. Old images never
    enter the loss itself.
    """

    def old_items(self, t: int, count: int) -> Items | None:
        return None

    def before_step(self, t: int, old_gradient: Callable[[Items], list[Tensor]]) -> None:
        if not self.replays(t):
            return
        count = self.old_count(self.run.images)
        reference = old_gradient(draw_items(self.run.buffer, count))
        project([p.grad for p in self.trainable()], reference)


@torch.no_grad()
def project(gradient: Sequence[Tensor | None], reference: Sequence[Tensor]) -> None:
    """Take from `gradient`, in place, its part against `reference`, where there is one.

    Both are lists of tensors that make up one vector; None stands for zeros.
    """
    pairs = [(g, r) for g, r in zip(gradient, reference, strict=True) if g is not None]
    along = sum((g * r).sum() for g, r in pairs)
    if along < 0:
        size = sum(r.square().sum() for r in reference)
        for g, r in pairs:
            g -= along / size * r
