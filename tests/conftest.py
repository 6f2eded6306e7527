"""What several test files share: the teacher, the notebooks, each run once, and the book."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"  # the tests, and the notebooks they run, need no GPU
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each has its share of the cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import pytest
import torch
from diffusers import UNet2DConditionModel

import kdc
from tools import book


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file goes to one process; those that need the executed notebooks share one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = file.endswith(("test_notebooks.py", "test_book.py", "test_browser.py"))
            return "notebooks" if shared else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Training chooses bf16 where the processor has units for it; tests compare exact numbers."""
    monkeypatch.setattr("kdc.training.loop.has_bf16", lambda device: False)


@pytest.fixture(scope="session")
def teacher():
    """The embedded mini teacher. Tests leave its weights as they are."""
    return kdc.load_teacher("mini", device="cpu")


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion's layout, as narrow as it can be, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 24, 24),
            layers_per_block=2,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )


@pytest.fixture(scope="session")
def executed():
    """A function that runs a notebook at the quick budget and remembers how that went."""
    done: dict[Path, Path | Exception] = {}

    def run(notebook: Path) -> Path:
        if notebook not in done:
            try:
                done[notebook] = book.run_one(notebook)
            except Exception as error:
                done[notebook] = error
        if isinstance(done[notebook], Exception):
            raise done[notebook]
        return done[notebook]

    return run


def pytest_addoption(parser):
    parser.addoption("--book", type=Path, help="the pages of a book that was built before")


@pytest.fixture(scope="session")
def html(executed, pytestconfig) -> Path:
    """The folder of the strictly built book."""
    if built := pytestconfig.getoption("--book"):
        return built.resolve()
    for notebook in book.notebooks():
        executed(notebook)
    return book.build().parent
