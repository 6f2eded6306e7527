"""Which process this is, of how many, its device, and which folders are its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from filelock import FileLock, Timeout
from torch import Tensor


def this_process() -> PartialState:
    """Accelerate's state of this process, the same object every time.

    Accelerate does not see processes that a launcher such as torchrun started on CPUs unless it is
    told so; each would take itself for the only one. Raises `RuntimeError` where they still do not
    see each other.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    on_cpus = launched > 1 and not (torch.cuda.is_available() or torch.xpu.is_available())
    state = PartialState(cpu=on_cpus or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if launched > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but this one sees itself alone, and each would "
            "train for itself: make kdc's first call before anything else uses Accelerate"
        )
    return state


def own_part(count: int) -> slice:
    """Which of `count` things that are drawn for all processes are this one's: equal parts.

    Every process draws the same from generators of the same seed, and keeps its part, so that
    several processes compute what one would. Raises `ValueError` where they cannot be shared out.
    """
    process = this_process()
    each, left = divmod(count, process.num_processes)
    if left:
        raise ValueError(f"{count} images cannot be shared by {process.num_processes} processes")
    return slice(process.process_index * each, (process.process_index + 1) * each)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a tensor that every process has, in each; of one process the tensor itself."""
    process = this_process()
    if process.num_processes == 1:
        return tensor
    summed = tensor.detach().clone()
    torch.distributed.all_reduce(summed)
    return summed / process.num_processes


def first_of_all(value: Any) -> Any:
    """What the first process has, in each of them: any plain value."""
    if this_process().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Within it, no other run can write into that folder, which is made; None: nothing.

    The first of several processes holds it for all of them. May be entered again by the process
    that holds it. The lock goes with the process, however that ends. Raises `RuntimeError` where
    another run holds it.
    """
    if folder is None or not this_process().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another process writes into {folder}: wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
