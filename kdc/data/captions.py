"""Captions that come with a folder of images, and the one matcher that gives each to its image.

Read are `metadata.jsonl` ({"file_name", "text"} a line, the text one caption or a list of them),
`metadata.csv` (columns file_name and text), in any folder, for the images below it, and `.txt`
files beside images, a caption a line.
"""

from __future__ import annotations

import csv
import json
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LISTS = ("metadata.jsonl", "metadata.csv")


def read_captions(root: Path, images: Sequence[Path], files: Iterable[Path]) -> dict[Path, list]:
    """The captions of images below `root`, in the order in which they stand there.

    `files` are all files below `root`, among them those that hold captions. A name in a list need
    not be that of the file to the letter: slashes, an added or missing folder, the case, the
    Unicode form and the suffix may differ, as long as one image alone is meant. Warns, with both
    counts, of rows that mean no image and images that no row means. Raises `ValueError`, naming
    file and line, for rows that cannot be read or mean several images, and for a list that means
    none of the images.
    """
    found: dict[Path, list[str]] = {}
    for listing in sorted(f for f in files if f.name.lower() in LISTS):
        below = [f for f in images if listing.parent in f.parents]
        if below:
            _read_list(listing, below, found)
    beside = {f.with_suffix(""): f for f in files if f.suffix.lower() == ".txt"}
    texts = {image: beside.get(image.with_suffix("")) or beside.get(image) for image in images}
    without = [image for image in images if texts[image] is None and image not in found]
    for image, text in texts.items():
        if text is not None and image not in found:
            lines = [line.strip() for line in _decoded(text).splitlines()]
            found[image] = list(dict.fromkeys(line for line in lines if line))
            if not found[image]:
                raise ValueError(f"{text}:1: no caption for {image.name}")
    if without and any(texts.values()):
        warnings.warn(
            f"{root}: {len(without)} of {len(images)} images have no caption beside them, "
            f"{without[0].relative_to(root)} for one; these are called after their folder",
            stacklevel=5,
        )
    return found


def _read_list(listing: Path, below: Sequence[Path], found: dict[Path, list[str]]) -> None:
    """Add the captions of one list to those found."""
    rows = list(_rows(listing))
    exact = {f.relative_to(listing.parent).as_posix(): f for f in below}
    claimed = {exact[name] for _, name, _ in rows if name in exact}
    names = _Names({name: f for name, f in exact.items() if f not in claimed})
    unknown = 0
    meant = set()
    for number, name, texts in rows:
        image = exact.get(name) or names.find(name, f"{listing}:{number}")
        if image is None:
            unknown += 1
            continue
        meant.add(image)
        known = found.setdefault(image, [])
        known += [text for text in dict.fromkeys(texts) if text not in known]
    if not meant:
        raise ValueError(
            f"{listing} names none of the {len(below)} images below it; the first of them is "
            f"{min(exact)!r}"
        )
    if unknown or len(meant) < len(below):
        warnings.warn(
            f"{listing}: {unknown} of {len(rows)} rows name no image, and "
            f"{len(below) - len(meant)} of {len(below)} images have no row; these are called after "
            "their folder",
            stacklevel=6,
        )


def _rows(listing: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, name and captions of each row. Raises `ValueError` with file and line."""
    expected = {
        ".jsonl": '{"file_name": ..., "text": ...}',
        ".csv": "columns file_name and text",
    }[listing.suffix.lower()]
    number = 0
    try:
        rows = _json_rows(listing) if listing.suffix.lower() == ".jsonl" else _csv_rows(listing)
        for number, row in rows:
            name, text = row["file_name"], row["text"]
            texts = text if isinstance(text, list) else [text]
            if not isinstance(name, str) or not name.strip():
                raise TypeError(f"the file_name is {name!r}")
            for one in texts or [None]:
                if not isinstance(one, str) or not one.strip():
                    raise TypeError(f"the text is {one!r}")
            yield number, name, [one.strip() for one in texts]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        at = getattr(error, "line", number)
        raise ValueError(f"{listing}:{max(1, at)}: expected {expected}: {error!r}") from error


class _LineError(ValueError):
    def __init__(self, line: int, said: str):
        super().__init__(said)
        self.line = line


def _json_rows(listing: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        try:
            text = line.decode("utf-8-sig").strip()
            if text:
                row = json.loads(text, parse_constant=lambda name: None)
                if not isinstance(row, dict):
                    raise TypeError(f"the row is {row!r}")
                row["file_name"], row["text"]
                yield number, row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _LineError(number, f"{type(error).__name__}: {error}") from error


def _csv_rows(listing: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(_decoded(listing).splitlines(keepends=True), strict=True)
    for name in ("file_name", "text"):
        if name not in (reader.fieldnames or ()):
            raise _LineError(1, f"no column {name}, only {reader.fieldnames}")
    for row in reader:
        yield reader.line_num, row


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error


def _plain(name: str) -> str:
    """A name without what differs between systems: slashes, case, Unicode form."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/")).casefold()
    while name.startswith(("./", "/")):
        name = name[1:].lstrip("/") if name.startswith("/") else name[2:]
    return name


class _Names:
    """Images by names that need not be theirs to the letter: {name in the list's folder: file}.

    Folders may be missing or added at the front of a name, but not differ: "a/1.jpg" never means
    b/1.jpg.
    """

    def __init__(self, images: dict[str, Path]):
        self.by_stem: dict[str, list[tuple[list[str], str, Path]]] = {}
        for name, file in images.items():
            folders, stem, suffix = self._parts(name)
            self.by_stem.setdefault(stem, []).append((folders, suffix, file))

    @staticmethod
    def _parts(name: str) -> tuple[list[str], str, str]:
        *folders, last = _plain(name).split("/")
        stem, dot, suffix = last.rpartition(".")
        return (folders, stem, suffix) if dot else (folders, last, "")

    def find(self, name: str, where: str) -> Path | None:
        """The image that is meant, or None. Raises `ValueError` where it could be several."""
        folders, stem, suffix = self._parts(name)
        candidates = self.by_stem.get(stem, [])
        if not candidates and suffix:  # a name without suffix that has a dot in it
            candidates = self.by_stem.get(f"{stem}.{suffix}", [])
        fitting = [c for c in candidates if _ends_alike(folders, c[0])]
        for closest in (
            [c for c in fitting if c[0] == folders and c[1] == suffix],
            [c for c in fitting if c[0] == folders],
            [c for c in fitting if c[1] == suffix],
            fitting,
        ):
            if len(closest) > 1:
                shown = ", ".join(sorted(f.as_posix() for _, _, f in closest)[:3])
                raise ValueError(f"{where}: {name!r} could be any of {shown}: give the whole path")
            if closest:
                return closest[0][2]
        return None


def _ends_alike(a: list[str], b: list[str]) -> bool:
    shared = min(len(a), len(b))
    return a[len(a) - shared :] == b[len(b) - shared :]
