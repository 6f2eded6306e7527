"""The experiments behind the chapters: each is a function of its settings and writes `results/`."""
