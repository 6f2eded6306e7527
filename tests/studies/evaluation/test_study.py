import dataclasses
import json

import pandas as pd
import pytest

import kdc
from kdc.evaluation import latency
from studies.common import ledger, runner
from studies.evaluation import stages, study
from studies.evaluation.study import Settings

TINY = Settings(
    recipes=("task", "corrected"), training_steps=1, trainings=(0, 1), steps=(1, 2),
    schedulers=("dpm++", "ddim"), goal_steps=2, generated=8, choosing_generated=8, references=16,
    seeds=(0, 1), table_steps=1, batch_sizes=(1, 2), rounds=2,
)  # fmt: skip


def test_prompts_are_spread_over_both_worlds():
    asked = study.asked_for(8)
    assert len(set(asked)) == 8 and len({a.world for a in asked}) == 2
    assert len(set(study.asked_for(144))) == 144


def rows(**accuracy):
    return pd.DataFrame(
        [
            {"pipeline": name, "scheduler": "dpm++", "steps": steps, "accuracy": a, "clip": steps}
            for name, values in accuracy.items()
            for steps, a in values.items()
        ]
    )


def times(**seconds):
    return pd.DataFrame(
        [
            {"pipeline": name, "steps": steps, "batch_size": 1, "median": s, "ratio": s / 10}
            for name, values in seconds.items()
            for steps, s in values.items()
        ]
    )


def test_the_fastest_good_setting_is_chosen_and_the_best_of_the_quick_ones():
    generated = rows(
        teacher={1: 0.5, 2: 1.0}, student={1: 0.949, 2: 0.95, 3: 0.96, 4: 0.99, 5: 0.9}
    )
    clock = times(
        teacher={1: 5.0, 2: 10.0}, student={1: 0.5, 2: 1.0, 3: 2.0, 4: 2.1, 5: 1.9}
    )  # only 3 is good, quick, and of the highest CLIP score: 4 is slow, 5 not good
    teacher, fastest, best = study.choose(generated, clock, TINY)
    assert (teacher["pipeline"], teacher["steps"], teacher["rules"]) == ("teacher", 2, ["fastest"])
    assert (fastest["steps"], fastest["ratio"], fastest["rules"]) == (2, 0.1, ["fastest"])
    assert (best["steps"], best["rules"]) == (3, ["best"])
    assert study.label_of(best) == "student, dpm++, 3 steps"
    generated = rows(teacher={2: 1.0}, student={1: 0.9, 2: 1.0})
    both = study.choose(generated, times(teacher={2: 10.0}, student={1: 0.5, 2: 1.0}), TINY)
    assert [row["rules"] for row in both] == [["fastest"], ["fastest", "best"]]
    none = study.choose(
        rows(teacher={2: 1.0}, student={1: 0.9}), times(teacher={2: 9.0}, student={1: 1.0}), TINY
    )
    assert [row["pipeline"] for row in none] == ["teacher"]


@pytest.mark.long
def test_the_stages_write_what_the_chapter_reads(teacher, tmp_path, monkeypatch):
    small = {"images": 24, "test_images": 8}
    defaults = stages.distillation.Settings
    monkeypatch.setattr(
        stages.distillation, "Settings", lambda **s: defaults(**small, batch_size=2, **s)
    )
    settings = dataclasses.asdict(TINY)
    with pytest.raises(ValueError, match="unknown stages"):
        list(runner.run(stages.STAGES, ["speed"], runner.Context()))
    context = runner.Context(tmp_path, tmp_path / "rows", settings=settings)
    paths = list(runner.run(stages.STAGES, ["timing", "steps", "table"], context))
    assert [path.stem for path in paths] == [
        "evaluation_timing", "evaluation_steps", "evaluation_table"
    ]  # fmt: skip
    timed = pd.DataFrame(ledger.read("evaluation_timing", tmp_path)["images"])
    assert len(timed) == 8 and timed.loc[0, ["pipeline", "steps", "ratio"]].tolist() == [
        "teacher", 2, 1.0
    ]  # fmt: skip
    steps = ledger.read("evaluation_steps", tmp_path)
    assert len(steps["sweep"]) == 8 and "teacher" in steps["tables"]
    for label in steps["compared"]:
        assert label in steps["tables"] and set(steps["compared"][label]["clip"]) == {
            "difference", "p", "verdict"
        }  # fmt: skip
    table = ledger.read("evaluation_table", tmp_path)
    assert set(table["tables"]) == {
        "teacher", study.SHIPPED, "task, 0", "task, 1", "corrected, 0", "corrected, 1",
    }  # fmt: skip
    assert "task - corrected" in table["compared"]
    assert table["retraining"]["corrected"]["accuracy"]["retraining"] >= 0
    assert "NaN" not in (tmp_path / "evaluation_table.json").read_text()
    json.loads((tmp_path / "evaluation_table.json").read_text())

    def never(*arguments, **settings):
        raise AssertionError("made again")

    monkeypatch.setattr(stages, "follow", never)
    monkeypatch.setattr(study, "generate", never)
    again = study.sweep(study.pipelines(teacher), TINY, tmp_path / "rows")
    assert again.to_dict("records") == steps["sweep"]
    assert len(stages.trained(teacher, TINY, tmp_path / "rows" / "students")["corrected"]) == 2


def test_samplers_of_one_noise_schedule_draw_nearly_the_same_image(teacher):
    """All three follow the same path from noise to image, so with many steps they must meet."""
    prompt = ["a red daisy on a sky background"]
    generated = {
        name: kdc.generate(latency.with_scheduler(teacher, name), prompt, steps=16, guidance=2.0)
        for name in latency.SCHEDULERS
    }
    for name in ("ddim", "euler"):
        apart = (generated[name].float() - generated["dpm++"].float()).abs().mean()
        assert 0 < apart < 6, name
