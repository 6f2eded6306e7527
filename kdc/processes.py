"""Which process this is, of how many, its device, and which folders are its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout


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
