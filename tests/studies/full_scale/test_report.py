"""What full size takes: arithmetic that can be done again by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

import kdc
from studies.common import ledger
from studies.full_scale import report
from studies.full_scale.folders import tiny_folders


def test_a_step_has_the_operations_that_were_counted():
    whole, student = report.flops()
    assert whole / 2e9 == pytest.approx(401.6, abs=0.1)
    assert student / 2e9 == pytest.approx(255.4, abs=0.1)
    step = whole + 3 * student
    assert step / 1e12 == pytest.approx(2.335, abs=0.01)
    assert (
        report.rate() / 1e12 == pytest.approx(108 * step / 1e12)
        and 250 < report.rate() / 1e12 < 254
    )


def test_hours_scale_with_the_cards_and_the_work():
    table = report.hours()
    assert list(table.index) == list(report.JOBS) and list(table.columns) == list(report.CARDS)
    row = table.loc["distil, as this chapter does"]
    assert row["H200"] == pytest.approx(20_000 * 64 / 108 / 3600), "images over images a second"
    assert row["A100 80 GB"] / row["H200"] == pytest.approx(989 / 312)
    assert table.loc["distil, as in the authors' script", "T4"] * 3600 < 60
    replay, plain = (
        table.loc[n] for n in ("learn a task by replay", "distil, as this chapter does")
    )
    assert replay["H200"] / plain["H200"] == pytest.approx(2 * 5_000 / 20_000)


def test_hours_are_said_in_their_unit():
    said = [report.spoken(h) for h in (1.5 / 3600, 0.21, 3.29, 49.7, 1234.5)]
    assert said == ["2 s", "13 min", "3.3 h", "50 h", "1,234 h"]


def test_memory_says_which_cards_have_it():
    table = report.memory()
    assert table["GiB"].tolist() == [24, 45, 72, 22]
    assert "RTX 4090" in table["fits on"].iloc[3] and "RTX 4090" not in table["fits on"].iloc[0]
    assert "T4" not in " ".join(table["fits on"])


def test_the_readers_row_is_filled_from_scores(tmp_path):
    empty = report.beside(tmp_path / "none.json").loc["your run"]
    assert empty.isna().all()
    scores = {"fid": {"value": 20.5, "spread": 1}, "clip": {"value": 27.0, "spread": None}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    mine = report.beside(tmp_path / "scores.json").loc["your run"]
    assert mine["FID"] == 20.5 and mine["CLIP"] == pytest.approx(0.27)


def test_two_tiny_folders_can_be_read_as_data_sets(tmp_path):
    for folder in tiny_folders(tmp_path, images=24):
        train, test = (kdc.load_dataset(folder, split, 64) for split in ("train", "test"))
        assert len(train) >= 6 and len(test) >= 2
        assert 2 <= len({train.caption(i) for i in range(len(train))}) <= 3
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.png")}
    tiny_folders(tmp_path, images=24)
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.png")}


def test_figures_from_a_gpu_say_which_one():
    files = sorted(ledger.RESULTS.glob("*_cuda.json"))
    assert len(files) >= 3
    for file in files:
        found = json.loads(Path(file).read_text())["provenance"]
        assert found["device"].startswith("NVIDIA") and found["commit"], file.name
    assert not np.isnan(report.rate())
