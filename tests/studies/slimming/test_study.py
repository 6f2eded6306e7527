import dataclasses
import functools
import json

import pandas as pd
import pytest
import torch

import kdc
from kdc.unet.blocks import PARTS
from kdc.unet.budget import Budget
from kdc.unet.costs import count_costs
from kdc.unet.layouts import sd_unet
from kdc.unet.plans import PLANS
from kdc.unet.slimming import count_parameters
from studies.__main__ import main
from studies.common import ledger, runner
from studies.common.protocol import compare_rows, prepare, score
from studies.common.renderings import balanced_prompts
from studies.slimming import full_size, stages, study

TINY = study.Settings(
    seeds=(0, 1), fresh_seeds=(), steps=2, batch_size=2, images=16, test_images=64, copies=0,
    draws=1, count=2, sampling_steps=1,
)  # fmt: skip
SCORES = pd.Series([3.0, 2.0, 1.0, 0.1, 0.5, 0.4, 0.3, 2.0, 1.0, 0.5, 0.01, 0.05], PARTS)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The error on fewer images than a study takes."""
    few = functools.partial(kdc.output_error, count=4, levels=2)
    monkeypatch.setattr(study, "output_error", few)


@pytest.fixture(scope="module")
def setup(teacher):
    return prepare(teacher, TINY)


def rows(**columns) -> pd.DataFrame:
    seeds = range(len(next(iter(columns.values()))))
    return pd.concat(
        pd.DataFrame({"seed": seeds, "candidate": name, "output_error": v, "accuracy": v})
        for name, v in columns.items()
    )


def test_differences_are_paired_and_have_students_interval():
    """Closed form: differences 1, 2, 3 have mean 2 and standard error 1/sqrt(3); t(0.975, 2)."""
    table = compare_rows(rows(a=[11.0, 2.0, 8.0], b=[10.0, 0.0, 5.0]), "a", "b")
    half = 4.302652729696142 / 3**0.5
    for measure, verdict in (("output_error", "open"), ("accuracy", "open")):
        assert table.loc[measure, "mean"] == pytest.approx(2)
        assert table.loc[measure, "low"] == pytest.approx(2 - half)
        assert table.loc[measure, "high"] == pytest.approx(2 + half)
        assert table.loc[measure, "verdict"] == verdict
    clear = compare_rows(rows(a=[1.0, 2.0, 3.0], b=[2.0, 3.1, 3.9]), "a", "b")["verdict"]
    assert clear.to_dict() == {"output_error": "better", "accuracy": "worse"}
    lone = compare_rows(rows(a=[1.0], b=[9.0]), "a", "b")
    assert set(lone["verdict"]) == {"open"} and set(lone["n"]) == {1}


def test_budgets_are_the_plans_own_costs(setup):
    budgets = study.budgets_of(setup, "kdc")
    total = count_costs(kdc.slim(setup.teacher.unet, "kdc"), **setup.inputs).loc["total"]
    assert budgets == {
        "parameters": Budget(parameters=total["parameters"]),
        "macs": Budget(macs=total["macs"]),
    }


def test_a_random_plan_is_the_same_whichever_seeds_run_beside_it(setup):
    budgets = study.budgets_of(setup)
    both = study.random_control(setup, budgets, (0, 1))
    assert study.random_control(setup, budgets, (1,))["random: macs"][1] == both["random: macs"][1]
    assert both["random: macs"][0] != both["random: macs"][1]
    assert set(both) == {"random: parameters", "random: macs"}


def test_rows_are_kept_and_a_stopped_study_goes_on(setup, tmp_path, monkeypatch):
    candidates = {
        "kdc": dict.fromkeys((0, 1), PLANS["kdc"]),
        "generated": {0: PLANS["kdc"], 1: PLANS["bk-tiny"]},
        "late": {5: PLANS["kdc"]},  # none of its seeds is asked for
    }
    made, judge = [], study.judge

    def counted(setup, plan, seed, settings):
        made.append((plan.name, seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return judge(setup, plan, seed, settings)

    monkeypatch.setattr(study, "judge", counted)
    with pytest.raises(KeyboardInterrupt):
        study.recover(setup, candidates, TINY, tmp_path)
    table = study.recover(setup, candidates, TINY, tmp_path)
    assert made == [("kdc", 0), ("kdc", 0), ("kdc", 1), ("bk-tiny", 1), ("bk-tiny", 1)]
    assert table["candidate"].tolist() == ["kdc", "generated"] * 2
    same = table[table["seed"] == 0]
    assert same["output_error"].nunique() == 1  # one plan and seed, trained twice
    assert (table["after_cut"] > table["output_error"]).all()
    other = dataclasses.replace(TINY, steps=3)
    with pytest.raises(ValueError, match=r"kdc-0\.json was made with"):
        study.recover(setup, candidates, other, tmp_path)


def test_images_are_scored_where_the_attributes_are_known(setup):
    assert score(setup, setup.teacher, 0) == {}
    asked = balanced_prompts(1, False)[:128]
    torch.manual_seed(0)
    known = dataclasses.replace(setup, asked=asked, reference=torch.randn(128, 64))
    scores = score(known, setup.teacher, 0)
    assert set(scores) == {"accuracy", "colour", "kind", "background", "fd"}
    with_unseen = score(dataclasses.replace(known, unseen=asked[:8]), setup.teacher, 0)
    assert 0 <= with_unseen.pop("unseen") <= 1 and with_unseen == scores
    assert scores["accuracy"] <= min(scores["colour"], scores["kind"], scores["background"])


def test_students_of_full_size_are_counted_and_timed_beside_the_teacher(tiny_unet):
    assert count_parameters(sd_unet("meta")) == 859_520_964
    table = full_size.time_plans(
        tiny_unet, {"kdc": PLANS["kdc"]}, rounds=2, size=16, sequence_length=5
    )
    assert table.index.tolist() == ["full", "kdc"]
    assert table.loc["full", ["parameter_ratio", "mac_ratio", "ratio"]].tolist() == [1, 1, 1]
    counted = count_costs(kdc.slim(tiny_unet, "kdc"), 16, 5).loc["total", "macs"]
    assert table.loc["kdc", "macs"] == counted and 0 < table.loc["kdc", "ratio"]


def test_a_borrowed_student_computes_what_a_copied_one_does_and_holds_nothing(tiny_unet):
    borrowed, copied = full_size.borrow(tiny_unet, "bk-tiny"), kdc.slim(tiny_unet, "bk-tiny")
    inputs = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(borrowed(*inputs).sample, copied.eval()(*inputs).sample)
    theirs = {p.data_ptr() for p in tiny_unet.parameters()}
    assert all(p.data_ptr() in theirs for p in borrowed.parameters())


@pytest.mark.long
def test_the_stages_read_one_anothers_results(teacher, tmp_path, monkeypatch):
    """All of them but the full-size timing, from block times that make one part very dear."""
    seconds = ledger.read("sd_blocks")
    ledger.write("sd_blocks", seconds, tmp_path)
    monkeypatch.setattr(study, "Settings", lambda **given: dataclasses.replace(TINY, **given))
    monkeypatch.setattr(study, "sensitivity", lambda *a, **k: pd.DataFrame(
        {"part": PARTS, "timestep": 5, "draw": 0, "error": SCORES.tolist()}
    ))  # fmt: skip
    once = functools.partial(full_size.time_plans, rounds=1)
    monkeypatch.setattr(full_size, "time_plans", once)
    monkeypatch.setattr(stages, "_at_full_size", lambda device: teacher.unet)
    quickly = {"unguided": study.Criterion(1.0, 0, ((1, 1),))}
    quickly["found"] = study.Criterion(None, 1, ((1, 1),))
    monkeypatch.setattr(study, "CRITERIA", quickly)
    monkeypatch.setattr(study, "recovered_importance", lambda *a, **k: 2 * SCORES)
    where = ["--results", str(tmp_path), "--output-dir", str(tmp_path / "rows")]
    main(["slimming", "importance", "search", *where])
    assert stages.stored_scores("unguided", tmp_path).to_dict() == SCORES.to_dict()
    assert stages.stored_scores("found", tmp_path).to_dict() == (2 * SCORES).to_dict()
    found = stages.found_plans(tmp_path)
    kinds = [name.split(": ") for name in found]
    assert kinds == [[c, b] for c in ("unguided", "found") for b in ("parameters", "macs", "time")]
    limit = count_parameters(kdc.slim(teacher.unet, "kdc"))
    assert count_parameters(kdc.slim(teacher.unet, found["found: parameters"])) <= limit
    monkeypatch.setattr(
        study, "Settings", lambda **given: dataclasses.replace(TINY, fresh_seeds=(5,), **given)
    )
    main(["slimming", "latency", "recovery", *where, "--seeds", "1"])
    table = stages.stored_recovery(tmp_path)
    seeds = table.groupby("candidate")["seed"].agg(list).to_dict()
    assert seeds["kdc"] == [1, 5] and seeds["found: macs"] == [5]
    assert seeds["unguided: macs"] == seeds["random: macs"] == seeds["bk-tiny"] == [1]
    whole = count_parameters(teacher.unet)
    assert table["parameter_ratio"].tolist() == pytest.approx(
        (table["parameters"] / whole).tolist()
    )
    assert (table["latency_ratio"] > 0).all()
    with pytest.raises(ValueError, match="unknown stages roof; they are blocks, importance"):
        list(runner.run(stages.STAGES, ["roof"], runner.Context()))


def test_the_stored_plans_keep_to_their_budgets_at_full_size_and_mini(teacher):
    found = stages.found_plans()
    timed = ledger.read("latency")["full size"]
    assert timed["found: time"]["parameters"] <= 482_346_884
    for name in set(found) & set(timed):
        student = kdc.slim(sd_unet("meta"), found[name])
        assert count_parameters(student) == timed[name]["parameters"]
    kept = {row["candidate"]: row for row in ledger.read("recovery")["rows"]}
    assert kept["found: parameters"]["parameters"] <= kept["kdc"]["parameters"]
    assert kept["found: macs"]["macs"] <= kept["kdc"]["macs"]
    assert json.dumps(kept["found: time"]["plan"]) == json.dumps(
        json.loads(json.dumps(found["found: time"].to_dict()))
    )
