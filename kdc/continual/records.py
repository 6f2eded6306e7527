"""What a sequence of tasks writes down, so that it can be stopped anywhere and go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc.continual.strategies import RankOneFisher
from kdc.io import part, read_tensors, write_tensors
from kdc.pipelines import save_student
from kdc.replay import buffer as buffers
from kdc.replay.buffer import ReplayBuffer

FISHER, VERSION = "kdc-fisher", "1"


@dataclasses.dataclass
class Counts:
    """What one task cost. Images are counted once for each time a network sees them.

    new_pictures and old_pictures went through the student forwards and backwards,
    teacher_pictures and guide_pictures through the teacher or the old student for new and old
    ones, sampler_pictures through the old student to draw generated_pictures, fisher_pictures
    forwards and backwards for the penalty. `buffer_bytes` are the items held after the task (or
    generated before it), `embedding_bytes` their captions' embeddings, a cache; `model_bytes` old
    weights and directions. `seconds` is the wall time of it all without the evaluation.
    """

    new_images: int = 0
    old_images: int = 0
    teacher_images: int = 0
    old_teacher_images: int = 0
    generated_images: int = 0
    sampler_images: int = 0
    fisher_images: int = 0
    buffer_bytes: int = 0
    embedding_bytes: int = 0
    model_bytes: int = 0
    seconds: float = 0.0


class Progress:
    """What changes within a task beside the weights: counts, and the source of old images.

    Of a buffer that only gives, its generator; of one that also takes in (`whole`), everything.
    """

    def __init__(self, counts: Counts, source: ReplayBuffer | None, whole: bool, started: float):
        self.counts, self.source, self.whole = counts, source, whole
        self.started, self.before = started, counts.seconds

    def stop(self) -> None:
        self.counts.seconds = self.before + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Tensor]:
        self.stop()
        values = list(dataclasses.asdict(self.counts).values())
        state = {"counts": torch.tensor(values, dtype=torch.float64)}
        if self.source is not None and self.whole:
            state |= {f"source.{k}": v for k, v in self.source.state_dict().items()}
        elif self.source is not None:
            state["generator"] = self.source.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for field, value in zip(dataclasses.fields(Counts), state["counts"].tolist(), strict=True):
            setattr(self.counts, field.name, type(field.default)(value))
        self.before = self.counts.seconds
        if self.source is not None and self.whole:
            self.source.load_state_dict(part(state, "source"))
        elif self.source is not None:
            self.source.generator.set_state(state["generator"])


class Records:
    """The folder of a sequence: `sequence.json` with every score so far, and a folder a task.

    Without a folder everything is remembered and nothing written. `learnt` is the number of tasks
    that are through; their students, the buffer and the Fisher after them lie in `task-<t>`, and
    how it all began in `start`.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        identity: dict,
        student: UNet2DConditionModel,
        buffer: ReplayBuffer | None,
        fisher: RankOneFisher | None,
    ):
        self.root = Path(output_dir) if output_dir else None
        self.identity = json.loads(json.dumps(identity))
        self.student, self.buffer, self.fisher = student, buffer, fisher
        self.learnt = 0
        self.scores: dict[tuple[int, int], dict[str, float]] = {}
        self.counts: list[dict] = []

    def begin(self, resume: bool) -> None:
        """Start the folder, or go back to where the sequence in it was after its last task.

        Raises `ValueError` where a start finds items in the buffer.
        """
        file = self.root / "sequence.json" if self.root else None
        if not (file and file.is_file()):
            if self.buffer is not None and len(self.buffer):
                raise ValueError(
                    f"{self.buffer} already holds items, which the first task would rehearse: a new"
                    " sequence fills its buffer itself, so give it a new one"
                )
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
        for key in self.identity | note["identity"]:
            ours, theirs = self.identity.get(key), note["identity"].get(key)
            if ours != theirs:
                raise ValueError(
                    f"{file} was made with {key}={theirs}, this sequence has {key}={ours}: use the "
                    "same, or another output_dir"
                )
        self.learnt, self.counts = note["learnt"], note["counts"]
        self.scores = {(t, k): scores for t, k, scores in note["scores"]}
        self._load(f"task-{self.learnt - 1}" if self.learnt else "start")

    def folder(self, t: int) -> Path | None:
        return self.root / f"task-{t}" if self.root else None

    def file(self, t: int, name: str) -> Path | None:
        return self.root / f"task-{t}" / f"{name}.safetensors" if self.root else None

    def finish(self, t: int, counts: Counts) -> None:
        """Task t is learnt: keep what the next one starts from, and drop the checkpoints."""
        self.learnt = t + 1
        self.counts.append(dataclasses.asdict(counts))
        if not self.root:
            return
        self._save(f"task-{t}")
        self._write()
        self.file(t, "pool").unlink(missing_ok=True)
        for checkpoint in self.folder(t).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def has_score(self, t: int, k: int) -> bool:
        return (t, k) in self.scores

    def add_score(self, t: int, k: int, scores: dict[str, float]) -> None:
        self.scores[t, k] = {name: float(value) for name, value in scores.items()}
        if self.root:
            self._write()

    def _write(self) -> None:
        note = {
            "identity": self.identity,
            "learnt": self.learnt,
            "scores": [[t, k, scores] for (t, k), scores in self.scores.items()],
            "counts": self.counts,
        }
        partial = self.root / "sequence.partial"
        partial.write_text(json.dumps(note, indent=1))
        partial.replace(self.root / "sequence.json")

    def _save(self, name: str) -> None:
        save_student(self.student, self.root / name, strategy=self.identity["strategy"]["name"])
        if self.buffer is not None:
            self.buffer.save(self.root / name / "buffer.safetensors")
        if self.fisher is not None:
            state = self.fisher.state_dict()
            write_tensors(self.root / name / "fisher.safetensors", state, FISHER, VERSION)

    def _load(self, name: str) -> None:
        folder = self.root / name
        saved = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.student.load_state_dict(saved.state_dict())
        if self.buffer is not None:
            state = read_tensors(folder / "buffer.safetensors", buffers.FORMAT, buffers.VERSION)
            self.buffer.load_state_dict(state)
        if self.fisher is not None:
            state = read_tensors(folder / "fisher.safetensors", FISHER, VERSION)
            self.fisher.load_state_dict(state, self.student.device)
