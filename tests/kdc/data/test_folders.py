"""Which files of a folder are data, for what, and what they say."""

import csv
import json
import os
import shutil
import unicodedata
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdc
from kdc.continual.tasks import select
from kdc.data import folders
from tests.helpers import captions_in, tree


@pytest.mark.parametrize(
    "rubbish",
    [".ipynb_checkpoints", "__MACOSX", ".cache", ".Trash-1000", "__pycache__", "@eaDir", ".git"],
)
def test_what_systems_leave_behind_is_no_class(rubbish, tmp_path):
    tree(tmp_path, "train/rose/1.png", "train/rose/2.png", f"train/{rubbish}/3.png",
         f"{rubbish}/4.png", "train/rose/._1.png", "train/rose/Thumbs.db.png")  # fmt: skip
    (tmp_path / "train" / "rose" / "Thumbs.db").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = captions_in(tmp_path)
    assert set(found) == {"train/rose/1.png", "train/rose/2.png", "train/rose/Thumbs.db.png"}


def test_class_folders_that_are_links_are_followed_once(tmp_path):
    tree(tmp_path / "elsewhere", "tulips/1.png", "tulips/2.png")
    data = tree(tmp_path / "data", "train/rose/1.png")
    (data / "train" / "tulip").symlink_to(tmp_path / "elsewhere" / "tulips")
    (data / "train" / "rose" / "again").symlink_to(data / "train")  # in a circle
    (data / "train" / "rose" / "same.png").symlink_to(data / "train" / "rose" / "1.png")
    found = captions_in(data)
    assert list(found.values()).count("a photo of a tulips") == 2
    assert len(found) == 3


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path, "train/rose/1.png", "train/secret/1.png")
    original = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="secret cannot be read: Permission denied"):
        kdc.load_dataset(tmp_path)


@pytest.mark.parametrize(
    "train, test",
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "VAL"), ("train", "valid"),
     ("Training", "Validation"), ("train", "eval")],
)  # fmt: skip
def test_splits_are_known_by_their_usual_names_in_any_case(train, test, tmp_path):
    tree(tmp_path, f"{train}/rose/1.png", f"{train}/iris/2.png", f"{test}/rose/3.png")
    assert set(captions_in(tmp_path)) == {f"{train}/rose/1.png", f"{train}/iris/2.png"}
    assert captions_in(tmp_path, "test") == {f"{test}/rose/3.png": "a photo of a rose"}


def test_the_butterflies_have_three_splits_of_which_two_are_tests(tmp_path):
    tree(tmp_path, *(f"{s}/ADONIS/{i}.jpg" for s in ("train", "valid", "test") for i in (1, 2)))
    assert len(captions_in(tmp_path)) == 2 and len(captions_in(tmp_path, "test")) == 4
    assert set(captions_in(tmp_path).values()) == {"a photo of an adonis"}


@pytest.mark.parametrize(
    "names, seen",
    [
        (("train/1.png", "bus/2.png", "car/3.png"), "train and also bus, car"),
        (("train/a/1.png", "test/a/1.png", "unlabelled/1.png"), "test, train and also unlabelled"),
        (("train/1.png", "rose.png"), "train and also images right in it"),
        (("Train/1.png", "training/2.png"), r"several folders for training, \['Train', 'training'"),
    ],
)
def test_what_can_be_read_in_several_ways_is_refused(names, seen, tmp_path):
    tree(tmp_path, *names)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=seen):
            kdc.load_dataset(tmp_path, split)


def test_a_missing_split_says_what_was_seen(tmp_path):
    tree(tmp_path, "Train/rose/1.png")
    with pytest.raises(ValueError, match="no sub-folder for the split 'test', only Train"):
        kdc.load_dataset(tmp_path, "test")


def test_a_text_does_not_take_the_place_of_the_test_images(tmp_path):
    tree(tmp_path, "a.png", "b.png", "c.png", "d.png")
    for name in ("z.txt", "y.md", "e.csv"):
        (tmp_path / name).write_text("file_name,text\n" if name == "e.csv" else "hello")
    with pytest.warns(UserWarning, match="left out 3 files"):
        train = captions_in(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        test = captions_in(tmp_path, "test")
    assert test and len(train) + len(test) == 4


def test_the_same_image_for_training_and_for_tests_is_noticed(tmp_path):
    tree(tmp_path, "train/rose/1.png", "train/rose/2.png", "test/rose/3.png")
    shutil.copy(tmp_path / "train" / "rose" / "1.png", tmp_path / "test" / "rose" / "copy.png")
    with pytest.warns(UserWarning, match="1 images are both.*too good:\n  train/rose/1.png = test"):
        kdc.load_dataset(tmp_path, "test")


def test_so_many_images_and_no_more_in_turn_from_each_class(tmp_path):
    tree(tmp_path, *(f"train/{c}/{i}.png" for c in ("rose", "iris", "lily") for i in range(9)),
         "train/rare/0.png")  # fmt: skip
    found = captions_in(tmp_path, count=10)
    classes = [name.split("/")[1] for name in found]
    assert {c: classes.count(c) for c in set(classes)} == {
        "rose": 3,
        "iris": 3,
        "lily": 3,
        "rare": 1,
    }
    assert captions_in(tmp_path, count=10) == found and set(captions_in(tmp_path, count=4)) < set(
        found
    )
    assert len(captions_in(tmp_path)) == len(captions_in(tmp_path, count=500)) == 28


@pytest.mark.parametrize(
    "how, error, message",
    [
        (dict(size=0), ValueError, "size must be at least 1"),
        (dict(size=32.0), TypeError, "size must be a whole number"),
        (dict(count=0), ValueError, "count must be at least 1"),
        (dict(split="everything"), ValueError, "train and test"),
        (dict(variants=0), ValueError, "variants must be"),
        (dict(flip="yes"), TypeError, "flip must be"),
        (dict(templates=["no place"]), ValueError, "one {} for the class"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(how, error, message, tmp_path):
    tree(tmp_path, "train/rose/1.png")
    with pytest.raises(error, match=message):
        kdc.load_dataset(tmp_path, **how)


@pytest.mark.parametrize("source, error", [("", ValueError), (102, TypeError), (None, TypeError)])
def test_what_names_no_data_set_is_refused(source, error):
    with pytest.raises(error, match="the data set"):
        kdc.load_dataset(source)


def test_home_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path, "data/train/rose/1.png")
    assert len(kdc.load_dataset("~/data")) == 1


def test_several_templates_are_several_captions(tmp_path):
    tree(tmp_path, "train/red_rose/1.png")
    dataset = kdc.load_dataset(tmp_path, templates=("a photo of {}", "a painting of {}"))
    assert dataset[0]["captions"] == ("a photo of a red rose", "a painting of a red rose")
    assert dataset[0]["caption"] == dataset.caption(0) == "a photo of a red rose"


# Lists of captions.


def jsonl(folder, *rows, end="\n"):
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(text.encode())


NAMES = ("train/rose/1.png", "train/rose/2.png")
WRITTEN = {
    "to the letter": ("train/rose/1.png", "train/rose/2.png"),
    "with backslashes": ("train\\rose\\1.png", "train\\rose\\2.png"),
    "from the class folder": ("rose/1.png", "rose/2.png"),
    "the name alone": ("1.png", "2.png"),
    "with a folder more": ("data/train/rose/1.png", "data/train/rose/2.png"),
    "with a dot": ("./train/rose/1.png", "./train/rose/2.png"),
    "in capitals": ("TRAIN/Rose/1.PNG", "train/ROSE/2.png"),
    "another suffix": ("train/rose/1.jpg", "train/rose/2.jpeg"),
    "no suffix": ("train/rose/1", "rose/2"),
    "spaces around": (" train/rose/1.png ", "train/rose/2.png\t"),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_name_need_not_be_the_files_to_the_letter(how, kind, tmp_path):
    tree(tmp_path, *NAMES)
    rows = [{"file_name": n, "text": f"caption {i}"} for i, n in enumerate(WRITTEN[how], 1)]
    if kind == "jsonl":
        jsonl(tmp_path, *rows)
    else:
        with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["other", "file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captions_in(tmp_path) == {NAMES[0]: "caption 1", NAMES[1]: "caption 2"}


def test_unicode_forms_of_a_name_are_one_name(tmp_path):
    tree(tmp_path, "train/" + unicodedata.normalize("NFD", "grün.png"))
    jsonl(tmp_path, {"file_name": unicodedata.normalize("NFC", "train/grün.png"), "text": "leaf"})
    assert list(captions_in(tmp_path).values()) == ["leaf"]


def test_a_caption_is_never_anothers(tmp_path):
    """The row of a deleted image must not find one of the same name elsewhere."""
    tree(tmp_path, "train/rose/1.png", "train/iris/2.png")
    jsonl(tmp_path, {"file_name": "train/rose/1.png", "text": "one"},
          {"file_name": "train/rose/2.png", "text": "gone"})  # fmt: skip
    with pytest.warns(
        UserWarning, match="1 of 2 rows name no image, and 1 of 2 images have no row"
    ):
        found = captions_in(tmp_path)
    assert found == {"train/rose/1.png": "one", "train/iris/2.png": "a photo of an iris"}


def test_a_name_that_could_be_several_is_refused(tmp_path):
    tree(tmp_path, "train/rose/1.png", "train/iris/1.png")
    jsonl(tmp_path, {"file_name": "1.png", "text": "which?"})
    with pytest.raises(ValueError, match="metadata.jsonl:1: '1.png' could be any of"):
        kdc.load_dataset(tmp_path)
    jsonl(tmp_path, {"file_name": "train/rose/1.png", "text": "this"},
          {"file_name": "1.png", "text": "so the other"})  # fmt: skip
    assert captions_in(tmp_path)["train/iris/1.png"] == "so the other"


def test_a_list_that_names_none_of_the_images_is_refused(tmp_path):
    tree(tmp_path, *NAMES)
    jsonl(tmp_path, {"file_name": "lily/9.png", "text": "x"})
    with pytest.raises(ValueError, match="names none of the 2 images.*'train/rose/1.png'"):
        kdc.load_dataset(tmp_path)


def test_an_image_may_have_several_captions_and_all_are_used(tmp_path, teacher):
    tree(tmp_path, *NAMES, "train/rose/3.png")
    jsonl(tmp_path, {"file_name": NAMES[0], "text": ["a", "b", "a"]},
          {"file_name": NAMES[1], "text": "c"}, {"file_name": NAMES[1], "text": "d"},
          {"file_name": "train/rose/3.png", "text": "e"}, end="\n\n")  # fmt: skip
    dataset = kdc.load_dataset(tmp_path)
    assert [dataset[i]["captions"] for i in range(3)] == [("a", "b"), ("c", "d"), ("e",)]
    data = kdc.cache_latents(teacher, dataset)
    assert data.captions == list("abcde") and data.caption_index.tolist() == [0, 2, 4]
    index = torch.arange(3).repeat(200)
    items = data.pick(index, torch.Generator().manual_seed(0))
    for row, expected in enumerate(("ab", "cd", "e")):
        mine = items["embedding"][index == row]
        shares = [(mine == data.embeddings["abcde".index(c)]).all(2).all(1).float().mean().item()
                  for c in expected]  # fmt: skip
        assert sum(shares) == pytest.approx(1) and min(shares) > 0.35
    _, embeddings = data.draw(50, torch.Generator().manual_seed(1), 0.0)
    assert len({e.numpy().tobytes() for e in embeddings}) == 5
    part = select(data, torch.tensor([2, 1]))
    assert part.captions == ["c", "d", "e"] and part.caption_index.tolist() == [2, 0]
    assert part.choices.tolist() == [[2, -1], [0, 1]]
    student = kdc.slim(teacher.unet, "kdc")
    kdc.distill(student, teacher, data, steps=1, batch_size=2)


def test_texts_beside_images_are_captions_a_line_each(tmp_path):
    tree(tmp_path, *NAMES, "train/rose/3.png")
    (tmp_path / "train/rose/1.txt").write_text("one\n\n  another \n")
    (tmp_path / "train/rose/2.png.txt").write_bytes("\ufeffzwei, grün".encode())
    with pytest.warns(UserWarning, match="1 of 3 images have no caption beside them, .*3.png"):
        dataset = kdc.load_dataset(tmp_path)
    captions = {f.name: dataset.captions[i] for i, f in enumerate(dataset.files)}
    assert captions["1.png"] == ("one", "another") and captions["2.png"] == ("zwei, grün",)
    assert captions["3.png"] == ("a photo of a rose",)
    (tmp_path / "train/rose/1.txt").write_text("\n")
    with pytest.raises(ValueError, match="1.txt:1: no caption for 1.png"):
        kdc.load_dataset(tmp_path)


BAD = {
    "metadata.jsonl": [
        b'{"file": 1}', b"[1]", b"\xff", b'{"file_name": "train/rose/1.png", "text": null}',
        b'{"file_name": "train/rose/1.png", "text": []}', b'{"file_name": 3, "text": "x"}',
        b'{"file_name": "train/rose/1.png", "text": NaN}', b'{"file_name": "", "text": "x"}',
        b'{"file_name": "train/rose/1.png", "text": " "}', b"[" * 100_000,
    ],
    "metadata.csv": [
        b"name,text\n1,2\n", b"file_name\nx\n", b"\xff\xfe", b'file_name,text\n"unclosed,x',
        b"file_name,text\ntrain/rose/1.png\n", b"file_name,text\ntrain/rose/1.png,\n", b"",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, data", [(n, d) for n, many in BAD.items() for d in many])
def test_a_list_that_cannot_be_read_is_named_with_its_line(name, data, tmp_path):
    tree(tmp_path, *NAMES)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}:?\\d?:"):
        kdc.load_dataset(tmp_path)


@settings(max_examples=120, deadline=20_000, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.lists(st.tuples(st.sampled_from(["a/1.png", "b/1.png", "b/2.png", "1.png", "A\\1.PNG",
                                           "x/b/2", "c/9.png", "2.jpg", ""]),
                          st.one_of(st.text(max_size=5), st.lists(st.text(max_size=3), max_size=2),
                                    st.none(), st.integers())), max_size=4),
       st.binary(max_size=6), st.integers(0, 300))  # fmt: skip
def test_any_list_gives_each_image_its_own_caption_or_is_refused(tmp_path_factory, rows, noise, at):
    root = tmp_path_factory.getbasetemp() / "any-list"
    if not root.exists():
        tree(root, "train/a/1.png", "train/b/1.png", "train/b/2.png")
    texts = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in rows]
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    data = data[:at] + noise + data[at:]
    (root / "train" / "metadata.jsonl").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = captions_in(root)
        except ValueError as error:
            assert "metadata.jsonl" in str(error)
            return
    given_to = {"train/a/1.png": {"a/1.png", "A\\1.PNG", "1.png"},
                "train/b/1.png": {"b/1.png", "1.png"},
                "train/b/2.png": {"b/2.png", "x/b/2", "2.jpg"}}  # fmt: skip
    for name, caption in found.items():
        if caption.startswith("a photo of"):
            continue
        mine = [t for n, t in rows if n.strip() in given_to[name]]
        mine = [x.strip() for t in mine for x in (t if isinstance(t, list) else [t])
                if isinstance(x, str)]  # fmt: skip
        assert caption in mine or noise, (name, caption, rows)


def test_a_folder_of_many_photographs_is_looked_at_once(tmp_path, monkeypatch):
    tree(tmp_path, *(f"train/rose/{i}.png" for i in range(5)))
    reads = []
    original = folders.unreadable

    def counting(files, size):
        reads.append(len(files))
        return original(files, size)

    monkeypatch.setattr(folders, "unreadable", counting)
    kdc.load_dataset(tmp_path, check=False)
    assert not reads
    kdc.load_dataset(tmp_path)
    assert reads == [5]
