"""Scenes: what is asked for is what is drawn, where it is asked for, and captions say so."""

import dataclasses

import numpy as np
import pytest

import kdc
from kdc.data import drawing, scenes, worlds
from kdc.data.scenes import DOMAINS, TEMPLATES, Group, Scene

MANY = [scenes.draw_scene(np.random.default_rng(i), held_out=i % 3 == 0) for i in range(600)]


def image(scene, seed=0, size=64):
    return scenes.render(scene, np.random.default_rng(seed), size)


def test_captions_bind_attributes_to_objects_in_the_readers_words():
    poppy = Group("flora", "pink", "poppy")
    butterfly = Group("lepidoptera", "blue", "spotted")
    scene = Scene((poppy, butterfly), "night", "beside")
    assert (
        scenes.caption(scene) == "a pink poppy and a blue spotted butterfly on a night background"
    )
    fish, lilies = Group("reef", "red", "guppy", "small"), Group("flora", "white", "lily", count=2)
    scene = Scene((lilies, fish), "sand", "above")
    assert scenes.caption(scene, 2) == "a small red guppy below two white lilies, sand background"
    three = Scene((Group("lepidoptera", "orange", "eyed", "large", 3),), "sky")
    assert scenes.caption(three) == "three large orange eyed butterflies on a sky background"
    one = Scene((Group("reef", "orange", "angelfish"),), "meadow")
    assert scenes.caption(one) == "an orange angelfish on a meadow background"


def test_every_caption_says_its_scene_and_no_other():
    said = {}
    for scene in MANY:
        for template in range(4):
            text = scenes.caption(scene, template)
            assert scenes.read_caption(text) == scene, text
            assert said.setdefault(text, scene) == scene
    assert {len(templates) for templates in TEMPLATES.values()} == {4}


def test_one_object_is_the_worlds_caption_and_image_bit_for_bit():
    for world in worlds.WORLDS.values():
        for seed, a in enumerate(world.combinations()[::11]):
            scene = Scene((Group(a.world, a.colour, a.kind),), a.background)
            rng = np.random.default_rng(seed)
            assert np.array_equal(image(scene, seed), worlds.render(a, rng))
            for template in range(4):
                assert scenes.caption(scene, template) == worlds.caption(a, template)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red blue daisy on a sand background", "names 2 of the colours in 'a red blue daisy'"),
        ("a daisy and a red lily on a sand background", "names 0 of the colours in 'a daisy'"),
        ("a red daisy", "names 0 of the backgrounds"),
        ("a red dog on a sand background", "has the word 'dog'"),
        ("a red lily and a red rose and a red poppy on a sky background", "more than two groups"),
        ("a red lily and a red rose above a red poppy on a sky background", "more than two groups"),
        ("two small large red lilies on a sky background", "twice how many or how large"),
    ],
)
def test_unclear_captions_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        scenes.read_caption(text)


def test_scenes_have_one_to_three_objects_in_two_groups_that_differ():
    counts = [sum(g.count for g in scene.groups) for scene in MANY]
    shares = [counts.count(n) / len(MANY) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.06)
    for scene in MANY:
        assert (scene.relation == "") == (len(scene.groups) == 1)
        assert len({(g.colour, g.kind) for g in scene.groups}) == len(scene.groups)
        assert len(scenes.places(scene)) == sum(g.count for g in scene.groups) <= scenes.MOST
    for total in (1, 2, 3):
        scene = scenes.draw_scene(np.random.default_rng(total), total)
        assert sum(g.count for g in scene.groups) == total
    with pytest.raises(ValueError, match="1 to 3 objects, not 4"):
        scenes.draw_scene(np.random.default_rng(0), 4)


def test_what_is_held_out_is_never_in_training_and_once_in_the_others():
    for number, scene in enumerate(MANY):
        assert sum(g.is_held_out for g in scene.groups) == (number % 3 == 0)
    for world in DOMAINS.values():
        seen = {(c, k) for c in worlds.COLOURS for k in world.kinds} - world.held_out
        assert {c for c, _ in world.held_out} <= {c for c, _ in seen}
        assert {k for _, k in world.held_out} == set(world.kinds)


def test_no_task_of_any_chapter_has_the_third_domain():
    assert set(DOMAINS) - set(worlds.WORLDS) == {"reef"}
    kinds = [kind for world in DOMAINS.values() for kind in world.kinds]
    assert len(kinds) == len(set(kinds)) == 18


def changed(scene, seed=0, size=64):
    """Where the image is not its background."""
    plain = drawing.background(scene.background, np.random.default_rng(seed), size).pixels
    return np.abs(image(scene, seed, size) / 255.0 - plain).sum(axis=2) > 0.2


def test_objects_stand_where_the_truth_says_and_nowhere_else():
    """Measured in the pixels: the centre of what was drawn in each object's half of the image."""
    line = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(line, -line)
    for scene in MANY[:300]:
        found = scenes.places(scene)
        if len(found) == 1:
            continue
        mask, owner = changed(scene), np.argmin(
            [np.hypot(x - p.x, y - p.y) for p in found], axis=0
        )  # fmt: skip
        for number, place in enumerate(found):
            own = mask & (owner == number)
            assert own.sum() > 20, scene
            assert abs(x[own].mean() - place.x) < 0.2 and abs(y[own].mean() - place.y) < 0.25, scene
        assert not mask[
            np.min([np.hypot(x - p.x, y - p.y) / p.scale for p in found], 0) > 1.8
        ].any()


def test_the_first_is_left_or_above_and_small_is_smaller():
    lily, fish = Group("flora", "white", "lily"), Group("reef", "red", "guppy")
    left, right = scenes.places(Scene((lily, fish), "sky", "beside"))
    assert left.group == lily and left.x < right.x and left.y == right.y
    upper, lower = scenes.places(Scene((fish, lily), "sky", "above"))
    assert upper.group == fish and upper.y > lower.y and upper.x == lower.x
    row = scenes.places(Scene((lily, dataclasses.replace(fish, count=2)), "sky", "beside"))
    assert [p.group.kind for p in row] == ["lily", "guppy", "guppy"]
    assert row[0].x < row[1].x < row[2].x
    for groups, relation in (((lily,), ""), ((lily, fish), "beside"), ((lily, fish), "above")):
        small, plain, large = (
            Scene((dataclasses.replace(groups[0], size=s), *groups[1:]), "night", relation)
            for s in ("small", "", "large")
        )
        scale = [scenes.places(s)[0].scale for s in (small, plain, large)]
        assert scale[0] < 0.75 * scale[1] and scale[0] < 0.7 * scale[2]
    assert changed(Scene((dataclasses.replace(lily, size="small"),), "night")).sum() < (
        0.6 * changed(Scene((dataclasses.replace(lily, size="large"),), "night")).sum()
    )


def test_every_fish_looks_different_and_shows_its_colour():
    for colour in ("red", "blue", "yellow"):
        shown = [
            image(Scene((Group("reef", colour, kind),), "sand"), 1)
            for kind in DOMAINS["reef"].kinds
        ]
        for number, one in enumerate(shown):
            for other in shown[:number]:
                assert (np.abs(one.astype(int) - other).sum(axis=2) > 60).mean() > 0.05
            mask = changed(
                Scene((Group("reef", colour, DOMAINS["reef"].kinds[number]),), "sand"), 1
            )
            seen = one[mask] / 255.0
            seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
            names = list(worlds.COLOURS)
            palette = np.array([worlds.COLOURS[n] for n in names])
            palette /= np.linalg.norm(palette, axis=1, keepdims=True)
            nearest = np.bincount((seen @ palette.T).argmax(axis=1), minlength=len(names))
            assert names[nearest.argmax()] == colour
    with pytest.raises(ValueError, match="unknown species of fish 'shark'"):
        drawing.fish(
            drawing.Canvas(np.zeros((8, 8, 3))), "shark", np.zeros(3), np.random.default_rng(0)
        )


def test_splits_seeds_and_indices_draw_other_scenes():
    drawn = [
        scenes.render(scenes.draw_scene(rng), rng).tobytes()
        for rng in (
            scenes.rendering_rng("train", 0),
            scenes.rendering_rng("test", 0),
            scenes.rendering_rng("train", 1),
            scenes.rendering_rng("train", 0, seed=1),
        )
    ]
    assert len(set(drawn)) == 4
    with pytest.raises(ValueError, match="unknown split 'val'; the splits are train, test"):
        scenes.rendering_rng("val", 0)


def test_scenes_are_a_data_set_by_name(teacher):
    data = kdc.load_dataset("scenes", "test", 32, count=5, seed=2)
    assert len(data) == 5 and data[4]["image"].shape == (3, 32, 32)
    assert scenes.read_caption(data[3]["caption"]) == data[3]["attributes"]
    assert np.array_equal(
        data[3]["image"], kdc.load_dataset("scenes", "test", 32, seed=2)[3]["image"]
    )
    rare = kdc.load_dataset("scenes", count=3, held_out=True)
    assert all(any(g.is_held_out for g in rare[i]["attributes"].groups) for i in range(3))
    with pytest.raises(TypeError, match="crop concern folders of images"):
        kdc.load_dataset("scenes", crop=True)
    with pytest.raises(IndexError):
        data[5]
    latents = kdc.cache_latents(teacher, kdc.load_dataset("scenes", count=3))
    assert len(latents) == 3
