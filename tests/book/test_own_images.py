"""The chapters on folders of a reader's own images; apart, for another process to run them."""

from __future__ import annotations

import json
import re

import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from tools import book


def run_on_images(chapter: str, folder, names, **parameters) -> str:
    """A chapter run on folders of two classes each, a broken file among them; what it printed."""
    rng, folder = np.random.default_rng(0), folder / chapter
    for index in range(24 * len(names)):
        kind = ("rose", "iris")[index // len(names) % 2]
        file = folder / names[index % len(names)] / kind / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(file)
    (folder / names[0] / "rose" / "broken.png").write_bytes(b"not an image")
    dataset = " then ".join(str(folder / name) for name in names)
    ran = folder / "ran.ipynb"
    papermill.execute_notebook(
        str(book.NOTEBOOKS / f"{chapter}.ipynb"),
        str(ran),
        {"dataset": dataset, "output_dir": str(folder / "out"), **parameters},
        progress_bar=False,
    )
    text = json.dumps([c.get("outputs", []) for c in nbformat.read(ran, as_version=4).cells])
    assert "broken.png" in text
    return text


@pytest.mark.book
def test_the_replay_chapter_runs_on_two_folders(tmp_path):
    short = {"steps": 1, "batch_size": 2}
    text = run_on_images("04_forgetting", tmp_path, ["before", "after"], **short)
    assert all(re.search(rf"{name}: \d+ images", text) for name in ("before", "after"))
    assert (tmp_path / "04_forgetting" / "out" / "forgetting.png").is_file()


@pytest.mark.book
def test_the_evaluation_chapter_runs_on_a_folder(tmp_path):
    text = run_on_images("06_evaluation", tmp_path, ["images"], steps=1)
    assert "the attributes of the prompts are not known" in text
    assert (tmp_path / "06_evaluation" / "out" / "images.png").is_file()


@pytest.mark.book
def test_the_distillation_chapter_runs_on_a_folder_of_images(tmp_path):
    """Fine-tuning first, two classes, and a broken file that is named and left out."""
    short = {"steps": 1, "batch_size": 2}
    text = run_on_images("03_what_terms_are_worth", tmp_path, ["images"], **short)
    assert "2 captions" in text
    out = tmp_path / "03_what_terms_are_worth" / "out"
    assert (out / "fine_tuning.png").is_file() and (out / "students.png").is_file()
