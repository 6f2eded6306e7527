"""The reader of image files: colours as they are meant, and files that are none refused by name."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import kdc
from kdc.data.images import FORMATS, read_image, suffixes, unreadable

RED, GREY = (200, 40, 60), (128, 128, 128)


def colour(file, size=None):
    """The mean colour of a file as it is read."""
    return np.asarray(read_image(file, size)).reshape(-1, 3).mean(axis=0).round().tolist()


def save(folder, image, name="image.png", **how):
    image.save(folder / name, **how)
    return folder / name


@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "gif", "tiff", "tif", "webp", "jpg", "ppm", "tga"]
)
def test_a_colour_is_the_same_in_every_format(suffix, tmp_path):
    file = save(tmp_path, Image.new("RGB", (40, 30), RED), f"image.{suffix}")
    assert colour(file) == pytest.approx(RED, abs=3)
    assert f".{suffix}" in suffixes() and ".pdf" not in suffixes() and ".txt" not in suffixes()


@pytest.mark.parametrize("grey", [0, 128, 255])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_cut_off(grey, suffix, tmp_path):
    """Cut off, every grey but black would be white."""
    wide = Image.fromarray(np.full((20, 20), grey * 257, np.uint16))
    assert colour(save(tmp_path, wide, f"image.{suffix}")) == [grey] * 3


def test_thirty_two_bits_that_hold_sixteen_are_read_and_others_refused(tmp_path):
    file = save(tmp_path, Image.fromarray(np.full((9, 9), 128 * 257, np.int32)), "image.tiff")
    assert colour(file) == list(GREY)
    for values in (np.full((9, 9), 70_000, np.int32), np.full((9, 9), 0.5, np.float32)):
        with pytest.raises(ValueError, match="image.tiff: "):
            read_image(save(tmp_path, Image.fromarray(values), "image.tiff"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white_and_do_not_show_what_they_hide(mode, tmp_path):
    image, how = Image.new("RGBA", (20, 20), (*RED, 0)).convert(mode), {}
    if mode == "P":
        image = Image.new("P", (20, 20), 1)
        image.putpalette([0, 0, 0, *RED])
        how = {"transparency": 1}
    assert colour(save(tmp_path, image, **how)) == [255, 255, 255]


def test_half_transparent_parts_are_half_white(tmp_path):
    file = save(tmp_path, Image.new("RGBA", (20, 20), (*RED, 128)))
    assert colour(file) == pytest.approx([227, 147, 157], abs=1)


@pytest.mark.parametrize("mode, shown", [("L", GREY), ("1", (255,) * 3), ("CMYK", RED)])
def test_other_modes_show_their_colours(mode, shown, tmp_path):
    source = {"L": GREY, "1": (255, 255, 255), "CMYK": RED}[mode]
    image = Image.new("RGB", (16, 16), source).convert(mode)
    file = save(tmp_path, image, "image.tiff")
    assert colour(file) == pytest.approx(shown, abs=3)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (16, 16), c) for c in (RED, (0, 0, 255))]
    file = save(tmp_path, frames[0], "image.gif", save_all=True, append_images=frames[1:])
    assert colour(file) == pytest.approx(RED, abs=3)


def striped(width, height):
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), RED)
    image.paste((0, 0, 255), (0, height // 2, width, height))
    return image


@pytest.mark.parametrize("orientation, top", [(1, RED), (3, (0, 0, 255))])
def test_photographs_stand_upright(orientation, top, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path, striped(40, 40), "image.jpg", exif=exif, quality=95)
    assert np.asarray(read_image(file))[3, 20].tolist() == pytest.approx(top, abs=12)


def test_a_broken_exif_block_spoils_nothing(tmp_path):
    for exif in (b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00garbage", b"Exif\x00\x00"):
        file = save(tmp_path, striped(40, 40), "image.jpg", exif=exif, quality=95)
        assert not unreadable([file], 32)
        assert np.asarray(read_image(file))[3, 20].tolist() == pytest.approx(RED, abs=12)


def test_large_photographs_are_decoded_small_and_look_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    large = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    file = save(tmp_path, large, "image.jpg", quality=92)
    small, whole = read_image(file, 64), read_image(file)
    assert whole.size == (1600, 1200) and small.size == (200, 150)
    sides = [
        np.asarray(x.resize((64, 48), Image.Resampling.BICUBIC), float) for x in (small, whole)
    ]
    assert np.abs(sides[0] - sides[1]).mean() < 1.5
    assert np.array_equal(np.asarray(read_image(file, 64)), np.asarray(small))


def test_what_is_checked_is_what_is_read(tmp_path):
    good = save(tmp_path, striped(40, 40), "good.png")
    cut = tmp_path / "cut.jpg"
    buffer = io.BytesIO()
    striped(400, 400).save(buffer, "JPEG")
    cut.write_bytes(buffer.getvalue()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_bytes(b"%PDF-1.4\n")
    files = [good, cut, tmp_path / "empty.png", tmp_path / "page.png"]
    wrong = unreadable(files, 32)
    assert set(wrong) == set(files[1:])
    for file in files[1:]:
        with pytest.raises(ValueError, match=file.name):
            read_image(file, 32)
    cut.write_bytes(buffer.getvalue())
    assert cut not in unreadable(files, 32), "an old verdict outlived the file"


def test_a_bomb_is_refused_by_name(tmp_path, monkeypatch):
    file = save(tmp_path, Image.new("RGB", (150, 150)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7000)
    with pytest.raises(ValueError, match="bomb.png.*decompression bomb"):
        read_image(file)


def samples():
    """A small file of each format that can be written."""
    found = {}
    for name in FORMATS:
        buffer = io.BytesIO()
        try:
            striped(24, 20).save(buffer, name)
        except (KeyError, OSError, ValueError):
            continue
        found[name] = buffer.getvalue()
    return found


SAMPLES = samples()


@settings(max_examples=150, deadline=20_000, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.sampled_from(sorted(SAMPLES)), st.integers(0, 2**32), st.integers(0, 8))
def test_broken_files_are_read_or_refused_by_name(tmp_path_factory, kind, seed, flips):
    """Bytes changed, and half of the time the file cut off: an image of 8 bits, or `ValueError`."""
    draw = random.Random(seed)
    data = bytearray(SAMPLES[kind])
    for _ in range(flips):
        data[draw.randrange(min(len(data), 200) if draw.random() < 0.7 else len(data))] = (
            draw.randrange(256)
        )
    if draw.random() < 0.5:
        data = data[: draw.randrange(len(data) + 1)]
    file = tmp_path_factory.getbasetemp() / "broken.img"
    file.write_bytes(bytes(data))
    try:
        image = read_image(file, 16)
    except ValueError as error:
        assert "broken.img" in str(error)
    else:
        assert image.mode == "RGB" and min(image.size) >= 1


def test_crops_and_flips_are_drawn_from_the_seed_and_the_number(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / f"{number}.png")
    how = {"size": 32, "crop": "random", "flip": True, "variants": 40}
    a, b, c = (kdc.load_dataset(tmp_path, seed=seed, **how) for seed in (0, 0, 1))
    assert len(a) == 120 and a.caption(1) == a.caption(4)
    items = [a[i]["image"] for i in range(0, 120, 3)]
    assert all(torch.equal(a[i]["image"], b[i]["image"]) for i in range(0, 120, 17))
    assert any(not torch.equal(a[i]["image"], c[i]["image"]) for i in range(0, 120, 17))
    assert len({x.numpy().tobytes() for x in items}) > 20, "the variants are not different"
    plain = kdc.load_dataset(tmp_path, size=32, flip=True, variants=40)
    left = plain[0]["image"], plain[0]["image"].flip(-1)
    turned = [torch.equal(plain[i]["image"], kdc.load_dataset(tmp_path, size=32)[0]["image"])
              for i in range(0, 120, 3)]  # fmt: skip
    assert 8 < sum(turned) < 32 and not torch.equal(*left)
    with pytest.raises(ValueError, match="crop must be"):
        kdc.load_dataset(tmp_path, crop="middle")
    with pytest.raises(TypeError, match="concern folders"):
        kdc.load_dataset("worlds", flip=True)
