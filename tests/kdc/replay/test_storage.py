"""Rows on disk: a full disk is an error and not the end, and scratch of dead processes goes."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import kdc
from kdc.data.latents import LatentDataset
from kdc.replay import policies
from kdc.replay.policies import herding_order


def latents(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return LatentDataset(
        torch.randn(count, 4, 4, 4, generator=g),
        torch.rand(count, 4, 4, 4, generator=g),
        torch.randn(3, 5, 6, generator=g),
        torch.arange(count) % 3,
        torch.zeros(5, 6),
        ["a", "b", "c"],
    )


def test_a_full_disk_raises_and_leaves_the_buffer_as_it_was(tmp_path, monkeypatch):
    buffer = kdc.ReplayBuffer(500, "class_balanced", "float32", folder=tmp_path, seed=1)
    buffer.add(latents(40))
    before = {name: x.clone() for name, x in buffer.state_dict().items()}

    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no room for .* bytes of the replay buffer"):
            buffer.add(latents(100, seed=1), task=1)
    after = buffer.state_dict()
    assert len(buffer) == 40 and all(torch.equal(after[n], x) for n, x in before.items())
    buffer.add(latents(100, seed=1), task=1)
    assert len(buffer) == 140


def test_the_scratch_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path):
    code = (
        "import sys, time, torch\n"
        "from kdc.replay.storage import Rows\n"
        "rows = Rows({'x': ((2,), torch.float32)}, 10, sys.argv[1])\n"
        "rows.reserve(5)\n"
        "print('there', flush=True)\n"
        "time.sleep(60)\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)],
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    try:
        assert all(other.stdout.readline() == "there\n" for other in others)
        others[0].send_signal(signal.SIGKILL)
        others[0].wait()
        (tmp_path / "rows-of-mine").mkdir()
        left = set(tmp_path.iterdir())
        buffer = kdc.ReplayBuffer(9, folder=tmp_path)
        buffer.add(latents(3))
        gone = left - set(tmp_path.iterdir())
        assert len(left) == 3 and len(gone) == 1 and (tmp_path / "rows-of-mine").is_dir()
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("together", [10, 1000])
def test_herding_chooses_as_its_definition_says(together, monkeypatch):
    """Against the sum written out, one candidate after the other."""
    monkeypatch.setattr(policies, "TOGETHER", together)
    features = torch.randn(60, 7, generator=torch.Generator().manual_seed(3))
    x, chosen = features.double(), []
    for k in range(1, 61):
        rest = [i for i in range(60) if i not in chosen]
        distance = [(x.mean(0) - x[[*chosen, i]].sum(0) / k).norm().item() for i in rest]
        chosen.append(rest[min(range(len(rest)), key=distance.__getitem__)])
    assert herding_order(features, 60) == chosen and herding_order(features, 9) == chosen[:9]


@pytest.mark.parametrize("seed", [0.5, "1", None, [1], True, -1, 2**70])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        kdc.ReplayBuffer(4, seed=seed)
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        kdc.load_dataset("flora", seed=seed)
