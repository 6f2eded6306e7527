"""Which process this is, of how many, and its device: Accelerate's state, made in one place."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


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
