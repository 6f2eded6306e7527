"""Arrays in, matplotlib figures out, and how these are shown; nothing else of the library."""

from studies.figures.colours import COLOURS, WIDTH
from studies.figures.curves import bars, curves, doses, lines
from studies.figures.images import image_grid
from studies.figures.show import show
from studies.figures.tables import dots, forest, heat_map, spread_bars, trade_offs

__all__ = [
    "COLOURS",
    "WIDTH",
    "bars",
    "curves",
    "doses",
    "dots",
    "forest",
    "heat_map",
    "lines",
    "image_grid",
    "show",
    "spread_bars",
    "trade_offs",
]
