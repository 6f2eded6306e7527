import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from kdc.replay import policies
from kdc.replay.buffer import ReplayBuffer, item_bytes
from kdc.replay.policies import POLICIES, fair_shares, herding_order
from kdc.replay.storage import quantise

# Statistical tests draw with fixed seeds; with other seeds they would raise a false alarm once in
# 10,000 runs, which is what `ALARM` says.
ALARM = 1e-4


def latents(count, seed=0, captions=3, size=4, offset=0):
    """Items whose first mean value is their number, with `captions` captions in turn."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 4, size, size, generator=g)
    mean[:, 0, 0, 0] = torch.arange(count) + offset
    return SimpleNamespace(
        mean=mean,
        std=torch.rand(count, 4, size, size, generator=g),
        embeddings=torch.randn(captions, 5, 8, generator=g).half().float(),
        caption_index=torch.arange(count) % captions,
        captions=[f"caption {offset + i}" for i in range(captions)],
    )


def numbers(batch):
    return batch["mean"][:, 0, 0, 0].long().tolist()


def same(a, b):
    return all(torch.equal(a[k], b[k]) if k != "caption" else a[k] == b[k] for k in a)


def test_every_item_seen_is_held_with_the_same_probability():
    """Chi-square of 800 reservoirs of 5 among 20 items, which came in uneven batches.

    Of the counts n_i, of mean n p and variance n p (1 - p), negatively correlated because 5 are
    always held: sum (n_i - n p)^2 / (n p (1 - p)) * (N - 1) / N is chi-square of N - 1.
    """
    runs, kept, every = 800, 5, 20
    data, counts = latents(every, size=1), torch.zeros(every)
    for seed in range(runs):
        buffer = ReplayBuffer(kept, dtype="float32", seed=seed)
        for rows in torch.arange(every).split([3, 1, 9, 7]):
            buffer.add(data, rows)
        counts[numbers(buffer.items())] += 1
    p = kept / every
    statistic = ((counts - runs * p) ** 2).sum().item() / (runs * p * (1 - p)) * (every - 1) / every
    assert counts.sum() == runs * kept
    assert stats.chi2.sf(statistic, every - 1) > ALARM


def test_a_reservoir_in_batches_is_algorithm_r_item_by_item():
    """Against the published loop, on the same random numbers."""
    data = latents(200, size=1)
    buffer = ReplayBuffer(16, dtype="float32", seed=3)
    for rows in torch.arange(200).split([1, 30, 2, 100, 67]):
        buffer.add(data, rows)
    u = torch.rand(184, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    slots = list(range(16))
    for n in range(17, 201):
        j = int(u[n - 17] * n)
        if j < 16:
            slots[j] = n - 1
    assert numbers(buffer.items()) == slots


def test_the_first_in_are_the_first_out():
    buffer, data = ReplayBuffer(5, "fifo", "float32"), latents(23)
    for rows in torch.arange(23).split([2, 9, 12]):
        buffer.add(data, rows)
    assert sorted(numbers(buffer.items())) == [18, 19, 20, 21, 22]


def balanced(seed, capacity=12, sizes=(40, 3, 17)):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    buffer = ReplayBuffer(capacity, "class_balanced", "float32", seed=seed)
    data = latents(len(labels), size=1)
    for rows in order.split([7, 20, len(order) - 27]):
        buffer.add(data, rows, labels=labels[rows])
    return buffer.items(), labels


def test_classes_are_balanced_and_small_ones_kept_whole():
    """However the stream is mixed: 3 of 3, and the other 9 shared, no class above the next by 2."""
    for seed in range(20):
        items, labels = balanced(seed)
        sizes = items["label"].bincount().tolist()
        assert sizes[1] == 3 and sum(sizes) == 12
        assert abs(sizes[0] - sizes[2]) <= 1
        assert torch.equal(labels[numbers(items)], items["label"])


def test_within_a_class_every_item_is_held_with_the_same_probability():
    """Class by class, in the order of the stream: chi-square over the items of the first class."""
    runs, counts, held = 1000, torch.zeros(10), 0
    labels = torch.tensor([0] * 10 + [1] * 6)
    data = latents(16, size=1)
    for seed in range(runs):
        buffer = ReplayBuffer(6, "class_balanced", "float32", seed=seed)
        buffer.add(data, labels=labels)
        items = buffer.items()
        chosen = [i for i in numbers(items) if i < 10]
        held += len(chosen)
        counts[chosen] += 1
        assert items["label"].bincount().tolist() == [3, 3]
    p = held / runs / 10
    statistic = ((counts - runs * p) ** 2).sum().item() / (runs * p * (1 - p)) * 9 / 10
    assert stats.chi2.sf(statistic, 9) > ALARM


def slow_herding(features, count):
    """Rebuffi et al., algorithm 4, as it is written."""
    features, chosen = features.double(), []
    mean = features.mean(dim=0)
    for k in range(1, count + 1):
        rest = [i for i in range(len(features)) if i not in chosen]
        distance = [(mean - (features[i] + features[chosen].sum(dim=0)) / k).norm() for i in rest]
        chosen.append(rest[int(torch.stack(distance).argmin())])
    return chosen


@pytest.mark.parametrize("together", [30, 29])
def test_herding_is_the_published_algorithm(monkeypatch, together):
    monkeypatch.setattr(policies, "TOGETHER", together)
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 3
    assert herding_order(features, 12) == slow_herding(features, 12)


def test_herding_shares_the_room_among_classes_and_gives_up_the_last_chosen():
    data, buffer = latents(30), ReplayBuffer(12, "herding", "float32")
    first, second = torch.arange(20), torch.arange(20, 30)
    order = slow_herding(data.mean[first].flatten(1), 12)
    buffer.add(data, first, labels=torch.zeros(20).long())
    assert set(numbers(buffer.items())) == set(order)
    buffer.add(data, second, labels=torch.ones(10).long())
    new = slow_herding(data.mean[second].flatten(1), 6)
    assert set(numbers(buffer.items())) == set(order[:6]) | {20 + i for i in new}
    assert torch.equal(buffer.items()["label"], (buffer.items()["mean"][:, 0, 0, 0] >= 20).long())


def test_fair_shares():
    for sizes in itertools.product(range(5), repeat=3):
        for capacity in range(14):
            shares, slow = fair_shares(list(sizes), capacity), list(sizes)
            while sum(slow) > capacity:  # the largest loses one, the last of equals
                slow[max(range(3), key=lambda i: (slow[i], i))] -= 1
            assert shares == slow


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_round_trip_of_latents_stays_within_its_bound(dtype):
    """Exact; half a unit in the last place of float16; half a step of each item and channel."""
    data = latents(40)
    data.mean[3, 1] = 0  # a channel without a scale
    data.std[:, 2] *= 1e-5
    buffer = ReplayBuffer(40, "fifo", dtype)
    buffer.add(data)
    items = buffer.items()
    for name in ("mean", "std"):
        exact = getattr(data, name)
        error = (items[name] - exact).abs()
        bound = {"float32": torch.zeros_like(exact), "float16": exact.abs() * 2.0**-11 + 2.0**-25}
        if dtype == "int8":
            step = exact.abs().amax(dim=(2, 3), keepdim=True) / 127
            bound["int8"] = step / 2 * (1 + 1e-5)
            assert error.max() > 0.4 * step.max()  # the bound is not slack
        assert (error <= bound[dtype]).all()


def test_quantised_latents_use_the_whole_range():
    whole, step = quantise(
        torch.randn(3, 4, 8, 8) * torch.tensor([1e-6, 1, 50, 3e4])[:, None, None]
    )
    assert whole.abs().amax(dim=(2, 3)).eq(127).all() and step.shape == (3, 4)


def test_items_keep_what_belongs_together():
    """Captions, embeddings, tasks and labels follow their latents through every replacement."""
    buffer, expected = ReplayBuffer(10, dtype="float32", seed=1), {}
    for task in range(4):
        data = latents(12, seed=task, offset=100 * task)
        buffer.add(data, task=task, labels=torch.arange(12) + 50 * task)
        for i, number in enumerate(data.mean[:, 0, 0, 0].tolist()):
            words = data.embeddings[data.caption_index[i]]
            caption = data.captions[data.caption_index[i]]
            expected[int(number)] = (data.mean[i], data.std[i], words, task, i + 50 * task, caption)
        items = buffer.items()
        for i, number in enumerate(numbers(items)):
            mean, std, words, t, label, caption = expected[number]
            assert torch.equal(items["mean"][i], mean) and torch.equal(items["std"][i], std)
            assert torch.equal(items["embedding"][i], words) and items["caption"][i] == caption
            assert (items["task"][i], items["label"][i]) == (t, label)
        assert set(buffer._captions.place) == set(items["caption"]), "captions nobody uses are kept"
    assert buffer.sizes()["embeddings"] == 4 * 5 * 8 * len(set(items["caption"]))
    assert buffer.sizes()["captions"] == sum(len(c) for c in set(items["caption"]))


def test_a_batch_has_no_item_twice_and_every_item_its_turn():
    """Small batches of large buffers are drawn another way than large ones; both are uniform."""
    data = latents(50, size=1)
    buffer = ReplayBuffer(50, dtype="float32", seed=5)
    buffer.add(data)
    for count, runs in ((4, 2500), (20, 500), (50, 2)):
        generated = Counter()
        for _ in range(runs):
            batch = numbers(buffer.sample(count))
            assert len(set(batch)) == count
            generated.update(batch)
        p = count / 50
        if p < 1:
            squares = sum((generated[i] - runs * p) ** 2 for i in range(50))
            assert stats.chi2.sf(squares / (runs * p * (1 - p)) * 49 / 50, 49) > ALARM


def test_sampling_does_not_change_what_is_kept():
    a, b = (ReplayBuffer(6, dtype="float32", seed=2) for _ in range(2))
    for rows in torch.arange(60).split(15):
        a.add(latents(60), rows)
        b.add(latents(60), rows)
        b.sample(3)
    assert numbers(a.items()) == numbers(b.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_loaded_buffer_goes_on_as_an_unsaved_one_bit_for_bit(policy, dtype, tmp_path):
    def feed(buffer, start, stop):
        for task in range(start, stop):
            labels = torch.arange(15) % 3 + 3 * (task % 2)
            buffer.add(latents(15, seed=task, offset=20 * task), task=task, labels=labels)
            batch = buffer.sample(min(4, len(buffer)))
        return batch

    capacity = 9
    whole = ReplayBuffer(capacity, policy, dtype, seed=4)
    feed(whole, 0, 4)
    loaded = ReplayBuffer.load(whole.save(tmp_path / "made" / "buffer.safetensors"))
    again = ReplayBuffer(capacity, policy, dtype, seed=99)
    again.add(latents(3))  # what was there before must go
    again.load_state_dict(whole.state_dict())
    expected = feed(whole, 4, 7)
    for other in (loaded, again):
        assert same(feed(other, 4, 7), expected)
        assert same(other.items(), whole.items()) and other.sizes() == whole.sizes()


def test_an_empty_buffer_can_be_saved(tmp_path):
    file = ReplayBuffer(5, seed=8).save(tmp_path / "empty.safetensors")
    loaded = ReplayBuffer.load(file)
    unsaved = ReplayBuffer(5, seed=8)
    for buffer in (loaded, unsaved):
        buffer.add(latents(20))
    assert len(loaded) == 5 and same(loaded.sample(3), unsaved.sample(3))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_buffer_on_disk_is_the_one_in_memory(dtype, tmp_path):
    disk = ReplayBuffer(300, dtype=dtype, seed=1, folder=tmp_path)
    memory = ReplayBuffer(300, dtype=dtype, seed=1)
    for task in range(5):
        for buffer in (disk, memory):
            buffer.add(latents(100, seed=task, offset=100 * task), task=task)
        assert same(disk.sample(20), memory.sample(20))
    assert same(disk.items(), memory.items())
    files = {f.name: f.stat().st_size for f in tmp_path.rglob("*.bin")}
    assert files["mean.bin"] == 300 * 4 * 4 * 4 * (2 if dtype == "float16" else 1)
    loaded = ReplayBuffer.load(disk.save(tmp_path / "kept.safetensors"), folder=tmp_path)
    del disk
    assert same(loaded.items(), memory.items())
    del loaded, buffer
    assert [f.name for f in tmp_path.iterdir()] == ["kept.safetensors"], "scratch was left behind"


def test_storage_grows_with_what_is_held_not_with_the_capacity(tmp_path):
    buffer = ReplayBuffer(10**9, folder=tmp_path)
    buffer.add(latents(70))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.bin")) < 3 * 70 * 400


def test_bytes_of_an_item():
    """Two latents; for int8 two float32 steps a channel; three int32."""
    assert item_bytes((4, 16, 16), "float32") == 2 * 4096 + 12
    assert item_bytes((4, 16, 16), "float16") == 2 * 2048 + 12
    assert item_bytes((4, 16, 16), "int8") == 2 * (1024 + 16) + 12
    buffer = ReplayBuffer(capacity_bytes=10_000, dtype="int8")
    with pytest.raises(RuntimeError, match="after the first add"):
        _ = buffer.bytes_per_item
    buffer.add(latents(99))
    assert buffer.bytes_per_item == item_bytes((4, 4, 4), "int8") == 2 * (64 + 16) + 12
    assert buffer.capacity == len(buffer) == 10_000 // 172
    assert buffer.sizes()["items"] == len(buffer) * 172 <= 10_000


def test_files_that_are_none_are_refused(tmp_path):
    buffer = ReplayBuffer(5)
    buffer.add(latents(9))
    file = buffer.save(tmp_path / "buffer.safetensors")
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "short").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="short is damaged or cut off"):
            ReplayBuffer.load(tmp_path / "short")
    state = load_file(file)
    save_file(state, tmp_path / "new", {"format": "kdc-replay", "version": "9"})
    with pytest.raises(ValueError, match="version 9, this code reads version 1"):
        ReplayBuffer.load(tmp_path / "new")
    save_file(state, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no kdc-replay"):
        ReplayBuffer.load(tmp_path / "other")
    del state["items.mean"]
    save_file(state, tmp_path / "less", {"format": "kdc-replay", "version": "1"})
    with pytest.raises(ValueError, match="less is damaged"):
        ReplayBuffer.load(tmp_path / "less")
    with pytest.raises(FileNotFoundError):
        ReplayBuffer.load(tmp_path / "nowhere")
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_is_refused():
    for settings, message in (
        (dict(capacity=0), "at least 1, not 0"),
        (dict(capacity_bytes=0), "at least 1, not 0"),
        (dict(), "one of them"),
        (dict(capacity=1, capacity_bytes=9), "one of them"),
        (dict(capacity=1, policy="lru"), "unknown policy 'lru'; the policies are reservoir"),
        (dict(capacity=1, dtype="int4"), "unknown dtype 'int4'; the dtypes are float32"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(**settings)
    for settings in (dict(capacity=2.5), dict(capacity=4.0), dict(capacity=True),
                     dict(capacity="4"), dict(capacity_bytes=1e6)):  # fmt: skip
        with pytest.raises(TypeError, match=f"{next(iter(settings))} must be a whole number, not"):
            ReplayBuffer(**settings)
    with pytest.raises(ValueError, match="100 bytes hold no item: one takes 268"):
        ReplayBuffer(capacity_bytes=100).add(latents(1))
    buffer = ReplayBuffer(8)
    with pytest.raises(ValueError, match="sample 1 items: the buffer holds 0"):
        buffer.sample(1)
    buffer.add(latents(4))
    with pytest.raises(ValueError, match="sample 5 items: the buffer holds 4"):
        buffer.sample(5)
    for some in (buffer, ReplayBuffer(4)):
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"count must be at least 1, not {count}"):
                some.sample(count)
        with pytest.raises(TypeError, match="count must be a whole number, not 1.5"):
            some.sample(1.5)
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4, 4\), these are \(4, 5, 5\)"):
        buffer.add(latents(4, size=5))
    with pytest.raises(ValueError, match="labels of shape"):
        buffer.add(latents(4), labels=[1, 2])
    broken = latents(4)
    broken.std = broken.std[:, :2]
    with pytest.raises(ValueError, match="one shape"):
        buffer.add(broken)
    for value in (torch.nan, torch.inf, 1e5):  # 1e5 is more than float16 holds
        broken = latents(4)
        broken.mean[2, 1, 0, 0] = value
        with pytest.raises(ValueError, match="mean is not finite in float16"):
            buffer.add(broken)
    with pytest.raises(ValueError, match="the state is of a buffer with"):
        ReplayBuffer(9).load_state_dict(buffer.state_dict())
    assert len(buffer) == 4


REFUSED = {
    "a mask": (dict(index=torch.ones(12).bool()), TypeError, "index must be whole numbers"),
    "a mask by another name": (dict(index=torch.ones(12).byte()), TypeError, "not torch.uint8"),
    "a row of no number": (dict(index=[0.0, 1.0]), TypeError, "not torch.float32"),
    "a table of rows": (dict(index=torch.ones(2, 2).long()), ValueError, r"shape \(2, 2\)"),
    "a row": (dict(index=3), ValueError, r"index .* shape \(\)"),
    "a row past the end": (dict(index=[0, 12]), ValueError, r"index\[1\] is 12, .* -12 to 11"),
    "a row before the start": (dict(index=[-13]), ValueError, r"index\[0\] is -13"),
    "a large label": (dict(labels=[5] * 11 + [2**31]), ValueError, r"labels\[11\] is 2147483648"),
    "a small label": (dict(labels=[-(2**31) - 1] * 12), ValueError, r"labels\[0\] is -2147483649"),
    "a huge label": (dict(labels=[2**70] * 12), TypeError, "labels must be whole numbers"),
    "fractions": (dict(labels=torch.arange(12) + 0.5), TypeError, "labels must be whole numbers"),
    "texts": (dict(labels=["rose"] * 12), TypeError, "labels must be whole numbers"),
    "a large task": (dict(task=2**31), ValueError, "task must be at most 2147483647, not"),
    "half a task": (dict(task=0.5, labels=[0] * 12), TypeError, "task must be a whole number"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, policy):
    """Not even what the policy has counted: the next items are kept as if nothing had been."""
    settings, error, message = REFUSED[case]
    buffer, other = (ReplayBuffer(8, policy, seed=2) for _ in range(2))
    for start in range(2):  # empty, and then with items
        with pytest.raises(error, match=message):
            buffer.add(latents(12, offset=50), **settings)
        assert len(buffer) == len(other)
        for each in (buffer, other):
            each.add(latents(12, seed=start, offset=20 * start), labels=torch.arange(12) % 3)
        assert same(buffer.items(), other.items())
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in buffer.state_dict().items())


def test_rows_and_labels_may_be_any_whole_numbers():
    """The greatest that fit, rows from the end, narrow types, an empty list."""
    buffer, data = ReplayBuffer(8, "fifo", "float32"), latents(6)
    ends = [-(2**31), 2**31 - 1]
    buffer.add(data, [-1, 2], labels=ends, task=2**31 - 1)
    buffer.add(data, torch.tensor([3, 4], dtype=torch.int16), labels=torch.tensor([7, 8]).byte())
    buffer.add(data, [], labels=[])
    items = buffer.items()
    assert numbers(items) == [5, 2, 3, 4] and items["label"].tolist() == [*ends, 7, 8]
    assert items["task"].tolist() == [2**31 - 1] * 2 + [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_embeddings_that_the_storage_cannot_hold_are_refused(dtype):
    """Buffers of float16 and int8 keep them in float16; of the items offered alone."""
    buffer, data = ReplayBuffer(12, "fifo", dtype), latents(12)
    wide = 1e5 if dtype != "float32" else torch.inf
    for value in (wide, -wide, torch.nan):
        data.embeddings[1, 2, 3] = value
        with pytest.raises(ValueError, match="embeddings of captions are not finite in float"):
            buffer.add(data)
    buffer.add(data, torch.arange(12)[data.caption_index != 1])
    assert len(buffer) == 8 and buffer.items()["embedding"].isfinite().all()
    if dtype == "float32":
        data.embeddings[1, 2, 3] = 1e5
        buffer.add(data)
        assert buffer.items()["embedding"].amax() == 1e5
