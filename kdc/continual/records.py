"""What a sequence of tasks writes down, so that it can be stopped anywhere and go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.continual.mechanisms.base import Counts, Mechanism
from kdc.io import part, plain, refuse_other_settings, write_json
from kdc.pipelines import save_student


class Progress:
    """What changes within a task beside the weights: counts, and the mechanism's own state."""

    def __init__(self, counts: Counts, mechanism: Mechanism, started: float):
        self.counts, self.mechanism = counts, mechanism
        self.started, self.before = started, counts.seconds

    def stop(self) -> None:
        """Bring the seconds up to now."""
        self.counts.seconds = self.before + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Tensor]:
        self.stop()
        values = list(dataclasses.asdict(self.counts).values())
        own = {f"mechanism.{name}": x for name, x in self.mechanism.task_state().items()}
        return {"counts": torch.tensor(values, dtype=torch.float64)} | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for field, value in zip(dataclasses.fields(Counts), state["counts"].tolist(), strict=True):
            setattr(self.counts, field.name, type(field.default)(value))
        self.before = self.counts.seconds
        self.mechanism.load_task_state(part(state, "mechanism"))


class Records:
    """The folder of a sequence: `sequence.json` with every score so far, and a folder a task.

    Without a folder everything is remembered and nothing written. `learnt` is the number of tasks
    that are through; their students, and what the mechanism stored after them, lie in `task-<t>`,
    and how it all began in `start`.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        identity: dict,
        student: UNet2DConditionModel,
        mechanism: Mechanism,
    ):
        self.root = Path(output_dir) if output_dir else None
        self.identity = plain(identity)
        self.student, self.mechanism = student, mechanism
        self.learnt = 0
        self.scores: dict[tuple[int, int], dict[str, float]] = {}
        self.counts: list[dict] = []
        self.logs: list[pd.DataFrame] = []

    def begin(self, resume: bool) -> None:
        """Start the folder, or go back to where the sequence in it was after its last task.

        Raises `ValueError` where a start finds something left of another sequence, and where the
        folder is of another experiment, `FileExistsError` for an earlier one without `resume`.
        """
        file = self.root / "sequence.json" if self.root else None
        if not (file and file.is_file()):
            self.mechanism.begin_sequence()
            if file:
                self._save("start")
                self._write()
            return
        if not resume:
            raise FileExistsError(
                f"{file} is of an earlier sequence: go on with resume=True, or give another "
                "output_dir"
            )
        note = json.loads(file.read_text())
        remedy = "use the same, or another output_dir"
        refuse_other_settings(file, note["identity"], self.identity, remedy)
        self.learnt, self.counts = note["learnt"], note["counts"]
        self.scores = {(t, k): scores for t, k, scores in note["scores"]}
        self.logs = [self._read_log(t) for t in range(self.learnt)]
        self._load(f"task-{self.learnt - 1}" if self.learnt else "start")

    def folder(self, t: int) -> Path | None:
        """Where task t writes, or None."""
        return self.root / f"task-{t}" if self.root else None

    def finish(self, t: int, counts: Counts, log: pd.DataFrame) -> None:
        """Task t is learnt: store what the next one starts from, and drop the checkpoints."""
        self.learnt = t + 1
        self.counts.append(dataclasses.asdict(counts))
        self.logs.append(log)
        if not self.root:
            return
        self._save(f"task-{t}")
        self._write()
        for checkpoint in self.folder(t).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def has_score(self, t: int, k: int) -> bool:
        """Whether task k was scored after task t."""
        return (t, k) in self.scores

    def add_score(self, t: int, k: int, scores: dict[str, float]) -> None:
        """Task k scored so after task t."""
        self.scores[t, k] = {name: float(value) for name, value in scores.items()}
        if self.root:
            self._write()

    def _read_log(self, t: int) -> pd.DataFrame:
        file = self.folder(t) / "log.csv"
        return pd.read_csv(file) if file.is_file() else pd.DataFrame()

    def _write(self) -> None:
        note = {
            "identity": self.identity,
            "learnt": self.learnt,
            "scores": [[t, k, scores] for (t, k), scores in self.scores.items()],
            "counts": self.counts,
        }
        write_json(self.root / "sequence.json", note, indent=1)

    def _save(self, name: str) -> None:
        save_student(self.student, self.root / name, strategy=self.identity["strategy"]["name"])
        self.mechanism.save(self.root / name)

    def _load(self, name: str) -> None:
        folder = self.root / name
        saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        self.student.load_state_dict(saved.state_dict())
        self.mechanism.load(folder)
