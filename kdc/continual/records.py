"""What a sequence of tasks writes down, so that it can be stopped anywhere and go on."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.continual.mechanisms.base import Counts, Mechanism
from kdc.io import (
    MANIFEST,
    check_sealed,
    forget_partial,
    part,
    plain,
    read_json,
    refuse_other_settings,
    replacing,
    seal,
    write_json,
)
from kdc.pipelines import load_unet, save_student
from kdc.processes import first_of_all, this_process
from kdc.training.checkpoints import clean, forget_checkpoints
from kdc.training.logs import read_log

FILE, PREVIOUS = "sequence.json", "sequence.previous.json"
KIND = "kdc-task"
# What a sequence writes, beside what `train` and `save_student` write in each task's folder.
SEQUENCE_FILES = (FILE, PREVIOUS, "start/kdc.json", "task-0/log.csv", "task-0/unet/config.json")


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
    and how it all began in `start`, each with checksums. What is damaged is learnt again from the
    task before.
    """

    def __init__(
        self,
        root: Path | None,
        identity: dict,
        student: UNet2DConditionModel,
        mechanism: Mechanism,
    ):
        self.root = root
        self.identity = plain(identity)
        self.student, self.mechanism = student, mechanism
        self.learnt = 0
        self.scores: dict[tuple[int, int], dict[str, float]] = {}
        self.counts: list[dict] = []
        self.logs: list[pd.DataFrame] = []

    def begin(self, resume: bool) -> None:
        """Start the folder, or go back to where the sequence in it was after its last task.

        Raises `ValueError` where the folder is of another experiment and where all that lies there
        is damaged, `FileExistsError` for an earlier one without `resume`.
        """
        if self.root is None:
            return
        if not first_of_all(is_begun(self.root)):
            self._save("start")
            self._write()
            return
        check_begun(self.root, resume, self.identity)
        note = read_notes(self.root)
        self.learnt, self.counts = note["learnt"], note["counts"]
        self.scores = {(t, k): scores for t, k, scores in note["scores"]}
        self._go_back()
        self.logs = [read_log(self.folder(t)) for t in range(self.learnt)]
        self._clean()

    def _go_back(self) -> None:
        """Load the last state that is whole; what came after it will be learnt again."""
        while True:
            name = f"task-{self.learnt - 1}" if self.learnt else "start"
            try:
                check_sealed(self.root / name, KIND)
                break
            except ValueError as error:
                if not self.learnt:
                    raise
                warnings.warn(f"{error}. Learning that task again", stacklevel=4)
                self.learnt -= 1
        self.counts = self.counts[: self.learnt]
        self.scores = {(t, k): scores for (t, k), scores in self.scores.items() if t < self.learnt}
        self.student.load_state_dict(load_unet(self.root / name).state_dict())
        self.mechanism.load(self.root / name)

    def _clean(self) -> None:
        """Remove what a stopped process left: half files, and checkpoints of learnt tasks."""
        if not this_process().is_main_process:
            return
        forget_partial(self.root / FILE, self.root / PREVIOUS)
        for t in range(self.learnt):
            clean(self.folder(t))
            forget_checkpoints(self.folder(t))

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
        if this_process().is_main_process:
            forget_checkpoints(self.folder(t))
        this_process().wait_for_everyone()

    def has_score(self, t: int, k: int) -> bool:
        """Whether task k was scored after task t."""
        return (t, k) in self.scores

    def add_score(self, t: int, k: int, scores: dict[str, float]) -> None:
        """Task k scored so after task t."""
        self.scores[t, k] = {name: float(value) for name, value in scores.items()}
        if self.root:
            self._write()

    def _write(self) -> None:
        if not this_process().is_main_process:
            return
        if (self.root / FILE).is_file():
            with replacing(self.root / PREVIOUS) as place:
                shutil.copyfile(self.root / FILE, place)
        note = {
            "identity": self.identity,
            "learnt": self.learnt,
            "scores": [[t, k, scores] for (t, k), scores in self.scores.items()],
            "counts": self.counts,
        }
        write_json(self.root / FILE, note, indent=1)

    def _save(self, name: str) -> None:
        if not this_process().is_main_process:
            return
        folder = self.root / name
        save_student(self.student, folder, strategy=self.identity["strategy"]["name"])
        self.mechanism.save(folder)
        own = [f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST]
        kept = [f for f in own if not f.relative_to(folder).parts[0].startswith("checkpoint-")]
        seal(folder, KIND, sorted(kept))


def is_begun(root: Path) -> bool:
    """Whether a sequence left its notes there."""
    return (root / FILE).is_file() or (root / PREVIOUS).is_file()


def check_begun(root: Path, resume: bool, identity: Mapping[str, Any]) -> None:
    """Look at an earlier sequence's notes before any costly step.

    `identity` is what is known so far. Raises `FileExistsError` where it is not to be resumed, and
    `ValueError` where it was another experiment.
    """
    if not resume:
        raise FileExistsError(
            f"{root / FILE} is of an earlier sequence: go on with resume=True, or give another "
            "output_dir"
        )
    refuse_other_settings(root / FILE, read_notes(root)["identity"], identity, partly=True)


def read_notes(root: Path) -> dict:
    """What `sequence.json` holds, or its version before where it is damaged, with a warning.

    Raises `ValueError` naming what is damaged where that is no better.
    """
    try:
        return _check_notes(root / FILE)
    except (OSError, ValueError) as error:
        if not (root / PREVIOUS).is_file():
            raise ValueError(str(error)) from error
        note = _check_notes(root / PREVIOUS)
        warnings.warn(f"{error}. Going on from {root / PREVIOUS} instead", stacklevel=3)
        return note


def _check_notes(file: Path) -> dict:
    note = read_json(file)
    kinds = {"identity": dict, "learnt": int, "scores": list, "counts": list}
    for name, kind in kinds.items():
        if not isinstance(note.get(name), kind):
            raise ValueError(f"{file} is damaged: it has no {name}")
    return note
