"""Arrays in, matplotlib figures out. Imports no other module of the library."""

from studies.figures.colours import COLOURS
from studies.figures.curves import bars, curves, doses, lines
from studies.figures.images import image_grid
from studies.figures.tables import dots, heat_map, spread_bars, trade_offs

__all__ = [
    "COLOURS",
    "bars",
    "curves",
    "doses",
    "dots",
    "heat_map",
    "lines",
    "image_grid",
    "spread_bars",
    "trade_offs",
]
