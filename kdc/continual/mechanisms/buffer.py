"""Replay: stored images of earlier tasks join each batch of new ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kdc.continual.mechanisms.base import Items, Mechanism, draw_items
from kdc.io import read_tensors
from kdc.replay import buffer as buffers

FILE = "buffer.safetensors"


class BufferReplay(Mechanism):
    """Every task goes into the replay buffer once it is learnt; later tasks draw from it."""

    uses_buffer = True

    def begin_sequence(self) -> None:
        if len(self.run.buffer):
            raise ValueError(
                f"{self.run.buffer} already holds items, which the first task would rehearse: a new"
                " sequence fills its buffer itself, so give it a new one"
            )

    def replays(self, t: int) -> bool:
        return len(self.run.buffer) > 0

    def old_items(self, t: int, count: int) -> Items | None:
        return draw_items(self.run.buffer, count) if self.replays(t) else None

    def finish(self, t: int) -> None:
        task, buffer = self.run.tasks[t], self.run.buffer
        generator = torch.Generator().manual_seed(self.run.seed_of(t))
        order = torch.randperm(len(task.train), generator=generator)
        numbers = torch.tensor([self.run.label_numbers[label] for label in task.labels])
        buffer.add(task.train, order, task=t, labels=numbers[order])
        self.counts.buffer_bytes = buffer.sizes()["items"]
        self.counts.embedding_bytes = buffer.sizes()["embeddings"]

    def task_state(self) -> dict[str, Tensor]:
        # Within a task the buffer only gives: its items stay, its generator moves on.
        return {"generator": self.run.buffer.generator.get_state()}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        self.run.buffer.generator.set_state(state["generator"])

    def save(self, folder: Path) -> None:
        self.run.buffer.save(folder / FILE)

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / FILE, buffers.FORMAT, buffers.VERSION)
        self.run.buffer.load_state_dict(state)
