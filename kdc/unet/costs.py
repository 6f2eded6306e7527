"""What a U-Net costs: parameters, multiply-accumulates and activations from shapes; time measured.

The three are different things. Taking out Stable Diffusion's mid-block removes 97M parameters and
2 % of the multiplications. So all of them are reported, and none stands for another.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

COLUMNS = ("parameters", "linear_macs", "attention_macs", "activation_bytes")
GROUPS = ("resnets", "attentions", "downsamplers", "upsamplers")


def block_of(name: str) -> str:
    """The block a module or parameter belongs to: "down_blocks.0.resnets.1", "conv_in", ..."""
    parts = name.split(".")
    deep = 4 if parts[0] in ("down_blocks", "up_blocks") else 3 if parts[0] == "mid_block" else 1
    return ".".join(parts[:deep])


def count_costs(
    unet: UNet2DConditionModel,
    size: int | None = None,
    sequence_length: int = 77,
    batch_size: int = 1,
) -> pd.DataFrame:
    """Costs of one call, by block and, in the last row, in "total"; from shapes, without memory.

    `size` is the side of the latents (default: the configuration's), `sequence_length` the number
    of tokens in a caption. Columns: `parameters`; `linear_macs`, multiply-accumulates of
    convolutions and linear layers; `attention_macs`, those of the products of queries with keys and
    of weights with values; `macs`, both; `activation_bytes`, what training holds for the backward
    pass in float32, each tensor once, in the block that saved it first, attention weights written
    out in full (a fused attention kernel saves those). Counted with PyTorch's own FLOP counter on
    the meta device, two FLOPs to a multiply-accumulate, once for each configuration and size.
    `unet` may be on any device.
    """
    size = size or unet.config.sample_size
    return _count(unet.to_json_string(), size, sequence_length, batch_size).copy()


@functools.lru_cache(maxsize=256)
def _count(config: str, size: int, sequence_length: int, batch_size: int) -> pd.DataFrame:
    """`count_costs` of the U-Net of that configuration, in JSON."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads(config))
        latents = torch.empty(batch_size, model.config.in_channels, size, size)
        captions = torch.empty(batch_size, sequence_length, model.config.cross_attention_dim)
        timestep = torch.tensor(1)
    rows: dict[str, dict[str, int]] = {}

    def add(name: str, column: str, value: int) -> None:
        row = rows.setdefault(block_of(name), dict.fromkeys(COLUMNS, 0))
        row[column] += value

    for name, parameter in model.named_parameters():
        add(name, "parameters", parameter.numel())
    flops, saved = _trace(model, latents, timestep, captions)
    for name, values in flops.items():
        for operation, count in values.items():
            column = "attention_macs" if "bmm" in operation or "attention" in operation else None
            add(name, column or "linear_macs", count // 2)
    for name, size_in_bytes in saved.items():
        add(name, "activation_bytes", size_in_bytes)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    table.loc["total"] = table.sum()
    table["macs"] = table["linear_macs"] + table["attention_macs"]
    return table.rename_axis("block")


def _trace(model, latents: Tensor, timestep: Tensor, captions: Tensor) -> tuple[dict, dict]:
    """FLOPs by block and operation, and bytes saved for the backward pass by block."""
    blocks = {block_of(name) for name, _ in model.named_parameters()}
    names = {module: name for name, module in model.named_modules() if name in blocks}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    inside = ["other"]
    seen: dict[int, object] = {}
    saved: dict[str, int] = {}

    def enter(module, _):
        inside.append(names[module])

    def leave(*_):
        inside.pop()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that no address is used twice
            saved[inside[-1]] = saved.get(inside[-1], 0) + storage.nbytes()
        return tensor

    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        )
    ]
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(latents, timestep, captions)
    for handle in handles:
        handle.remove()
    counts = counter.get_flop_counts()
    root = type(model).__name__
    flops = {
        name: {str(op): n for op, n in counts[f"{root}.{name}"].items()}
        for name in blocks
        if f"{root}.{name}" in counts
    }
    return flops, saved


def measure_latency(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Seconds of a call of each candidate, all of them interleaved round by round.

    A busy machine slows all candidates of a round alike, so the ratios hold where the times do not:
    `ratio` is the median over rounds of a candidate's time over the first candidate's in the same
    round, `ratio_low` and `ratio_high` the quartiles. `median`, `low` and `high` are seconds, the
    latter two quartiles; `peak_bytes` is the most memory that the device's allocator held during a
    call (CUDA only, else missing). Calls are synchronised. Raises `ValueError` without candidates.

    A U-Net with `call_of(unet)` makes a candidate; so does `functools.partial(pipeline, prompt)`.
    """
    if not candidates or rounds < 1:
        raise ValueError("give at least one candidate and one round")
    on_gpu = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peak: dict[str, int] = dict.fromkeys(candidates, 0)
    for number in tqdm(range(warmup + rounds), desc="timing", mininterval=2):
        for name, call in candidates.items():
            if on_gpu:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            begun = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated(device))
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    times = pd.DataFrame(seconds)
    ratios = times.div(times.iloc[:, 0], axis=0)
    return pd.DataFrame(
        {
            "median": times.median(),
            "low": times.quantile(0.25),
            "high": times.quantile(0.75),
            "ratio": ratios.median(),
            "ratio_low": ratios.quantile(0.25),
            "ratio_high": ratios.quantile(0.75),
            "peak_bytes": pd.Series(peak) if on_gpu else float("nan"),
        }
    ).rename_axis("candidate")


def call_of(
    unet: UNet2DConditionModel,
    size: int | None = None,
    sequence_length: int = 77,
    batch_size: int = 1,
) -> Callable[[], Tensor]:
    """A call of that U-Net on fixed random inputs of the given size, without gradients."""
    generator, like = torch.Generator().manual_seed(0), {"device": unet.device, "dtype": unet.dtype}
    size = size or unet.config.sample_size
    shape = (batch_size, unet.config.in_channels, size, size)
    latents = torch.randn(shape, generator=generator).to(**like)
    captions = torch.randn(
        batch_size, sequence_length, unet.config.cross_attention_dim, generator=generator
    ).to(**like)

    @torch.inference_mode()
    def call() -> Tensor:
        return unet(latents, 500, captions, return_dict=False)[0]

    return call


def time_blocks(unet: UNet2DConditionModel, rounds: int = 8, **inputs) -> pd.Series:
    """Median seconds of each block in a call of `unet`; "other" is the rest of the call."""
    blocks = {block_of(name) for name, _ in unet.named_parameters()}
    names = {module: name for name, module in unet.named_modules() if name in blocks}
    begun: dict[str, float] = {}
    rows: list[dict[str, float]] = []
    on_gpu = unet.device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(unet.device)
        return time.perf_counter()

    def enter(module, *_):
        begun[names[module]] = now()

    def leave(module, *_):
        name = names[module]
        rows[-1][name] = rows[-1].get(name, 0.0) + now() - begun[name]

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    call = call_of(unet, **inputs)
    try:
        for _ in range(rounds + 1):
            rows.append({})
            start = now()
            call()
            total = now() - start
            rows[-1]["other"] = total - sum(rows[-1].values())
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows[1:]).fillna(0.0).median()
