"""The cache of latents: in memory, or on disk in shards that processes write side by side.

    FOLDER/<key>/latents-00000.safetensors    mean, std of 256 images
    FOLDER/<key>/captions-00000.safetensors   embeddings of 256 distinct captions
    FOLDER/<key>/index.safetensors            which caption is whose, and the empty one
    FOLDER/<key>/cache.json                   what made it, and the error of half precision

`key` is a hash of everything that the numbers depend on. A shard is written whole or not at all, so
that a stopped run goes on where it was; the manifest, with checksums, is written last.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from kdc.checks import whole_number
from kdc.data.latents import LatentDataset, embed_captions, encode, number_captions
from kdc.data.shards import FORMAT, VERSION, open_shards, write_shard
from kdc.io import (
    MANIFEST,
    check_sealed,
    checksum,
    fingerprint,
    forget_partial,
    hash_text,
    plain,
    read_json,
    read_tensors,
    seal,
    write_json,
)
from kdc.paths import try_writing
from kdc.processes import locked, this_process

KIND = "kdc-latents"
ROWS = 256  # in a shard: 16 MB of Stable Diffusion's latents in half precision
NOTE, INDEX = "cache.json", "index.safetensors"
# What a data set must be able to say before its encoded images can lie on a disk.
PROTOCOL = {
    "identity": "whatever the images depend on, in plain values",
    "captions_of": "all captions of item i, without reading its image",
}
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def cache_latents(
    pipeline: StableDiffusionPipeline,
    dataset: Dataset,
    batch_size: int = 32,
    *,
    folder: str | Path | None = None,
    dtype: str = "float16",
    workers: int | None = None,
) -> LatentDataset:
    """Encode every image and every distinct caption once.

    Without a `folder` all is held in memory, in float32. With one it goes there in shards of
    `dtype`, "float16" (whose largest error the result's `note` states) or "float32", and is read
    from there by need; what lies there already, from the same networks, images and captions, is not
    encoded again. Several processes write their shares side by side. `workers` processes read the
    images while the encoder runs; None: up to 8 where that is a GPU, else none.

    Raises `ValueError` if an image's size is not what the autoencoder and U-Net expect, and
    `FloatingPointError` naming the image or caption whose encoding is not finite; with a folder
    also what `cache_on_disk` raises.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("the data set is empty")
    batch_size = whole_number("batch_size", batch_size, 1)
    if workers is not None:
        workers = whole_number("workers", workers, 0)
    if folder is not None:
        return cache_on_disk(
            pipeline, dataset, folder, batch_size=batch_size, dtype=dtype, workers=workers
        )
    mean = std = torch.empty(0)
    captions: list[Sequence[str]] = []
    batches = [part.tolist() for part in torch.arange(count).split(batch_size)]
    for items, means, stds in encode(pipeline, dataset, batches, workers):
        if not len(mean):  # one copy of all, filled in place
            mean = torch.empty(count, *means.shape[1:])
            std = torch.empty_like(mean)
        rows = slice(len(captions), len(captions) + len(items))
        mean[rows], std[rows] = means, stds
        captions += [item.get("captions") or (item["caption"],) for item in items]
    distinct, index, choices = number_captions(captions)
    return LatentDataset(
        mean,
        std,
        embed_captions(pipeline, distinct),
        index,
        embed_captions(pipeline, [""])[0],
        distinct,
        choices if choices.shape[1] > 1 else None,
    )


def check_cache(folder: str | Path, dataset, dtype: str = "float16") -> Path:
    """The folder as a path, looked at before anything is encoded; raises as `cache_on_disk`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    for name in ("identity", "captions_of"):
        if not callable(getattr(dataset, name, None)):
            raise TypeError(
                f"a cache on disk needs to know its data again: {type(dataset).__name__} has no "
                f"method {name}. It should give {PROTOCOL[name]}"
            )
    return try_writing(folder, (f"{'0' * 16}/{NOTE}",), "the folder of latents")


def cache_on_disk(
    pipeline: StableDiffusionPipeline,
    dataset,
    folder: str | Path,
    *,
    batch_size: int,
    dtype: str = "float16",
    workers: int | None = None,
) -> LatentDataset:
    """The encoded data set, from `folder` where it is there already; see `cache_latents`.

    What was encoded with the same networks from the same images and captions is used again; shards
    that are damaged are encoded anew, with a warning. Raises `ValueError` for another dtype,
    `TypeError` for a data set that cannot say what it is (see `PROTOCOL`), `RuntimeError` where
    another run fills the same cache, another `OSError` where nothing can be written, and as
    `cache_latents`.
    """
    root = check_cache(folder, dataset, dtype)
    captions = [tuple(dataset.captions_of(i)) for i in range(len(dataset))]
    distinct, index, choices = number_captions(captions)
    made_with = _made_with(pipeline, dataset, captions, dtype)
    place = root / hash_text(repr(made_with))
    parts = {f"latents-{i:05d}.safetensors": rows for i, rows in enumerate(_shards(len(dataset)))}
    texts = {f"captions-{i:05d}.safetensors": rows for i, rows in enumerate(_shards(len(distinct)))}
    process = this_process()
    with locked(place):
        if process.is_main_process:
            _mend(place, [*parts, *texts, INDEX, NOTE])
        process.wait_for_everyone()
        if not (place / MANIFEST).is_file():
            kept = DTYPES[dtype]
            _write_latents(pipeline, dataset, place, _own(parts, place), batch_size, kept, workers)
            _write_captions(pipeline, distinct, place, _own(texts, place), kept)
            process.wait_for_everyone()
            if process.is_main_process:
                empty = embed_captions(pipeline, [""])[0]
                numbers = {"caption_index": index, "choices": choices, "empty": empty}
                write_shard(place / INDEX, numbers)
                note = {"made_with": made_with, "images": len(dataset), "captions": distinct}
                note["largest_error"] = _largest_error([place / name for name in parts])
                write_json(place / NOTE, note, indent=1)
                seal(place, KIND, [place / name for name in (*parts, *texts, INDEX, NOTE)])
        process.wait_for_everyone()
    return _opened(place, list(parts), list(texts))


def _own(files: Mapping[str, range], place: Path) -> dict[str, range]:
    """The shards that this process writes and that are not there yet."""
    process = this_process()
    mine = list(files.items())[process.process_index :: process.num_processes]
    return {name: rows for name, rows in mine if not (place / name).is_file()}


def _shards(count: int) -> list[range]:
    return [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def _made_with(pipeline, dataset, captions: Sequence[Sequence[str]], dtype: str) -> dict:
    """Everything that the numbers in a cache depend on."""
    vae, text = pipeline.vae, pipeline.text_encoder
    return plain(
        {
            "version": 1,
            "dataset": dataset.identity(),
            "captions": hash_text(*(caption for each in captions for caption in (*each, ""))),
            "autoencoder": fingerprint(*vae.state_dict().values()),
            "scaling_factor": vae.config.scaling_factor,
            "text_encoder": fingerprint(*text.state_dict().values()),
            "vocabulary": hash_text(repr(sorted(pipeline.tokenizer.get_vocab().items()))),
            "size": pipeline.unet.config.sample_size,
            "precision": [str(vae.dtype), str(text.dtype)],
            "dtype": dtype,
        }
    )


def _mend(place: Path, files: list[str]) -> None:
    """Make a cache that was begun one that can go on: what is half written or damaged goes."""
    forget_partial(*(place / name for name in (*files, MANIFEST)))
    if not (place / MANIFEST).is_file():
        return
    try:
        check_sealed(place, KIND)
        return
    except ValueError as error:
        warnings.warn(f"{error}. Encoding again what is damaged", stacklevel=4)
    try:
        sums = read_json(place / MANIFEST)["files"]
    except (ValueError, KeyError, OSError):
        sums = {}
    for name in files:
        file = place / name
        if file.is_file() and (name not in sums or checksum(file) != sums[name]):
            file.unlink()
    (place / MANIFEST).unlink()


def _write_latents(pipeline, dataset, place, left: dict[str, range], batch_size, dtype, workers):
    """Encode the images of these shards, and write each shard once it is full."""
    batches = [
        list(rows[start : start + batch_size])
        for rows in left.values()
        for start in range(0, len(rows), batch_size)
    ]
    encoded = encode(pipeline, dataset, batches, workers)
    for name, rows in left.items():
        means, stds = (torch.cat(parts) for parts in zip(*_of(rows, encoded), strict=True))
        mean, std = _halved(means, dtype), _halved(stds, dtype)
        error = (mean.float() - means).abs()
        errors = [error.max(), (std.float() - stds).abs().max(), (error / means.std()).max()]
        write_shard(place / name, {"mean": mean, "std": std, "error": torch.stack(errors)[None]})


def _write_captions(pipeline, captions: list[str], place, left: dict[str, range], dtype):
    """Embed the captions of these shards."""
    for name, rows in left.items():
        embedded = embed_captions(pipeline, [captions[i] for i in rows])
        write_shard(place / name, {"embedding": _halved(embedded, dtype)})


def _largest_error(files: Sequence[Path]) -> dict[str, float]:
    """The largest rounding errors that the shards note of themselves; see `_write_latents`."""
    mean, std, relative = open_shards(files, "error", "")[:].amax(dim=0).tolist()
    return {"mean": mean, "std": std, "mean_over_deviation": relative}


def _of(rows: range, encoded: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
    """The encoded batches of one shard."""
    done = 0
    while done < len(rows):
        _, mean, std = next(encoded)
        done += len(mean)
        yield mean, std


def _halved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in that precision. Raises `FloatingPointError` where they are too large for it."""
    stored = values.to(dtype)
    if not stored.isfinite().all():
        raise FloatingPointError(
            f"a value of {values.abs().max().item():g} is too large for {dtype}: take "
            "dtype='float32'"
        )
    return stored


def _opened(place: Path, latents: list[str], captions: list[str]) -> LatentDataset:
    note, key = read_json(place / NOTE), place.name
    files = [place / name for name in latents]
    index = read_tensors(place / INDEX, FORMAT, VERSION)
    choices = index["choices"]
    return LatentDataset(
        open_shards(files, "mean", f"{key} mean"),
        open_shards(files, "std", f"{key} std"),
        open_shards([place / name for name in captions], "embedding", f"{key} embedding"),
        index["caption_index"],
        index["empty"],
        note["captions"],
        choices if choices.shape[1] > 1 else None,
        note=note | {"folder": str(place)},
    )
