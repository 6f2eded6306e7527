"""A teacher that answers a question it has heard before from memory.

Recipes of one seed draw the same images, captions, noise and timesteps, so that the teacher says
the same to all of them; calling it again would be a third of the study's time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.io import fingerprint

Answer = tuple[Tensor, dict[str, Tensor]]


@contextlib.contextmanager
def remembering(
    unet: UNet2DConditionModel, names: Sequence[str], answers: dict[str, Answer]
) -> Iterator[None]:
    """Inside, `unet` looks into `answers` before it computes, and adds what was not there.

    Kept are its output and those of the submodules called `names`; an answer from memory is handed
    to the forward hooks of these submodules as well, so that hooks see what they would have seen.
    Bit for bit the same as computing again. For calls without gradients and with
    `return_dict=False` only; others raise `RuntimeError`, and so does a hook on another submodule,
    which would see nothing.
    """
    outer = vars(unet).get("forward")  # of another memory around this one
    compute, modules = unet.forward, dict(unet.named_modules())

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def ask(
        sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        if torch.is_grad_enabled() or return_dict:
            raise RuntimeError("only calls without gradients and with return_dict=False")
        key = fingerprint(sample, timestep, prompt_embeds)
        if key in answers:
            output, seen = answers[key]
            for name, module in modules.items():
                for hook in module._forward_hooks.values():
                    if name not in seen:
                        raise RuntimeError(f"{name} has a hook, but was not remembered")
                    hook(module, (), seen[name])
            return (output,)
        seen: dict[str, Tensor] = {}
        handles = [
            modules[name].register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: first(output)})
            )
            for name in names
        ]
        try:
            output = compute(sample, timestep, prompt_embeds, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        answers[key] = output, seen
        return (output,)

    unet.forward = ask
    try:
        yield
    finally:
        if outer is None:
            del unet.forward
        else:
            unet.forward = outer
