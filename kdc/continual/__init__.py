"""Learning tasks one after the other: strategies, the sequence, and the score matrix."""
