"""What makes a training step waste nothing, each on its own: precision, compiling, recomputing.

Nothing here changes what is computed, only in which precision or order, and all of it is undone
when training is over: the networks are left as they were.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdc.processes import this_process

# The blocks that repeat in a U-Net: compiled, or their shared-out weights put together, one by one.
REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")


def reduced(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """`unet` itself where it has that precision or a lower one, else a frozen copy that has it.

    Cast once; autocast would cast all weights in every step again.
    """
    if unet.dtype.itemsize <= dtype.itemsize:
        return unet
    weights = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in unet.parameters()}
    return copy.deepcopy(unet, weights)


@contextlib.contextmanager
def quickened(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    hooks: Sequence = (),
    *,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
) -> Iterator[None]:
    """Both networks compiled, or the student's inner activations recomputed instead of kept.

    See `compile_unet` for what of them is compiled. `bf16` says that they are called under bf16
    autocast: then `plain_attention` is theirs.

    Enter it when the hooks hang in the networks already: a compiled network keeps the hooks that it
    was compiled with. A step with `gradient_checkpointing` computes the same for less memory and
    the time of one more forward pass of the student. Raises `ValueError` for both at once (the
    compiler chooses by itself what to recompute) and where `torch.compile` does not work.
    """
    refuse_unusable(compile, gradient_checkpointing, student.device)
    compiled: list[nn.Module] = []
    recomputes = gradient_checkpointing and not student.is_gradient_checkpointing
    try:
        for unet in (student, teacher) if compile else ():
            compiled += compile_unet(unet)
        if recomputes:
            student.enable_gradient_checkpointing(_recomputed_in_silence(hooks))
        with plain_attention(*([student, teacher] if bf16 else [])):
            yield
    finally:
        for module in compiled:
            module._compiled_call_impl = None  # what `nn.Module.compile` set
        if recomputes:
            student.disable_gradient_checkpointing()


@contextlib.contextmanager
def plain_attention(*unets: UNet2DConditionModel) -> Iterator[None]:
    """Attention written out as two products on CPUs, the fused one elsewhere.

    There the fused one's backward pass in bf16 took a third of a small network's training step.
    Both compute the same, but for rounding.
    """
    before = [unet.attn_processors for unet in unets]
    on_cpu = this_process().device.type == "cpu"
    try:
        for unet in unets if on_cpu else ():
            unet.set_attn_processor(AttnProcessor())
        yield
    finally:
        for unet, processors in zip(unets, before, strict=True):
            unet.set_attn_processor(processors)


def compile_unet(unet: UNet2DConditionModel, by_regions: bool | None = None) -> list[nn.Module]:
    """Compile a U-Net, and return the modules that were; they compile when they are called.

    `by_regions` compiles the blocks that repeat, each by itself, so that equal ones are compiled
    once; the hooks between them are not traced. None: on a GPU, where compiling a training step of
    full size had not ended after a minute; on CPUs the network is one piece, which runs faster.
    """
    if by_regions is None:
        by_regions = unet.device.type == "cuda"
    parts = [m for m in unet.modules() if type(m).__name__ in REPEATED] if by_regions else [unet]
    # Blocks of other shapes are compilations of the same code, of which PyTorch allows eight.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for part in parts:
        part.compile(dynamic=False)
    return parts


def refuse_unusable(compile: bool, gradient_checkpointing: bool, device: torch.device) -> None:
    """Raise `ValueError` for what `quickened` cannot do."""
    if compile and gradient_checkpointing:
        raise ValueError(
            "compile and gradient_checkpointing exclude each other: the compiler chooses by itself "
            "what to recompute. Take one of them"
        )
    if compile:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as error:
            raise ValueError(
                f"compile=True, but torch.compile does not work on {device} here: leave it out, or "
                f"install what is missing (on a CPU a C++ compiler). It said: {error}"
            ) from error


def _recomputed_in_silence(hooks: Sequence):
    """A checkpointing function for diffusers under which hooks do not see recomputations.

    The hooks run in them again; what those collect would outlive the step.
    """

    @contextlib.contextmanager
    def silence():
        before = [dict(hooked._seen) for hooked in hooks]
        try:
            yield
        finally:
            for hooked, seen in zip(hooks, before, strict=True):
                hooked._seen = seen

    def call(module: nn.Module, *inputs):
        return checkpoint(
            module,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), silence()),
        )

    return call


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)` for which the host does not wait where the device is a GPU.

    So the host draws the next batch while the GPU computes, without a thread of its own.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def average(ema: EMAModel, parameters: Sequence[Tensor]) -> None:
    """`ema.step` in place: that one makes a second copy of all weights on its way.

    Averages on another device, the host's, take in one tensor after the other.
    """
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    share = 1 - ema.cur_decay_value
    if ema.shadow_params[0].device == parameters[0].device:
        torch._foreach_lerp_(ema.shadow_params, parameters, share)
        return
    for shadow, parameter in zip(ema.shadow_params, parameters, strict=True):
        shadow.lerp_(parameter.detach().to(shadow.device), share)


def make_optimizer(
    name: str, parameters: Sequence[Tensor], learning_rate: float, **settings
) -> torch.optim.Optimizer:
    """AdamW by name: "adamw", fused, or "adamw8bit", whose moments take a quarter of the memory.

    Raises `ValueError` where bitsandbytes, which has the latter, is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, fused=True, **settings)
    return find_bitsandbytes().optim.AdamW8bit(parameters, learning_rate, **settings)


def find_bitsandbytes():
    """The package of optimisers in 8 bits. Raises `ValueError` where it does not work."""
    try:
        import bitsandbytes
    except Exception as error:  # it looks for CUDA's libraries while it is imported
        raise ValueError(
            "optimizer='adamw8bit' needs bitsandbytes: pip install bitsandbytes, or take"
            f" optimizer='adamw'. It said: {error}"
        ) from error
    return bitsandbytes


def refuse_infinite(unseen: list[tuple[int, Tensor]], label: str) -> None:
    """Look at the losses, each with its step, that were not looked at yet, and forget them.

    Looking makes the host wait for an accelerator, so the loop does it there a few steps at a time,
    and always before a row is logged or a checkpoint written. Raises `FloatingPointError`.
    """
    values = torch.stack([loss for _, loss in unseen]).tolist()
    for (step, _), value in zip(unseen, values, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(f"{label}: the loss is {value} at step {step}")
    unseen.clear()
