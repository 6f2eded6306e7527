"""Two procedural image worlds whose every attribute is known exactly.

``flora`` shows flowers, ``lepidoptera`` butterflies. An image is a pure function of its
`Attributes` and of a `numpy.random.Generator` that draws the nuisances (place, size, turn, light,
number of petals), so a data set is a seed, a caption is never wrong, and a score such as "the
asked-for colour was drawn" has a true answer. Backgrounds are smooth on purpose: fine texture costs
a small model its capacity and teaches the reader nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from kdc.data import drawing

COLOURS = {
    "red": (0.84, 0.10, 0.13),
    "orange": (0.98, 0.50, 0.07),
    "yellow": (0.98, 0.86, 0.16),
    "pink": (0.98, 0.55, 0.74),
    "purple": (0.50, 0.20, 0.70),
    "blue": (0.16, 0.36, 0.90),
    "white": (0.97, 0.96, 0.94),
}
BACKGROUNDS = ("sky", "meadow", "sand", "night")
TEMPLATES = (
    "a {colour} {kind} on a {background} background",
    "a picture of a {colour} {kind} on a {background} background",
    "{colour} {kind}, {background} background",
    "one {colour} {kind} in front of a {background} background",
)
SPLITS = ("train", "test")


@dataclass(frozen=True, order=True)
class Attributes:
    """What an image shows: `kind` is the species of a flower or the pattern of a butterfly."""

    world: str
    colour: str
    kind: str
    background: str


@dataclass(frozen=True)
class World:
    """One image world.

    `noun` follows the kind in a caption ("" for flowers, " butterfly" for patterns). `held_out`
    lists the (colour, kind) pairs that no training image shows, on any background: what a model
    draws for them it has composed, not remembered.
    """

    name: str
    kinds: tuple[str, ...]
    noun: str
    held_out: frozenset[tuple[str, str]]

    def combinations(self, held_out: bool = False) -> list[Attributes]:
        """The attribute combinations used for training, or (`held_out`) those kept from it."""
        every = itertools.product(COLOURS, self.kinds, BACKGROUNDS)
        return [
            Attributes(self.name, colour, kind, background)
            for colour, kind, background in every
            if ((colour, kind) in self.held_out) == held_out
        ]


FLORA = World(
    "flora",
    ("daisy", "tulip", "rose", "sunflower", "lily", "poppy"),
    "",
    frozenset(
        {
            ("blue", "daisy"),
            ("purple", "tulip"),
            ("orange", "rose"),
            ("red", "sunflower"),
            ("yellow", "lily"),
            ("white", "poppy"),
        }
    ),
)
LEPIDOPTERA = World(
    "lepidoptera",
    ("plain", "spotted", "striped", "bordered", "eyed", "tipped"),
    " butterfly",
    frozenset(
        {
            ("pink", "plain"),
            ("yellow", "spotted"),
            ("white", "striped"),
            ("purple", "bordered"),
            ("orange", "eyed"),
            ("blue", "tipped"),
        }
    ),
)
WORLDS = {world.name: world for world in (FLORA, LEPIDOPTERA)}


def world(name: str) -> World:
    """The world of that name. Raises `ValueError` naming the known worlds."""
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}; the worlds are {', '.join(WORLDS)}")
    return WORLDS[name]


def caption(attributes: Attributes, template: int = 0) -> str:
    """The caption of an image, in one of the `TEMPLATES` (0 is the one used for prompts)."""
    text = TEMPLATES[template].format(
        colour=attributes.colour,
        kind=attributes.kind + world(attributes.world).noun,
        background=attributes.background,
    )
    return text.replace("a orange", "an orange")


def read_caption(text: str) -> Attributes:
    """The attributes a caption names; the inverse of `caption` for every template.

    Raises `ValueError` when a colour, kind or background is missing or named twice.
    """
    words = text.lower().replace(",", " ").split()
    kinds = {kind: w.name for w in WORLDS.values() for kind in w.kinds}

    def only(what: str, known) -> str:
        found = [word for word in words if word in known]
        if len(found) != 1:
            raise ValueError(f"{text!r} names {len(found)} of {what}; it must name exactly one")
        return found[0]

    kind = only("the kinds", kinds)
    return Attributes(
        kinds[kind], only("the colours", COLOURS), kind, only("the backgrounds", BACKGROUNDS)
    )


def rendering_rng(world_name: str, split: str, index: int, seed: int = 0) -> np.random.Generator:
    """The generator of one image. Splits, seeds and indices never share a stream."""
    return stream(list(WORLDS).index(world(world_name).name), split, index, seed)


def stream(number: int, split: str, index: int, seed: int) -> np.random.Generator:
    """The generator of one image of what has that number: a world, or scenes after the worlds.

    Raises `ValueError` for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    key = (number, SPLITS.index(split), seed, index)
    return np.random.default_rng(np.random.SeedSequence(entropy=20250506, spawn_key=key))


def draw_attributes(
    world_name: str, rng: np.random.Generator, held_out: bool = False
) -> Attributes:
    """A combination drawn uniformly from the training ones, or from the held-out ones."""
    choices = world(world_name).combinations(held_out)
    return choices[int(rng.integers(len(choices)))]


def render(attributes: Attributes, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw one image: attributes and a generator of nuisances to (size, size, 3) uint8."""
    colour = np.clip(np.array(COLOURS[attributes.colour]) + rng.uniform(-0.025, 0.025, 3), 0, 1)
    canvas = drawing.background(attributes.background, rng, size)
    draw = drawing.flower if attributes.world == "flora" else drawing.butterfly
    draw(canvas, attributes.kind, colour, rng)
    return canvas.to_uint8()
