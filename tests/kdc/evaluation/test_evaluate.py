import dataclasses
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lpips import LPIPS

import kdc
from kdc.data import worlds
from kdc.evaluation import evaluate as evaluation
from kdc.evaluation import extractors, judges, latency
from kdc.evaluation.metrics import METRICS, clip_score
from studies.common.renderings import balanced_prompts, renderings_of

ASKED = balanced_prompts(1, held_out=False)[::24]  # twelve
PROMPTS = [worlds.caption(a) for a in ASKED]
QUICK = {"steps": 2, "seeds": (0, 1), "baseline_draws": 3}


@pytest.fixture(scope="module")
def real():
    return renderings_of(balanced_prompts(1, held_out=False)[:40], seed=3)


@pytest.fixture(scope="module")
def scored(teacher, real):
    return kdc.evaluate(teacher, PROMPTS, real, attributes=ASKED, teacher=teacher, **QUICK)


@pytest.fixture(scope="module")
def cut(teacher):
    return kdc.with_unet(teacher, kdc.slim(teacher.unet, "bk-tiny"))


def test_every_row_says_what_it_is(scored, teacher, real):
    table = scored.table
    assert set(table.index) == set(METRICS)
    assert (table["samples"] == 12).all() and set(table["seeds"]) == {"0, 1"}
    assert (
        table.loc["clip", "extractor"] == "mini-clip" and len(table.loc["clip", "checksum"]) == 16
    )
    assert table.loc["diversity", "extractor"] == "mini-lpips"
    assert table.loc["accuracy", "extractor"] == "mini-classifier"
    assert np.isnan(table.loc["fd", "value"]) and "128 needed" in table.loc["fd", "note"]
    generated = kdc.generate(teacher, PROMPTS, seed=1, steps=2)
    assert torch.equal(scored.images[1], generated)
    assert scored.by_seed["accuracy"][1] == judges.attribute_accuracy(generated, ASKED)["all"]
    clip = clip_score(judges.clip_features(generated), judges.clip_text_features(PROMPTS))
    assert torch.allclose(scored.per_image["clip"][1], clip, atol=1e-3)
    assert table.loc["clip", "value"] == pytest.approx(np.mean(scored.by_seed["clip"]))
    assert table.loc["lpips_to_teacher", "value"] == pytest.approx(0, abs=1e-6)  # it is its own
    assert table.loc["diversity", "value"] > 0.01 and np.isnan(table.loc["diversity", "spread"])
    kid = table.loc["kid"]
    assert np.isfinite(kid[["value", "real_vs_real", "real_vs_real_spread"]].astype(float)).all()
    assert "2 seed(s)" in kid["note"] and "real_vs_real" not in kid["note"]


def test_warnings_travel_with_the_number(teacher, real):
    few = kdc.evaluate(
        teacher, PROMPTS, real[:10], steps=1, seeds=(0,), metrics=("kid", "precision")
    )
    assert (
        list(few.table.index) == ["kid", "precision"] and np.isnan(few.table["real_vs_real"]).all()
    )
    note = few.table.loc["kid", "note"]
    assert "no baseline: 10 reference images, 24 needed" in note and "compared with 10" in note
    assert "1 seed(s)" in note and np.isnan(few.table.loc["kid", "spread"])


def test_what_cannot_carry_its_weight_is_refused_before_drawing(teacher, real, monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError("drew")

    monkeypatch.setattr(evaluation, "generate", never)

    def refused(error, match, reference=real, **settings):
        with pytest.raises(error, match=match):
            kdc.evaluate(teacher, PROMPTS, reference, **(QUICK | settings))

    refused(ValueError, "fd: 12 images, 128 needed", metrics=("fd",))
    refused(ValueError, "unknown metric 'is'", metrics=("is",))
    refused(ValueError, "diversity: it needs two seeds", metrics=("diversity",), seeds=(0,))
    refused(ValueError, "3 attributes for 12", attributes=ASKED[:3])
    refused(ValueError, r"got torch.float32 in \[0.*: from \[0, 1\] make", real.float() / 255)
    refused(ValueError, r"reference images are \(32, 32\)", real[:, :, ::2, ::2])
    refused(ValueError, "unknown extractor", extractor="vgg")
    refused(ValueError, "unknown distance", perceptual="ssim")
    refused(FileNotFoundError, "no data set", "no/such/folder")
    teacher.unet.train()
    try:
        refused(RuntimeError, "pipeline.unet is in training mode")
    finally:
        teacher.unet.eval()
    judges.mini_clip()[0].train()
    try:
        refused(RuntimeError, "mini-clip is in training mode", real.flip(0))
    finally:
        judges.mini_clip()[0].eval()


def test_an_extractor_that_cannot_be_had_is_an_error_and_never_another(monkeypatch):
    def offline():
        raise OSError("no network")

    monkeypatch.setitem(extractors.EXTRACTORS, "dinov2", offline)
    with pytest.raises(RuntimeError, match="'dinov2' cannot be loaded.*no network"):
        extractors.find_extractor("dinov2")

    def broken(**settings):
        raise OSError("no network")

    monkeypatch.setattr(extractors.lpips, "LPIPS", broken)
    with pytest.raises(RuntimeError, match="'lpips-alex' cannot be loaded"):
        extractors.find_perceptual("lpips-alex")


def test_no_code_of_a_foreign_file_is_run(tmp_path, monkeypatch):
    """torch-fidelity reads its weights without a restriction; here no file can run code."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (ran,)

    file = tmp_path / "weights.pth"
    torch.save({"bomb": Bomb()}, file)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    inception = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setattr(
        f"{inception}.load_state_dict_from_url",
        lambda *a, **k: torch.load(file, weights_only=False),
    )
    extractors.find_extractor.cache_clear()
    with pytest.raises(RuntimeError, match="'inception-v3' cannot be loaded"):
        extractors.find_extractor("inception-v3")
    assert not ran.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(file, weights_only=False)  # outside the file would have run
    assert ran.exists()


def test_features_of_a_reference_are_computed_once_for_its_content(teacher, real, monkeypatch):
    see, calls = extractors.find_extractor("mini-clip"), []
    evaluation._REFERENCES.clear()
    counted = dataclasses.replace(see, see=lambda x: calls.append(len(x)) or see.see(x))
    for images in (real, real.clone(), real[:20]):
        evaluation._features_of(images, counted, teacher)
    assert calls == [40, 20]


def test_the_paired_distance_is_that_of_the_package():
    images = renderings_of(ASKED[:4], seed=5)
    noisy = (images.float() + 20 * torch.randn(images.shape)).clamp(0, 255).to(torch.uint8)
    found = extractors.find_perceptual("mini-lpips")(images, noisy)
    package = LPIPS(net="alex", pnet_rand=True, lpips=False, verbose=False).eval()
    package.net.load_state_dict(judges.mini_lpips().net.state_dict())
    with torch.no_grad():
        expected = package(images.float() / 255, noisy.float() / 255, normalize=True).flatten()
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        extractors.find_perceptual("mini-lpips")(images, noisy[:2])


def test_a_worse_student_is_told_from_its_teacher_and_a_model_from_itself_not(
    scored, cut, teacher, real
):
    theirs = kdc.evaluate(cut, PROMPTS, real, attributes=ASKED, teacher=teacher, **QUICK)
    again = kdc.evaluate(cut, PROMPTS, teacher=scored, metrics=("lpips_to_teacher",), **QUICK)
    assert again.by_seed["lpips_to_teacher"] == theirs.by_seed["lpips_to_teacher"]
    with pytest.raises(ValueError, match="differ in prompts"):
        kdc.evaluate(cut, PROMPTS[::-1], teacher=scored, **QUICK)
    table = kdc.compare(scored, theirs, permutations=60)
    assert table.loc["lpips_to_teacher", "verdict"] == "better"
    far = dataclasses.replace(scored, features=scored.features + 2 * scored.features.std())
    ahead, behind = (kdc.compare(*pair, permutations=60) for pair in ((scored, far), (far, scored)))
    assert ahead.loc["kid", "verdict"] == "better" and ahead.loc["kid", "p"] == 1 / 61
    assert behind.loc["kid", "difference"] == pytest.approx(-ahead.loc["kid", "difference"])
    assert behind.loc["kid", "verdict"] == "worse"
    same = kdc.compare(scored, scored, permutations=20)
    assert set(same["verdict"]) == {"not distinguishable"} and "diversity" not in same.index
    other = kdc.evaluate(cut, PROMPTS, real, attributes=ASKED, **(QUICK | {"steps": 1}))
    with pytest.raises(ValueError, match="differ in steps"):
        kdc.compare(scored, other)
    parts = kdc.retraining([scored, theirs])
    assert parts.loc["kid", "retraining"] > 0 and parts.loc["clip", "sampling"] > 0


def test_samplers_share_networks_and_fewer_steps_take_less_time(teacher, cut):
    ddim = latency.with_scheduler(teacher, "ddim")
    assert ddim.unet is teacher.unet and type(ddim.scheduler).__name__ == "DDIMScheduler"
    with pytest.raises(ValueError, match=r"dpm\+\+, ddim, euler"):
        latency.with_scheduler(teacher, "heun")
    for name in latency.SCHEDULERS:
        other = latency.with_scheduler(teacher, name)
        assert kdc.generate(other, PROMPTS[:1], steps=2).shape == (1, 3, 64, 64)
    again = latency.with_scheduler(teacher, "dpm++")
    pair = (kdc.generate(one, PROMPTS[:1], steps=4) for one in (teacher, again))
    assert torch.equal(*pair)
    rows = latency.time_images(
        {"teacher": teacher, "cut": cut}, PROMPTS[0], steps=(2, 8), batch_sizes=(1, 2), rounds=2
    )
    assert len(rows) == 8 and rows["ratio"][0] == 1
    slow = rows[(rows["steps"] == 8) & (rows["pipeline"] == "teacher")]["median"]
    fast = rows[(rows["steps"] == 2) & (rows["pipeline"] == "teacher")]["median"]
    assert slow.min() > fast.max()
    calls = latency.time_calls({"teacher": teacher, "cut": cut}, (1, 2), rounds=2)
    assert set(calls["pipeline"]) == {"teacher", "cut"} and (calls["median"] > 0).all()


def test_the_fastest_setting_that_is_good_enough():
    rows = pd.DataFrame({"median": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.96, 1.0]})
    assert latency.fastest_within(rows, 1.0)["median"] == 2.0
    assert latency.fastest_within(rows, 1.0, loss=0.0)["median"] == 3.0
    assert latency.fastest_within(rows, 2.0) is None
