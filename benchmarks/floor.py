"""The matrix products of a distillation step, alone: what no loop around them can undercut.

One step's convolutions, linear layers and attentions, forward and backward, are recorded as PyTorch
calls them and called again on tensors of the same shapes, one kind at a time. Left out are
normalisations, activation functions, sums of residuals, concatenations, the loss, clipping, the
optimiser, the average of the weights, drawing the batch, and Python between the calls. Attention
is one product here, softmax included, because one kernel does it. A compiler that lays tensors out
otherwise, or weights that are packed once, can go below it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

PRODUCTS = ("convolution", "mm", "bmm", "baddbmm", "addmm", "scaled_dot_product")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()
        self.operators: dict = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.removeprefix("_")
        if name.startswith(PRODUCTS):
            described = tree_map(_describe, (args, kwargs))
            key = repr((str(function), described))
            self.calls[key] += 1
            self.operators[key] = (function, *described)
        return function(*args, **kwargs)


def _describe(value):
    if not isinstance(value, Tensor):
        return value
    return _Like(tuple(value.shape), value.stride(), value.dtype, str(value.device))


class _Like(tuple):
    """(shape, stride, dtype, device) of a tensor."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)

    def make(self) -> Tensor:
        shape, stride, dtype, device = self
        empty = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return empty.normal_() if dtype.is_floating_point else empty.zero_()


def _fill(described):
    if isinstance(described, _Like):
        return described.make()
    if isinstance(described, list | tuple):
        return type(described)(_fill(x) for x in described)
    if isinstance(described, dict):
        return {k: _fill(v) for k, v in described.items()}
    return described


def record_step(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, inputs: tuple[Tensor, ...]
) -> tuple[_Recorder, int]:
    """The products of the teacher's forward pass and the student's forward and backward pass, and
    the multiply-accumulates of them."""
    recorder, counter = _Recorder(), FlopCounterMode(display=False)
    with recorder, counter:
        with torch.no_grad():
            teacher(*inputs)
        student(*inputs).sample.square().mean().backward()
    student.zero_grad()
    return recorder, counter.get_total_flops() // 2


def seconds_of_products(recorder: _Recorder, device: torch.device, repeats: int = 3) -> float:
    """Seconds of all products of a step: each kind's median time, as often as it occurs."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    total = 0.0
    for key, count in tqdm(recorder.calls.items(), desc="products alone", mininterval=2):
        function, args, kwargs = recorder.operators[key]
        args, kwargs, times = _fill(args), _fill(kwargs), []
        with torch.no_grad():
            for _ in range(repeats + 1):
                begun = now()
                function(*args, **kwargs)
                times.append(now() - begun)
        total += count * statistics.median(times[1:])
    return total


def square_product_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, side: int = 1024, repeats: int = 5
) -> float:
    """Multiply-accumulates a second of one large square matrix product, its best of some."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return side**3 / best
