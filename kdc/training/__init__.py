"""The one training loop, its settings, its checkpoints, and what makes a step cheap."""
