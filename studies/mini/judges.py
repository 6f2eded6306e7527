"""Training of the judges: attribute classifier, mini CLIP, perceptual trunk."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as vision

from kdc.data.worlds import TEMPLATES, caption
from kdc.evaluation.judges import (
    AttributeClassifier,
    PerceptualTrunk,
    attribute_loss,
    labels_of,
    new_clip,
)
from kdc.evaluation.scene_judge import (
    SceneJudge,
    boxes_of,
    judge_loss,
    object_labels,
    scene_labels,
)
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from studies.mini.images import leaf_images, scene_images, to_signed, world_images
from studies.mini.text import new_tokenizer, text_config, tokenize

# The judges see every combination, held-out ones too: they must recognise what they grade. Their
# renderings come from seeds of their own, apart from those of the generator and of the grades.
SEEDS = {"classifier": 101, "clip": 102, "trunk": 103, "scene-judge": 104}


def judge_pool(count: int, seed: int) -> tuple[Tensor, list]:
    """Renderings of all combinations: six in seven of training ones, the rest held-out."""
    usual, shown = world_images(count * 6 // 7, "train", seed)
    rare, shown_rare = world_images(count - count * 6 // 7, "train", seed + 1000, held_out=True)
    return torch.cat([usual, rare]), shown + shown_rare


def _choose(generator: torch.Generator, count: int, size: int) -> Tensor:
    return torch.randint(count, (size,), generator=generator)


def train_classifier(
    output_dir: Path, steps: int = 500, batch_size: int = 64, pool: int = 8000
) -> tuple[AttributeClassifier, object]:
    """Train the attribute classifier, with light noise and blur so that it forgives both."""
    torch.manual_seed(SEEDS["classifier"])
    images, shown = judge_pool(pool, SEEDS["classifier"])
    labels = labels_of(shown)
    model = AttributeClassifier()

    def loss(model, generator):
        index = _choose(generator, len(images), batch_size)
        batch = to_signed(images[index])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        if torch.rand((), generator=generator) < 0.3:
            batch = vision.gaussian_blur(batch, 3, 0.3 + torch.rand((), generator=generator).item())
        level = 0.08 * torch.rand((batch_size, 1, 1, 1), generator=generator)
        batch = batch + level * torch.randn(batch.shape, generator=generator)
        device = next(model.parameters()).device
        target = {name: values[index].to(device) for name, values in labels.items()}
        return {"loss": attribute_loss(model(batch.to(device)), target)}

    settings = TrainSettings(
        steps, batch_size=batch_size, learning_rate=2e-3, warmup=50, ema_decay=0.995
    )
    return model, train(
        model, loss, settings, output_dir, resume=True, label="attribute classifier"
    )


def train_scene_judge(
    output_dir: Path, steps: int = 2400, batch_size: int = 48, pool: int = 16000
) -> tuple[SceneJudge, object]:
    """Train the judge of scenes, with noise and blur, and with boxes that are not quite right."""
    torch.manual_seed(SEEDS["scene-judge"])
    usual, shown = scene_images(pool * 3 // 4, "train", SEEDS["scene-judge"])
    rare, shown_rare = scene_images(pool // 4, "train", SEEDS["scene-judge"], held_out=True)
    images, shown = torch.cat([usual, rare]), shown + shown_rare
    model = SceneJudge()

    def loss(model, generator):
        index = _choose(generator, len(images), batch_size)
        asked = [shown[i] for i in index.tolist()]
        batch = to_signed(images[index])
        if torch.rand((), generator=generator) < 0.3:
            batch = vision.gaussian_blur(batch, 3, 0.3 + torch.rand((), generator=generator).item())
        level = 0.08 * torch.rand((batch_size, 1, 1, 1), generator=generator)
        batch = batch + level * torch.randn(batch.shape, generator=generator)
        boxes, owners, groups = boxes_of(asked)
        jitter = 1 + 0.06 * torch.randn((len(boxes), 1), generator=generator)
        shift = 0.08 * torch.randn((len(boxes), 2), generator=generator) * boxes[:, 2:]
        boxes = torch.cat([boxes[:, :2] + shift, boxes[:, 2:] * jitter], dim=1)
        device = next(model.parameters()).device
        logits = model(batch.to(device), boxes.to(device), owners.to(device))
        labels = [
            {name: values.to(device) for name, values in found.items()}
            for found in (object_labels(groups), scene_labels(asked))
        ]
        return {"loss": judge_loss(logits, (labels[0], labels[1]))}

    settings = TrainSettings(
        steps, batch_size=batch_size, learning_rate=2e-3, warmup=50, ema_decay=0.995
    )
    return model, train(model, loss, settings, output_dir, resume=True, label="judge of scenes")


def train_clip(
    output_dir: Path, steps: int = 700, batch_size: int = 128, pool: int = 8000
) -> tuple[object, object]:
    """Train the mini CLIP contrastively; images of equal captions count as matches."""
    torch.manual_seed(SEEDS["clip"])
    images, shown = judge_pool(pool, SEEDS["clip"])
    tokenizer = new_tokenizer()
    model = new_clip(text_config(tokenizer, width=64))
    kinds = {a: i for i, a in enumerate(sorted(set(shown)))}
    identity = torch.tensor([kinds[a] for a in shown])
    ids = torch.stack([tokenize(tokenizer, [caption(a, t) for a in kinds]) for t in range(4)])

    def loss(model, generator):
        index = _choose(generator, len(images), batch_size)
        template = _choose(generator, len(TEMPLATES), batch_size)
        device = next(model.parameters()).device
        batch = to_signed(images[index])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        token_ids = ids[template, identity[index]]
        out = model(input_ids=token_ids.to(device), pixel_values=batch.to(device))
        same = (identity[index][:, None] == identity[index][None]).float().to(device)
        target = same / same.sum(dim=1, keepdim=True)
        logits = out.logits_per_image
        return {"loss": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2}

    settings = TrainSettings(
        steps, batch_size=batch_size, learning_rate=1e-3, warmup=100, ema_decay=0.995
    )
    log = train(model, loss, settings, output_dir, resume=True, label="mini CLIP")
    return (model, tokenizer), log


def distort(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distort each image (B, 3, H, W) in one of `PerceptualTrunk.DISTORTIONS`; also which."""
    which = torch.randint(len(PerceptualTrunk.DISTORTIONS), (len(images),), generator=generator)
    strength = 0.25 + 0.75 * torch.rand((len(images), 1, 1, 1), generator=generator)
    blurred = vision.gaussian_blur(images, 7, 1.6)
    noisy = images + 0.35 * strength * torch.randn(images.shape, generator=generator)
    flat = images.mean(dim=(1, 2, 3), keepdim=True)
    versions = [
        images,
        images + strength * (blurred - images),
        noisy,
        flat + (images - flat) * (1 - 0.7 * strength),
        images + 0.5 * strength * torch.randn((len(images), 3, 1, 1), generator=generator),
    ]
    return torch.stack(versions)[which, torch.arange(len(images))].clamp(-1, 1), which


def train_trunk(
    output_dir: Path, steps: int = 800, batch_size: int = 64, pool: int = 6000
) -> tuple[PerceptualTrunk, object]:
    """Train the perceptual trunk on attributes (renderings) and distortions (dead leaves too)."""
    torch.manual_seed(SEEDS["trunk"])
    images, shown = judge_pool(pool, SEEDS["trunk"])
    leaves = leaf_images(pool // 4, SEEDS["trunk"])
    labels = labels_of(shown)
    model = PerceptualTrunk()
    half = batch_size // 2

    def loss(model, generator):
        index = _choose(generator, len(images), half)
        batch = torch.cat([images[index], leaves[_choose(generator, len(leaves), half)]])
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        batch, which = distort(to_signed(batch), generator)
        device = next(model.parameters()).device
        logits = model(batch.to(device))
        target = {name: values[index].to(device) for name, values in labels.items()}
        shown_part = attribute_loss({k: v[:half] for k, v in logits.items()}, target)
        distorted = F.cross_entropy(logits["distortion"], which.to(device))
        return {"loss": shown_part + distorted, "distortion": distorted.detach()}

    settings = TrainSettings(
        steps, batch_size=batch_size, learning_rate=5e-4, warmup=100, ema_decay=0.995
    )
    return model, train(model, loss, settings, output_dir, resume=True, label="perceptual trunk")
