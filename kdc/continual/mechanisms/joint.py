"""Joint training: new images come from all tasks at once, in the same number of steps."""

from __future__ import annotations

import torch
from torch import Tensor

from kdc.continual.mechanisms.base import Mechanism


class Joint(Mechanism):
    """Every image of a batch is of a task drawn at random, from the first task on."""

    own_first_task = True

    def new_rows(self, t: int, count: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
        tasks = self.run.tasks
        drawn = torch.randint(len(tasks), (count,), generator=generator).tolist()
        found = []
        for number in sorted(set(drawn)):
            shape = (drawn.count(number),)
            rows = torch.randint(len(tasks[number].train), shape, generator=generator)
            found.append((number, rows))
        return found
