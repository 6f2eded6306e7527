"""A teacher that answers a question it has heard before from memory.

Recipes of one seed draw the same images, captions, noise and timesteps, so that the teacher says
the same to all of them; calling it again would be a third of the study's time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.io import fingerprint

Answer = tuple[Tensor, dict[str, Tensor]]


class _Memory:
    """A U-Net's forward that looks into `answers` before it computes.

    A copy of the network, such as one in lower precision, gets a memory of its own around itself,
    with the same answers.
    """

    def __init__(self, unet: UNet2DConditionModel, names: Sequence[str], answers: dict, outer):
        self.unet, self.names, self.answers, self.outer = unet, names, answers, outer

    def __deepcopy__(self, memo: dict) -> _Memory:
        outer = copy.deepcopy(self.outer, memo)
        return _Memory(memo[id(self.unet)], self.names, self.answers, outer)

    def compute(self, *inputs: Tensor) -> Tensor:
        """What the network, or the memory around which this one lies, says itself."""
        if self.outer is not None:
            return self.outer(*inputs, return_dict=False)[0]
        return type(self.unet).forward(self.unet, *inputs, return_dict=False)[0]

    def __call__(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        if torch.is_grad_enabled() or return_dict:
            raise RuntimeError("only calls without gradients and with return_dict=False")
        modules = dict(self.unet.named_modules())
        key = f"{self.unet.dtype}, {fingerprint(sample, timestep, prompt_embeds)}"
        if key in self.answers:
            output, seen = self.answers[key]
            for name, module in modules.items():
                for hook in module._forward_hooks.values():
                    if name not in seen:
                        raise RuntimeError(f"{name} has a hook, but was not remembered")
                    hook(module, (), seen[name])
            return (output,)
        seen: dict[str, Tensor] = {}
        handles = [
            modules[name].register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: _first(output)})
            )
            for name in self.names
        ]
        try:
            output = self.compute(sample, timestep, prompt_embeds)
        finally:
            for handle in handles:
                handle.remove()
        self.answers[key] = output, seen
        return (output,)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def remembering(
    unet: UNet2DConditionModel, names: Sequence[str], answers: dict[str, Answer]
) -> Iterator[None]:
    """Inside, `unet` looks into `answers` before it computes, and adds what was not there.

    Stored are its output and those of the submodules called `names`; an answer from memory is
    handed to the forward hooks of these submodules as well, so that hooks see what they would have
    seen. Bit for bit the same as computing again. For calls without gradients and with
    `return_dict=False` only; others raise `RuntimeError`, and so does a hook on another submodule,
    which would see nothing. Copies that are made inside remember as well.
    """
    outer = vars(unet).get("forward")  # of another memory around this one
    unet.forward = _Memory(unet, names, answers, outer)
    try:
        yield
    finally:
        if outer is None:
            del unet.forward
        else:
            unet.forward = outer
