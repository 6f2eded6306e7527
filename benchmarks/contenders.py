"""Training loops in threads that take turns, and how much memory one step of one needs."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from kdc.data.latents import LatentDataset


class Contender:
    """A training loop in a thread that stands still before every step until it is its turn.

    So loops that know nothing of each other are measured in one process, round by round. `loop` is
    called with a function that the loop must call at the start of each step. What the loop raises
    is raised by `step`, what it returns is `result` once all its steps are done.
    """

    def __init__(self, loop: Callable, threads: int):
        self._turn, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.result, self._error, self._stopped = None, None, False

        def run():
            torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
            try:
                self.result = loop(self._wait)
            except BaseException as error:
                self._error = error
            self._arrived.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._arrived.acquire()
        self._raise()

    def _wait(self) -> None:
        self._arrived.release()
        self._turn.acquire()
        if self._stopped:
            raise SystemExit

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def step(self) -> None:
        """Let the loop do one step, and wait until it stands before the next or has ended."""
        self._turn.release()
        self._arrived.acquire()
        self._raise()

    def stop(self) -> None:
        """End the loop where it stands; its memory is free again."""
        self._stopped = True
        self._turn.release()
        self._thread.join()


class WaitingLatents(LatentDataset):
    """A cache of latents from which `wait` is called before each batch is drawn."""

    wait = staticmethod(lambda: None)

    def draw(self, *args, **kwargs):
        self.wait()
        return super().draw(*args, **kwargs)


def waiting(data: LatentDataset, wait: Callable[[], None]) -> WaitingLatents:
    """The same cache, not copied."""
    one = WaitingLatents(**vars(data))
    one.wait = wait
    return one


def peak_of_step(step: Callable[[], None], device: torch.device) -> dict[str, int]:
    """Bytes that a step needs at its peak, and what of them is held between steps.

    On CUDA, both are the allocator's own counts. On a CPU (Linux), `held` is the size of all live
    tensors before the step, and `peak` adds how far the step lifts the resident memory of the
    process above where it stood: the high-water mark is reset before, and memory that is free is
    given back to the system first. Python, libraries and the compiler's own memory do not count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return {"held": held, "peak": torch.cuda.max_memory_allocated(device)}
    if not sys.platform.startswith("linux"):
        raise OSError("peak memory on a CPU is read from /proc, which only Linux has")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    held = live_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    step()
    return {"held": held, "peak": held + _status("VmHWM") - before}


def live_bytes() -> int:
    """The size of all tensors that Python still holds, each storage once."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
