"""Rows of tensors in memory or on disk, captions held once, latents in eight bits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kdc.data.shards import Shards
from kdc.paths import as_path

SCRATCH, LOCK = "rows-", "in-use.lock"  # scratch folders, and what says that they are in use
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
LEVELS = 127  # whole numbers on either side of zero in eight bits


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w) in eight bits, and the step of every item's every channel (N, C).

    The step is the channel's largest magnitude divided by 127, so that `dequantise` returns each
    value to within half a step (and the rounding of float32).
    """
    step = x.float().abs().amax(dim=(2, 3)) / LEVELS
    step = step.clamp_min(torch.finfo(torch.float32).tiny)  # a channel of zeros has no scale
    whole = (x.float() / step[:, :, None, None]).round().clamp(-LEVELS, LEVELS)
    return whole.to(torch.int8), step


def dequantise(whole: Tensor, step: Tensor) -> Tensor:
    """The inverse of `quantise` up to half a step: (N, C, h, w) float32."""
    return whole.float() * step[:, :, None, None]


def _forget_dead(folder: Path) -> None:
    """Remove the scratch of processes that are no more, known by a lock that nobody holds."""
    for left in folder.glob(f"{SCRATCH}*"):
        if not (left / LOCK).is_file():
            continue
        try:
            with FileLock(left / LOCK, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue  # in use


class Rows:
    """Named columns of equal length, allocated as they are needed, up to `capacity` rows.

    `columns` gives every column's shape without the row dimension, and its dtype. With a `folder`
    the columns are memory-mapped files in a scratch directory below it that goes with this object;
    the operating system then decides what is in memory. What a killed process left there is
    removed.
    """

    def __init__(
        self,
        columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        capacity: int,
        folder: str | Path | None = None,
    ):
        self.columns, self.capacity, self.allocated = dict(columns), capacity, 0
        self._scratch = None
        if folder:
            folder = as_path(folder, "the buffer's folder")
            folder.mkdir(parents=True, exist_ok=True)
            _forget_dead(folder)
            self._scratch = tempfile.TemporaryDirectory(
                prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True
            )
            self._alive = FileLock(Path(self._scratch.name) / LOCK)
            self._alive.acquire()
        self._data = {n: torch.empty((0, *s), dtype=d) for n, (s, d) in self.columns.items()}

    @property
    def bytes_per_row(self) -> int:
        """What one row takes, in bytes."""
        return sum(torch.Size(shape).numel() * d.itemsize for shape, d in self.columns.values())

    def reserve(self, rows: int) -> None:
        """Make room for so many rows, and for as many again, as far as the capacity goes.

        Raises `ValueError` above the capacity, and `OSError` where the disk is full; what was
        stored stays as it was.
        """
        if rows > self.capacity:
            raise ValueError(f"{rows} rows do not fit: there is room for {self.capacity}")
        if rows <= self.allocated:
            return
        wanted = min(max(2 * rows, 64), self.capacity)
        for name, (shape, dtype) in self.columns.items():
            grown = self._allocate(name, (wanted, *shape), dtype)
            if not self._scratch:  # a file grows in place
                grown[: self.allocated] = self._data[name][: self.allocated]
            self._data[name] = grown
        self.allocated = wanted

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._scratch:
            return torch.zeros(shape, dtype=dtype)
        file, count = Path(self._scratch.name) / f"{name}.bin", torch.Size(shape).numel()
        size = count * dtype.itemsize
        with open(file, "ab") as opened:
            try:
                # A file that only claims the space ends the process when the disk is full.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.write(bytes(size - opened.tell()))
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"no room for {size:,} bytes of the replay buffer ({error.strerror}): make room"
                    " in its folder, lower its capacity or its dtype, or hold it in memory",
                    str(file.parent.parent),
                ) from error
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)

    def write(self, slots: Tensor, values: Mapping[str, Tensor]) -> None:
        """Put a value into every column of the rows `slots`, (N,) without repetition.

        Raises `KeyError` where a column is missing: nothing is written in part.
        """
        if missing := self.columns.keys() - values.keys():
            raise KeyError(f"no values for {', '.join(sorted(missing))}")
        if len(slots):
            self.reserve(int(slots.max()) + 1)
        for name, (_, dtype) in self.columns.items():
            self._data[name][slots] = values[name].to(dtype)

    def read(self, slots: Tensor, *names: str) -> dict[str, Tensor]:
        """Copies of the named columns (default: all) at the rows `slots`, (N,)."""
        return {name: self._data[name][slots] for name in names or self.columns}


def columns_of(shape: Sequence[int], dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    columns = {name: (tuple(shape), DTYPES[dtype]) for name in ("mean", "std")}
    if dtype == "int8":
        columns |= {f"{name}_step": ((shape[0],), torch.float32) for name in ("mean", "std")}
    return columns | {name: ((), torch.int32) for name in ("caption", "task", "label")}


def item_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of one item with latents of that shape (C, h, w): mean, deviation, and three numbers.

    Captions and their embeddings are not counted: they are held once for all items that share one.
    """
    return Rows(columns_of(shape, dtype), 0).bytes_per_row


class Latents(Protocol):
    """What the buffer takes from a `kdc.LatentDataset`."""

    mean: Tensor | Shards
    std: Tensor | Shards
    embeddings: Tensor | Shards
    caption_index: Tensor
    captions: list[str]


class Captions:
    """Distinct captions that some item uses, with their embeddings (L, D)."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, capacity: int, folder):
        self.rows = Rows({"embedding": (tuple(shape), dtype)}, capacity, folder)
        self.place: dict[str, int] = {}
        self.texts: list[str | None] = []
        self.uses: list[int] = []
        self.free: list[int] = []

    def release(self, rows: Tensor) -> None:
        for row, count in zip(*(x.tolist() for x in rows.unique(return_counts=True)), strict=True):
            self.uses[row] -= count
            if not self.uses[row]:
                del self.place[self.texts[row]]
                self.free.append(row)

    def take(self, data: Latents, captions: Tensor) -> Tensor:
        """The rows (N,) of the captions that items of `data` have, which now use them."""
        distinct, inverse, counts = captions.unique(return_inverse=True, return_counts=True)
        rows, fresh = [], []
        for number, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            text = data.captions[number]
            if text not in self.place:
                if not self.free:
                    self.free.append(len(self.texts))
                    self.texts.append(None)
                    self.uses.append(0)
                self.place[text] = self.free.pop()
                self.texts[self.place[text]] = text
                fresh.append((self.place[text], number))
            rows.append(self.place[text])
            self.uses[rows[-1]] += count
        if fresh:
            slots, numbers = torch.tensor(fresh).T
            self.rows.write(slots, {"embedding": data.embeddings[numbers]})
        return torch.tensor(rows)[inverse]

    def fill(self, texts: list[str], embeddings: Tensor, uses: list[int]) -> None:
        """Hold these captions and no others, the i-th used so many times."""
        self.rows.write(torch.arange(len(texts)), {"embedding": embeddings})
        self.texts, self.uses, self.free = list(texts), list(uses), []
        self.place = {text: row for row, text in enumerate(texts)}
