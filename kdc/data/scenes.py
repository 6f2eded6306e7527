"""Scenes: one to three objects of three domains before one background, all of it known exactly.

A scene is one group of equal objects, or two groups side by side or one above the other: "a pink
poppy and a blue spotted butterfly on a night background", "a small red guppy below two white lilies
on a sand background". A scene of one object without a size is an image of `worlds`, bit for bit.
The third domain, fish, belongs to no task: it shows what a student keeps of what nobody asked for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from kdc.data import drawing, worlds
from kdc.data.worlds import BACKGROUNDS, COLOURS, World

REEF = World(
    "reef",
    ("guppy", "angelfish", "pufferfish", "swordfish", "clownfish", "stingray"),
    "",
    frozenset(
        {
            ("purple", "guppy"),
            ("red", "angelfish"),
            ("pink", "pufferfish"),
            ("white", "swordfish"),
            ("blue", "clownfish"),
            ("yellow", "stingray"),
        }
    ),
)
DOMAINS: dict[str, World] = worlds.WORLDS | {"reef": REEF}
DRAW = {"flora": drawing.flower, "lepidoptera": drawing.butterfly, "reef": drawing.fish}
PLURALS = {"daisy": "daisies", "lily": "lilies", "poppy": "poppies", "guppy": "guppies"}
PLURALS |= {name: name for name in REEF.kinds if name.endswith("fish")}
NUMBERS = ("a", "two", "three")
SIZES = ("", "small", "large")
RELATIONS = ("beside", "above")  # the first group left of the second, or above it
MOST = 3  # objects in a scene

# Captions by relation; "" is that of one group, as in `worlds.TEMPLATES`. The first is for prompts.
TEMPLATES = {
    "": (
        "{first} on a {background} background",
        "a picture of {first} on a {background} background",
        "{first}, {background} background",
        "{first} in front of a {background} background",
    ),
    "beside": (
        "{first} and {second} on a {background} background",
        "a picture of {first} and {second} on a {background} background",
        "{first} to the left of {second}, {background} background",
        "{first} beside {second} in front of a {background} background",
    ),
    "above": (
        "{first} above {second} on a {background} background",
        "a picture of {first} above {second} on a {background} background",
        "{second} below {first}, {background} background",
        "{second} under {first} in front of a {background} background",
    ),
}
BACKWARDS = (" below ", " under ")  # the words between groups that name the lower one first
BETWEEN = (" and ", " to the left of ", " beside ", " above ", *BACKWARDS)


@dataclass(frozen=True, order=True)
class Group:
    """Equal objects: how many, and what each is."""

    # The domain, a key of `DOMAINS`.
    world: str
    colour: str
    # The species, or the pattern of a butterfly.
    kind: str
    # One of `SIZES`; "": neither small nor large.
    size: str = ""
    # 1 to 3.
    count: int = 1

    @property
    def is_held_out(self) -> bool:
        """Whether no training image shows its colour on its kind."""
        return (self.colour, self.kind) in DOMAINS[self.world].held_out


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    # One or two groups that differ, of at most `MOST` objects; the left or the upper one first.
    groups: tuple[Group, ...]
    background: str
    # One of `RELATIONS`; "" for one group.
    relation: str = ""


@dataclass(frozen=True)
class Place:
    """Where an object of a scene stands, in coordinates from -1 to 1, before it is jittered."""

    group: Group
    # The centre, y upwards.
    x: float
    y: float
    # Half of its side, over half of the image's.
    scale: float
    # The same without the size that is named.
    usual: float


# Half sides of objects by their number in the row, and the middles of rows by the number of rows.
ALONE, IN_ROW = 1.0, {1: 0.50, 2: 0.47, 3: 0.34}
SCALES = {"": 1.0, "small": 0.72, "large": 1.16}  # of an object of that size, over the above
ROWS = {1: (0.0,), 2: (0.48, -0.48)}


def places(scene: Scene) -> list[Place]:
    """Where the objects of a scene stand, in the order of its groups and from left to right."""
    whole = [group for group in scene.groups for _ in range(group.count)]
    if len(whole) == 1:
        scale = {"": ALONE, "small": 0.52, "large": 0.92}[whole[0].size]
        return [Place(whole[0], 0.0, 0.0, scale, ALONE if scale == ALONE else 0.8)]
    rows = [[g] * g.count for g in scene.groups] if scene.relation == "above" else [whole]
    found = []
    for row, y in zip(rows, ROWS[len(rows)], strict=True):
        for number, group in enumerate(row):
            x = (2 * number + 1) / len(row) - 1
            usual = IN_ROW[len(row)] * (0.9 if len(rows) == 2 else 1.0)
            found.append(Place(group, x, y, usual * SCALES[group.size], usual))
    return found


def phrase(group: Group) -> str:
    """A group in words: "a pink poppy", "two small blue spotted butterflies"."""
    noun = DOMAINS[group.world].noun
    if group.count == 1:
        words = group.kind + noun
    elif noun:
        words = f"{group.kind} butterflies"
    else:
        words = PLURALS.get(group.kind, group.kind + "s")
    said = " ".join(w for w in (NUMBERS[group.count - 1], group.size, group.colour, words) if w)
    return said.replace("a orange", "an orange")


def caption(scene: Scene, template: int = 0) -> str:
    """The caption of a scene, in one of the `TEMPLATES` of its relation."""
    said = [phrase(group) for group in scene.groups]
    if template >= 2 and scene.relation == "" and scene.groups[0].count == 1:
        bare = said[0].split(" ", 1)[1]  # as the worlds have it
        said[0] = bare if template == 2 else f"one {bare}"
    words = dict(zip(("first", "second"), said, strict=False))
    return TEMPLATES[scene.relation][template].format(background=scene.background, **words)


def read_caption(text: str) -> Scene:
    """The scene that a caption names; the inverse of `caption` for every template.

    Raises `ValueError` when a colour, kind or background is missing or named twice in a group, and
    for words that no caption has.
    """
    words = text.lower().replace("a picture of ", "")
    named = [word for word in words.replace(",", " ").split() if word in BACKGROUNDS]
    if len(named) != 1:
        raise ValueError(
            f"{text!r} names {len(named)} of the backgrounds; it must name exactly one"
        )
    for between in (f" on a {named[0]}", f", {named[0]}", f" in front of a {named[0]}"):
        words = words.replace(between + " background", "")
    found = [between for between in BETWEEN for _ in range(words.count(between))]
    if len(found) > 1:
        raise ValueError(f"{text!r} has more than two groups of objects")
    if not found:
        return Scene((_read_group(words, text),), named[0])
    first, second = (_read_group(part, text) for part in words.split(found[0]))
    if found[0] in BACKWARDS:
        first, second = second, first
    relation = "above" if found[0] in (" above ", *BACKWARDS) else "beside"
    return Scene((first, second), named[0], relation)


KINDS = {kind: world for world in DOMAINS.values() for kind in world.kinds}
SINGULARS = {PLURALS.get(kind, kind + "s"): kind for kind in KINDS} | {kind: kind for kind in KINDS}


def _read_group(words: str, text: str) -> Group:
    """The group that some words of a caption name."""
    found: dict[str, list] = {"number": [], "size": [], "colour": [], "kind": []}
    for word in words.split():
        if word in ("a", "an", "one", "two", "three"):
            found["number"].append(1 if word in ("an", "one") else NUMBERS.index(word) + 1)
        elif word in SIZES:
            found["size"].append(word)
        elif word in COLOURS:
            found["colour"].append(word)
        elif word in SINGULARS:
            found["kind"].append(SINGULARS[word])
        elif word not in ("butterfly", "butterflies"):
            raise ValueError(f"{text!r} has the word {word!r}, which no caption of a scene has")
    for name in ("colour", "kind"):
        if len(found[name]) != 1:
            raise ValueError(
                f"{text!r} names {len(found[name])} of the {name}s in {words!r}; it must name"
                " exactly one"
            )
    if len(found["number"]) > 1 or len(found["size"]) > 1:
        raise ValueError(f"{text!r} says in {words!r} twice how many or how large")
    kind = found["kind"][0]
    (count,), (size,) = found["number"] or [1], found["size"] or [""]
    return Group(KINDS[kind].name, found["colour"][0], kind, size, count)


def rendering_rng(split: str, index: int, seed: int = 0) -> np.random.Generator:
    """The generator of one scene. Splits, seeds and indices never share a stream."""
    return worlds.stream(len(worlds.WORLDS), split, index, seed)


def draw_scene(
    rng: np.random.Generator, objects: int | None = None, held_out: bool = False
) -> Scene:
    """A scene drawn at random: of `objects` objects; None: of one, two or three, 4 : 4 : 2.

    No group of it is held out; with `held_out` exactly one is.
    """
    total = objects or int(rng.choice(MOST, p=(0.4, 0.4, 0.2))) + 1
    if not 1 <= total <= MOST:
        raise ValueError(f"a scene has 1 to {MOST} objects, not {total}")
    alone = total == 1 or rng.random() < 0.25
    counts = [total] if alone else [[1, 1], [1, 2], [2, 1]][0 if total == 2 else rng.integers(1, 3)]
    rare = int(rng.integers(len(counts))) if held_out else None
    groups: list[Group] = []
    while len(groups) < len(counts):
        group = _draw_group(rng, counts[len(groups)], len(groups) == rare)
        if not groups or _looks(group) != _looks(groups[0]):
            groups.append(group)
    relation = "" if alone else RELATIONS[int(rng.integers(2))]
    return Scene(tuple(groups), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], relation)


def _looks(group: Group) -> tuple[str, str]:
    return group.colour, group.kind


def _draw_group(rng: np.random.Generator, count: int, held_out: bool) -> Group:
    world = list(DOMAINS.values())[int(rng.integers(len(DOMAINS)))]
    pairs = [
        pair
        for pair in itertools.product(COLOURS, world.kinds)
        if (pair in world.held_out) == held_out
    ]
    colour, kind = pairs[int(rng.integers(len(pairs)))]
    size = SIZES[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    return Group(world.name, colour, kind, size, count)


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a scene: what it shows and a generator of nuisances to (size, size, 3) uint8."""
    found = places(scene)
    if len(found) == 1 and found[0].scale == ALONE and scene.groups[0].world in worlds.WORLDS:
        group = scene.groups[0]
        shown = worlds.Attributes(group.world, group.colour, group.kind, scene.background)
        return worlds.render(shown, rng, size)
    canvas = drawing.background(scene.background, rng, size)
    for place in sorted(found, key=lambda place: -place.y):  # the lower ones stand before the upper
        group, (dx, dy) = place.group, rng.uniform(-0.04, 0.04, 2)
        colour = np.array(COLOURS[group.colour]) + rng.uniform(-0.025, 0.025, 3)
        part = canvas.part(place.x + dx, place.y + dy, place.scale * rng.uniform(0.96, 1.04))
        DRAW[group.world](part, group.kind, np.clip(colour, 0, 1), rng)
    return canvas.to_uint8()
