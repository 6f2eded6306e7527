"""Scores of generated images: metrics, feature extractors, uncertainty, comparison, time."""
