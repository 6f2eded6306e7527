"""The colours that all figures share."""

COLOURS = ("#33658a", "#c8553d", "#588b5b", "#8e5aa8", "#d99b2b", "#4a4a4a", "#c76f9b", "#2a9d9d")
