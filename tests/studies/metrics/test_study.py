import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from kdc.evaluation.judges import attribute_accuracy
from studies.common import ledger, runner
from studies.common.protocol import higher_is_better
from studies.metrics import faults, report, stages, study


@pytest.fixture(scope="module")
def shown():
    return study.exhibit(128, seed=0)


@pytest.mark.parametrize("fault", study.FAULTS)
def test_no_dose_spoils_nothing_and_the_largest_does(fault, shown):
    spoil, doses = study.FAULTS[fault]
    few = faults.Exhibit(*(getattr(shown, f.name)[:24] for f in dataclasses.fields(shown)))
    before = few.images.clone()
    clean = spoil(few, doses[0], torch.Generator().manual_seed(0))
    assert torch.equal(clean.images, few.images) and clean.asked == few.asked
    worst = spoil(few, doses[-1], torch.Generator().manual_seed(0))
    changed = not torch.equal(worst.images, few.images) or worst.asked != few.asked
    assert changed and worst.images.dtype == torch.uint8
    assert worst.images.shape == few.images.shape and torch.equal(few.images, before)
    assert list(doses) == sorted(doses)


def test_faults_do_what_they_are_called(shown):
    def spoilt(fault, dose):
        return study.FAULTS[fault][0](shown, dose, torch.Generator().manual_seed(0))

    kinds = {a.kind for a in shown.asked}
    half = spoilt("mode dropping", 0.5)
    assert len({a.kind for a in half.asked}) == len(kinds) / 2
    assert attribute_accuracy(half.images, half.asked)["all"] > 0.97
    wrong = spoilt("wrong caption", 1)
    assert sorted(wrong.asked) == sorted(shown.asked)
    assert attribute_accuracy(wrong.images, wrong.asked)["all"] < 0.2
    assert torch.equal(spoilt("memorised copies", 1).images, shown.reference)
    assert len(spoilt("one image", 1).images.unique(dim=0)) == 1


def test_scores_see_what_was_done(shown):
    clean = study.judge(shown, shown)
    assert (
        clean["lpips_to_teacher"] == pytest.approx(0, abs=1e-6) and 0.35 < clean["leakage"] < 0.65
    )
    copied = study.judge(shown.put(shown.reference), shown)
    assert copied["leakage"] == 1 and copied["fd"] == pytest.approx(0, abs=1e-3)
    assert copied["precision"] == copied["recall"] == 1


def test_a_verdict_needs_three_spreads():
    rows = pd.DataFrame(
        [
            {"fault": "blur", "dose": dose, "seed": seed}
            | dict.fromkeys(study.SCORES, 0.5)
            | {"fd": 1 + 0.1 * seed + (5 if dose else 0), "clip": 90 + seed - (1 if dose else 0)}
            for dose in (0, 4)
            for seed in (0, 1, 2)
        ]
    )
    table = report.verdicts(rows).set_index("score")
    assert table.loc["fd", "noticed"] and table.loc["fd", "ok"]
    assert table.loc["fd", "spreads"] == pytest.approx(50)
    assert not table.loc["clip", "noticed"] and table.loc["clip", "ok"]
    assert not table.loc["kid", "noticed"] and not table.loc["kid", "ok"]


def test_scaled_scores_are_best_at_one_and_worst_at_nought():
    rows = pd.DataFrame({"fault": "blur", "dose": [0, 1, 2], "seed": 0})
    for score in study.SCORES:
        rows[score] = [9.0, 5.0, 1.0] if higher_is_better(score) else [1.0, 5.0, 9.0]
    table = report.scaled(rows)
    for score in study.SCORES:
        assert table[score].tolist() == [1.0, 0.5, 0.0]
    assert rows["fd"].tolist() == [1.0, 5.0, 9.0]


def test_the_bias_falls_with_the_count_and_kid_has_none():
    rows = study.bias((40, 160, 640), seeds=range(12))
    means = rows.groupby(["pair", "count"])[["fd", "kid"]].mean()
    equal = means.loc["equal"]
    assert equal["fd"].is_monotonic_decreasing and equal["fd"].iloc[-1] > 0
    ratio = equal["fd"].iloc[0] / equal["fd"].iloc[-1]
    assert 12 < ratio < 24  # about 1 / count
    assert abs(equal["kid"].iloc[-1]) < 0.1 * equal["fd"].iloc[-1]
    assert means.loc["shifted"]["fd"].iloc[-1] == pytest.approx(1, abs=0.4)


def test_the_trial_is_written_goes_on_where_it_was_and_refuses_unknown_faults(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "FAULTS", {"blur": study.FAULTS["blur"]})
    judged, bias = [], study.bias

    def judge(spoilt, original):
        judged.append(1)
        if len(judged) == 4:
            raise KeyboardInterrupt
        return {"fd": 1.0}

    monkeypatch.setattr(study, "judge", judge)
    monkeypatch.setattr(stages, "bias", lambda counts: bias(counts, seeds=(0,)))
    settings = dict(count=4, seeds=(0,))
    context = runner.Context(tmp_path, tmp_path / "rows", settings=settings)
    with pytest.raises(KeyboardInterrupt):
        list(runner.run(stages.STAGES, [], context))
    (path,) = runner.run(stages.STAGES, [], context)
    assert len(judged) == 4 + 2  # three were kept
    values = ledger.read(path.stem, tmp_path)
    assert [row["dose"] for row in values["rows"]] == [0, 0.5, 1, 2, 4]
    assert np.isfinite([row["fd"] for row in values["rows"]]).all()
    assert len(values["gaussians"]) == 2 * 7
    with pytest.raises(ValueError, match="was made with .*, now "):
        study.hold(count=5, seeds=(0,), folder=tmp_path / "rows")
    with pytest.raises(ValueError, match="unknown faults"):
        study.hold(("smear",))
