"""Captioned images: folders, the procedural worlds, and the cache of their latents."""
