"""Appendix A2: planted failures that a score must notice."""
