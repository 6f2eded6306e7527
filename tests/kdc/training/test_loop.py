import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

from kdc.training.checkpoints import newest_checkpoint
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from tests.helpers import regression, weights

SETTINGS = TrainSettings(30, learning_rate=1e-2, warmup=3, log_every=5, save_every=10)


def test_training_learns_and_logs():
    model, loss = regression()
    log = train(model, loss, TrainSettings(300, learning_rate=1e-2, ema_decay=0))
    assert log["loss"].iloc[-3:].mean() < 0.1 * log["loss"].iloc[0]
    assert {"step", "loss", "grad_norm", "learning_rate"} <= set(log.columns)
    assert log["step"].iloc[-1] == 300 and log["learning_rate"].iloc[-1] == pytest.approx(0)


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    results = []
    for seed in (0, 0, 1):
        model, loss = regression()
        train(model, loss, dataclasses.replace(SETTINGS, seed=seed))
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def stop_after(loss, steps):
    """The same loss, killed after so many steps."""
    count = 0

    def stopping(model, generator):
        nonlocal count
        if count == steps:
            raise KeyboardInterrupt
        count += 1
        return loss(model, generator)

    return stopping


@pytest.mark.parametrize("killed_after", [10, 17, 25])
def test_a_resumed_run_gives_what_an_unbroken_one_gives(tmp_path, killed_after):
    model, loss = regression()
    whole = train(model, loss, SETTINGS, tmp_path / "whole")
    unbroken = weights(model)

    model, loss = regression()
    with pytest.raises(KeyboardInterrupt):
        train(model, stop_after(loss, killed_after), SETTINGS, tmp_path / "broken")
    model, loss = regression(seed=5)  # other weights: they must come from the checkpoint
    calls = 0

    def counting(model, generator):
        nonlocal calls
        calls += 1
        return loss(model, generator)

    log = train(model, counting, SETTINGS, tmp_path / "broken", resume=True)
    assert calls == 30 - killed_after // 10 * 10, "it started again from zero"
    assert torch.equal(weights(model), unbroken)
    assert log.equals(whole)


class Draws:
    """A companion: numbers from a generator of its own, and how many there were."""

    def __init__(self):
        self.generator, self.count = torch.Generator().manual_seed(7), 0

    def next(self):
        self.count += 1
        return torch.rand(1, generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "count": torch.tensor(self.count)}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.count = int(state["count"])


def test_a_companion_goes_on_with_the_run(tmp_path):
    def run(killed_after=None, **arguments):
        model, loss = regression()
        draws = Draws()

        def noisy(model, generator):
            return {"loss": loss(model, generator)["loss"] * draws.next().squeeze()}

        noisy = stop_after(noisy, killed_after)
        train(model, noisy, SETTINGS, companion=draws, **arguments)
        return weights(model), draws.count

    whole, count = run()
    with pytest.raises(KeyboardInterrupt):
        run(17, output_dir=tmp_path)
    resumed, again = run(output_dir=tmp_path, resume=True)
    assert torch.equal(resumed, whole) and again == count == 30


def test_an_unfinished_checkpoint_is_not_used(tmp_path):
    model, loss = regression()
    with pytest.raises(KeyboardInterrupt):
        train(model, stop_after(loss, 25), SETTINGS, tmp_path)
    shutil.copytree(tmp_path / "checkpoint-0000020", tmp_path / "checkpoint-0000030.partial")
    assert newest_checkpoint(tmp_path).name == "checkpoint-0000020"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_are_safetensors_and_json_and_few(tmp_path):
    model, loss = regression()
    train(model, loss, TrainSettings(30, save_every=5), tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000030"]
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"]
    kinds = {file.suffix for file in files}
    assert kinds == {".safetensors", ".json", ".csv"}


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    model, loss = regression()
    train(model, loss, SETTINGS, tmp_path)
    other = TrainSettings(30, learning_rate=2e-2, warmup=3, log_every=5, save_every=10)
    with pytest.raises(ValueError, match="learning_rate=0.01.*learning_rate=0.02"):
        train(model, loss, other, tmp_path, resume=True)
    with pytest.raises(ValueError, match="seed=0"):
        train(model, loss, dataclasses.replace(SETTINGS, seed=3), tmp_path, resume=True)
    with pytest.raises(ValueError, match="data=None, now data='flowers'"):
        train(model, loss, SETTINGS, tmp_path, resume=True, identity={"data": "flowers"})


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path):
    model, loss = regression()
    train(model, loss, SETTINGS, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="resume=True, or give another output_dir"):
        train(model, loss, SETTINGS, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_that_cannot_be_is_noticed_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model, loss = regression()

    def never(*args):
        raise AssertionError("trained")

    with pytest.raises(NotADirectoryError):
        train(model, never, SETTINGS, tmp_path / "file")


def test_bf16_is_for_training_only_and_leaves_the_model_as_it_was():
    """In a process of its own: Accelerate keeps one precision for all that follows."""
    code = (
        "import torch, kdc.training.loop as t\n"
        "t.has_bf16 = lambda device: True\n"
        "model, seen = torch.nn.Linear(4, 4), []\n"
        "x = torch.randn(2, 4)\n"
        "def loss(m, g):\n"
        "    y = m(x); seen.append(torch.mm(y, y.T).dtype)\n"
        "    return {'loss': y.float().square().mean()}\n"
        "t.train(model, loss, t.TrainSettings(2))\n"
        "assert seen[0] == torch.bfloat16, seen\n"
        "exact = torch.nn.functional.linear(x, model.weight, model.bias)\n"
        "assert torch.equal(model(x), exact) and model.weight.dtype == torch.float32\n"
        "t.train(model, loss, t.TrainSettings(1, precision='no'))\n"
        "assert seen[-1] == torch.float32, seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_average_is_what_the_model_ends_with():
    """Against a slow average kept by hand with the published warm-up of its decay."""
    model, loss = regression()
    seen = []

    def watching(module, generator):
        seen.append(weights(module).clone())
        return loss(module, generator)

    settings = TrainSettings(12, learning_rate=1e-2, warmup=0, ema_decay=0.9)
    train(model, watching, settings)
    raw, loss = regression()
    bare = TrainSettings(12, learning_rate=1e-2, warmup=0, ema_decay=0)
    train(raw, loss, bare)
    average = seen[0].double()
    for step, now in enumerate([*seen[1:], weights(raw)], 1):
        decay = 0.0 if step == 1 else min(0.9, 1 - (1 + (step - 1) / 10) ** -0.9)
        average = decay * average + (1 - decay) * now.double()
    assert torch.allclose(weights(model).double(), average, atol=1e-5)


def test_gradients_are_clipped():
    model, loss = regression()
    before = weights(model)

    def huge(module, generator):
        return {"loss": 1e6 * loss(module, generator)["loss"]}

    log = train(model, huge, TrainSettings(1, learning_rate=1e-3, warmup=0, ema_decay=0))
    assert log["grad_norm"].iloc[0] > 1e3
    assert (weights(model) - before).abs().max() < 2e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model, loss = regression()
    count = 0

    def breaking(module, generator):
        nonlocal count
        count += 1
        value = loss(module, generator)["loss"]
        return {"loss": value * float("nan") if count == 15 else value}

    with pytest.raises(FloatingPointError, match="step 14"):
        train(model, breaking, SETTINGS, tmp_path)
    state = json.loads((newest_checkpoint(tmp_path) / "state.json").read_text())
    assert state["step"] == 10


def fixed_batches(count, size):
    """A loss over fixed batches, one after the other, and the batches."""
    draw = torch.Generator().manual_seed(1)
    batches = torch.randn(count, size, 3, generator=draw)

    def loss_of(batches):
        turn = iter(batches)

        def loss(model, generator):
            x = next(turn)
            return {"loss": (model(x) - x.sum(dim=1, keepdim=True)).square().mean()}

        return loss

    return batches, loss_of


def test_accumulated_micro_batches_are_one_large_batch():
    batches, loss_of = fixed_batches(24, 1)
    settings = TrainSettings(6, learning_rate=1e-2, warmup=0, log_every=1)
    small, _ = regression()
    log = train(small, loss_of(batches), dataclasses.replace(settings, accumulation=4))
    large, _ = regression()
    whole = train(large, loss_of(batches.view(6, 4, 3)), settings)
    assert torch.allclose(weights(small), weights(large), atol=1e-6)
    assert log["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=1e-5)
    assert log["grad_norm"].tolist() == pytest.approx(whole["grad_norm"].tolist(), rel=1e-4)


def test_a_run_that_accumulates_resumes_bit_for_bit(tmp_path):
    settings = dataclasses.replace(SETTINGS, accumulation=3)
    model, loss = regression()
    train(model, loss, settings)
    whole = weights(model)
    model, loss = regression()
    with pytest.raises(KeyboardInterrupt):
        train(model, stop_after(loss, 3 * 17 + 1), settings, tmp_path)
    model, loss = regression(seed=5)
    train(model, loss, settings, tmp_path, resume=True)
    assert torch.equal(weights(model), whole)


def test_the_environment_does_not_divide_the_gradient(monkeypatch):
    model, loss = regression()
    expected = train(model, loss, SETTINGS)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    model, loss = regression()
    found = train(model, loss, SETTINGS)
    assert found.equals(expected)


def test_a_hook_between_backward_and_step_sees_and_changes_the_gradients():
    model, loss = regression()
    before, seen = weights(model), []

    def remove():
        seen.append([p.grad.clone() for p in model.parameters()])
        for p in model.parameters():
            p.grad.zero_()

    train(model, loss, TrainSettings(3, weight_decay=0.0, ema_decay=0), before_step=remove)
    assert len(seen) == 3 and any(g.abs().sum() > 0 for g in seen[0])
    assert torch.equal(weights(model), before)


def test_unusable_settings_are_refused():
    for wrong in (dict(steps=0), dict(steps=5, learning_rate=0), dict(steps=5, precision="fp8")):
        with pytest.raises(ValueError):
            TrainSettings(**wrong)
