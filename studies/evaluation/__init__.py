"""Chapter 06: teacher against students on every score and in time."""
