"""Tasks: what a model learns one after the other, and how a data set is cut into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdc.checks import MOST_SEEDS, as_texts, whole_number
from kdc.data import worlds
from kdc.data.latents import LatentDataset
from kdc.data.shards import Shards
from kdc.paths import as_path


@dataclass(frozen=True, eq=False)
class Task:
    """One step of a sequence: images to learn, and what its test needs.

    `labels` are the classes of the training items, one text each (default: their captions);
    `prompts` what a test asks for (default: the distinct captions). `test` is for the caller's own
    evaluation, the library never looks at it. Raises `ValueError` for an empty task and for labels
    that do not match.
    """

    name: str
    train: LatentDataset
    prompts: Sequence[str] = ()
    labels: Sequence[str] = ()
    test: Any = field(default=None, repr=False)

    def __post_init__(self):
        if not len(self.train):
            raise ValueError(f"the task {self.name!r} has no images")
        captions = [self.train.captions[i] for i in self.train.caption_index.tolist()]
        labels = tuple(as_texts("labels", self.labels)) or tuple(captions)
        if len(labels) != len(self.train):
            raise ValueError(f"{self.name!r}: {len(labels)} labels, {len(self.train)} images")
        object.__setattr__(self, "labels", labels)
        prompts = tuple(as_texts("prompts", self.prompts))
        object.__setattr__(self, "prompts", prompts or tuple(sorted(set(captions))))


def select(data: LatentDataset, rows: torch.Tensor) -> LatentDataset:
    """The items `rows` (N,) of a latent data set, with the captions that they use."""
    first = data.caption_index[rows]
    offered = first[:, None] if data.choices is None else data.choices[rows]
    used, place = offered.unique(return_inverse=True)
    if used[0] < 0:  # an image with fewer captions than others
        used, place = used[1:], place - 1
    mean, std, embeddings = (
        values.take(chosen) if isinstance(values, Shards) else values[chosen]
        for values, chosen in ((data.mean, rows), (data.std, rows), (data.embeddings, used))
    )
    return LatentDataset(
        mean,
        std,
        embeddings,
        torch.searchsorted(used, first),
        data.empty,
        [data.captions[i] for i in used.tolist()],
        None if data.choices is None else place,
        data.note,
    )


def split_classes(
    data: LatentDataset,
    label_of: Callable[[str], str] = str,
    *,
    per_task: int = 1,
    order: int | Sequence[str] | None = None,
    test: LatentDataset | None = None,
) -> list[Task]:
    """Class-incremental tasks of `per_task` classes each.

    `label_of` reads a caption's class, such as `lambda c: worlds.read_caption(c).kind`; as it
    stands every caption is a class, as for a folder with a folder a class. `order` is a seed that
    shuffles the classes, a list of some of them or all, or None for alphabetical order. `test` is
    cut in the same way. Raises `ValueError` for a class without images and fewer than two tasks.
    """
    per_task = whole_number("per_task", per_task, 1)
    rows = _rows_by_label(data, label_of)
    classes = sorted(rows)
    if isinstance(order, int):
        generator = torch.Generator().manual_seed(whole_number("order", order, 0, MOST_SEEDS))
        classes = [classes[i] for i in torch.randperm(len(classes), generator=generator)]
    elif order is not None:
        classes = as_texts("order", order)
        if unknown := [c for c in classes if c not in rows]:
            raise ValueError(f"no images of {unknown}; the classes are {', '.join(rows)}")
    groups = [classes[i : i + per_task] for i in range(0, len(classes), per_task)]
    if len(groups) < 2:
        raise ValueError(f"{len(classes)} classes, {per_task} a task: a sequence needs two tasks")
    held_out = _rows_by_label(test, label_of) if test is not None else {}
    tasks = []
    for group in groups:
        mine = [row for label in group for row in rows[label]]
        theirs = [row for label in group for row in held_out.get(label, ())]
        tasks.append(
            Task(
                " + ".join(group),
                select(data, torch.tensor(mine)),
                labels=[label for label in group for _ in rows[label]],
                test=select(test, torch.tensor(theirs)) if theirs else None,
            )
        )
    return tasks


def names_of(dataset: str | Path) -> list[str]:
    """The data sets in a text: "A then B" names worlds or folders in turn, "worlds" both worlds.

    Raises `TypeError` for what is no text, and `ValueError` where two would give tasks of one name.
    """
    text = str(as_path(dataset, "the data set")) if isinstance(dataset, Path) else dataset
    (text,) = as_texts("the data set", [text])
    names = list(worlds.WORLDS) if text == "worlds" else text.split(" then ")
    called = [Path(name).name for name in names]
    if len(set(called)) < len(called):
        raise ValueError(f"the data sets of {text!r} must have names of their own, not {called}")
    return names


def half_of_classes(
    name: str | Path, train: Sequence[str], test: Sequence[str], order: Sequence[str] | None = None
) -> int:
    """How many classes are half of a data set, looked at before anything is encoded.

    `train` and `test` are the classes of its images, one text each; `order` is that of the classes
    (default: alphabetical). Raises `ValueError` where they do not make two tasks with test images.
    """
    classes, instead = list(order or sorted(set(train))), 'give two data sets, "A then B"'
    if len(classes) < 2:
        raise ValueError(f"{name} has one class, {classes[0]!r}, which cannot be halved: {instead}")
    if len(classes) == len(train) > 2:
        raise ValueError(f"every image of {name} has a caption of its own, so no class: {instead}")
    half = math.ceil(len(classes) / 2)
    for group in (classes[:half], classes[half:]):
        if not set(group) & set(test):
            raise ValueError(f"{name} has no test images of {', '.join(group)}: {instead}")
    return half


def _rows_by_label(data: LatentDataset, label_of: Callable[[str], str]) -> dict[str, list[int]]:
    labels = [label_of(caption) for caption in data.captions]
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(data.caption_index.tolist()):
        rows.setdefault(labels[caption], []).append(row)
    return rows
