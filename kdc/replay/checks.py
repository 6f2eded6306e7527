"""What a replay buffer is given, looked at before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdc.checks import whole_number
from kdc.replay.policies import POLICIES
from kdc.replay.storage import DTYPES, Latents

STORED = torch.iinfo(torch.int32)  # tasks and labels are held as that
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
# By a buffer's dtype, what its latents (in eight bits, their steps) and its embeddings are held as.
LARGEST = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}
EMBEDDED = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float16}

AT_ONCE = 1024  # rows looked at together, so that memory does not grow with the data set


def whole_numbers(
    name: str, values: Tensor | Sequence[int], low: int, high: int, dtypes: Sequence = SIGNED
) -> Tensor:
    """`values` (N,) as int64.

    Raises `TypeError` for other dtypes, `ValueError` for another shape or what is out of bounds.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, or too large for int64
        raise TypeError(f"{name} must be whole numbers (N,): {error}") from error
    if found.ndim != 1:
        raise ValueError(f"{name} must be whole numbers (N,), not of shape {tuple(found.shape)}")
    if len(found) and found.dtype not in dtypes:
        raise TypeError(
            f"{name} must be whole numbers, not {found.dtype}: convert them with .long(), or a "
            "mask with .nonzero().flatten()"
        )
    found = found.long()
    outside = (found < low) | (found > high)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(f"{name}[{first}] is {found[first]}, but must be from {low} to {high}")
    return found


def check_settings(
    policy: str, dtype: str, capacity: int | None, capacity_bytes: int | None
) -> tuple[int | None, int | None]:
    """The capacity in items and in bytes, one of them None; raises as `ReplayBuffer` says."""
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; the policies are {', '.join(POLICIES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    if (capacity is None) == (capacity_bytes is None):
        raise ValueError("give the capacity in items or capacity_bytes, one of them")
    if capacity is None:
        return None, whole_number("capacity_bytes", capacity_bytes, 1)
    return whole_number("capacity", capacity, 1), None


def rows_of(count: int, index: Tensor | Sequence[int] | None) -> Tensor:
    """The rows `index` (N,) of `count`, all by default; those below 0 count from the end.

    Bytes are refused: as an index they are a mask.
    """
    if index is None:
        return torch.arange(count)
    return whole_numbers("index", index, -count, count - 1)


def labels_of(count: int, labels: Tensor | Sequence[int] | None, task: int) -> Tensor:
    """The labels (count,) of as many items, the task's number by default."""
    if labels is None:
        return torch.full((count,), task)
    dtypes = (*SIGNED, torch.uint8)
    labels = whole_numbers("labels", labels, STORED.min, STORED.max, dtypes)
    if len(labels) != count:
        raise ValueError(f"{count} items, but labels of shape {tuple(labels.shape)}")
    return labels


def check_items(data: Latents, index: Tensor, shapes: Mapping[str, list], dtype: str) -> None:
    """Raise `ValueError` where the rows `index` (N,) cannot go into a buffer of that dtype.

    `shapes` are those of a "latent" and an "embedding" that it holds, empty before the first.
    """
    if data.mean.ndim != 4 or data.mean.shape != data.std.shape:
        raise ValueError(
            "mean and std must be of one shape (N, C, h, w), not "
            f"{tuple(data.mean.shape)} and {tuple(data.std.shape)}"
        )
    given = {"latent": data.mean.shape[1:], "embedding": data.embeddings.shape[1:]}
    for name, shape in shapes.items():
        if list(given[name]) != shape:
            raise ValueError(
                f"the buffer holds {name}s of shape {tuple(shape)}, these are {tuple(given[name])}"
            )
    for name in ("mean", "std"):
        for rows in index.split(AT_ONCE):
            _check_finite(f"the latents' {name} is", getattr(data, name)[rows], LARGEST[dtype])
    for rows in data.caption_index[index].unique().split(AT_ONCE):
        words = data.embeddings[rows]
        _check_finite("the embeddings of captions are", words, EMBEDDED[dtype])


def _check_finite(name: str, values: Tensor, dtype: torch.dtype) -> None:
    if values.numel() and not (largest := values.abs().amax()) <= torch.finfo(dtype).max:
        precision = str(dtype).removeprefix("torch.")  # also where it is not a number
        raise ValueError(f"{name} not finite in {precision}: the largest is {largest.item():g}")
