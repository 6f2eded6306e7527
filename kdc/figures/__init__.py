"""Arrays in, matplotlib figures out. Imports no other module of the library."""

from kdc.figures.colours import COLOURS
from kdc.figures.curves import bars, curves, doses, lines
from kdc.figures.pictures import picture_grid
from kdc.figures.tables import dots, heat_map, spread_bars, trade_offs

__all__ = [
    "COLOURS",
    "bars",
    "curves",
    "doses",
    "dots",
    "heat_map",
    "lines",
    "picture_grid",
    "spread_bars",
    "trade_offs",
]
