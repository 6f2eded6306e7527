"""Distillation: the loss terms, the features they compare, one step, and how to look into it."""
