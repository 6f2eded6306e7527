"""Measures of generated images with the embedded judges. Every score names its extractor.

Images are uint8 (N, 3, H, W) throughout. The judges expect 64 x 64; other sizes are resized.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import lpips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPTokenizer

from kdc.data import worlds
from kdc.evaluation.judges import AttributeClassifier, PerceptualTrunk, labels_of
from kdc.pipelines import ASSETS

BATCH = 128


@functools.cache
def attribute_classifier() -> AttributeClassifier:
    """The embedded attribute classifier, in evaluation mode."""
    model = AttributeClassifier()
    model.load_state_dict(load_file(ASSETS / "mini-classifier" / "model.safetensors"))
    return model.float().eval()


@functools.cache
def mini_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """The embedded CLIP and its tokenizer, in evaluation mode."""
    folder = ASSETS / "mini-clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), CLIPTokenizer.from_pretrained(folder)


@functools.cache
def mini_lpips() -> lpips.LPIPS:
    """LPIPS on the embedded trunk: the package's own arithmetic, unweighted layers (`lpips=False`).

    Not the published metric: the trunk is AlexNet's shape with weights trained here on procedural
    images, and the published linear weights do not fit it. Inputs in [-1, 1], 32 x 32 at least.
    """
    with warnings.catch_warnings(action="ignore"):  # that lpips calls torchvision by old names
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


def as_bytes(signed: Tensor) -> Tensor:
    """Images in [-1, 1] (values outside are clipped) as uint8, on the CPU."""
    return ((signed.float().cpu().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


def check_images(images: Tensor) -> None:
    """Raise `ValueError` for what is not a batch of uint8 images, and say how to make it one."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (N, 3, H, W), got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        seen = f"[{images.min().item():.3g}, {images.max().item():.3g}]" if len(images) else ""
        raise ValueError(
            f"expected uint8 images in 0..255, got {images.dtype} in {seen}: from [0, 1] make "
            "them with (x * 255 + 0.5).to(torch.uint8)"
        )


def _signed(images: Tensor, size: int = 64) -> Tensor:
    check_images(images)
    x = images.float() / 127.5 - 1
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return x


@torch.inference_mode()
def predicted_attributes(images: Tensor) -> dict[str, Tensor]:
    """The classifier's reading of each image: class indices (N,) in the order of the labels."""
    model = attribute_classifier()
    parts = [model(_signed(batch)) for batch in images.split(BATCH)]
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
        hidden = model.vision_model(pixel_values=_signed(batch)).pooler_output
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
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def clip_score(images: Tensor, captions: Sequence[str]) -> Tensor:
    """100 times the cosine of image and caption in the mini CLIP's space, (N,)."""
    return 100 * F.cosine_similarity(clip_features(images), clip_text_features(captions))


class Identity(nn.Module):
    """Lets torchmetrics take features instead of images."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features (N, d) and (M, d), each fitted by a Gaussian.

    Raises `ValueError` below two samples a dimension, where the covariance is not determined.
    """
    width = features.shape[1]
    fewest = min(len(features), len(reference))
    if fewest < 2 * width:
        raise ValueError(f"{fewest} samples for {width} dimensions: at least {2 * width} needed")
    metric = FrechetInceptionDistance(feature=Identity(width), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()
