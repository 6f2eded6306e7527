"""Two small folders of drawn images that stand in for photographs."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from kdc.data import worlds


def tiny_folders(root: str | Path, images: int = 12, size: int = 96) -> list[Path]:
    """Two small folders of images with a class a folder, drawn; what stands in for photographs.

    They have train/ and test/, as a reader's own may, and are written once.
    """
    folders = []
    for name, world in worlds.WORLDS.items():
        folder = Path(root) / name
        folders.append(folder)
        for split, count in (("train", images), ("test", images // 3)):
            for number in range(count):
                rng = worlds.rendering_rng(name, split, number)
                shown = worlds.draw_attributes(name, rng)
                if shown.kind not in world.kinds[:3]:
                    continue
                file = folder / split / shown.kind / f"{number}.png"
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(worlds.render(shown, rng, size)).save(file)
    return folders
