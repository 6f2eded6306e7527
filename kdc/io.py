"""Reading and writing: whole files or none, fingerprints, and "made with the same settings".

Every file of the project is written by one of these functions, beside its place and then renamed,
so that a reader never sees half of it. Formats are JSON and safetensors, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def as_path(path: str | os.PathLike, name: str = "the path") -> Path:
    """`path` with `~` as the home folder; every path that a caller gives goes through here once.

    Raises `TypeError` for what is no path, a number for instance, and `ValueError` for an empty
    text (which would mean the current folder) and for what no file system can name.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a text or a Path, not {path!r}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text or a Path, not {path!r}")
    if not text.strip() or "\0" in text:
        raise ValueError(f"{name} is {text!r}: give the name of a file or folder, '.' for this one")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} {text!r}: {error}") from error


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of the tensors' bytes, by which a run knows its data and teacher again."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def plain(values: Any) -> Any:
    """`values` as JSON gives them back: tuples become lists, keys become texts."""
    return json.loads(json.dumps(values))


def write_text(file: str | Path, text: str) -> Path:
    """Write a text beside its place and rename it; the folder is made."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    return partial.replace(file)


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


def refuse_other_settings(where: Path, stored: Mapping, given: Mapping, remedy: str) -> None:
    """Raise `ValueError` where something stored was made with other settings than these.

    The message names `where` it lies, each setting that differs with both values, and a `remedy`.
    """
    before, now = plain(dict(stored)), plain(dict(given))
    differing = [key for key in before | now if before.get(key) != now.get(key)]
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
        note = json.loads(file.read_text())
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
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file(state, partial, {"format": kind, "version": version})
    return partial.replace(file)


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
