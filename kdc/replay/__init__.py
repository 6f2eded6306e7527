"""The replay buffer: a bounded store of old images as latents, and who stays in it."""
