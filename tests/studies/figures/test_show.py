"""Figures are shown with their number, caption and description, light enough to commit."""

import base64
import io
import re
import sys
from copy import deepcopy

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from studies.figures.colours import COLOURS, WIDTH
from studies.figures.show import CAPTIONS, KEY, captions, show
from tools import book


@pytest.fixture
def displayed(monkeypatch) -> list:
    """What is displayed, with its metadata; no figure that another test left open is in the way."""
    plt.close("all")
    found = []
    module = sys.modules["studies.figures.show"]
    monkeypatch.setattr(
        module, "display", lambda data, metadata, raw=False: found.append((data, metadata))
    )
    return found


SHOWN = re.compile(r'figures\.show\("([^"]+)"')


def test_a_figure_is_shown_at_half_its_dots_with_its_texts(displayed, tmp_path):
    plt.subplots(figsize=(5, 2))
    show("1.2", save=tmp_path / "figure.png")
    (image, metadata), (caption, _) = displayed
    assert Image.open(io.BytesIO(image["image/png"])).width == 960
    assert metadata["image/png"] == {"width": 480}
    assert metadata[KEY] == {"figure": "1.2", **captions()["1.2"]}
    assert caption.data == f"**Figure 1.2.** {captions()['1.2']['caption']}"
    assert not plt.get_fignums() and (tmp_path / "figure.png").is_file()
    with pytest.raises(KeyError, match="9.99"):
        show("9.99")


def stored_and_plain(displayed, draw) -> tuple[str, bytes, float]:
    """How `show` stores a drawing: its type, its bytes, and how far it is from the plain one."""
    figure, axis = plt.subplots(figsize=(7, 5))
    draw(axis)
    plain = io.BytesIO()
    figure.savefig(plain, dpi=192)
    show("1.3")
    data, metadata = displayed[-2]
    (kind,) = (k for k in data if k.startswith("image/"))
    assert metadata[kind]["width"] == 7 * 96
    first, second = (Image.open(i).convert("RGB") for i in (plain, io.BytesIO(data[kind])))
    apart = np.abs(np.asarray(first, float) - np.asarray(second.resize(first.size), float)).mean()
    return kind, data[kind], apart


def test_a_heavy_picture_becomes_a_lighter_jpeg_that_looks_the_same(displayed):
    seen = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    seen = np.asarray(Image.fromarray(seen).resize((1400, 1000), Image.Resampling.BICUBIC))
    kind, data, apart = stored_and_plain(displayed, lambda axis: axis.imshow(seen))
    assert kind == "image/jpeg" and len(data) < 100_000 and apart < 3


def test_a_heavy_drawing_gets_a_palette(displayed):
    places = np.random.default_rng(0).random((2, 4000))
    kind, data, apart = stored_and_plain(displayed, lambda axis: axis.plot(*places, "-", lw=0.4))
    assert kind == "image/png" and Image.open(io.BytesIO(data)).mode == "P" and apart < 3


def test_every_figure_has_texts_and_every_text_a_figure_in_order():
    shown = []
    for path in book.notebooks():
        numbers = SHOWN.findall(path.with_suffix(".py").read_text())
        chapter = re.match(r"0?(\w\d?)_", path.name)[1]
        plain = [n for n in numbers if n[-1].isdigit()]
        assert plain == [f"{chapter}.{i}" for i in range(1, len(plain) + 1)], path.name
        shown += numbers
    assert shown == list(captions()), f"{CAPTIONS.name} and the notebooks name other figures"
    for number, texts in captions().items():
        assert set(texts) == {"caption", "alt"}, number
        assert all(20 < len(text) < 400 and text.endswith(".") for text in texts.values()), number


def test_the_book_is_told_of_a_figure_and_shows_its_caption_once():
    note = {"figure": "1.2", "caption": "What to see.", "alt": "Bars."}
    png = {"image/png": base64.b64encode(b"-").decode()}
    image = nbformat.v4.new_output("display_data", png, metadata={KEY: note})
    caption = nbformat.v4.new_output(
        "display_data", {"text/markdown": "-"}, metadata={KEY: "caption"}
    )
    other = nbformat.v4.new_output("stream", text="printed")
    cell = nbformat.v4.new_code_cell(
        "show()", outputs=[other, image, caption, image, caption, other]
    )
    cells = book.with_figures(nbformat.v4.new_notebook(cells=[cell])).cells
    assert [c.outputs for c in cells] == [[other], [image], [image], [other]]
    assert [c.source for c in cells] == ["show()", "...", "...", "..."]
    assert all(c.metadata["tags"] == ["remove-input"] for c in cells[1:])
    told = {
        "image": {"alt": "Bars."},
        "figure": {"caption": "**Figure 1.2.** What to see.", "name": "figure-1-2"},
    }
    assert [c.metadata.get("mystnb") for c in cells] == [None, told, told, None]


def test_no_figure_is_wider_than_the_column_and_all_colours_stand_out():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return np.dot([0.2126, 0.7152, 0.0722], parts)

    assert all(1.05 / (light(colour) + 0.05) >= 3 for colour in COLOURS)
    for path in book.notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                for kind in ("image/png", "image/jpeg"):
                    width = output.get("metadata", {}).get(kind, {}).get("width", 0)
                    assert width <= WIDTH * 96 + 1, f"{path.name}: {cell.source[:80]}"


def test_the_stored_figures_have_the_present_captions():
    old = {"figure": "1.2", "caption": "Old.", "alt": "Old."}
    image = nbformat.v4.new_output("display_data", {"text/plain": "Old."}, metadata={KEY: old})
    under = nbformat.v4.new_output(
        "display_data", {"text/markdown": "Old."}, metadata={KEY: "caption"}
    )
    book.recaption([image, under])
    assert image.metadata[KEY] == {"figure": "1.2", **captions()["1.2"]}
    assert under.data["text/markdown"] == f"**Figure 1.2.** {captions()['1.2']['caption']}"
    for path in book.notebooks():
        stored = nbformat.read(path, as_version=4)
        shown = deepcopy([o for c in stored.cells for o in c.get("outputs", [])])
        book.clean(stored)
        assert shown == [o for c in stored.cells for o in c.get("outputs", [])], path.name
