"""Several processes on CPUs, as launchers start them: one run, and the same as one process's."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdc
from kdc.data.datasets import WorldDataset
from kdc.training.checkpoints import checkpoints
from kdc.unet.slimming import slim
from tests.robustness.trials import narrow

ROOT = Path(__file__).resolve().parents[3]
IMAGES = 6  # in each forward pass, of all processes together

CODE = f"""
import json, sys
from pathlib import Path
import torch
import kdc
import kdc.training.loop
kdc.training.loop.has_bf16 = lambda device: False
from kdc.continual.sequence import run_sequence
from kdc.continual.strategies import STRATEGIES
from kdc.continual.tasks import Task
from kdc.processes import this_process
from kdc.training.checkpoints import TrainingState
from kdc.training.sharding import own
from safetensors.torch import save_file
from tests.robustness.trials import latents, narrow

folder, kinds, steps = Path(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3])
process, pipeline = this_process(), narrow()
settings = dict(batch_size={IMAGES} // process.num_processes, log_every=1, save_every=2,
                ema_decay=0.9, schedule="constant", warmup=0, learning_rate=1e-3,
                precision="no") | json.loads(sys.argv[4])
save, held = TrainingState.save, []
def saves(self, *args):
    moments = [v for entry in self.optimizer.state.values() for v in entry.values()]
    held.append([sum(own(v).numel() for v in moments if v.dim()),
                 sum(v.numel() for v in moments if v.dim())])
    save(self, *args)
TrainingState.save = saves
found = {{"processes": process.num_processes}}
for kind in kinds:
    if kind == "cache":
        from kdc.data import cache
        from kdc.data.datasets import WorldDataset
        wrote, write, cache.ROWS = [], cache.write_shard, 2
        cache.write_shard = lambda file, rows: (wrote.append(file.name), write(file, rows))
        data = kdc.cache_latents(pipeline, WorldDataset(["flora"], count=8), 2,
                                 folder=folder / "latents", dtype="float32")
        found["cache"] = [data.mean[:].sum().item(), data.embeddings[:].sum().item()]
        found["wrote"] = [name.split("-")[0] for name in wrote]
        continue
    student, place = kdc.slim(pipeline.unet, "kdc"), folder / kind
    if kind in STRATEGIES:
        uses = STRATEGIES[kind].mechanism.uses_buffer
        strategy = STRATEGIES[kind]
        if kind.startswith("generative"):
            strategy = strategy.replace(pool=6, sampling_steps=2)
        if kind == "ewc":
            strategy = strategy.replace(fisher_samples=4)
        def evaluate(probed, task):
            seen = probed.unet(task.train.mean[:2], 300, task.train.embeddings[:2]).sample
            return {{"error": seen.square().mean().item() + process.process_index}}
        result = run_sequence(
            [Task(f"task {{t}}", latents(pipeline, t)) for t in range(2)], strategy, student,
            pipeline,
            evaluate=torch.no_grad()(evaluate), higher_is_better={{"error": False}},
            buffer=kdc.ReplayBuffer(8, seed=3) if uses else None,
            steps=steps, output_dir=place, resume=True, **settings)
        losses = [row for log in result.logs for row in log["loss"].tolist()]
        found[kind] = [*losses, *result.matrix.values.flatten().tolist()]
    else:
        weights = kdc.LossWeights.only(*kind.split("+"))
        log = kdc.distill(student, pipeline, latents(pipeline, 1), weights=weights, steps=steps,
                          output_dir=place, resume=True, **settings)
        found[kind] = log["loss"].tolist()
    if process.is_main_process:
        state = {{k: v.contiguous() for k, v in student.state_dict().items()}}
        save_file(state, folder / f"{{kind}}.safetensors")
    found[f"{{kind}} sum"] = sum(p.double().sum().item() for p in student.parameters())
found["held"] = held
(folder / f"found-{{process.process_index}}.json").write_text(json.dumps(found))
"""


def command(processes, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
            *map(str, arguments)]  # fmt: skip


@functools.cache
def environment():
    kept = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(folder, processes, kinds, steps, **settings):
    folder.mkdir(exist_ok=True, parents=True)
    script = folder / "run.py"
    script.write_text(CODE)
    return subprocess.Popen(
        command(processes, script, folder, kinds, steps, json.dumps(settings)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(folder, processes, kinds, steps, **settings):
    """What each process found, and what was printed; the run must end well."""
    running = start(folder, processes, kinds, steps, **settings)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said[-3000:]
    return [json.loads(f.read_text()) for f in sorted(folder.glob("found-*.json"))]


def weights(folder, kind):
    return torch.cat(
        [x.double().flatten() for x in load_file(folder / f"{kind}.safetensors").values()]
    )


def check_equal(one, other, kind):
    """The weights agree but for rounding, which Adam magnifies where a gradient is nearly 0."""
    start = torch.cat(
        [x.double().flatten() for x in slim(narrow().unet, "kdc").state_dict().values()]
    )
    a, b = weights(one, kind), weights(other, kind)
    difference, moved = (a - b).norm(), (b - start).norm()
    assert difference < 3e-3 * moved, f"{kind}: {difference / moved} of the way"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each kind of run in one process, once."""
    folder = tmp_path_factory.mktemp("alone")
    launch(folder, 1, EVERY, 3)
    return folder


EVERY = "feature task+output task+output+soft+feature replay replay+distil agem ewc joint"
EVERY += " generative_replay"


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_are_one_run_and_equal_one_process(processes, alone, tmp_path):
    kinds = EVERY if processes == 2 else "feature task+output+soft+feature replay ewc"
    (one,) = [json.loads(f.read_text()) for f in alone.glob("found-*.json")]
    found = launch(tmp_path, processes, kinds, 3)
    assert [f["processes"] for f in found] == [processes] * processes
    for kind in kinds.split():
        assert len({f[f"{kind} sum"] for f in found}) == 1, f"{kind}: each trained for itself"
        assert found[0][kind] == found[1][kind], f"{kind}: each logs or scores for itself"
        assert found[0][kind] == pytest.approx(one[kind], rel=1e-5), kind
        check_equal(tmp_path, alone, kind)


@pytest.mark.long
def test_processes_fill_a_cache_side_by_side(teacher, tmp_path):
    found = launch(tmp_path, 2, "cache", 1)
    alone = kdc.cache_latents(teacher, WorldDataset(["flora"], count=8), 2)
    sums = [alone.mean.sum().item(), alone.embeddings.sum().item()]
    for each in found:
        assert each["cache"] == pytest.approx(sums, rel=1e-5)
        assert each["wrote"].count("latents") == 2, "two shards of two images each"
    assert sum("index.safetensors" in each["wrote"] for each in found) == 1


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_either_process_is_no_loss(victim, alone, tmp_path):
    """Killed at a checkpoint in the middle; the launcher ends the other, and the run goes on."""
    for kind, steps in (("task+output+soft+feature", 3), ("replay", 3)):
        running = start(tmp_path, 2, kind, steps)
        place = tmp_path / kind / ("task-1" if kind == "replay" else "")
        until = time.monotonic() + 120
        while not (place.is_dir() and checkpoints(place)) and running.poll() is None:
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.005)
        os.kill(sorted(children(running.pid))[victim], signal.SIGKILL)
        running.communicate(timeout=120)
        assert running.returncode != 0 and not (tmp_path / f"{kind}.safetensors").exists()
        launch(tmp_path, 2, kind, steps)
        check_equal(tmp_path, alone, kind)


def children(pid):
    """The processes that a launcher started, of this script."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(one) for one in listed.stdout.split()]


SHARED = {"shard_weights": True}
ALL = "task+output+soft+feature"


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_shared_out_weights_change_nothing_but_who_holds_them(processes, alone, tmp_path):
    kinds = f"{ALL} replay+distil joint" if processes == 2 else ALL
    sampled = {"sample_every": 2} if processes == 2 else {}
    (one,) = [json.loads(f.read_text()) for f in alone.glob("found-*.json")]
    found = launch(tmp_path, processes, kinds, 3, **sampled, **SHARED)
    for kind in kinds.split():
        assert len({f[f"{kind} sum"] for f in found}) == 1, f"{kind}: not the same weights"
        assert found[0][kind] == pytest.approx(one[kind], rel=1e-5), kind
        check_equal(tmp_path, alone, kind)
    for each in found:
        for parts, all_of_them in each["held"]:
            assert parts < 1.2 * all_of_them / processes
    shown = list(tmp_path.rglob("samples/*.png"))
    assert len(shown) == (5 if sampled else 0) and {f.stem for f in shown} <= {"step-0000002"}


@pytest.mark.long
def test_shared_out_weights_can_be_recomputed_accumulated_and_averaged_elsewhere(tmp_path):
    how = {"accumulation": 2, "ema_on_cpu": True}
    launch(tmp_path / "one", 1, ALL, 2, **how)
    launch(tmp_path / "two", 2, ALL, 2, gradient_checkpointing=True, **how, **SHARED)
    check_equal(tmp_path / "two", tmp_path / "one", ALL)


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes_and_other_ways(alone, tmp_path):
    """Weights shared out by two, then whole in one, then shared out again."""
    launch(tmp_path, 2, ALL, 1, **SHARED)
    launch(tmp_path, 1, ALL, 2)
    launch(tmp_path, 2, ALL, 3, **SHARED)
    check_equal(tmp_path, alone, ALL)


@pytest.mark.long
def test_accelerate_launches_the_commands(tmp_path):
    """Two processes by `accelerate launch -m kdc`, from a file, the latents encoded by both.

    Accelerate starts several processes only where it is told that there are GPUs; kdc sees that
    there are none, and takes CPUs.
    """
    config = {"dataset": "flora", "images": 6, "steps": 2, "batch_size": 2, "log_every": 1,
              "ema_decay": 0.0, "precision": "no", "cache_dir": str(tmp_path / "latents"),
              "output_dir": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                "--main_process_port", "0", "-m", "kdc", "distill",
                "--config", str(tmp_path / "config.yaml")]  # fmt: skip
    done = subprocess.run(
        launcher, env=environment(), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(tmp_path / "run")) == 1, "only the first process says so"
    assert "2 processes x 2 images = 4 images an update" in done.stderr, done.stderr
    assert pd.read_csv(tmp_path / "run" / "log.csv")["images"].tolist() == [4, 8]
    assert (tmp_path / "run" / "unet" / "config.json").is_file()
    assert len(list((tmp_path / "latents").glob("*/latents-*"))) == 1


def test_what_cannot_be_shared_is_refused(teacher, monkeypatch):
    from kdc.continual import sequence
    from kdc.continual.strategies import find_strategy
    from kdc.distillation.losses import LossWeights
    from kdc.processes import this_process
    from kdc.training.settings import TrainSettings

    class Two:
        num_processes, device, is_main_process = 2, torch.device("cpu"), True

    def check(name, batch_size, shard_weights=False, **changes):
        strategy = find_strategy(name).replace(**changes)
        uses = strategy.mechanism.uses_buffer
        sequence.check_sequence(
            strategy,
            teacher.unet,
            teacher,
            buffer=kdc.ReplayBuffer(4) if uses else None,
            settings=TrainSettings(1, batch_size=batch_size, shard_weights=shard_weights),
            weights=LossWeights.only("task"),
            output_dir=None,
            resume=False,
        )

    assert this_process().num_processes == 1
    monkeypatch.setattr(sequence, "this_process", Two)
    check("replay", 2)
    check("ewc", 1, ratio=0.5)  # which has no old images
    with pytest.raises(ValueError, match="last_sample runs in one process .* cannot be shared out"):
        check("last_sample", 2)
    with pytest.raises(ValueError, match="replay adds 1 old images to 1 x 2 new ones"):
        check("replay", 1, ratio=0.5)
    check("replay", 2, shard_weights=True)
    for name in ("agem", "ewc"):
        with pytest.raises(ValueError, match=f"{name} looks at whole weights .* shard_weights out"):
            check(name, 2, shard_weights=True)
    with pytest.raises(ValueError, match="shard_weights goes with neither compile nor"):
        TrainSettings(1, shard_weights=True, compile=True)


def test_accelerates_own_sharding_is_refused_by_name(monkeypatch):
    from accelerate.utils import DistributedType

    from kdc.training import loop

    class Sharding:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(loop, "Accelerator", lambda **settings: Sharding())
    with pytest.raises(ValueError, match="FSDP is not supported: .* set shard_weights"):
        loop.make_accelerator("no")


def test_one_process_is_one(monkeypatch):
    from kdc.processes import own_part, this_process

    assert this_process().num_processes == 1 and this_process().device.type in ("cpu", "cuda")
    assert own_part(5) == slice(0, 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but this one sees itself"):
        this_process()
    assert torch.distributed.is_initialized() is False
