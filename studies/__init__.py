"""The experiments of the book, one folder a chapter. They need a checkout and its `results/`."""
