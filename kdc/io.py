"""Reading and writing: whole files or none, fingerprints, and "made with the same settings".

Every file of the project is written by one of these functions, beside its place and then renamed,
so that a reader never sees half of it. Formats are JSON and safetensors, never pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
REMEDY = "use the same, or another output_dir"


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of the tensors' bytes, by which a run knows its data and teacher again."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_text(*texts: str) -> str:
    """A short hash of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def plain(values: Any) -> Any:
    """`values` as JSON gives them back: tuples become lists, keys become texts."""
    return json.loads(json.dumps(values))


def beside(file: Path) -> Path:
    """The folder in which `file` is written before it is renamed.

    A folder, because safetensors writes through a file of a random name beside the one it is given.
    """
    return file.with_name(file.name + ".partial")


def forget_partial(*files: Path) -> None:
    """Remove what a stopped process left of these files while it wrote them."""
    for file in files:
        shutil.rmtree(beside(file), ignore_errors=True)


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A place to write to, which takes the place of `file` at the end, all of it or nothing.

    The folder is made. What was written is on the disk before the old file goes, so that a crash
    leaves one of the two. Where writing fails nothing is left behind.
    """
    file = Path(file)
    folder = beside(file)
    forget_partial(file)
    folder.mkdir(parents=True)
    try:
        yield folder / file.name
        sync(folder / file.name)
        (folder / file.name).replace(file)
    finally:
        forget_partial(file)
    sync(file.parent)


@contextlib.contextmanager
def disk_errors(said: str, place: Path, rubbish: Path | None = None) -> Iterator[None]:
    """Within it a failure to write is an `OSError` that says so, also where safetensors met it.

    What was written into the folder `rubbish` goes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if rubbish:
            shutil.rmtree(rubbish, ignore_errors=True)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{said} ({error})", str(place)) from error


def refuse_infinite_weights(named: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Raise `FloatingPointError` naming the first of these tensors that is not finite."""
    floats = [(name, x.detach()) for name, x in named if x.is_floating_point() and x.numel()]
    if floats and not torch.stack([x.abs().max().float() for _, x in floats]).isfinite().all():
        first = next(name for name, x in floats if not x.isfinite().all())
        raise FloatingPointError(f"{when}: the weights {first} are not finite")


def sync(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(file: str | Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def seal(folder: Path, kind: str, files: Iterable[Path] | None = None) -> None:
    """Bring a folder's files to the disk, and list them with their checksums in a manifest.

    `files` are all below it unless given; a manifest of none says whose the folder is while it is
    being filled, and is not whole.
    """
    if files is None:
        files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    sums = {}
    for file in files:
        sync(file)
        sums[file.relative_to(folder).as_posix()] = checksum(file)
    write_json(folder / MANIFEST, {"format": kind, "version": 1, "files": sums})


def check_sealed(folder: Path, kind: str) -> None:
    """Raise `ValueError` where a folder is not as it was sealed, naming what is wrong."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is damaged, or was written by an earlier version: it has no {MANIFEST}"
        )
    note = read_json(folder / MANIFEST)
    sums = note.get("files")
    if note.get("format") != kind or not isinstance(sums, dict) or not sums:
        raise ValueError(f"{folder} is damaged: {MANIFEST} lists no files of a {kind}")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if checksum(folder / name) != expected:
            raise ValueError(f"{folder} is damaged: {name} is not what was written")


def is_sealed_as(folder: Path, kind: str) -> bool:
    """Whether a folder is one of that kind, filled or not; only such folders are ever deleted."""
    try:
        return read_json(folder / MANIFEST).get("format") == kind
    except (OSError, ValueError):
        return False


def write_text(file: str | Path, text: str) -> Path:
    """Write a text beside its place and rename it; the folder is made."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(file)


def write_image(file: str | Path, image: Tensor | Image.Image) -> Path:
    """Write an image, Pillow's or (3, H, W) uint8, beside its place and then renamed."""
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    with replacing(file) as place:
        image.save(place)
    return Path(file)


def read_json(file: str | Path) -> dict:
    """The dictionary that `write_json` wrote.

    Raises `FileNotFoundError`, and `ValueError` naming a file that is damaged or holds none.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds {type(values).__name__}, not names")
    return values


def write_json(
    file: str | Path,
    values: Any,
    indent: int | None = 2,
    default: Callable[[Any], Any] | None = None,
) -> Path:
    """Write values as JSON, beside and then renamed.

    Raises `TypeError` for what JSON does not know, unless `default` turns it into something else.
    """
    return write_text(file, json.dumps(values, indent=indent, default=default) + "\n")


def refuse_other_settings(
    where: Path, stored: Mapping, given: Mapping, remedy: str = REMEDY, partly: bool = False
) -> None:
    """Raise `ValueError` where something stored was made with other settings than these.

    `partly` looks at the names of `given` alone, which are not all. The message names `where` it
    lies, each setting that differs with both values, and a `remedy`.
    """
    before, now = plain(dict(stored)), plain(dict(given))
    names = now if partly else before | now
    differing = [key for key in names if before.get(key) != now.get(key)]
    if differing:
        said = "; ".join(
            f"{key}={_short(before.get(key))}, now {key}={_short(now.get(key))}"
            for key in differing
        )
        raise ValueError(f"{where} was made with {said}: {remedy}")


def _short(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def make_once(file: Path, made_with: dict, make: Callable[[], dict]) -> dict:
    """What `make()` gives, from `file` if it is there already, and there afterwards.

    Raises `ValueError` where `file` was made with other settings.
    """
    if file.is_file():
        note = read_json(file)
        refuse_other_settings(
            file, note["made_with"], made_with, "use another folder, or delete it"
        )
        return note["row"]
    file.parent.mkdir(parents=True, exist_ok=True)  # where `make` may leave files of its own
    row = plain(make())
    write_json(file, {"made_with": plain(made_with), "row": row}, indent=None)
    return row


def write_tensors(file: str | Path, state: dict[str, Tensor], kind: str, version: str) -> Path:
    """Write tensors as safetensors that name their format, beside and then renamed."""
    with replacing(file) as partial, disk_errors("could not be written", Path(file)):
        save_file(state, partial, {"format": kind, "version": version})
    return Path(file)


def read_tensors(file: str | Path, kind: str, version: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote.

    Raises `FileNotFoundError`, and `ValueError` for a damaged file, another format or version.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}")
    try:
        with safe_open(file, "pt") as opened:
            note = opened.metadata() or {}
            if note.get("format") != kind:
                raise ValueError(f"{file} holds no {kind}: its metadata are {note}")
            if note.get("version") != version:
                raise ValueError(
                    f"{file} is of version {note.get('version')}, this code reads version "
                    f"{version}: read it with the code that wrote it"
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}") from error


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries below `name`, without it."""
    return {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{name}.")}
