"""Rows of tensors that lie in several files: written by many processes, read by memory map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdc.io import fingerprint, hash_text, write_tensors

FORMAT, VERSION = "kdc-shard", "1"


class Shards:
    """Rows (N, ...) of one name in several files, as a tensor of float32 that is read by need.

    Indexing with whole numbers, slices and tensors of whole numbers gives ordinary tensors, copied
    out of the files' memory map; the system keeps in memory what it has room for. `key` is what the
    rows are known by, `rows` (N',) chooses some, None all.
    """

    dtype = torch.float32

    def __init__(self, parts: Sequence[Tensor], key: str, rows: Tensor | None = None):
        self.parts, self.key, self.rows = tuple(parts), key, rows
        self.arrays = [part.numpy() for part in self.parts]  # the same memory
        sizes = torch.tensor([len(part) for part in self.parts])
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes

    @property
    def shape(self) -> torch.Size:
        count = int(self.ends[-1]) if self.rows is None else len(self.rows)
        return torch.Size((count, *self.parts[0].shape[1:]))

    @property
    def ndim(self) -> int:
        return self.parts[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: Tensor) -> Shards:
        """Some of the rows, by number (N',); nothing is read."""
        return Shards(self.parts, self.key, rows if self.rows is None else self.rows[rows])

    def identity(self) -> str:
        """A fingerprint of the rows, from what they are known by; nothing is read."""
        chosen = "all" if self.rows is None else fingerprint(self.rows)
        return hash_text(self.key, chosen)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if not isinstance(index, Tensor):
            index = torch.arange(len(self))[index]
        if len(index.shape) and index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        index = torch.where(index < 0, index + len(self), index)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"rows of 0 to {len(self) - 1}, not {int(index.max())}")
        rows = index if self.rows is None else self.rows[index]
        flat = rows.reshape(-1)
        numbers = torch.searchsorted(self.ends, flat, right=True)
        places = (flat - self.starts[numbers]).tolist()
        found = np.empty((len(flat), *self.shape[1:]), np.float32)
        # Row by row, which takes as long for many files as for few.
        for place, (number, row) in enumerate(zip(numbers.tolist(), places, strict=True)):
            found[place] = self.arrays[number][row]
        return torch.from_numpy(found).reshape(*rows.shape, *self.shape[1:])


def write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file of rows, whole or not at all."""
    write_tensors(file, {k: v.contiguous() for k, v in tensors.items()}, FORMAT, VERSION)


def open_shards(files: Sequence[Path], name: str, key: str) -> Shards:
    """The rows of that name in the files, one after the other, by memory map.

    Raises `ValueError` naming a file that is damaged or is none of `write_shard`.
    """
    parts = []
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get("format") != FORMAT:
                    raise ValueError(f"{file} holds no {FORMAT}")
                parts.append(opened.get_tensor(name))  # a view of the file, not a copy
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut off: {error}") from error
    return Shards(parts, key)
