"""Checkpoints: whole or not used, found again after damage, and nobody else's folders."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from kdc.training import checkpoints
from kdc.training.loop import train
from kdc.training.settings import TrainSettings
from tests.helpers import regression, weights

SETTINGS = TrainSettings(30, learning_rate=1e-2, warmup=3, log_every=5, save_every=10)


def counted(loss, stop_before=None):
    """The same loss, its calls counted, and the call at which the process "dies"."""
    calls = []

    def counting(model, generator):
        if len(calls) == stop_before:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(model, generator)

    return counting, calls


@pytest.fixture
def unbroken():
    model, loss = regression()
    train(model, loss, SETTINGS)
    return weights(model)


@pytest.fixture
def stopped(tmp_path):
    """A run that died after 25 steps: checkpoints of 10 and 20."""
    model, loss = regression()
    dying, _ = counted(loss, 25)
    with pytest.raises(KeyboardInterrupt):
        train(model, dying, SETTINGS, tmp_path)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-0000010", "checkpoint-0000020",
    ]  # fmt: skip
    return tmp_path


def flip(file, place=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit in the weights": lambda c: flip(c / "model.safetensors"),
    "a flipped bit in the moments": lambda c: flip(c / "optimizer.safetensors", -3),
    "a flipped bit in the state": lambda c: flip(c / "state.json"),
    "a flipped bit in the manifest": lambda c: flip(c / "manifest.json", 60),
    "weights cut off": lambda c: (c / "model.safetensors").write_bytes(
        (c / "model.safetensors").read_bytes()[:100]
    ),
    "an empty state": lambda c: (c / "state.json").write_bytes(b""),
    "no average": lambda c: (c / "ema.safetensors").unlink(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "an empty folder": lambda c: [f.unlink() for f in c.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(kind, stopped, unbroken):
    DAMAGE[kind](stopped / "checkpoint-0000020")
    model, loss = regression(seed=5)
    counting, calls = counted(loss)
    with pytest.warns(UserWarning, match="checkpoint-0000020.*Going on from .*checkpoint-0000010"):
        train(model, counting, SETTINGS, stopped, resume=True)
    assert len(calls) == 20 and torch.equal(weights(model), unbroken)
    left = [p.name for p in checkpoints.checkpoints(stopped)]
    assert left == ["checkpoint-0000030"], "the damaged one, or an older, stayed"


@pytest.mark.parametrize("kind", DAMAGE)
def test_where_none_is_whole_each_is_named(kind, stopped):
    for checkpoint in checkpoints.checkpoints(stopped):
        DAMAGE[kind](checkpoint)
    model, loss = regression()
    with pytest.raises(
        ValueError, match="(?s)0000020.* is damaged.*0000010.* is damaged.*begin anew"
    ):
        train(model, loss, SETTINGS, stopped, resume=True)


def test_folders_and_files_of_other_people_stay(tmp_path, unbroken):
    notes = tmp_path / "checkpoint-0000001-notes"
    notes.mkdir()
    (notes / "thoughts.txt").write_text("keep me")
    (tmp_path / "checkpoint-0.txt").write_text("keep me too")
    mine = tmp_path / "checkpoint-0000020"
    mine.mkdir()
    (mine / "mine.txt").write_text("and me")
    half = tmp_path / "checkpoint-0000005.partial"
    half.mkdir()
    (half / "mine.txt").write_text("and me")
    model, loss = regression()
    with pytest.raises(FileExistsError, match="resume=True"):  # it might be of an earlier run
        train(model, loss, SETTINGS, tmp_path)
    mine.rename(tmp_path / "elsewhere")
    train(model, loss, SETTINGS, tmp_path)
    assert torch.equal(weights(model), unbroken)
    assert (notes / "thoughts.txt").exists() and (tmp_path / "checkpoint-0.txt").exists()
    assert (tmp_path / "elsewhere" / "mine.txt").exists() and (half / "mine.txt").exists()


def test_a_folder_that_has_the_name_of_a_checkpoint_moves_aside(tmp_path):
    def loss_that_puts(model, generator):
        nonlocal steps
        steps += 1
        if steps == 15:
            (tmp_path / "checkpoint-0000020").mkdir()
            (tmp_path / "checkpoint-0000020" / "mine.txt").write_text("keep me")
        return loss(model, generator)

    steps = 0
    model, loss = regression()
    with pytest.warns(UserWarning, match="was no checkpoint of this run: it is now"):
        train(model, loss_that_puts, SETTINGS, tmp_path)
    assert (tmp_path / "checkpoint-0000020.aside-1" / "mine.txt").read_text() == "keep me"


def test_what_a_killed_save_left_is_cleaned_at_the_next_start(stopped, unbroken):
    half = stopped / "checkpoint-0000030.partial"
    shutil.copytree(stopped / "checkpoint-0000020", half)
    (half / "ema.safetensors").unlink()
    model, loss = regression(seed=5)
    train(model, loss, SETTINGS, stopped, resume=True)
    assert torch.equal(weights(model), unbroken) and not list(stopped.rglob("*.partial"))


@pytest.mark.parametrize("content", [(), ("manifest.json.partial",), ("mine.txt",)])
def test_a_save_that_was_killed_at_its_first_moment_is_no_obstacle(content, stopped, unbroken):
    half = stopped / "checkpoint-0000030.partial"
    for name in content:
        (half / name).mkdir(parents=True)
    half.mkdir(exist_ok=True)
    model, loss = regression(seed=5)
    train(model, loss, SETTINGS, stopped, resume=True)
    assert torch.equal(weights(model), unbroken) and not list(stopped.rglob("*.partial"))
    assert bool(list(stopped.glob("*.aside-1/mine.txt"))) == ("mine.txt" in content)


@pytest.mark.parametrize("count", range(0, 12, 2))
def test_a_full_disk_leaves_the_checkpoints_before_it(count, tmp_path, unbroken, monkeypatch):
    """The disk fills up at the `count`-th file that is brought to it in the second checkpoint."""
    calls = []

    def sync(path):
        calls.append(path)
        if "0000020" in str(path) and sum("0000020" in str(c) for c in calls) > count:
            raise OSError(28, "No space left on device")

    model, loss = regression()
    with monkeypatch.context() as patch:
        patch.setattr("kdc.io.sync", sync)
        with pytest.raises(OSError, match="step 20 could not be written.*resume=True"):
            train(model, loss, SETTINGS, tmp_path)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-0000010"]
    assert not list(tmp_path.glob("*.partial"))
    model, loss = regression(seed=5)
    train(model, loss, SETTINGS, tmp_path, resume=True)
    assert torch.equal(weights(model), unbroken)


def test_safetensors_own_error_of_a_full_disk_is_one_too(tmp_path, unbroken, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, file):
        if "0000020" in str(file):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, file)

    original = checkpoints.save_file
    model, loss = regression()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="step 20 could not be written.*No space"):
            train(model, loss, SETTINGS, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    model, loss = regression(seed=5)
    train(model, loss, SETTINGS, tmp_path, resume=True)
    assert torch.equal(weights(model), unbroken)


def test_moments_are_filed_by_name_so_other_parts_trained_are_refused(stopped):
    model, loss = regression()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters='4 of 4.*now parameters='3 of 4"):
        train(model, loss, SETTINGS, stopped, resume=True)


def test_frozen_parts_stay_frozen_and_resume(tmp_path):
    def frozen():
        model, loss = regression()
        model[0].weight.requires_grad_(False)
        return model, loss

    model, loss = frozen()
    train(model, loss, SETTINGS)
    whole = weights(model)
    model, loss = frozen()
    dying, _ = counted(loss, 15)
    with pytest.raises(KeyboardInterrupt):
        train(model, dying, SETTINGS, tmp_path)
    model, loss = frozen()
    train(model, loss, SETTINGS, tmp_path, resume=True)
    assert torch.equal(weights(model), whole)


def test_a_finished_run_is_extended_to_what_a_longer_one_gives(tmp_path):
    constant = dataclasses.replace(SETTINGS, schedule="constant_with_warmup")
    longer = dataclasses.replace(constant, steps=50, save_every=7, log_every=1)
    model, loss = regression()
    train(model, loss, longer)
    whole = weights(model)
    model, loss = regression()
    train(model, loss, constant, tmp_path)
    model, loss = regression(seed=5)
    counting, calls = counted(loss)
    log = train(model, counting, longer, tmp_path, resume=True)
    assert torch.equal(weights(model), whole) and len(calls) == 20
    assert log["step"].iloc[-1] == 50
    with pytest.raises(ValueError, match="has 50 steps behind it, now steps=30"):
        train(model, loss, constant, tmp_path, resume=True)
    again, _ = regression(seed=6)
    train(again, counting, longer, tmp_path, resume=True)
    assert len(calls) == 20 and torch.equal(weights(again), whole), "nothing was left to do"


def test_an_extended_run_follows_the_longer_schedule(tmp_path):
    model, loss = regression()
    train(model, loss, SETTINGS, tmp_path)
    longer = dataclasses.replace(SETTINGS, steps=60, log_every=1)
    log = train(model, loss, longer, tmp_path, resume=True).set_index("step")
    model, loss = regression()
    expected = train(model, loss, longer).set_index("step")
    after = range(31, 61)
    assert log.loc[after, "learning_rate"].tolist() == pytest.approx(
        expected.loc[after, "learning_rate"].tolist()
    )


def test_the_state_is_not_kept_where_it_is_not_wanted(tmp_path):
    model, loss = regression()
    train(model, loss, dataclasses.replace(SETTINGS, keep_state=False), tmp_path)
    assert not (tmp_path / "checkpoint-0000030").exists() and (tmp_path / "log.csv").exists()


def test_without_a_word_a_run_is_saved_ten_times(tmp_path):
    assert TrainSettings(200).saves_after == 20
    assert TrainSettings(30).saves_after == 20 and TrainSettings(100_000).saves_after == 10_000
    model, loss = regression()
    dying, _ = counted(loss, 105)
    with pytest.raises(KeyboardInterrupt):
        train(model, dying, TrainSettings(200), tmp_path)
    names = [p.name for p in checkpoints.checkpoints(tmp_path)]
    assert names == ["checkpoint-0000080", "checkpoint-0000100"]


def test_a_slow_run_is_saved_by_the_clock(tmp_path):
    model, loss = regression()
    dying, _ = counted(loss, 3)
    with pytest.raises(KeyboardInterrupt):
        train(model, dying, TrainSettings(200, save_minutes=1e-9), tmp_path)
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-0000003"


@pytest.mark.parametrize("number, left", [(signal.SIGINT, KeyboardInterrupt),
                                          (signal.SIGTERM, SystemExit)])  # fmt: skip
def test_a_signal_ends_the_step_saves_and_stops(number, left, tmp_path, unbroken):
    model, loss = regression()
    before = signal.getsignal(number)

    def signalled(module, generator):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), number)
        return loss(module, generator)

    calls = []
    with pytest.raises(left):
        train(model, signalled, SETTINGS, tmp_path)
    assert signal.getsignal(number) is before and not model.training
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-0000013"
    model, loss = regression(seed=5)
    counting, calls = counted(loss)
    train(model, counting, SETTINGS, tmp_path, resume=True)
    assert len(calls) == 17 and torch.equal(weights(model), unbroken)


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    model, loss = regression()

    def stuck(module, generator):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        train(model, stuck, SETTINGS, tmp_path)
    assert not checkpoints.checkpoints(tmp_path)


def test_training_works_where_signals_do_not(tmp_path, unbroken):
    model, loss = regression()
    thread = threading.Thread(target=train, args=(model, loss, SETTINGS, tmp_path))
    thread.start()
    thread.join()
    assert torch.equal(weights(model), unbroken)


def test_after_any_end_the_model_is_as_it_was(tmp_path):
    for error in (KeyboardInterrupt, ZeroDivisionError):
        model, loss = regression()

        def failing(module, generator, error=error, loss=loss):
            assert module.training
            (loss(module, generator)["loss"]).backward()
            raise error

        with pytest.raises(error):
            train(model, failing, SETTINGS)
        assert not model.training and all(p.grad is None for p in model.parameters())


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    model, loss = regression()
    steps = []

    def poisoned():
        steps.append(1)
        if len(steps) == 20:  # a gradient that no loss shows until the next step
            model[0].weight.grad[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 20: the weights 0.weight are not finite"):
        train(model, loss, SETTINGS, tmp_path, before_step=poisoned)
    names = [p.name for p in checkpoints.checkpoints(tmp_path)]
    assert names == ["checkpoint-0000010"]


def test_the_last_step_is_looked_at_too():
    model, loss = regression()

    def poisoned():
        model[0].weight.grad[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="at its end: the weights 0.weight"):
        train(model, loss, TrainSettings(1), before_step=poisoned)


def test_one_process_at_a_time_trains_into_a_folder(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from kdc.processes import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        model, loss = regression()
        with pytest.raises(RuntimeError, match="another process writes into"):
            train(model, loss, SETTINGS, tmp_path)
    finally:
        other.kill()
        other.wait()
    train(model, loss, SETTINGS, tmp_path)  # the lock went with the process


def test_nothing_to_train_is_said_at_once():
    model, loss = regression()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(model, loss, SETTINGS)


def test_places_that_cannot_be_written_are_tried_before_the_first_step(tmp_path):
    model, loss = regression()

    def never(*args):
        raise AssertionError("trained")

    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    for folder, error, said in (
        (tmp_path / "file", NotADirectoryError, "file is a file"),
        (tmp_path / "file" / "below", NotADirectoryError, "file is a file"),
        (tmp_path / "run", IsADirectoryError, "log.csv is a folder"),
        ("/proc/nowhere", OSError, "nothing can be written there"),
        ("", ValueError, "output_dir is ''"),
        (7, TypeError, "output_dir must be a text or a Path"),
    ):
        with pytest.raises(error, match=said):
            train(model, never, SETTINGS, folder)
    with pytest.raises(ValueError, match="resume=True needs the output_dir"):
        train(model, never, SETTINGS, resume=True)
    with pytest.raises(TypeError, match="resume must be True or False"):
        train(model, never, SETTINGS, tmp_path / "new", resume="yes")
    assert not (tmp_path / "new").exists()


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, loss = regression()
    train(model, loss, SETTINGS, "~/run")
    assert (tmp_path / "run" / "log.csv").is_file() and not (tmp_path / "~").exists()


def test_a_checkpoint_says_what_it_holds(stopped):
    manifest = json.loads((stopped / "checkpoint-0000020" / "manifest.json").read_text())
    assert manifest["format"] == "kdc-checkpoint"
    assert set(manifest["files"]) == {
        "ema.safetensors", "generator.safetensors", "model.safetensors",
        "optimizer.safetensors", "state.json",
    }  # fmt: skip
