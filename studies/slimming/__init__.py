"""Chapter 01: how important each block is, and which plan is best after recovery."""
