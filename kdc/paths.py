"""Paths as callers give them, and whether anything can be written there. Imports nothing heavy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

STUDENT_FILES = ("unet/config.json", "kdc.json")  # what `pipelines.save_student` writes


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


def try_writing(folder: str | os.PathLike, files: Iterable[str], name: str = "output_dir") -> Path:
    """The folder as `as_path` gives it, where all these files could be written; nothing is made.

    `files` are relative to it. Raises `NotADirectoryError` or `IsADirectoryError` where something
    of the other kind has such a name, and `PermissionError` or another `OSError` where nothing can
    be written; each says which path.
    """
    folder = as_path(folder, name)
    tried = set()
    for file in (folder / each for each in files):
        parent = file.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{name} {folder}: {parent} is a file, a folder is needed")
        if file.is_dir():
            raise IsADirectoryError(f"{name} {folder}: {file} is a folder, a file is to go there")
        if parent not in tried:
            try:
                with tempfile.TemporaryFile(dir=parent):
                    tried.add(parent)
            except OSError as error:
                raise type(error)(
                    error.errno, f"{name} {folder}: nothing can be written there", str(parent)
                ) from error
    return folder
