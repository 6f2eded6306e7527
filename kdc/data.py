"""Captioned pictures by name or folder, and the cache of latents and text embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from kdc import worlds
from kdc.folders import FOLDER_SPLITS, FolderDataset, read_folder
from kdc.models import generate

__all__ = [
    "FolderDataset",
    "LatentDataset",
    "WorldDataset",
    "cache_latents",
    "embed_captions",
    "latents_of_captions",
    "load_dataset",
    "sample_posterior",
    "with_captions",
]


class WorldDataset(Dataset):
    """Renderings of one world or of both in turn, drawn when asked for.

    Items: {"image" (3, size, size) in [-1, 1], "caption", "attributes"}.
    """

    def __init__(
        self,
        names: Sequence[str],
        split: str = "train",
        size: int = 64,
        count: int = 2000,
        seed: int = 0,
        held_out: bool = False,
    ):
        self.names = [worlds.world(name).name for name in names]
        self.split, self.size, self.count = split, size, count
        self.seed, self.held_out = seed, held_out
        worlds.rendering_rng(self.names[0], split, 0)  # an unknown split is refused here

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return worlds.caption(self._draw(index)[0])

    def _draw(self, index: int):
        if not 0 <= index < self.count:
            raise IndexError(index)
        name = self.names[index % len(self.names)]
        rng = worlds.rendering_rng(name, self.split, index // len(self.names), self.seed)
        return worlds.draw_attributes(name, rng, self.held_out), rng

    def __getitem__(self, index: int) -> dict:
        attributes, rng = self._draw(index)
        picture = torch.from_numpy(worlds.render(attributes, rng, self.size)).permute(2, 0, 1)
        return {
            "image": picture.float() / 127.5 - 1,
            "caption": worlds.caption(attributes),
            "attributes": attributes,
        }


def load_dataset(
    name_or_folder: str | Path,
    split: str = "train",
    size: int = 64,
    *,
    count: int = 2000,
    seed: int = 0,
    held_out: bool = False,
) -> Dataset:
    """A captioned data set: "flora", "lepidoptera", "worlds" (both), or a folder of pictures.

    `count`, `seed` and `held_out` concern the worlds. A folder may hold `train/` and `test/`; where
    it does not, one picture in five, chosen by the hash of its name, is for testing. Every file is
    opened once: those that are no readable picture are left out and named in a warning. Raises
    `FileNotFoundError` for a missing folder and `ValueError` for one without pictures.
    """
    if split not in FOLDER_SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are train and test")
    names = list(worlds.WORLDS) if name_or_folder == "worlds" else [str(name_or_folder)]
    if all(name in worlds.WORLDS for name in names):
        return WorldDataset(names, split, size, count, seed, held_out)
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data set {str(name_or_folder)!r}: neither a folder nor one of "
            f"{', '.join(worlds.WORLDS)}, worlds"
        )
    return read_folder(folder, split, size)


@dataclass
class LatentDataset(Dataset):
    """Encoded pictures: what training needs, and the pictures no more.

    mean, std (N, C, h, w) of the scaled latents, so that sampling stays random; embeddings
    (M, L, D) of the distinct captions, `caption_index` (N,) into them, and the empty caption's
    embedding (L, D).
    """

    mean: Tensor
    std: Tensor
    embeddings: Tensor
    caption_index: Tensor
    empty: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index) -> dict:
        return {
            "mean": self.mean[index],
            "std": self.std[index],
            "embedding": self.embeddings[self.caption_index[index]],
        }

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.1) -> tuple:
        """A random batch: latents (B, C, h, w) sampled from their posteriors, embeddings (B, L, D).

        A share `dropout` of the captions is replaced by the empty one.
        """
        index = torch.randint(len(self), (count,), generator=generator)
        return sample_posterior(**self[index], empty=self.empty, generator=generator, drop=dropout)


def sample_posterior(
    mean: Tensor,
    std: Tensor,
    embedding: Tensor,
    *,
    empty: Tensor,
    generator: torch.Generator,
    drop: float,
) -> tuple[Tensor, Tensor]:
    """Latents drawn from their posteriors, and embeddings of which a share `drop` is `empty`.

    mean, std (B, C, h, w), embedding (B, L, D), empty (L, D) -> (B, C, h, w) and (B, L, D).
    """
    spread = torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(len(mean), generator=generator) < drop
    return mean + std * spread, torch.where(dropped[:, None, None], empty, embedding)


@torch.inference_mode()
def embed_captions(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], batch_size: int = 64
) -> Tensor:
    """(M, L, D) text embeddings as the pipeline makes them for its U-Net, on the CPU."""
    parts = []
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        embedded, _ = pipeline.encode_prompt(part, pipeline.device, 1, False)
        parts.append(embedded.float().cpu())
    return torch.cat(parts).clone()


@torch.inference_mode()
def cache_latents(
    pipeline: StableDiffusionPipeline, dataset: Dataset, batch_size: int = 32
) -> LatentDataset:
    """Encode every picture and every distinct caption once.

    Raises `ValueError` if a picture's size is not what the autoencoder and U-Net expect.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    vae = pipeline.vae
    expected = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    loader = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=list)
    means, stds, captions = [], [], []
    for items in tqdm(loader, desc="encoding", mininterval=2):
        pictures = torch.stack([item["image"] for item in items])
        if pictures.shape[-2:] != (expected, expected):
            raise ValueError(
                f"pictures are {tuple(pictures.shape[-2:])}, the U-Net expects {expected} x "
                f"{expected}: load the data set with size={expected}"
            )
        posterior = vae.encode(pictures.to(pipeline.device, vae.dtype)).latent_dist
        means.append((posterior.mean * vae.config.scaling_factor).float().cpu())
        stds.append((posterior.std * vae.config.scaling_factor).float().cpu())
        captions += [item["caption"] for item in items]
    distinct, index = _number(captions)
    return LatentDataset(
        torch.cat(means).clone(),
        torch.cat(stds).clone(),
        embed_captions(pipeline, distinct),
        index,
        embed_captions(pipeline, [""])[0],
        distinct,
    )


def with_captions(
    data: LatentDataset, pipeline: StableDiffusionPipeline, captions: Sequence[str]
) -> LatentDataset:
    """The same pictures under other captions, one for each picture.

    Raises `ValueError` where there are not as many captions as pictures.
    """
    if len(captions) != len(data):
        raise ValueError(f"{len(captions)} captions for {len(data)} pictures")
    distinct, index = _number(captions)
    embeddings = embed_captions(pipeline, distinct)
    return dataclasses.replace(data, embeddings=embeddings, caption_index=index, captions=distinct)


def latents_of_captions(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], seed: int = 0, **settings
) -> LatentDataset:
    """What the pipeline itself draws for captions, as a data set; nothing is decoded or encoded.

    `settings` are those of `generate`. A drawn latent is known exactly, so its deviation is 0.
    """
    latents = generate(pipeline, captions, seed=seed, decode=False, **settings).clone()
    distinct, index = _number(captions)
    embeddings = embed_captions(pipeline, [*distinct, ""])
    return LatentDataset(
        latents, torch.zeros_like(latents), embeddings[:-1], index, embeddings[-1], distinct
    )


def _number(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct captions, sorted, and for each caption its place among them, (N,)."""
    distinct = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    return distinct, torch.tensor([place[caption] for caption in captions])
