"""The cache of latents on disk: the same numbers, encoded once, by any number of runs."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdc
from kdc.continual.tasks import select, split_classes
from kdc.data import cache
from kdc.data.cache import cache_latents
from kdc.data.datasets import WorldDataset
from kdc.data.shards import Shards, open_shards, write_shard
from kdc.distillation.distill import identity_of_data
from tests.helpers import picture

LARGE = ("mean", "std", "embeddings")


@pytest.fixture
def counted(teacher, monkeypatch):
    """The images and captions that the teacher encodes from now on."""
    seen = {"images": 0, "captions": 0}
    encode, prompt = teacher.vae.encode, teacher.encode_prompt

    def images(x, *args, **kwargs):
        seen["images"] += len(x)
        return encode(x, *args, **kwargs)

    def captions(texts, *args, **kwargs):
        seen["captions"] += len(texts)
        return prompt(texts, *args, **kwargs)

    monkeypatch.setattr(teacher.vae, "encode", images)
    monkeypatch.setattr(teacher, "encode_prompt", captions)
    return seen


@pytest.fixture
def data(monkeypatch):
    """Ten images, in shards of four."""
    monkeypatch.setattr(cache, "ROWS", 4)
    return WorldDataset(["flora"], count=10)


def whole(found):
    return {name: getattr(found, name)[:] for name in LARGE}


def the_cache(folder):
    (place,) = [p for p in folder.iterdir() if p.is_dir()]
    return place


def test_it_holds_what_memory_would_hold(teacher, data, tmp_path):
    expected = cache_latents(teacher, data, batch_size=4)
    found = cache_latents(teacher, data, batch_size=4, folder=tmp_path, dtype="float32")
    assert found.captions == expected.captions and torch.equal(found.empty, expected.empty)
    assert torch.equal(found.caption_index, expected.caption_index) and found.choices is None
    for name, values in whole(found).items():
        assert torch.equal(values, getattr(expected, name)), name
    batches = [d.draw(5, torch.Generator().manual_seed(3)) for d in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_half_precision_is_as_exact_as_it_says(teacher, data, tmp_path):
    expected = cache_latents(teacher, data, batch_size=4)
    found = cache_latents(teacher, data, batch_size=4, folder=tmp_path)
    assert (
        the_cache(tmp_path) / "latents-00002.safetensors"
    ).stat().st_size < 4 * 3 * 16**2 * 4 * 2
    stated = found.note["largest_error"]
    for name in ("mean", "std"):
        error = (getattr(found, name)[:] - getattr(expected, name)).abs().max().item()
        assert 0 < error == pytest.approx(stated[name], rel=1e-6)
    assert stated["mean_over_deviation"] < 2**-9  # half a step at four deviations


def test_a_second_start_encodes_nothing(teacher, data, tmp_path, counted):
    first = cache_latents(teacher, data, folder=tmp_path)
    assert counted == {"images": 10, "captions": len(first.captions) + 1}
    second = cache_latents(teacher, data, folder=tmp_path)
    assert counted == {"images": 10, "captions": len(first.captions) + 1}
    assert identity_of_data(first) == identity_of_data(second)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(whole(x).values() for x in (first, second)), strict=True)
    )


def test_a_stopped_run_encodes_the_rest(teacher, data, tmp_path, counted, monkeypatch):
    def stops(file, tensors):
        if "00001" in file.name:
            raise KeyboardInterrupt
        write_shard(file, tensors)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache, "write_shard", stops)
        cache_latents(teacher, data, batch_size=4, folder=tmp_path)
    assert [f.name for f in the_cache(tmp_path).glob("*.safetensors")] == [
        "latents-00000.safetensors"
    ]
    counted["images"] = 0
    found = cache_latents(teacher, data, batch_size=4, folder=tmp_path)
    assert counted["images"] == 6
    expected = cache_latents(teacher, data, batch_size=4, folder=tmp_path / "other")
    for name, values in whole(expected).items():
        assert torch.equal(values, getattr(found, name)[:])


@pytest.mark.parametrize("file", ["latents-00001.safetensors", "index.safetensors", "cache.json"])
@pytest.mark.parametrize("how", ["a changed byte", "missing"])
def test_what_is_damaged_is_encoded_again(teacher, data, tmp_path, counted, file, how):
    before = whole(cache_latents(teacher, data, batch_size=4, folder=tmp_path))
    damaged = the_cache(tmp_path) / file
    content = damaged.read_bytes()
    damaged.unlink()
    if how == "a changed byte":
        damaged.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    counted["images"] = 0
    with pytest.warns(UserWarning, match=f"{file} is .* Encoding again what is damaged"):
        after = whole(cache_latents(teacher, data, batch_size=4, folder=tmp_path))
    assert counted["images"] == (4 if "latents" in file else 0)
    assert all(torch.equal(before[name], after[name]) for name in LARGE)


def test_other_images_captions_and_networks_have_another_cache(teacher, data, tmp_path, counted):
    def caches(dataset, pipeline=teacher, **how):
        cache_latents(pipeline, dataset, folder=tmp_path / "cache", **how)
        return len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()])

    assert [caches(data), caches(data)] == [1, 1]
    assert caches(WorldDataset(["flora"], count=10, seed=1)) == 2
    assert caches(data, dtype="float32") == 3
    files = [picture(tmp_path / "images" / f"{i}.png") for i in range(5)]
    assert caches(kdc.load_dataset(tmp_path / "images")) == 4
    (tmp_path / "images" / "metadata.csv").write_text(
        "file_name,text\n" + "\n".join(f"{f.name},a thing" for f in files)
    )
    assert caches(kdc.load_dataset(tmp_path / "images")) == 5
    assert caches(kdc.load_dataset(tmp_path / "images", flip=True)) == 6
    weight = teacher.vae.encoder.conv_in.weight
    old = weight.detach().clone()
    try:
        weight.data[0, 0] += 1
        assert caches(data) == 7
    finally:
        weight.data.copy_(old)
    assert caches(data) == 7


def test_tasks_and_buffers_are_made_of_it(teacher, data, tmp_path):
    memory = cache_latents(teacher, data, batch_size=4)
    stored = cache_latents(teacher, data, batch_size=4, folder=tmp_path, dtype="float32")
    rows = torch.tensor([7, 0, 3])
    chosen = select(stored, rows)
    assert isinstance(chosen.mean, Shards) and len(chosen) == 3
    assert torch.equal(chosen.mean[:], memory.mean[rows])
    assert identity_of_data(chosen) != identity_of_data(stored)
    again = select(chosen, torch.tensor([1]))
    assert torch.equal(again.mean[0], memory.mean[0])
    pairs = zip(split_classes(stored), split_classes(memory), strict=True)
    assert all(torch.equal(a.train.mean[:], b.train.mean) for a, b in pairs)
    buffers = [kdc.ReplayBuffer(6, seed=1) for _ in range(2)]
    for buffer, items in zip(buffers, (stored, memory), strict=True):
        buffer.add(items)
    items = [buffer.items() for buffer in buffers]
    assert all(torch.equal(items[0][name], items[1][name]) for name in ("mean", "std", "embedding"))


def test_training_reads_it_and_resumes(teacher, data, tmp_path):
    how = {"batch_size": 2, "log_every": 1, "weights": kdc.LossWeights.only("task")}

    def run(found, steps, folder):
        student = kdc.slim(teacher.unet, "kdc")
        log = kdc.distill(
            student, teacher, found, steps=steps, output_dir=folder, resume=True, **how
        )
        return log["loss"].tolist()

    memory = run(cache_latents(teacher, data, batch_size=4), 2, None or tmp_path / "memory")
    stored = [cache_latents(teacher, data, batch_size=4, folder=tmp_path / "c", dtype="float32")
              for _ in range(2)]  # fmt: skip
    assert run(stored[0], 2, tmp_path / "disk") == memory
    assert run(stored[1], 3, tmp_path / "disk")[:2] == memory
    other = dataclasses.replace(stored[0], mean=stored[0].std)
    with pytest.raises(ValueError, match="data="):
        run(other, 4, tmp_path / "disk")


def test_workers_read_the_same_and_their_errors_are_their_own(teacher, tmp_path):
    for i in range(6):
        picture(tmp_path / "a" / f"{i}.png")
    dataset = kdc.load_dataset(tmp_path, check=False)
    alone, helped = (cache_latents(teacher, dataset, 2, workers=n) for n in (0, 2))
    assert torch.equal(alone.mean, helped.mean)
    dataset.files[1].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"^{dataset.files[1]}: cannot identify image"):
        cache_latents(teacher, dataset, 2, workers=2)


def test_what_cannot_be_is_refused_before_anything_is_encoded(teacher, data, tmp_path, counted):
    class Nameless(torch.utils.data.Dataset):
        def __len__(self):
            return 2

    with pytest.raises(TypeError, match="Nameless has no method identity. It should give whatever"):
        cache_latents(teacher, Nameless(), folder=tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float16, float32, not 'int8'"):
        cache_latents(teacher, data, folder=tmp_path, dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="the folder of latents"):
        cache_latents(teacher, data, folder=tmp_path / "file")
    assert counted == {"images": 0, "captions": 0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_shards_are_indexed_as_one_tensor(sizes, draw):
    parts = [torch.randn(n, 2).half() for n in sizes]
    joined = torch.cat(parts).float()
    index = draw.draw(st.lists(st.integers(-len(joined), len(joined) - 1), max_size=6))
    shards = Shards(parts, "key")
    assert torch.equal(shards[torch.tensor(index).long()], joined[index])
    assert torch.equal(shards[1:][...], joined[1:]) and torch.equal(shards[-1], joined[-1])
    rows = torch.tensor(index).long() % len(joined)
    taken = shards.take(rows)
    assert taken.shape == (len(index), 2) and torch.equal(taken[:], joined[rows])
    with pytest.raises(IndexError):
        shards[torch.tensor([len(joined)])]


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    write_shard(tmp_path / "a", {"x": torch.zeros(3)})
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:-3])
    with pytest.raises(ValueError, match="b is damaged or cut off"):
        open_shards([tmp_path / "a", tmp_path / "b"], "x", "key")


def test_the_note_says_what_made_it(teacher, data, tmp_path):
    found = cache_latents(teacher, data, folder=tmp_path)
    note = json.loads((the_cache(tmp_path) / "cache.json").read_text())
    assert note["images"] == 10 and note["made_with"]["dtype"] == "float16"
    assert found.note["folder"] == str(the_cache(tmp_path))
