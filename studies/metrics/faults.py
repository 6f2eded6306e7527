"""Faults: images spoilt in known ways and by known doses, for the trial of the metrics."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import adjust_hue, gaussian_blur

from kdc.data import worlds


@dataclass(frozen=True)
class Exhibit:
    """Images (N, 3, H, W) uint8 with what each was asked to show.

    Two other sets show the same: the `reference`, from which some faults copy, and images
    `held_back`.
    """

    images: Tensor
    asked: list[worlds.Attributes]
    reference: Tensor
    held_back: Tensor

    def put(self, images: Tensor, asked: list | None = None) -> Exhibit:
        return Exhibit(images, asked or self.asked, self.reference, self.held_back)


Fault = Callable[[Exhibit, float, torch.Generator], Exhibit]


def _blur(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    return x.put(gaussian_blur(x.images, 13, dose)) if dose else x


def _hue(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    return x.put(adjust_hue(x.images, dose)) if dose else x


def _dropped(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """A share of the kinds is never drawn: other kinds stand in their place, rightly captioned."""
    kinds = sorted({a.kind for a in x.asked})
    order = torch.randperm(len(kinds), generator=generator).tolist()
    lost = {kinds[i] for i in order[: round(dose * len(kinds))]}
    kept = [i for i, a in enumerate(x.asked) if a.kind not in lost]
    picks = torch.randint(len(kept), (len(x.asked),), generator=generator).tolist()
    whole = set(kept)
    rows = [i if i in whole else kept[picks[i]] for i in range(len(x.asked))]
    return x.put(x.images[rows], [x.asked[i] for i in rows])


def _wrong(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """A share of the captions goes to other images."""
    count = round(dose * len(x.asked))
    rows = torch.randperm(len(x.asked), generator=generator)[:count].tolist()
    asked = list(x.asked)
    for here, there in zip(rows, rows[1:] + rows[:1], strict=True):
        asked[here] = x.asked[there]
    return x.put(x.images, asked)


def _copied(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """A share of the images is taken from the reference, as by a model that memorised it."""
    count = min(round(dose * len(x.images)), len(x.reference))
    images = x.images.clone()
    images[:count] = x.reference[:count]
    return x.put(images)


def _same(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """A share of the images is one and the same."""
    images = x.images.clone()
    images[: round(dose * len(images))] = x.images[0]
    return x.put(images)


def _resized(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """Made smaller by a factor without a filter, as careless loaders do, and large again."""
    if dose <= 1:
        return x
    size = x.images.shape[-2:]
    small = F.interpolate(x.images.float(), scale_factor=1 / dose, mode="nearest")
    return x.put(F.interpolate(small, size, mode="bilinear").round().to(torch.uint8))


def _jpeg(x: Exhibit, dose: float, generator: torch.Generator) -> Exhibit:
    """Saved as JPEG; the dose is 100 minus the quality, 0 leaves the images alone."""
    if not dose:
        return x
    images = []
    for image in x.images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=round(100 - dose))
        images.append(np.asarray(Image.open(file)))
    return x.put(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


# The doses: pixels of deviation, turns of the hue, shares of kinds, captions and images, a
# factor, and 100 minus the quality.
FAULTS: dict[str, tuple[Fault, tuple[float, ...]]] = {
    "blur": (_blur, (0, 0.5, 1, 2, 4)),
    "colour shift": (_hue, (0, 0.05, 0.1, 0.2, 0.4)),
    "mode dropping": (_dropped, (0, 0.1, 0.25, 0.5, 0.75)),
    "wrong caption": (_wrong, (0, 0.1, 0.25, 0.5, 1)),
    "memorised copies": (_copied, (0, 0.1, 0.25, 0.5, 1)),
    "one image": (_same, (0, 0.1, 0.25, 0.5, 1)),
    "resize": (_resized, (1, 1.33, 2, 4, 8)),
    "jpeg": (_jpeg, (0, 20, 50, 80, 95)),
}
