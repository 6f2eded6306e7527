"""How the worlds are drawn: smooth shapes, painted in order on one anti-aliased canvas.

Coordinates run from -1 to 1 with y upwards. A shape is a map of signed distances (negative inside);
its coverage falls linearly over one pixel, which is the anti-aliasing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

INK = np.array([0.13, 0.09, 0.10])
CREAM = np.array([0.99, 0.95, 0.82])
SKIES = {  # top colour, bottom colour, colour of the soft feature
    "sky": ((0.50, 0.74, 0.95), (0.82, 0.92, 0.99), (1.00, 1.00, 1.00)),
    "meadow": ((0.70, 0.85, 0.48), (0.36, 0.62, 0.25), (0.52, 0.74, 0.33)),
    "sand": ((0.96, 0.90, 0.76), (0.85, 0.73, 0.53), (0.91, 0.81, 0.62)),
    "night": ((0.05, 0.06, 0.20), (0.15, 0.15, 0.36), (0.33, 0.35, 0.58)),
}


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(line, -line)
    return x, y


@dataclass
class Canvas:
    """An image in the making, or a part of one in which an object is drawn."""

    # (height, width, 3) in [0, 1]: the whole image, or a view of the part.
    pixels: np.ndarray
    # The size of a pixel in the coordinates of this canvas.
    pixel: float = field(default=0.0)
    # The coordinates of the pixels; None: from -1 to 1.
    coordinates: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        self.pixel = self.pixel or 2.0 / len(self.pixels)

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        return self.coordinates or _grid(len(self.pixels))

    @property
    def is_part(self) -> bool:
        """Whether it is a part of an image."""
        return self.coordinates is not None

    def part(self, cx: float, cy: float, scale: float) -> Canvas:
        """The part around (cx, cy) as a canvas of its own, where `scale` here is 1 there."""
        size, reach = len(self.pixels), 1.25 * scale
        columns = slice(_clipped(cx - reach, size), _clipped(cx + reach, size))
        rows = slice(_clipped(-cy - reach, size), _clipped(-cy + reach, size))
        x, y = self.grid
        there = (x[rows, columns] - cx) / scale, (y[rows, columns] - cy) / scale
        return Canvas(self.pixels[rows, columns], self.pixel / scale, there)

    def cover(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """Coverage in [0, 1] of a signed distance, over `softness` pixels."""
        return np.clip(0.5 - distance / (self.pixel * softness), 0, 1)

    def paint(self, colour: np.ndarray, alpha: np.ndarray) -> None:
        """Lay a colour (3,) or a coloured map (size, size, 3) over the image."""
        self.pixels += alpha[..., None] * (colour - self.pixels)

    def to_uint8(self) -> np.ndarray:
        return (np.clip(self.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _clipped(place: float, size: int) -> int:
    """The pixel at a place from -1 to 1, within the image."""
    return int(np.clip(round((place + 1) / 2 * size), 0, size))


def shade(colour: np.ndarray, light: np.ndarray) -> np.ndarray:
    """A colour under a map of light: below 1 darker, above 1 towards white."""
    light = light[..., None]
    dark = colour * np.minimum(light, 1)
    return dark + np.clip(light - 1, 0, 1) * (1 - dark)


def background(name: str, rng: np.random.Generator, size: int) -> Canvas:
    """A smooth sky, meadow, sand or night: a gradient and one soft feature."""
    top, bottom, feature = (np.array(c, np.float32) for c in SKIES[name])
    x, y = _grid(size)
    down = np.clip((1 - y) / 2 + rng.uniform(-0.1, 0.1), 0, 1)[..., None]
    canvas = Canvas((top + (bottom - top) * down).astype(np.float32))
    if name in ("meadow", "sand"):  # a hill or a dune
        height = rng.uniform(-0.35, 0.1) + 0.18 * np.sin(1.6 * x + rng.uniform(0, 6.3))
        canvas.paint(feature, 0.7 * canvas.cover(y - height, softness=10))
    else:  # a cloud or the halo of a moon
        cx, cy, r = rng.uniform(-0.8, 0.8), rng.uniform(0.3, 0.9), rng.uniform(0.25, 0.45)
        flat = 2.2 if name == "sky" else 1.0
        canvas.paint(feature, 0.8 * np.exp(-(((x - cx) ** 2 + flat * (y - cy) ** 2) / r**2)))
    return canvas


def _turned(x, y, cx, cy, angle, scale):
    """Coordinates in a frame centred on (cx, cy), turned by `angle`, measured in `scale`."""
    u, v = (x - cx) / scale, (y - cy) / scale
    return u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)


def _ellipse(x, y, cx, cy, a, b, angle=0.0):
    """Approximate signed distance to an ellipse (exact for a circle)."""
    u, v = _turned(x, y, cx, cy, angle, 1.0)
    return (np.sqrt((u / a) ** 2 + (v / b) ** 2) - 1) * min(a, b)


def _petals(canvas, u, v, scale, colour, count, phase, length, width, pointed, light=1.0):
    """One ring of `count` petals; `pointed` moves the widest place away from the tip."""
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    step = 2 * np.pi / count
    delta = np.mod(theta - phase + step / 2, step) - step / 2
    along, across = r * np.cos(delta) / length, r * np.sin(delta)
    inside = np.clip(along, 0, 1)
    outline = width * np.sin(np.pi * inside**pointed) ** 0.6
    edge = outline - np.abs(across)
    tone = light * (0.72 + 0.36 * inside - 0.10 * np.exp(-((across / (0.2 * width)) ** 2)))
    tone = tone * (1 - 0.30 * np.exp(-np.maximum(edge, 0) / (0.22 * width)))
    alpha = canvas.cover(-edge * scale) * canvas.cover((along - 1) * length * scale)
    canvas.paint(shade(colour, tone), alpha)


def _disc(canvas, u, v, scale, radius, colour):
    r = np.hypot(u, v)
    tone = 1.12 - 0.45 * (r / radius) ** 2
    canvas.paint(shade(np.array(colour), tone), canvas.cover((r - radius) * scale))


def _stem(canvas, rng, cx, cy, night_light):
    """A curved stem from the head to the lower edge, with one or two leaves."""
    x, y = canvas.grid
    green = np.array([0.16, 0.45, 0.16]) * night_light
    bend = rng.uniform(-0.18, 0.18)
    middle = cx + bend * (y - cy) * (y + 1.2)
    stem = canvas.cover(np.abs(x - middle) - 0.045) * canvas.cover(y - cy)
    if canvas.is_part:  # elsewhere it grows out of the lower edge
        stem = stem * canvas.cover(-1.0 - y)
    canvas.paint(green, stem)
    first = 1 if rng.random() < 0.5 else -1
    for side in (first, -first)[: int(rng.integers(1, 3))]:
        ly = rng.uniform(-0.85, -0.6)
        lx = cx + bend * (ly - cy) * (ly + 1.2) + side * 0.2
        leaf = _ellipse(x, y, lx, ly + 0.08, 0.24, 0.085, side * 0.6)
        canvas.paint(shade(green * 1.25, 0.9 + 0.5 * (y - ly)), canvas.cover(leaf))


def flower(canvas: Canvas, species: str, colour: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one flower with stem and leaves; `species` as in `worlds.FLORA`."""
    cx, cy = rng.uniform(-0.14, 0.14), rng.uniform(0.08, 0.26)
    scale, turn = rng.uniform(0.56, 0.68), rng.uniform(-0.3, 0.3)
    _stem(canvas, rng, cx, cy, 1.0)
    x, y = canvas.grid
    u, v = _turned(x, y, cx, cy, turn, scale)
    ring = lambda *args, **kw: _petals(canvas, u, v, scale, colour, *args, **kw)  # noqa: E731
    if species == "daisy":
        count = int(rng.integers(11, 14))
        ring(count, 0.0, 1.0, 0.17, 1.5)
        _disc(canvas, u, v, scale, 0.27, (0.97, 0.74, 0.12))
    elif species == "sunflower":
        count = int(rng.integers(15, 18))
        ring(count, np.pi / count, 1.08, 0.17, 0.9, light=0.75)
        ring(count, 0.0, 1.0, 0.17, 0.8)
        _disc(canvas, u, v, scale, 0.52, (0.33, 0.19, 0.09))
    elif species == "lily":
        ring(3, np.pi / 3 + np.pi / 2, 1.15, 0.30, 0.85, light=0.82)
        ring(3, np.pi / 2, 1.15, 0.32, 0.85)
        _disc(canvas, u, v, scale, 0.13, (0.72, 0.80, 0.25))
    elif species == "poppy":
        ring(2, np.pi / 2, 0.95, 0.80, 1.6, light=0.86)
        ring(2, 0.0, 0.95, 0.72, 1.6)
        _disc(canvas, u, v, scale, 0.23, (0.10, 0.08, 0.10))
    elif species == "tulip":
        _tulip(canvas, u, v, scale, colour)
    elif species == "rose":
        _rose(canvas, u, v, scale, colour, rng)
    else:
        raise ValueError(f"unknown species {species!r}")


def _tulip(canvas, u, v, scale, colour):
    """A cup seen from the side: one petal behind, two at the sides, one in front."""
    cup = _ellipse(u, v, 0, -0.05, 0.66, 0.80)
    for cx, angle, light in ((0.0, 0.0, 0.70), (-0.36, 0.30, 0.90), (0.36, -0.30, 0.90)):
        petal = np.maximum(_ellipse(u, v, cx, 0.18, 0.36, 0.85, angle), cup - 0.28)
        tone = light * (0.95 + 0.22 * v - 0.35 * np.exp(petal / 0.07))
        canvas.paint(shade(colour, tone), canvas.cover(petal * scale))
    front = _ellipse(u, v, 0, -0.16, 0.40, 0.68)
    tone = 1.05 + 0.22 * v - 0.35 * np.exp(np.minimum(front, 0) / 0.07)
    canvas.paint(shade(colour, tone), canvas.cover(front * scale))


def _rose(canvas, u, v, scale, colour, rng):
    """Overlapping petals that wind inwards: a scalloped disc under a spiral of shade."""
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    rim = 0.86 + 0.06 * np.cos(5 * theta + rng.uniform(0, 6.3))
    wind = np.mod(3.0 * np.sqrt(r / 0.9) - theta / (2 * np.pi) + rng.random(), 1.0)
    tone = 0.62 + 0.50 * wind - 0.16 * np.exp(-r / 0.12)
    canvas.paint(shade(colour, tone), canvas.cover((r - rim) * scale))


def butterfly(canvas: Canvas, pattern: str, colour: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one butterfly, wings spread; `pattern` as in `worlds.LEPIDOPTERA`."""
    x, y = canvas.grid
    cx, cy = rng.uniform(-0.10, 0.10), rng.uniform(-0.10, 0.10)
    scale, turn, open_ = rng.uniform(0.86, 1.0), rng.uniform(-0.3, 0.3), rng.uniform(0.88, 1.05)
    u, v = _turned(x, y, cx, cy, turn, scale)
    w = np.abs(u) / open_
    hind = _ellipse(w, v, 0.36, -0.36, 0.36, 0.30, -0.55)
    fore = _ellipse(w, v, 0.46, 0.30, 0.54, 0.30, 0.55)
    for wing, light in ((hind, 0.88), (fore, 1.0)):
        tone = light * (0.80 + 0.30 * np.clip(np.hypot(w, v), 0, 1))
        tone = tone * (1 - 0.45 * np.exp(np.minimum(wing, 0) / 0.035))
        canvas.paint(shade(colour, tone), canvas.cover(wing * scale))
        mark = _mark(pattern, w, v, wing, wing is fore)
        if mark is not None:
            canvas.paint(INK, canvas.cover(np.maximum(mark, wing) * scale))
        if pattern == "eyed":
            ex, ey, r = (0.54, 0.34, 0.125) if wing is fore else (0.37, -0.38, 0.11)
            ring = np.hypot(w - ex, v - ey)
            canvas.paint(CREAM, canvas.cover((ring - r) * scale))
            canvas.paint(INK, canvas.cover((ring - 0.55 * r) * scale))
    _body(canvas, u, v, scale)


def _mark(pattern, w, v, wing, is_fore):
    """Signed distance to the dark part of a wing's pattern, or None for plain wings."""
    if pattern == "plain":
        return None
    if pattern == "bordered":
        return -0.115 - wing
    if pattern == "striped":
        return 0.075 - np.abs(np.mod(np.hypot(w, v) + 0.02, 0.25) - 0.125)
    if pattern == "tipped":
        return 0.60 - w if is_fore else np.full_like(w, 9.0)
    if pattern == "eyed":
        ex, ey, r = (0.54, 0.34, 0.20) if is_fore else (0.37, -0.38, 0.175)
        return np.hypot(w - ex, v - ey) - r
    if pattern == "spotted":
        spots: tuple[tuple[float, float], ...]
        spots = ((0.30, 0.20), (0.52, 0.22), (0.50, 0.46), (0.74, 0.46))
        spots = spots if is_fore else ((0.24, -0.26), (0.48, -0.26), (0.32, -0.50))
        return np.min([np.hypot(w - a, v - b) for a, b in spots], axis=0) - 0.072
    raise ValueError(f"unknown pattern {pattern!r}")


def _body(canvas, u, v, scale):
    feeler = np.abs(np.abs(u) - 0.10 - 0.9 * (v - 0.42) ** 2 * 1.4) - 0.018
    feeler = np.maximum(feeler, np.abs(v - 0.60) - 0.17)
    canvas.paint(INK, 0.9 * canvas.cover(feeler * scale))
    body = _ellipse(u, v, 0, -0.04, 0.075, 0.50)
    canvas.paint(shade(INK, 1.0 + 0.25 * np.exp(-((u / 0.03) ** 2))), canvas.cover(body * scale))


def fish(canvas: Canvas, species: str, colour: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one fish from the side, a stingray from above; `species` as in `scenes.REEF`."""
    x, y = canvas.grid
    cx, cy = rng.uniform(-0.06, 0.06), rng.uniform(-0.10, 0.10)
    scale, turn = rng.uniform(0.80, 0.90), rng.uniform(-0.2, 0.2)
    looks = 1 if rng.random() < 0.5 else -1
    u, v = _turned(x, y, cx, cy, turn, scale)
    u = u * looks
    fins, body, eye = _outlines(species, u, v)
    for fin in fins:
        tone = 0.74 + 0.16 * np.cos(16 * np.arctan2(v, u + 0.2))
        canvas.paint(shade(colour, tone), canvas.cover(fin * scale))
    tone = (0.98 + 0.26 * v) * (1 - 0.35 * np.exp(np.minimum(body, 0) / 0.05))
    canvas.paint(shade(colour, tone), canvas.cover(body * scale))
    for place, width, paint in BANDS.get(species, ()):
        band = np.abs(u + 0.25 * v * v - place) - width
        canvas.paint(np.array(paint), canvas.cover(np.maximum(band, body + 0.01) * scale))
    for ex, ey in eye:
        ring = np.hypot(u - ex, v - ey)
        canvas.paint(CREAM, canvas.cover((ring - 0.095) * scale))
        canvas.paint(INK, canvas.cover((ring - 0.05) * scale))


# Bands across a fish: where, half as wide as, and in which colour; the later lie over the earlier.
BANDS: dict[str, tuple[tuple[float, float, tuple[float, float, float]], ...]] = {
    "clownfish": tuple(
        (place, width, paint)
        for place in (0.26, -0.30)
        for width, paint in ((0.15, tuple(INK)), (0.105, (0.97, 0.96, 0.93)))
    ),
    "angelfish": tuple((place, 0.05, tuple(INK)) for place in (0.22, -0.02, -0.26)),
}


def _outlines(species: str, u, v):
    """Signed distances to the fins (behind) and to the body, and where the eyes are."""
    if species == "guppy":  # a slim body, and a tail like a fan
        tail = np.maximum(np.hypot(u + 0.20, v * 0.95) - 0.74, np.abs(v) + 0.95 * (u + 0.12))
        body = _ellipse(u, v, 0.30, 0.0, 0.48, 0.21)
        return [tail], body, [(0.58, 0.05)]
    if species == "angelfish":  # high, with long fins above and below
        fins = [
            np.maximum(_ellipse(u, v, -0.24, 0.50 * s, 0.17, 0.58, 0.42 * s), -s * v)
            for s in (1, -1)
        ]
        tail = np.maximum(np.abs(v) + 0.8 * (u + 0.42), -0.84 - u)
        return [*fins, tail], _ellipse(u, v, 0.06, 0.0, 0.54, 0.44), [(0.38, 0.10)]
    if species == "pufferfish":  # a ball of spines
        theta, r = np.arctan2(v, u), np.hypot(u, v)
        spines = r - 0.60 - 0.22 * np.abs(np.mod(theta * 16 / (2 * np.pi), 1) - 0.5) * 2
        tail = np.maximum(np.abs(v) + 0.9 * (u + 0.52), -1.02 - u)
        return [spines, tail], _ellipse(u, v, 0, 0, 0.62, 0.60), [(0.36, 0.20)]
    if species == "swordfish":  # long, with a sword, a sickle for a tail and a high fin
        sword = np.maximum(np.abs(v - 0.02) - 0.045, np.abs(u - 0.70) - 0.34)
        ring = np.abs(np.hypot(u + 1.10, v) - 0.42) - 0.09
        tail = np.maximum(ring, -0.86 - u)
        back = np.maximum(_ellipse(u, v, 0.10, 0.28, 0.18, 0.36, 0.5), 0.05 - v)
        return [sword, tail, back], _ellipse(u, v, -0.08, 0.0, 0.62, 0.20), [(0.36, 0.04)]
    if species == "clownfish":  # plump, with round fins
        tail = _ellipse(u, v, -0.70, 0.0, 0.22, 0.30)
        fins = [_ellipse(u, v, -0.05, 0.40 * s, 0.34, 0.18) for s in (1, -1)]
        return [tail, *fins], _ellipse(u, v, 0.05, 0.0, 0.64, 0.42), [(0.50, 0.10)]
    if species == "stingray":  # a diamond from above, with a long tail
        tail = np.maximum(np.abs(u - 0.10 * np.sin(4 * v)) - 0.035, np.maximum(v, -1.05 - v))
        wide = np.abs(u) / 0.92 + np.abs(v - 0.14) / 0.62 + 0.10 * np.cos(6.3 * u) - 0.98
        return [tail], 0.48 * wide, [(-0.15, 0.34), (0.15, 0.34)]
    raise ValueError(f"unknown species of fish {species!r}")
