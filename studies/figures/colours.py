"""What all figures share: colours, their order, and the width of the page's column."""

import itertools

import matplotlib.pyplot as plt

# Each stands out from white by 3:1 at least. Lines and bars have a style or hatch as well, for
# whom colours look alike and for print in grey.
COLOURS = ("#33658a", "#c8553d", "#588b5b", "#8e5aa8", "#b07a12", "#4a4a4a", "#c76f9b", "#2a9d9d")
STYLES = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), ":", (0, (8, 2)), (0, (1, 1)))
MARKS = "osD^vPX*"
HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "oo", "--")
WIDTH = 7.4  # inches, of a figure as wide as the column: its text is shown at its own size

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "figure.titlesize": 10,
        "hatch.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def looks(count: int):
    """Colour, line style, mark and hatch of each of `count` series."""
    cycles = map(itertools.cycle, (COLOURS, STYLES, MARKS, HATCHES))
    return list(itertools.islice(zip(*cycles, strict=False), count))
