"""Draws the map of the method, `notebooks/images/method.svg`: `python tools/diagram.py`.

Each box is a link to its chapter, in the book, where the map stands in the page itself.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FILE = Path(__file__).resolve().parent.parent / "notebooks" / "images" / "method.svg"
CHAPTERS = {path.stem.split("_")[0]: path.stem for path in FILE.parents[1].glob("*.ipynb")}
FROZEN, TRAINED, LOSS, DATA = "#dbe7f3", "#d9efdf", "#fbe7cf", "#eeeeee"
# Each box: centre, size, text, chapter, colour.
BOXES = {
    "tasks": (1.25, 4.9, 2.1, 0.9, "task after task\nflowers, then butterflies", "04", DATA),
    "buffer": (1.25, 3.2, 2.1, 0.9, "replay buffer\na few old images", "05", DATA),
    "noise": (4.2, 4.05, 2.0, 0.9, "noisy latents\nof images; captions", "A0", DATA),
    "teacher": (7.4, 5.1, 2.2, 0.95, "teacher U-Net\n859,520,964 parameters", "A1", FROZEN),
    "student": (7.4, 2.6, 2.2, 0.95, "student U-Net\n482,346,884 parameters", "01", TRAINED),
    "terms": (11.0, 3.85, 2.5, 1.9,
              "four terms of the loss\ntask: against the noise\n"
              "output, soft: against\nthe teacher\nfeature: block by block", "02", LOSS),
    "scores": (7.4, 0.75, 2.2, 0.9, "scores\nimages, forgetting, time", "06", DATA),
    "full": (11.0, 0.75, 2.5, 0.9, "Stable Diffusion\nthe same code on a GPU", "07", DATA),
}  # fmt: skip
# Arrow: from, to, text, and whether what it carries comes back (a dashed line).
ARROWS = (
    ("tasks", "noise", "new", False),
    ("buffer", "noise", "old", False),
    ("tasks", "buffer", "is kept", False),
    ("noise", "teacher", "", False),
    ("noise", "student", "", False),
    ("teacher", "student", "cut layers out,\ncopy the rest", False),
    ("teacher", "terms", "", False),
    ("student", "terms", "", False),
    ("terms", "student", "gradient", True),
    ("student", "scores", "", False),
    ("scores", "full", "", False),
)


def edge(name: str, towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from a box's centre towards a point leaves the box."""
    x, y, width, height, *_ = BOXES[name]
    dx, dy = towards[0] - x, towards[1] - y
    scale = min(
        width / 2 / abs(dx) if dx else float("inf"), height / 2 / abs(dy) if dy else float("inf")
    )
    return x + dx * scale, y + dy * scale


def draw() -> Figure:
    """Boxes for what there is, arrows for what goes where; each box names its chapter."""
    figure = Figure(figsize=(9.4, 4.7))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 12.5), ylim=(0.1, 5.95))
    axis.axis("off")
    for start, end, text, back in ARROWS:
        shift = -0.12 if back else 0.12 if (end, start, "gradient", True) in ARROWS else 0.0
        a, b = edge(start, BOXES[end][:2]), edge(end, BOXES[start][:2])
        (xa, ya), (xb, yb) = (a[0], a[1] + shift), (b[0], b[1] + shift)
        style = dict(arrowstyle="-|>", color="#333333", lw=1.4, linestyle="--" if back else "-")
        axis.annotate("", xy=(xb, yb), xytext=(xa, ya), arrowprops=style)
        if text:
            axis.text((xa + xb) / 2, (ya + yb) / 2, text, fontsize=8.5, ha="center", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2})  # fmt: skip
    for x, y, width, height, text, chapter, colour in BOXES.values():
        box = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02",
            facecolor=colour, edgecolor="#333333", lw=1.2,
        )  # fmt: skip
        link = f"notebooks/{CHAPTERS[chapter]}.html"
        box.set_url(link)
        axis.add_patch(box)
        head, _, rest = text.partition("\n")
        lines = rest.count("\n") + 1
        axis.text(x, y + 0.11 * lines + 0.1, head, fontsize=9.5, weight="bold", ha="center",
                  va="center", url=link)  # fmt: skip
        axis.text(
            x, y - 0.14, rest, fontsize=8.5, ha="center", va="center", linespacing=1.25, url=link
        )
        axis.text(x + width / 2 - 0.05, y - height / 2 + 0.04, chapter, fontsize=7.5,
                  ha="right", va="bottom", color="#333333")  # fmt: skip
    return figure


def main() -> None:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever else is drawn in this process
        matplotlib.rcParams.update({"svg.hashsalt": "kdc", "svg.fonttype": "path"})
        FILE.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
