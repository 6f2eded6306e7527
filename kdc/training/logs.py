"""What a run writes down while it goes: log.csv, and TensorBoard's events where they are wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kdc.io import write_text

FILE = "log.csv"
# Columns of the file that are the machine's and not the run's; no two runs agree in them.
SPEED = ("images_per_second", "memory_gib")


def find_writer():
    """TensorBoard's writer of events. Raises `ValueError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard=True, but TensorBoard is not installed: pip install 'kdc[logs]', or leave"
            f" it out. It said: {error}"
        ) from error
    return SummaryWriter


def peak_memory(device: torch.device) -> float:
    """GiB at their peak so far: of the GPU's allocator, or of this process (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource  # which Windows has not

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


class RunLog:
    """The rows of a run's log, in memory and, with a `folder`, in `log.csv` as they come.

    `rows` begin as those of the part before. Each new row gets the columns of `SPEED`, measured
    since the row before.
    """

    def __init__(
        self, folder: Path | None, rows: list[dict], device: torch.device, tensorboard: bool = False
    ):
        self.folder, self.rows, self.device = folder, rows, device
        self.seen = rows[-1]["images"] if rows else 0
        self.at = time.perf_counter()
        self.writer: Any = None
        self.columns: list[str] = []
        if folder and tensorboard:
            step = rows[-1]["step"] + 1 if rows else 0
            self.writer = find_writer()(str(folder / "tensorboard"), purge_step=step)
        if folder and rows:
            self._write_all()

    def add(self, row: dict) -> None:
        """One more row; it has at least `step` and `images`."""
        now = time.perf_counter()
        speed = (row["images"] - self.seen) / (now - self.at), peak_memory(self.device)
        row |= dict(zip(SPEED, speed, strict=True))
        self.seen, self.at = row["images"], now
        self.rows.append(row)
        if self.folder:
            self._append(row)
        if self.writer:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """A picture (3, H, W) uint8 among the events."""
        if self.writer:
            self.writer.add_image(name, image, step)
            self.writer.flush()

    def _append(self, row: dict) -> None:
        if not set(row) <= set(self.columns):  # the first row, or a term that comes late
            self._write_all()
            return
        line = pd.DataFrame([row], columns=self.columns).to_csv(index=False, header=False)
        with open(self.folder / FILE, "a", encoding="utf-8") as file:
            file.write(line)

    def _write_all(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = pd.DataFrame(self.rows, columns=self.columns)
        write_text(self.folder / FILE, table.to_csv(index=False))

    def close(self) -> None:
        """No more rows come; the file is whole."""
        if self.folder and self.rows:
            self._write_all()
        if self.writer:
            self.writer.close()


def read_log(folder: Path) -> pd.DataFrame:
    """What a run in that folder returned as its log; empty where it left none."""
    file = folder / FILE
    return without_speed(pd.read_csv(file) if file.is_file() else [])


def without_speed(rows: Sequence[dict] | pd.DataFrame) -> pd.DataFrame:
    """The log as a table without the columns of `SPEED`: the same for the same run."""
    return pd.DataFrame(rows).drop(columns=list(SPEED), errors="ignore")
