"""U-Nets: which layers a student keeps, how it is cut, and what it costs."""
