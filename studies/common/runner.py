"""The one runner of all studies: which stages there are, what they write, and how they resume."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAPTERS = ("mini", "slimming", "distillation", "replay", "evaluation", "metrics")


@dataclass(frozen=True)
class Context:
    """Where a stage writes, and what the caller changed."""

    # Where result files go; None: `results/` of this checkout.
    results: str | Path | None = None
    # Where rows and checkpoints lie, from which a stopped stage goes on.
    folder: Path = Path("outputs")
    # Where networks of full size run.
    device: str = "cpu"
    # A folder of photographs, for stages that need one.
    photos: str | Path | None = None
    # Fields of the study's settings that are not to have their defaults.
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One step of a study."""

    # Measures, writes, and says what it wrote.
    run: Callable[[Context], Iterable[Path]]
    # What it measures, in a line.
    help: str
    # The result files it writes.
    writes: tuple[str, ...] = ()
    # Whether it needs `photos`; it then runs only when it is asked for.
    needs_photos: bool = False


def run(stages: Mapping[str, Stage], names: Sequence[str], context: Context) -> Iterator[Path]:
    """Run the named stages in the order of their table (default: all that need no photographs).

    Raises `ValueError`, before any work, for an unknown stage and for one that lacks photographs.
    """
    if unknown := [name for name in names if name not in stages]:
        raise ValueError(f"unknown stages {', '.join(unknown)}; they are {', '.join(stages)}")
    chosen = [
        name for name, stage in stages.items() if name in names or not (names or stage.needs_photos)
    ]
    for name in chosen:
        if stages[name].needs_photos and not context.photos:
            raise ValueError(f"the stage {name} needs a folder of images: --photos FOLDER")
    for name in chosen:
        yield from stages[name].run(context)


def stages_of(chapter: str) -> Mapping[str, Stage]:
    """The stages of a chapter's study. Raises `ValueError` naming the chapters."""
    if chapter not in CHAPTERS:
        raise ValueError(f"unknown chapter {chapter!r}; the chapters are {', '.join(CHAPTERS)}")
    return importlib.import_module(f"studies.{chapter}.stages").STAGES
