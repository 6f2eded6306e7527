import json
import subprocess
from pathlib import Path

import IPython
import IPython.display
import pytest

from studies.common import ledger, runner


def test_a_result_comes_back_with_its_provenance(tmp_path):
    path = ledger.write("speed", {"ratio": 0.5}, tmp_path, seed=3)
    assert ledger.read("speed", tmp_path) == {"ratio": 0.5}
    stored = json.loads(path.read_text())["provenance"]
    assert stored["seed"] == 3 and stored["packages"]["torch"] and "made" in stored
    assert [p.name for p in tmp_path.iterdir()] == ["speed.json"]


def test_a_failed_write_leaves_the_old_result(tmp_path):
    ledger.write("speed", {"ratio": 0.5}, tmp_path)
    with pytest.raises(TypeError):
        ledger.write("speed", {"ratio": object()}, tmp_path)
    assert ledger.read("speed", tmp_path) == {"ratio": 0.5}


def test_an_unknown_result_names_the_known_ones(tmp_path):
    ledger.write("speed", {}, tmp_path)
    with pytest.raises(FileNotFoundError, match="there are: speed"):
        ledger.read("sped", tmp_path)


def test_a_setting_cannot_take_the_name_of_a_date(tmp_path):
    with pytest.raises(ValueError, match="has a commit, made of its own"):
        ledger.write("x", {}, tmp_path, made=4, commit="mine", seed=1)
    assert not list(tmp_path.iterdir())


def test_the_commit_is_that_of_the_code_and_not_of_who_uses_it(tmp_path, monkeypatch):
    """As where a checkout lies inside somebody's own repository."""
    own = ledger.provenance()["commit"]
    assert own
    inside = tmp_path / "theirs" / "kdc-copy" / "results"
    inside.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path / "theirs")], check=True)
    monkeypatch.setattr(ledger, "RESULTS", inside)
    assert ledger.provenance()["commit"] is None


def test_results_of_no_checkout_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "site-packages" / "results")
    with pytest.raises(FileNotFoundError, match="belong to a checkout"):
        ledger.read("distillation")


def test_a_table_of_provenance_is_not_cut_off():
    import time

    shown = ledger.this_run(time.perf_counter())["this run"]
    assert shown.map(len).max() < 50 and shown["torch"]


def test_a_result_of_an_earlier_model_is_shown_with_a_warning_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", lambda html: shown.append(html.data))
    monkeypatch.setattr(ledger, "_warned", set())
    path = ledger.write("mini_fd", {"ratios": {}}, tmp_path)
    stored = json.loads(path.read_text())
    assert stored["provenance"]["models"] == {
        name: ledger.model_in_use(name) for name in ("teacher", "clip")
    }
    ledger.read("mini_fd", tmp_path)
    assert not shown and ledger.other_models("mini_fd", tmp_path) == []
    stored["provenance"]["models"]["teacher"] = "another"
    path.write_text(json.dumps(stored))
    assert ledger.other_models("mini_fd", tmp_path) == ["teacher"]
    assert [ledger.read("mini_fd", tmp_path) for _ in range(2)] == [{"ratios": {}}] * 2
    assert len(shown) == 1 and "mini_fd.json" in shown[0] and "a mini teacher that" in shown[0]


def test_a_result_that_names_no_models_is_the_first_rounds(tmp_path, monkeypatch):
    path = ledger.write("importance", {}, tmp_path)
    stored = json.loads(path.read_text())
    del stored["provenance"]["models"]
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(ledger, "model_in_use", lambda name: "new")
    assert ledger.other_models("importance", tmp_path) == ["teacher"]
    monkeypatch.setattr(ledger, "model_in_use", ledger.FIRST_ROUND.get)
    assert ledger.other_models("importance", tmp_path) == []


def test_every_result_says_whether_it_depends_on_weights():
    """Those that do not measure time, memory, behaviour, layouts, or networks of full size."""
    free = {
        "distill_step_full", "distill_step_full_cuda", "distill_step_mini", "evaluation_timing",
        "faults", "full_smoke", "latency", "latency_cuda", "latent_cache", "mini_legs",
        "mini_pilots", "mini_second_legs", "onnx_latency", "replay_cost",
        "robustness_damage", "robustness_fuzz", "robustness_kills", "sd_blocks",
        "strategy_seconds", "throughput_cuda",
    }  # fmt: skip
    stored = {path.stem for path in ledger.RESULTS.glob("*.json")}
    assert not free & ledger.MODELS.keys()
    stages = [s for name in runner.CHAPTERS for s in runner.stages_of(name).values()]
    written = {Path(file).stem for stage in stages for file in stage.writes}
    assert stored - free <= ledger.MODELS.keys() <= written | stored
