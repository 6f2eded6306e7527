"""Several processes on CPUs, as torchrun starts them: one run, one folder, one log."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

CODE = """
import sys, torch, kdc
from kdc.data.datasets import WorldDataset
from kdc.processes import this_process
from kdc.distillation.step import DistillationStep

torch.cpu._is_amx_tile_supported = lambda: False
folder, term = sys.argv[1:3]
own = []
call = DistillationStep.__call__
def watched(self, *args):
    terms = call(self, *args)
    own.append(terms["loss"].item())
    return terms
DistillationStep.__call__ = watched
teacher = kdc.load_teacher("mini")
data = kdc.cache_latents(teacher, WorldDataset(["flora"], count=8))
student = kdc.slim(teacher.unet, "kdc")
settings = dict(steps=int(sys.argv[3]), batch_size=2, log_every=1, schedule="constant", warmup=0)
kdc.distill(student, teacher, data, weights=kdc.LossWeights.only(*term.split(",")),
            output_dir=folder, resume=True, **settings)
total = sum(p.double().sum().item() for p in student.parameters())
process = this_process()
found = {"processes": process.num_processes, "own": own, "weights": total}
with open(f"{folder}/found-{process.process_index}.json", "w") as file:
    import json
    json.dump(found, file)
"""


def launch(folder, term, steps, processes=2):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    (folder.parent / "run.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(folder.parent / "run.py"), str(folder), term, str(steps)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done, [json.loads(f.read_text()) for f in sorted(folder.glob("found-*.json"))]


@pytest.mark.long
@pytest.mark.parametrize("term", ["feature", "task,output"])
def test_two_processes_are_one_run(term, tmp_path):
    done, found = launch(tmp_path / "whole", term, 4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [f["processes"] for f in found] == [2, 2]
    assert found[0]["weights"] == found[1]["weights"], "each trained for itself"
    assert found[0]["own"][0] != found[1]["own"][0], "both drew the same images"
    log = pd.read_csv(tmp_path / "whole" / "log.csv")
    means = [sum(pair) / 2 for pair in zip(*(f["own"] for f in found), strict=True)]
    assert log["loss"].tolist() == pytest.approx(means, rel=1e-6)
    assert log["images"].tolist() == [4, 8, 12, 16]

    launch(tmp_path / "parts", term, 2)
    done, again = launch(tmp_path / "parts", term, 4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert again[0]["weights"] == found[0]["weights"] and len(again[0]["own"]) == 2
    alone, _ = launch(tmp_path / "parts", term, 6, processes=1)
    assert alone.returncode != 0 and "processes=2, now processes=1" in alone.stderr


def test_one_process_is_one(monkeypatch):
    from kdc.processes import this_process

    assert this_process().num_processes == 1 and this_process().device.type in ("cpu", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but this one sees itself"):
        this_process()
    assert torch.distributed.is_initialized() is False
