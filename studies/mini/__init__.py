"""Makes the embedded mini models from nothing: `python -m studies mini`."""
