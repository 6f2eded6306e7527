"""Chapter 04: teacher against students on every score and in time."""
