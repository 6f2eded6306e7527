"""Chapter 04: what is forgotten, and what each strategy and buffer saves."""
