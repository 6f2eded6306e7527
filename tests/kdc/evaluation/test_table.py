"""A new metric is one entry of the table, and everything follows it."""

import numpy as np
import pytest
import torch

import kdc
from kdc.data import worlds
from kdc.evaluation import extractors, metrics
from kdc.evaluation.metrics import METRICS, Evidence, Metric, label, metric_of, refusals
from studies.common.protocol import compare_rows, higher_is_better

QUICK = dict(seeds=(0, 1), steps=1, baseline_draws=2)
PROMPTS = ["a red rose on a night background", "a blue eyed butterfly on a sand background"] * 2


@pytest.fixture
def brightness(monkeypatch):
    """One more metric: how bright the images are, brighter is better."""
    bright = Metric(
        lambda evidence: evidence.images.float().mean(dim=(1, 2, 3)), True, per_image=True
    )
    monkeypatch.setitem(METRICS, "brightness", bright)  # fmt: skip


def test_every_consumer_follows_a_new_metric(brightness, teacher):
    ours = kdc.evaluate(teacher, PROMPTS, **QUICK)
    expected = ours.images.float().mean(dim=(2, 3, 4))
    assert ours.table.loc["brightness", "value"] == pytest.approx(expected.mean().item())
    assert torch.allclose(ours.per_image["brightness"], expected)
    theirs = kdc.evaluate(kdc.load_student("mini", teacher), PROMPTS, **QUICK)
    found = kdc.compare(ours, theirs, permutations=5)
    assert "brightness" in found.index
    only = kdc.evaluate(teacher, PROMPTS, metrics=("brightness",), **QUICK)
    assert list(only.table.index) == ["brightness"]
    assert higher_is_better("old_brightness") and not higher_is_better("forgetting_brightness")
    assert metric_of("brightness").higher_is_better


def test_one_prompt_is_one_image(teacher):
    found = kdc.evaluate(teacher, "a red rose on a night background", **QUICK)
    assert found.images.shape[:2] == (2, 1) and found.table["samples"].eq(1).all()


def test_equal_seeds_are_refused(teacher):
    with pytest.raises(ValueError, match="seeds must differ"):
        kdc.evaluate(teacher, PROMPTS, seeds=(0, 0), steps=1)


def test_a_frechet_distance_is_an_fid_only_with_the_published_features(teacher, monkeypatch):
    assert label("fd", "inception-v3") == "fid" and label("fd", "mini-clip") == "fd"
    assert label("kid", "inception-v3") == "kid" and metric_of("fid") is METRICS["fd"]
    see = extractors.find_extractor("mini-clip")
    published = extractors.Extractor(
        "inception-v3", 2, see.model, lambda x: x.float().mean(dim=(2, 3))[:, :2]
    )
    monkeypatch.setattr("kdc.evaluation.evaluate.find_extractor", lambda name: published)
    real = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    found = kdc.evaluate(teacher, PROMPTS, real, extractor="inception-v3", **QUICK)
    assert "fid" in found.table.index and "fd" not in found.table.index
    assert np.isfinite(found.table.loc["fid", "value"])
    assert found.table.loc["fid", "extractor"] == "inception-v3"
    named = kdc.evaluate(
        teacher, PROMPTS, real, extractor="inception-v3", metrics=("fid",), **QUICK
    )
    assert list(named.table.index) == ["fid"]


def test_what_may_differ_is_said_and_nothing_else_may(teacher):
    ours = kdc.evaluate(teacher, PROMPTS, **QUICK)
    more = kdc.evaluate(teacher, PROMPTS, **(QUICK | {"steps": 2}))
    with pytest.raises(ValueError, match=r"differ in steps.*may_differ=\('steps',\)"):
        kdc.compare(ours, more)
    assert len(kdc.compare(ours, more, may_differ=("steps",), permutations=5))
    other = kdc.evaluate(teacher, PROMPTS, **(QUICK | {"steps": 2, "guidance": 3.0}))
    with pytest.raises(ValueError, match="differ in guidance"):
        kdc.compare(ours, other, may_differ=("steps",))


def test_scores_that_cannot_be_had_are_left_out_or_refused_by_name():
    images = torch.zeros(5, 3, 64, 64, dtype=torch.uint8)
    values, refused = metrics.score(Evidence(images=images))
    assert values == {} and set(refused) == set(METRICS)
    assert refused["fd"] == "there are no reference images"
    assert refused["accuracy"] == "the attributes of the prompts are not known"
    with pytest.raises(ValueError, match="kid: there are no reference images"):
        metrics.score(Evidence(images=images), ("kid",))
    assert metrics.score(Evidence(images=images), ("kid",), strict=False)[0] == {}
    few = refusals({"features", "reference"}, count=5, width=64, reference=200)
    assert few["fd"] == "5 images, 128 needed for 64 dimensions" and "kid" not in few


@pytest.mark.long
def test_output_error_is_scored_where_latents_are_given(teacher):
    data = kdc.cache_latents(teacher, kdc.load_dataset("worlds", "test", count=4))
    student = kdc.load_student("mini", teacher)
    found = kdc.evaluate(
        student, PROMPTS, teacher=teacher, latents=data, metrics=("output_error",), **QUICK
    )
    expected = kdc.output_error(student.unet, teacher, data).mean()
    assert found.table.loc["output_error", "value"] == pytest.approx(expected, rel=1e-5)


def test_attributes_are_scored_one_by_one(teacher):
    asked = [worlds.read_caption(prompt) for prompt in PROMPTS]
    found = kdc.evaluate(teacher, PROMPTS, attributes=asked, seeds=(0,), steps=12)
    table = found.table["value"]
    assert {"colour", "kind", "background", "accuracy"} <= set(table.index)
    assert table["accuracy"] <= min(table["colour"], table["kind"], table["background"])


def test_rows_over_seeds_are_compared_in_one_way():
    import pandas as pd

    rows = pd.DataFrame(
        {
            "candidate": ["a", "a", "a", "b", "b", "b", "c", "c", "c"],
            "seed": [0, 1, 2, 0, 1, 2, 5, 6, 7],
            "accuracy": [0.9, 0.8, 0.85, 0.7, 0.61, 0.64, 0.1, 0.12, 0.11],
            "fd": [1.0, 2.0, 1.5, 5.0, 6.1, 5.4, 9.0, 9.5, 9.9],
        }
    )
    paired = compare_rows(rows, "a", "b")
    assert paired.loc["accuracy", ["n", "verdict"]].tolist() == [3, "better"]
    assert paired.loc["fd", "verdict"] == "better" and paired.loc["fd", "mean"] < 0
    apart = compare_rows(rows, "b", "c")
    assert apart.loc["accuracy", ["n", "verdict"]].tolist() == ["3 + 3", "better"]
    one = compare_rows(rows[rows["seed"] == 0], "a", "b")
    assert one.loc["accuracy", ["n", "verdict"]].tolist() == [1, "open"]
