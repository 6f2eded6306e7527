"""The cache of latents and text embeddings: what training needs of images and captions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from kdc.checks import as_texts
from kdc.data.shards import Shards
from kdc.pipelines import generate, refuse_infinite_images
from kdc.processes import this_process


@dataclass
class LatentDataset(Dataset):
    """Encoded images: what training needs, and the images no more.

    mean, std (N, C, h, w) of the scaled latents, so that sampling stays random; embeddings
    (M, L, D) of the distinct captions, `caption_index` (N,) into them, and the empty caption's
    embedding (L, D). Where images have several captions, `choices` (N, K) are all of each, the
    first K of them, -1 where there are fewer; `caption_index` is the first. From a cache on disk
    the large ones are `Shards`, read by need; `note` then says where it lies and how exact it is.
    """

    mean: Tensor | Shards
    std: Tensor | Shards
    embeddings: Tensor | Shards
    caption_index: Tensor
    empty: Tensor
    captions: list[str]
    choices: Tensor | None = None
    note: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index) -> dict:
        return {
            "mean": self.mean[index],
            "std": self.std[index],
            "embedding": self.embeddings[self.caption_index[index]],
        }

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        dropout: float = 0.1,
        part: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """A random batch: latents (B, C, h, w) sampled from their posteriors, embeddings (B, L, D).

        A share `dropout` of the captions is replaced by the empty one. `count` images are drawn,
        and those of the `part` are read and returned.
        """
        index = torch.randint(len(self), (count,), generator=generator)
        items = self.pick(index, generator, part)
        return sample_posterior(
            **items, empty=self.empty, generator=generator, drop=dropout, count=count, part=part
        )

    def pick(
        self, index: Tensor, generator: torch.Generator, part: slice = slice(None)
    ) -> dict[str, Tensor]:
        """The items `index` (B,), each with one of its captions drawn at random; of them a part."""
        captions = self.caption_index[index]
        if self.choices is not None:
            offered = self.choices[index]
            count = (offered >= 0).sum(dim=1)
            which = (torch.rand(len(index), generator=generator) * count).long()
            captions = offered.gather(1, which[:, None]).squeeze(1)
        own = index[part]
        return {
            "mean": self.mean[own],
            "std": self.std[own],
            "embedding": self.embeddings[captions[part]],
        }


def sample_posterior(
    mean: Tensor,
    std: Tensor,
    embedding: Tensor,
    *,
    empty: Tensor,
    generator: torch.Generator,
    drop: float,
    count: int | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Latents drawn from their posteriors, and embeddings of which a share `drop` is `empty`.

    mean, std (B, C, h, w), embedding (B, L, D), empty (L, D) -> (B, C, h, w) and (B, L, D). They
    may be the `part` of `count` images for which all is drawn.
    """
    count = len(mean) if count is None else count
    spread = torch.randn((count, *mean.shape[1:]), generator=generator)[part]
    dropped = (torch.rand(count, generator=generator) < drop)[part]
    return mean + std * spread, torch.where(dropped[:, None, None], empty, embedding)


@torch.inference_mode()
def embed_captions(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], batch_size: int = 64
) -> Tensor:
    """(M, L, D) text embeddings as the pipeline makes them for its U-Net, on the CPU."""
    captions, parts = as_texts("captions", captions), []
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        embedded, _ = pipeline.encode_prompt(part, pipeline.device, 1, False)
        refuse_infinite_images(embedded, part, "the text encoder")
        parts.append(embedded.float().cpu())
    return torch.cat(parts).clone()


def encode(
    pipeline: StableDiffusionPipeline,
    dataset: Dataset,
    batches: list[list[int]],
    workers: int | None = None,
) -> Iterator[tuple[list[dict], Tensor, Tensor]]:
    """Of each batch its items without their images, and mean and std of their scaled latents.

    mean, std (B, C, h, w), float32 on the CPU. Raises as `cache_latents`.
    """
    vae, device = pipeline.vae, pipeline.device
    expected = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(
        _Reading(dataset),
        batch_sampler=batches,
        collate_fn=_stacked,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # it would draw a seed of its own from the global generator
    )
    hidden = not batches or not this_process().is_main_process
    for found in tqdm(loader, desc="encoding", mininterval=2, disable=hidden):
        if isinstance(found, Exception):
            raise found
        items, images = found
        if images.shape[-2:] != (expected, expected):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, the U-Net expects {expected} x "
                f"{expected}: load the data set with size={expected}"
            )
        with torch.inference_mode():
            inputs = images.to(device, vae.dtype, non_blocking=True)
            posterior = vae.encode(inputs).latent_dist
            mean, std = posterior.mean, posterior.std
        names = [item.get("path", item["caption"]) for item in items]
        for values in (mean, std):
            refuse_infinite_images(values, names, "the autoencoder")
        factor = vae.config.scaling_factor
        yield items, (mean.float().cpu() * factor).clone(), (std.float().cpu() * factor).clone()


class _Reading(Dataset):
    """Items, or what was raised instead: an error in a worker would lose its kind and message."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict | Exception:
        try:
            return self.dataset[index]
        except Exception as error:
            return error


def _stacked(items: list) -> tuple[list[dict], Tensor] | Exception:
    """Items without their images, and these as one tensor (B, 3, H, W)."""
    for item in items:
        if isinstance(item, Exception):
            return item
    shapes = {tuple(item["image"].shape) for item in items}
    if len(shapes) > 1:
        return ValueError(f"images differ in size: {sorted(shapes)}")
    images = torch.stack([item["image"] for item in items])
    return [{k: v for k, v in item.items() if k != "image"} for item in items], images


def with_captions(
    data: LatentDataset, pipeline: StableDiffusionPipeline, captions: Sequence[str]
) -> LatentDataset:
    """The same images under other captions, one for each image instead of those they had.

    Raises `ValueError` where there are not as many captions as images.
    """
    captions = as_texts("captions", captions)
    if len(captions) != len(data):
        raise ValueError(f"{len(captions)} captions for {len(data)} images")
    distinct, index = _number(captions)
    embeddings = embed_captions(pipeline, distinct)
    return dataclasses.replace(
        data, embeddings=embeddings, caption_index=index, captions=distinct, choices=None
    )


def latents_of_captions(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], seed: int = 0, **settings
) -> LatentDataset:
    """What the pipeline itself generates for captions, as a data set; nothing is decoded.

    `settings` are those of `generate`. A generated latent is known exactly: its deviation is 0.
    """
    captions = as_texts("captions", captions)
    latents = generate(pipeline, captions, seed=seed, decode=False, **settings).clone()
    distinct, index = _number(captions)
    embeddings = embed_captions(pipeline, [*distinct, ""])
    return LatentDataset(
        latents, torch.zeros_like(latents), embeddings[:-1], index, embeddings[-1], distinct
    )


def number_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor, Tensor]:
    """The distinct captions of some images, sorted, and for each image its first and all of them.

    The numbers are (N,) and (N, K), places among the distinct ones; -1 where there are fewer.
    """
    distinct, every = _number([caption for each in captions for caption in each])
    numbers = every.split([len(each) for each in captions])
    choices = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=-1)
    return distinct, choices[:, 0].clone(), choices


def _number(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct captions, sorted, and for each caption its place among them, (N,)."""
    distinct = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    return distinct, torch.tensor([place[caption] for caption in captions])
