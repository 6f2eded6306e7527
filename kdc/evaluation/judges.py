"""The small networks that judge images: an attribute classifier, a CLIP, a perceptual trunk.

None of them shares a weight with the generator they judge. All three see only procedural images;
scores made with them carry their names and are not comparable with published ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from kdc.data import worlds

KINDS = tuple(kind for world in worlds.WORLDS.values() for kind in world.kinds)
LABELS = {"colour": tuple(worlds.COLOURS), "kind": KINDS, "background": worlds.BACKGROUNDS}


def labels_of(shown: list[worlds.Attributes]) -> dict[str, Tensor]:
    """Class indices (N,) of every attribute, in the order of `LABELS`."""
    return {
        name: torch.tensor([values.index(getattr(a, name)) for a in shown])
        for name, values in LABELS.items()
    }


class AttributeHeads(nn.Module):
    """Linear heads on pooled features: one for each attribute in `LABELS`."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in LABELS.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


class AttributeClassifier(nn.Module):
    """Reads colour, kind and background off a 64x64 image; the judge of generated images.

    Images (B, 3, 64, 64) in [-1, 1] to logits {"colour": (B, 7), "kind": (B, 12),
    "background": (B, 4)}.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)):
        super().__init__()
        layers, inputs = [], 3
        for width in widths:
            layers += [
                nn.Conv2d(inputs, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=8),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.heads = AttributeHeads(16 * inputs)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.heads(self.features(images).flatten(1))


class PerceptualTrunk(nn.Module):
    """AlexNet's convolutional part, trained here, for use by the `lpips` package.

    Besides the attributes it learns to say which distortion an image suffered and how strongly,
    because a perceptual distance must see blur and noise, not only objects.
    """

    DISTORTIONS = ("none", "blur", "noise", "contrast", "shift")

    def __init__(self):
        super().__init__()
        self.features = alexnet(weights=None).features
        self.heads = AttributeHeads(256)
        self.distortion = nn.Linear(256, len(self.DISTORTIONS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.features(images).mean(dim=(2, 3))
        return self.heads(pooled) | {"distortion": self.distortion(pooled)}


def new_clip(text_config) -> CLIPModel:
    """A randomly initialised CLIP: 64x64 images in 8x8 patches, 4 layers of 128."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
    )
    config = CLIPConfig(
        text_config=text_config.to_dict(), vision_config=vision.to_dict(), projection_dim=64
    )
    return CLIPModel(config)


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum of the attributes' cross-entropies."""
    return sum(F.cross_entropy(logits[name], target) for name, target in labels.items())
