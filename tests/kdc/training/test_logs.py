"""What a run writes while it goes, and the options of long runs."""

import dataclasses
import sys
import types

import pandas as pd
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kdc
from kdc.continual.tasks import Task
from kdc.training.checkpoints import checkpoints
from kdc.training.logs import SPEED, RunLog
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from tests.helpers import regression, weights
from tests.robustness.trials import latents, narrow

SETTINGS = TrainSettings(6, batch_size=4, learning_rate=1e-2, log_every=2, save_every=2)


def test_the_file_grows_with_the_run_and_has_its_speed(tmp_path):
    seen = []
    model, loss = regression()

    def watched(module, generator):
        file = tmp_path / "log.csv"
        seen.append(len(pd.read_csv(file)) if file.is_file() else 0)
        return loss(module, generator)

    log = train(model, watched, SETTINGS, tmp_path)
    assert seen == [0, 1, 2, 2, 3, 3], "a row after step 1, 2, 4, 6"
    written = pd.read_csv(tmp_path / "log.csv")
    assert list(written.columns) == [*log.columns, *SPEED]
    assert written["step"].tolist() == [1, 2, 4, 6] and written["images"].tolist() == [4, 8, 16, 24]
    assert (written["images_per_second"] > 0).all() and (written["memory_gib"] > 0.05).all()
    assert not set(SPEED) & set(log.columns), "two equal runs have equal logs"


def test_a_resumed_run_has_each_row_once(tmp_path):
    model, loss = regression()
    train(model, loss, SETTINGS, tmp_path)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("7,half a row of a killed process")
    model, loss = regression()
    train(model, loss, dataclasses.replace(SETTINGS, steps=8), tmp_path, resume=True)
    assert pd.read_csv(tmp_path / "log.csv")["step"].tolist() == [1, 2, 4, 6, 8]


def test_a_term_that_comes_late_has_a_column_of_its_own(tmp_path):
    log = RunLog(tmp_path, [], torch.device("cpu"))
    log.add({"step": 1, "images": 2, "loss": 0.5})
    log.add({"step": 2, "images": 4, "loss": 0.4, "old_loss": 0.3})
    log.add({"step": 3, "images": 6, "loss": 0.3, "old_loss": 0.2})
    written = pd.read_csv(tmp_path / "log.csv")
    assert written["old_loss"].isna().tolist() == [True, False, False]
    assert written["loss"].tolist() == [0.5, 0.4, 0.3]


def test_tensorboard_gets_every_number_and_the_grids(tmp_path):
    model, loss = regression()
    settings = dataclasses.replace(SETTINGS, tensorboard=True, sample_every=3)
    grid = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    log = train(model, loss, settings, tmp_path, samples=lambda: grid)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in (*log.columns.drop("step"), *SPEED):
        found = events.Scalars(name)
        assert [e.step for e in found] == [1, 2, 4, 6], name
        if name in log:
            assert [e.value for e in found] == pytest.approx(log[name].tolist(), rel=1e-6)
    assert [e.step for e in events.Images("samples")] == [3, 6]
    written = Image.open(tmp_path / "samples" / "step-0000003.png")
    assert torch.equal(torch.tensor(written.getdata()).T.reshape(3, 4, 4), grid.long())


def test_samples_show_the_averaged_weights_and_change_nothing(tmp_path):
    seen = []
    plain, loss = regression()
    train(plain, loss, dataclasses.replace(SETTINGS, ema_decay=0.9))
    model, loss = regression()
    settings = dataclasses.replace(SETTINGS, ema_decay=0.9, sample_every=6)

    def samples():
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    train(model, loss, settings, tmp_path, samples=samples)
    assert torch.equal(weights(model), weights(plain))
    assert torch.equal(seen[0], weights(plain)), "the end of training is the average, as shown"


def test_distillation_shows_its_student(tmp_path):
    pipeline = narrow()
    how = {"steps": 2, "batch_size": 2, "sample_every": 1, "precision": "no"}
    student = kdc.slim(pipeline.unet, "kdc")
    kdc.distill(student, pipeline, latents(pipeline, 1), output_dir=tmp_path, **how,
                sample_prompts=["a red rose", "a daisy"])  # fmt: skip
    sizes = [Image.open(f).size for f in sorted((tmp_path / "samples").iterdir())]
    assert sizes == [(128, 64), (128, 64)]
    expected = kdc.generate(kdc.with_unet(pipeline, student), ["a red rose", "a daisy"])
    last = Image.open(tmp_path / "samples" / "step-0000002.png")
    shown = torch.tensor(list(last.getdata())).view(64, 128, 3).permute(2, 0, 1)
    assert torch.equal(shown[:, :, :64], expected[0].long())


def test_a_sequence_shows_its_student_too(tmp_path):
    """Grids of captions of the tasks so far: three of one task, then those of both."""
    pipeline = narrow()
    tasks = [Task(f"task {t}", latents(pipeline, t)) for t in range(2)]
    kdc.run_sequence(
        tasks, "finetune", kdc.slim(pipeline.unet, "kdc"), pipeline, steps=2, batch_size=2,
        sample_every=2, output_dir=tmp_path, precision="no", ahead=False,
        evaluate=lambda scored, task: {"none": 0.0}, higher_is_better={"none": True},
    )  # fmt: skip
    sizes = [Image.open(f).size for f in sorted(tmp_path.glob("task-*/samples/step-0000002.png"))]
    assert sizes == [(128, 128), (192, 128)]


def test_averages_on_the_host_are_the_same(tmp_path):
    found = []
    for on_cpu in (False, True):
        model, loss = regression()
        train(model, loss, dataclasses.replace(SETTINGS, ema_on_cpu=on_cpu, ema_decay=0.9))
        found.append(weights(model))
    assert torch.equal(*found)


class CountingAdam(torch.optim.AdamW):
    """AdamW as bitsandbytes has it: its state counts steps in whole numbers."""

    def __init__(self, parameters, learning_rate, **settings):
        super().__init__(parameters, learning_rate, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state.setdefault("state1", torch.zeros_like(p, dtype=torch.uint8))
                p -= group["lr"] * p.grad / state["step"]


def test_eight_bit_moments_are_taken_where_they_are_installed(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, optimizer="adamw8bit")
    model, loss = regression()
    with pytest.raises(ValueError, match="adamw8bit' needs bitsandbytes: pip install"):
        train(model, loss, settings, tmp_path / "never")
    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW8bit=CountingAdam)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    train(model, loss, settings, tmp_path / "whole")
    whole = weights(model)
    model, loss = regression()
    train(model, loss, dataclasses.replace(settings, steps=4, schedule="constant"), tmp_path / "a")
    assert checkpoints(tmp_path / "a")
    model, loss = regression()
    train(
        model, loss, dataclasses.replace(settings, schedule="constant"), tmp_path / "a", resume=True
    )
    parts = weights(model)
    model, loss = regression()
    train(model, loss, dataclasses.replace(settings, schedule="constant"))
    assert torch.equal(parts, weights(model)) and not torch.equal(parts, whole)
    with pytest.raises(ValueError, match="optimizer='adamw8bit', now optimizer='adamw'"):
        train(model, loss, dataclasses.replace(SETTINGS, steps=9), tmp_path / "whole", resume=True)


def test_what_has_nowhere_to_go_or_is_not_installed_is_refused_first(tmp_path, monkeypatch):
    model, loss = regression()
    for changes in ({"tensorboard": True}, {"sample_every": 2}):
        with pytest.raises(ValueError, match="write into an output_dir: give one"):
            train(model, loss, dataclasses.replace(SETTINGS, **changes))
    with pytest.raises(ValueError, match="nothing says what to show: samples="):
        train(model, loss, dataclasses.replace(SETTINGS, sample_every=2), tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'kdc\[logs\]'"):
        train(model, loss, dataclasses.replace(SETTINGS, tensorboard=True), tmp_path)
    assert not any(tmp_path.iterdir())
