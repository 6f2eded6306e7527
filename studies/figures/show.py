"""Shows a figure with number, caption and alternative text, in JupyterLab and in the book alike."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import matplotlib.pyplot as plt
import yaml
from IPython.display import Markdown, display
from PIL import Image

DOTS = 192  # an inch: twice what it is shown at, for screens with small pixels
HEAVY = 100_000  # bytes; a larger PNG is stored in less
FEW_COLOURS = 2**14  # a drawing has at most so many, soft edges included; pictures have more
CAPTIONS = Path(__file__).parents[2] / "notebooks" / "captions.yml"
KEY = "kdc"  # of the metadata that tools/book.py reads


def show(number: str, save: Path | None = None) -> None:
    """Show the current figure as "Figure `number`" with its caption from `CAPTIONS`, and close it.

    `save`: a PNG file that it is also written to. Raises `KeyError` for a number without a caption.
    """
    texts = captions()[number]
    caption, alt = texts["caption"], texts["alt"]
    figure = plt.gcf()
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=DOTS)
    if save:
        save.write_bytes(stored.getvalue())
    width = round(figure.get_size_inches()[0] * 96)
    plt.close(figure)
    kind, data = lightest(stored.getvalue())
    metadata = {kind: {"width": width}, KEY: {"figure": number, "caption": caption, "alt": alt}}
    display({kind: data, "text/plain": alt}, raw=True, metadata=metadata)
    display(Markdown(f"**Figure {number}.** {caption}"), metadata={KEY: "caption"})


@functools.cache
def captions() -> dict[str, dict[str, str]]:
    """By the number of each figure: "caption", what to see in it; "alt", what it looks like."""
    return yaml.safe_load(CAPTIONS.read_text("utf-8"))


def lightest(png: bytes) -> tuple[str, bytes]:
    """A figure's type and bytes: as it is, or where that is heavy and the other lighter, in less.

    Drawings have few colours, which a palette holds; pictures become JPEG, at fewer dots.
    """
    if len(png) <= HEAVY:
        return "image/png", png
    image, stored = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    if image.getcolors(FEW_COLOURS):
        kind = "image/png"
        image.quantize(256, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    else:
        kind, size = "image/jpeg", tuple(round(side * 2 / 3) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        image.save(stored, "JPEG", quality=85, optimize=True, progressive=True)
    smaller = len(stored.getvalue()) < len(png)
    return (kind, stored.getvalue()) if smaller else ("image/png", png)
