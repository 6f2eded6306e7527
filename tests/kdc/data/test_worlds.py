import numpy as np
import pytest

from kdc.data import drawing, worlds

EVERY = [
    a
    for world in worlds.WORLDS.values()
    for held_out in (False, True)
    for a in world.combinations(held_out)
]


def image(attributes, seed=0, size=64):
    return worlds.render(attributes, np.random.default_rng(seed), size)


def test_every_world_has_enough_combinations_and_a_held_out_list():
    for world in worlds.WORLDS.values():
        usual, rare = world.combinations(), world.combinations(held_out=True)
        assert len(usual) + len(rare) >= 6 * 7 * 4
        assert len(world.kinds) >= 6 and len(worlds.COLOURS) >= 7
        assert rare and not set(usual) & set(rare)
        # Every held-out colour, kind and background is seen in other company.
        for name in ("colour", "kind", "background"):
            assert {getattr(a, name) for a in rare} <= {getattr(a, name) for a in usual}


def test_the_same_seed_draws_the_same_image_and_another_seed_another():
    for attributes in EVERY[::17]:
        assert np.array_equal(image(attributes), image(attributes))
        assert not np.array_equal(image(attributes), image(attributes, seed=1))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_images_are_uint8_rgb_of_the_asked_for_size(size):
    generated = image(EVERY[0], size=size)
    assert generated.shape == (size, size, 3) and generated.dtype == np.uint8


def test_edges_are_anti_aliased():
    canvas = drawing.Canvas(np.zeros((64, 64, 3), np.float32))
    x, y = canvas.grid
    alpha = canvas.cover(np.hypot(x, y) - 0.5)
    assert ((alpha > 0.05) & (alpha < 0.95)).sum() > 50
    # The covered area is that of the disc: coverage is not only soft, it is right.
    assert alpha.sum() * (2 / 64) ** 2 == pytest.approx(np.pi * 0.25, rel=0.01)


@pytest.mark.parametrize("template", range(len(worlds.TEMPLATES)))
def test_a_caption_says_what_is_shown(template):
    for attributes in EVERY:
        assert worlds.read_caption(worlds.caption(attributes, template)) == attributes


def test_captions_use_the_right_article():
    assert worlds.caption(worlds.Attributes("flora", "orange", "lily", "sky")).startswith("an ")
    assert worlds.caption(worlds.Attributes("flora", "red", "lily", "sky")).startswith("a red")


def test_unclear_captions_are_refused():
    for text in ("a daisy on a sand background", "a red blue daisy on a sand background", ""):
        with pytest.raises(ValueError, match="exactly one"):
            worlds.read_caption(text)


def test_the_colour_of_the_image_is_the_colour_of_the_caption():
    """Measured in the pixels, without any classifier: the palette entry nearest to the subject."""
    palette = {
        name: np.array(value) / np.linalg.norm(value) for name, value in worlds.COLOURS.items()
    }
    for attributes in EVERY[::5]:
        if attributes.kind in ("sunflower", "bordered", "striped"):
            continue  # mostly centre, rim or stripes: the median pixel is not the colour
        plain = drawing.background(attributes.background, np.random.default_rng(0), 64)
        generated = image(attributes, 0) / 255.0
        rng = np.random.default_rng(0)
        rng.uniform(-0.025, 0.025, 3)  # the first draw of `render` is the colour's jitter
        plain = drawing.background(attributes.background, rng, 64).pixels
        changed = np.abs(generated - plain).sum(axis=2) > 0.25
        changed[44:] = False  # below the head: stem and leaves
        pixels = generated[changed]
        bright = pixels[np.linalg.norm(pixels, axis=1) > 0.35]
        direction = np.median(bright / np.linalg.norm(bright, axis=1, keepdims=True), axis=0)
        nearest = max(palette, key=lambda name: direction @ palette[name])
        assert nearest == attributes.colour, attributes


def test_train_and_test_share_no_rendering():
    def first(split, world):
        images = set()
        for index in range(60):
            rng = worlds.rendering_rng(world, split, index)
            images.add(image_bytes(worlds.draw_attributes(world, rng), rng))
        return images

    def image_bytes(attributes, rng):
        return worlds.render(attributes, rng).tobytes()

    for world in worlds.WORLDS:
        train, test = first("train", world), first("test", world)
        assert len(train) == len(test) == 60 and not train & test


def test_held_out_combinations_are_drawn_only_on_request():
    rng = np.random.default_rng(0)
    for world in worlds.WORLDS.values():
        for held_out in (False, True):
            generated = {worlds.draw_attributes(world.name, rng, held_out) for _ in range(300)}
            assert all(((a.colour, a.kind) in world.held_out) == held_out for a in generated)


def test_unknown_names_are_refused_by_name():
    with pytest.raises(ValueError, match="flora, lepidoptera"):
        worlds.world("fungi")
    with pytest.raises(ValueError, match="train, test"):
        worlds.rendering_rng("flora", "holdout", 0)
    with pytest.raises(ValueError, match="cactus"):
        image(worlds.Attributes("flora", "red", "cactus", "sky"))
