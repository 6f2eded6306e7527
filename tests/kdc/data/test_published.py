"""The paper's two data sets, as small folders of exactly their shapes."""

import csv
import json

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import Flowers102

import kdc
from kdc.__main__ import main
from kdc.commands import DATASET_NAMES
from kdc.continual.tasks import names_of
from kdc.data import published, worlds
from studies.replay.tasks import check_dataset
from tests.helpers import picture

SPLITS = {"trnid": [1, 2, 5], "valid": [3, 9], "tstid": [4, 6, 7, 8]}
LABELS = [1, 2, 1, 1, 102, 2, 102, 1, 2]  # of image 1, 2, ...; they count from 1


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Nine images in the layout that torchvision unpacks, with lists of its format."""
    monkeypatch.setenv("KDC_DATA", str(tmp_path))
    place = tmp_path / "flowers-102"
    (place / "jpg").mkdir(parents=True)
    for number in range(1, len(LABELS) + 1):
        picture(place / "jpg" / f"image_{number:05d}.jpg")
    scipy.io.savemat(place / "imagelabels.mat", {"labels": np.array([LABELS])})
    scipy.io.savemat(place / "setid.mat", {k: np.array([v]) for k, v in SPLITS.items()})
    sums = {name: (file, None) for name, (file, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", sums)  # the real lists have other checksums
    return place


@pytest.fixture
def butterflies(tmp_path, monkeypatch):
    """Two species in the layout of the archive, upper-case folders, and its list."""
    monkeypatch.setenv("KDC_DATA", str(tmp_path))
    root, rows = tmp_path / "butterflies", []
    for split, count in (("train", 3), ("valid", 1), ("test", 2)):
        for number, species in enumerate(("ADONIS", "ATLAS MOTH")):
            for i in range(1, count + 1):
                picture(root / split / species / f"{i}.jpg")
                rows.append((number, f"{split}/{species}/{i}.jpg", species, split))
    with open(root / "butterflies and moths.csv", "w", newline="") as file:
        csv.writer(file).writerows([("class id", "filepaths", "labels", "data set"), *rows])
    return root


def captions(dataset):
    return [dataset.caption(i) for i in range(len(dataset))]


def test_flowers_have_torchvisions_splits_and_names(flowers):
    train, test = (kdc.load_dataset("flowers102", split, 32) for split in ("train", "test"))
    assert [f.name for f in train.files] == [f"image_{i:05d}.jpg" for i in (1, 2, 5, 3, 9)]
    orchid = "a photo of a hard-leaved pocket orchid"
    assert captions(train) == [
        "a photo of a pink primrose",
        orchid,
        "a photo of a blackberry lily",
        "a photo of a pink primrose",
        orchid,
    ]
    assert [f.name for f in test.files] == [f"image_{i:05d}.jpg" for i in (4, 6, 7, 8)]
    assert captions(test)[1] == orchid and test[1]["image"].shape == (3, 32, 32)
    one_each = kdc.load_dataset("flowers102", "train", 32, count=3, templates=("{}, a flower",))
    assert len(set(captions(one_each))) == 3 and "a pink primrose, a flower" in captions(one_each)


def test_flowers_that_are_not_there_say_what_to_put_where(tmp_path, monkeypatch, flowers):
    def refused(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(Flowers102, "download", refused)
    (flowers / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 4 images .* image_00004.jpg"):
        kdc.load_dataset("flowers102", "test")
    monkeypatch.setenv("KDC_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError) as error:
        kdc.load_dataset("flowers102")
    for said in ("elsewhere/flowers-102", "102flowers.tgz", "setid.mat", "no network", "KDC_DATA"):
        assert said in str(error.value)


def test_butterflies_have_the_species_of_their_list(butterflies):
    train, test = (kdc.load_dataset("butterflies", split, 32) for split in ("train", "test"))
    assert len(train) == 6 and len(test) == 6, "valid and test are for tests"
    assert set(captions(train)) == {"a photo of an adonis", "a photo of an atlas moth"}
    listing = butterflies / "butterflies and moths.csv"
    listing.write_text(
        listing.read_text().replace("ATLAS MOTH/2.jpg,ATLAS", "ATLAS MOTH/2.jpg,ELM")
    )
    assert "a photo of an elm moth" in captions(kdc.load_dataset("butterflies", "train", 32))


def test_butterflies_that_are_not_whole_are_refused(butterflies, tmp_path, monkeypatch):
    (butterflies / "train" / "ADONIS" / "2.jpg").unlink()
    with pytest.raises(ValueError, match="lacks 1 of the images .* 'train/ADONIS/2.jpg'"):
        kdc.load_dataset("butterflies", "train", 32)
    assert len(kdc.load_dataset("butterflies", "test", 32)) == 6
    (butterflies / "butterflies and moths.csv").unlink()
    with pytest.warns(UserWarning, match="holds no CSV with columns filepaths and labels"):
        assert len(kdc.load_dataset("butterflies", "train", 32)) == 5
    monkeypatch.setenv("KDC_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere/butterflies.*kaggle.*KDC_DATA"):
        kdc.load_dataset("butterflies")


def test_a_list_that_cannot_be_read_is_named_with_its_line(butterflies):
    listing = butterflies / "butterflies and moths.csv"
    lines = listing.read_text().splitlines()
    lines[2] = "0,,ADONIS,train"
    listing.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"moths.csv:3: filepaths and labels must not be empty"):
        kdc.load_dataset("butterflies", "train", 32)


def test_both_are_tasks_by_name(flowers, butterflies, tmp_path):
    assert names_of("flowers102 then butterflies") == ["flowers102", "butterflies"]
    assert check_dataset("flowers102 then butterflies") == ["flowers102", "butterflies"]
    main(["continue", "--dataset", "flowers102 then butterflies", "--steps", "1", "--batch-size",
          "2", "--output-dir", str(tmp_path / "out")])  # fmt: skip
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["output_error"]["names"] == ["flowers102", "butterflies"]


def test_the_help_names_every_data_set():
    assert DATASET_NAMES.split(", ") == ["worlds", *worlds.WORLDS, "scenes", *published.PUBLISHED]


def test_a_broken_photograph_is_left_out_and_named(butterflies):
    (butterflies / "train" / "ADONIS" / "1.jpg").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="left out 1 files:\n  train/ADONIS/1.jpg"):
        assert len(kdc.load_dataset("butterflies", "train", 32)) == 5
