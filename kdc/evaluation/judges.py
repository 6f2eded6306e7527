"""The embedded judges of images: an attribute classifier, a CLIP, a perceptual trunk.

None of them shares a weight with the generator they judge. All three see only procedural images;
scores made with them carry their names and are not comparable with published ones. They expect
64 x 64 images; other sizes are resized.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import lpips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from kdc.checks import as_texts
from kdc.data import worlds
from kdc.evaluation.images import to_signed
from kdc.pipelines import ASSETS

BATCH = 128
KINDS = tuple(kind for world in worlds.WORLDS.values() for kind in world.kinds)
LABELS = {"colour": tuple(worlds.COLOURS), "kind": KINDS, "background": worlds.BACKGROUNDS}


def labels_of(shown: list[worlds.Attributes]) -> dict[str, Tensor]:
    """Class indices (N,) of every attribute, in the order of `LABELS`."""
    return {
        name: torch.tensor([values.index(getattr(a, name)) for a in shown])
        for name, values in LABELS.items()
    }


class AttributeHeads(nn.Module):
    """Linear heads on features: one for each attribute in `labels`, a table of their values."""

    def __init__(self, width: int, labels: Mapping[str, Sequence] = LABELS):
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in labels.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


class AttributeClassifier(nn.Module):
    """Reads colour, kind and background off a 64x64 image; the judge of generated images.

    Images (B, 3, side, side) in [-1, 1] to logits (B, values) of each attribute in `labels`; by
    default {"colour": (B, 7), "kind": (B, 12), "background": (B, 4)}.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence] = LABELS,
        widths: tuple[int, ...] = (24, 48, 96, 128),
        side: int = 64,
    ):
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
        self.heads = AttributeHeads(inputs * (side >> len(widths)) ** 2, labels)

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
    return sum(  # type: ignore[return-value]
        F.cross_entropy(logits[name], target) for name, target in labels.items()
    )


@functools.cache
def attribute_classifier() -> AttributeClassifier:
    """The embedded attribute classifier, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        model = AttributeClassifier()
    model.load_state_dict(load_file(ASSETS / "mini-classifier" / "model.safetensors"))
    return model.float().eval()


@functools.cache
def mini_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """The embedded CLIP and its tokenizer, in evaluation mode."""
    folder = ASSETS / "mini-clip"
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), CLIPTokenizer.from_pretrained(folder)


@functools.cache
def mini_lpips() -> lpips.LPIPS:
    """LPIPS on the embedded trunk: the package's own arithmetic, unweighted layers (`lpips=False`).

    Not the published metric: the trunk is AlexNet's shape with weights trained here on procedural
    images, and the published linear weights do not fit it. Inputs in [-1, 1], 32 x 32 at least.
    """
    with (
        warnings.catch_warnings(action="ignore"),  # that lpips calls torchvision by old names
        torch.random.fork_rng(devices=[]),  # weights are drawn before they are read
    ):
        metric = lpips.LPIPS(net="alex", pnet_rand=True, lpips=False, verbose=False)
        trunk = PerceptualTrunk()
    trunk.load_state_dict(load_file(ASSETS / "mini-trunk" / "model.safetensors"))
    ours = trunk.features.state_dict()
    state = {}
    for name in metric.net.state_dict():
        _, layer = name.split(".", 1)  # "slice3.6.weight" is "features.6.weight" in torchvision
        state[name] = ours[layer].float()
    metric.net.load_state_dict(state)
    return metric.eval()


@torch.inference_mode()
def predicted_attributes(images: Tensor) -> dict[str, Tensor]:
    """The classifier's reading of each image: class indices (N,) in the order of the labels."""
    model = attribute_classifier()
    parts = [model(to_signed(batch)) for batch in images.split(BATCH)]
    return {name: torch.cat([p[name] for p in parts]).argmax(dim=1) for name in parts[0]}


def shown_attributes(images: Tensor, asked: Sequence[worlds.Attributes]) -> dict[str, Tensor]:
    """Whether each image shows the asked-for colour, kind, background, and "all": (N,) bool."""
    if len(images) != len(asked):
        raise ValueError(f"{len(images)} images for {len(asked)} attributes")
    found, target = predicted_attributes(images), labels_of(list(asked))
    right = {name: found[name] == target[name] for name in target}
    return right | {"all": torch.stack(list(right.values())).all(dim=0)}


def attribute_accuracy(images: Tensor, asked: Sequence[worlds.Attributes]) -> dict[str, float]:
    """Share of images that show the asked-for colour, kind, background, and all three at once."""
    right = shown_attributes(images, asked)
    return {name: hits.float().mean().item() for name, hits in right.items()}


@torch.inference_mode()
def clip_features(images: Tensor) -> Tensor:
    """Mini-CLIP features of images, (N, 64), not normalised."""
    model, _ = mini_clip()
    parts = []
    for batch in images.split(BATCH):
        hidden = model.vision_model(pixel_values=to_signed(batch)).pooler_output
        parts.append(model.visual_projection(hidden))
    return torch.cat(parts)


@torch.inference_mode()
def clip_text_features(captions: Sequence[str]) -> Tensor:
    """Mini-CLIP features of captions, (N, 64), not normalised."""
    model, tokenizer = mini_clip()
    tokens = pad_tokens(tokenizer, captions)
    return model.text_projection(model.text_model(input_ids=tokens.input_ids).pooler_output)


def pad_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]):
    """The tokenizer's own padded batch of captions, each as long as its text encoder reads."""
    return tokenizer(
        as_texts("captions", captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
