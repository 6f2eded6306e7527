"""Last-sample replay, as in the authors' code: one image of the step before joins each batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kdc.continual.mechanisms.base import Items, Mechanism
from kdc.io import read_tensors, write_tensors

FILE, FORMAT, VERSION = "last_sample.safetensors", "kdc-last-sample", "1"


class LastSample(Mechanism):
    """The last new image of an update joins every forward pass of the next, also across tasks.

    There is no buffer and nothing is said of tasks: an image is seen in one more update and
    forgotten. At a batch of 1 it is half of every pass, so with `accumulation` 4 half of the
    update's gradient comes from it. With larger batches the authors' code picks one of the pass's
    images at random; here it is always the last.
    """

    own_first_task = True
    one_process = "the last image of an update is one, and cannot be shared out"

    def __init__(self, run):
        super().__init__(run)
        self.stored: Items = {}
        self._seen: Items = {}

    def replays(self, t: int) -> bool:
        return True

    def old_count(self, batch_size: int) -> int:
        return 1

    def old_items(self, t: int, count: int) -> Items | None:
        return self.stored or None

    def saw(self, t: int, rows: list[tuple[int, Tensor]]) -> None:
        number, last = rows[-1]
        self._seen = self.run.tasks[number].train[last[-1:]]

    def before_step(self, t: int, old_gradient) -> None:
        self.stored = {name: value.clone() for name, value in self._seen.items()}

    def finish(self, t: int) -> None:
        self.counts.buffer_bytes = self.stored["mean"].nbytes + self.stored["std"].nbytes
        self.counts.embedding_bytes = self.stored["embedding"].nbytes

    def task_state(self) -> dict[str, Tensor]:
        return dict(self.stored)

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        self.stored = dict(state)

    def save(self, folder: Path) -> None:
        state = self.stored or {"nothing": torch.zeros(0)}
        write_tensors(folder / FILE, state, FORMAT, VERSION)

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / FILE, FORMAT, VERSION)
        self.stored = {} if "nothing" in state else state
