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
PICTURE = 120_000  # bytes; a larger PNG is of pictures, which JPEG stores in less
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
    """Its type and bytes: as it is, or where that is heavy and JPEG lighter, as JPEG."""
    if len(png) <= PICTURE:
        return "image/png", png
    stored = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(
        stored, "JPEG", quality=88, subsampling=0, optimize=True, progressive=True
    )
    smaller = len(stored.getvalue()) < len(png)
    return ("image/jpeg", stored.getvalue()) if smaller else ("image/png", png)
