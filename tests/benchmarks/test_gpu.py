"""`make gpu`, part by part, on a CPU with the mini networks."""

import dataclasses
import json

import pytest
import torch

from benchmarks import full_smoke, gpu, onnx_latency
from benchmarks.gpu import PARTS, Place, main, run_all, run_part

CPU = Place(torch.device("cpu"), tiny=True)


def rows_of(folder, name):
    return json.loads((folder / f"gpu_{name}_cpu.json").read_text())["values"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["throughput", "step", "pipelines", "replay"])
def test_a_part_measures_and_writes(name, tmp_path):
    run_part(name, CPU, str(tmp_path))
    values = rows_of(tmp_path, name)
    assert values["whole"] and len(values["rows"]) >= 2
    for row in values["rows"]:
        assert "error" not in row
    if name == "throughput":
        assert all(row["peak_gib"] > 0.1 for row in values["rows"])
    if name == "pipelines":
        assert {row["pipeline"] for row in values["rows"]} == {
            "teacher",
            "bk-base",
            "kdc",
            "kdc-v2",
            "bk-tiny",
        }
    if name == "replay":
        assert values["rows"][1]["old_images"] == 2


@pytest.mark.long
def test_latency_times_all_plans_at_both_batches(tmp_path, monkeypatch):
    compiled = []  # what would take minutes on a CPU
    monkeypatch.setattr(gpu, "compile_unet", compiled.append)
    run_part("latency", CPU, str(tmp_path))
    rows = rows_of(tmp_path, "latency")["rows"]
    assert [(row["plan"], row["batch_size"], row["compiled"]) for row in rows] == [
        (plan, batch, how) for how in (False, True) for batch in (1, 8) for plan in gpu.PLANS
    ]
    assert all(row["median"] > 0 for row in rows)
    sizes = [sum(p.numel() for p in unet.parameters()) for unet in compiled]
    assert sizes == [row["parameters"] for row in rows if row["compiled"]], "each plan, both times"


def test_what_was_measured_before_an_end_stays(tmp_path, monkeypatch):
    def breaks(place):
        yield {"x": 1}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "replay", dataclasses.replace(PARTS["replay"], measure=breaks))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_part("replay", CPU, str(tmp_path))
    assert rows_of(tmp_path, "replay") == {"rows": [{"x": 1}], "whole": False}


def test_a_part_that_fails_or_hangs_ends_itself_alone(tmp_path, monkeypatch, capfd):
    """The parts' processes are stand-ins: one fails, one hangs, one is through."""
    stand_ins = {"throughput": "raise SystemExit(3)", "latency": "import time; time.sleep(60)",
                 "pipelines": "print('measured')"}  # fmt: skip
    run = gpu.subprocess.run

    def stand_in(command, timeout):
        code = stand_ins[command[command.index("benchmarks.gpu") + 1]]
        return run([command[0], "-c", code], timeout=min(timeout, 2))

    monkeypatch.setattr(gpu.subprocess, "run", stand_in)
    ended = run_all([*stand_ins, "replay"], CPU, str(tmp_path), seconds=6.5)
    assert ended["throughput"] == "failed (3)" and ended["latency"].startswith("ended after")
    assert ended["pipelines"] == "through" or ended["pipelines"].startswith("skipped")
    assert ended["replay"] == "skipped: no time left"


def test_without_a_gpu_it_says_what_to_do(capsys):
    for argv, said in (([], "sees no CUDA device"), (["speed"], "unknown parts speed")):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.long
def test_the_whole_way_runs_on_the_mini_teacher(tmp_path, capsys):
    full_smoke.main(["--tiny", "--results", str(tmp_path)])
    values = json.loads((tmp_path / "full_smoke_tiny.json").read_text())["values"]
    assert len(values["parts"]) == 9 and values["met"] and values["peak_gib"] < 20
    assert "open it with diffusers alone" in values["parts"]


@pytest.mark.slow  # two exports; that the images agree is tested beside `load_onnx`
def test_onnx_is_timed_beside_pytorch(tmp_path):
    onnx_latency.main(["--rounds", "1", "--steps", "2", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "onnx_latency.json").read_text())["values"]["rows"]
    assert len(rows) == 4 and all(row["median"] > 0 for row in rows.values())
