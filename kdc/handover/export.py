"""A finished student as a folder that opens with diffusers alone, a model card in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from kdc.handover.card import model_card
from kdc.handover.onnx import export_onnx, find_onnx
from kdc.io import beside, disk_errors, read_json, refuse_infinite_weights, sync, write_text
from kdc.paths import as_path, try_writing
from kdc.pipelines import in_pipeline, load_student, write_pipeline
from kdc.unet.slimming import refuse_adapters

CARD, ONNX = "README.md", "onnx"


def export(
    student: UNet2DConditionModel | str | Path,
    teacher: StableDiffusionPipeline,
    output_dir: str | Path,
    *,
    teacher_name: str | None = None,
    data_name: str | None = None,
    licence: str | None = None,
    scores: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    half: bool = False,
    onnx: bool = False,
) -> Path:
    """Write a student as a whole pipeline with a model card; the folder opens with diffusers alone.

    `student` is a U-Net or the folder of one, whose `kdc.json` says how it was made; the other
    parts are those of `teacher`. `teacher_name` and `data_name` are what the card calls them,
    `licence` is the teacher's (default: known for the names of `TEACHERS`), `scores` what `python
    -m kdc evaluate` wrote, a file or its values. `half` stores float16, `onnx` adds models for ONNX
    Runtime, see `export_onnx`. The folder is there whole or not at all.

    Raises, before anything is written, `FileExistsError` for a folder that holds something,
    `ValueError` for a student that does not fit the teacher, has adapters or scores that are none,
    `FloatingPointError` for weights that are not finite or too large for `half`, and another
    `OSError` where nothing can be written.
    """
    folder = try_writing(output_dir, ("model_index.json", CARD))
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: give another output_dir")
    if onnx:
        find_onnx()
    notes: dict[str, Any] = {}
    if isinstance(student, str | Path):
        place = as_path(student, "the student")
        notes = read_json(place / "kdc.json") if (place / "kdc.json").is_file() else {}
        student = load_student(place, teacher).unet
    refuse_adapters(student, "the student")
    refuse_infinite_weights(student.named_parameters(), "the student is not exported")
    pipeline = in_pipeline(teacher, student)
    table = _scores(scores)
    card = model_card(
        pipeline.unet,
        teacher.unet,
        notes,
        teacher_name=teacher_name,
        data_name=data_name,
        licence=licence,
        scores=table,
        onnx=onnx,
    )
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors("the pipeline could not be exported", folder, partial):
        write_pipeline(pipeline, partial, torch.float16 if half else None)
        write_text(partial / CARD, card)
        if onnx:
            export_onnx(pipeline, partial / ONNX)
        for file in partial.rglob("*"):
            sync(file)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    return folder


def _scores(scores) -> dict[str, Mapping[str, Any]]:
    """The table of scores, from a file or as it is."""
    if scores is None:
        return {}
    said = "scores"
    if isinstance(scores, str | Path):
        said = str(as_path(scores, "the scores"))
        scores = read_json(as_path(scores, "the scores"))
    for name, row in scores.items():
        if not isinstance(row, Mapping) or "value" not in row:
            raise ValueError(f"{said}: {name} has no value: give what `kdc evaluate` wrote")
    return dict(scores)
