import dataclasses
import subprocess
import sys
import typing

import pytest

from kdc.training.settings import TrainSettings


def test_every_field_says_what_it_is():
    hints = typing.get_type_hints(TrainSettings, include_extras=True)
    for field in dataclasses.fields(TrainSettings):
        assert len(typing.get_args(hints[field.name])[1]) > 5, field.name


def test_changes_are_put_over_settings():
    settings = TrainSettings(10, batch_size=4)
    assert TrainSettings.given(settings, {"steps": 20}) == TrainSettings(20, batch_size=4)
    assert TrainSettings.given(None, {"steps": 5, "seed": 3}) == TrainSettings(5, seed=3)
    assert TrainSettings.given(settings, {}) is not None and settings.steps == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batchsize": 4, "steps": 1}, "did you mean batch_size"),
        ({"zzz": 4, "steps": 1}, "The settings are steps, batch_size"),
        ({}, "say how long to train"),
    ],
)
def test_unknown_names_are_refused_with_the_closest_known_one(changes, said):
    with pytest.raises(TypeError, match=said):
        TrainSettings.given(None, changes)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (dict(steps=0), ValueError),
        (dict(steps=2.5), TypeError),
        (dict(steps=True), TypeError),
        (dict(batch_size=0), ValueError),
        (dict(accumulation=0), ValueError),
        (dict(save_every=0), ValueError),
        (dict(log_every=-1), ValueError),
        (dict(warmup=-1), ValueError),
        (dict(seed="0"), TypeError),
        (dict(learning_rate=0), ValueError),
        (dict(learning_rate=float("nan")), ValueError),
        (dict(learning_rate=float("inf")), ValueError),
        (dict(learning_rate="fast"), TypeError),
        (dict(weight_decay=-0.1), ValueError),
        (dict(max_grad_norm=0), ValueError),
        (dict(caption_dropout=1.5), ValueError),
        (dict(ema_decay=1.0), ValueError),
        (dict(betas=(0.9,)), ValueError),
        (dict(schedule="cosin"), ValueError),
        (dict(precision="fp8"), ValueError),
        (dict(compile="yes"), TypeError),
    ],
)
def test_values_that_no_run_can_have_are_refused_by_name(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        TrainSettings(**({"steps": 5} | wrong))


def test_the_settings_do_not_wait_for_pytorch():
    code = "import sys, kdc.training.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
