import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import kdc
from kdc import LossWeights, ReplayBuffer, Task
from kdc.continual.learner import Learner
from kdc.continual.mechanisms.base import draw_items
from kdc.continual.mechanisms.buffer import BufferReplay
from kdc.continual.mechanisms.ewc import RankOneEWC, RankOneFisher
from kdc.continual.mechanisms.generated import Generated, generate_pool
from kdc.continual.mechanisms.last_sample import LastSample
from kdc.continual.sequence import learn_first, run_sequence
from kdc.continual.strategies import STRATEGIES, Strategy
from kdc.continual.tasks import split_classes
from kdc.data import worlds
from kdc.data.latents import LatentDataset
from kdc.pipelines import load_student
from kdc.replay.storage import item_bytes

SMALL = dict(pool=6, sampling_steps=2, fisher_samples=3)


def small(strategy):
    """The strategy with those of the small options that its mechanism has."""
    known = {name: value for name, value in SMALL.items() if name in strategy.options}
    return strategy.replace(**known)


QUICK = {name: small(strategy) for name, strategy in STRATEGIES.items()}


def latents(count=12, seed=0, captions=("a red rose", "a blue tulip")):
    g = torch.Generator().manual_seed(seed)
    return LatentDataset(
        torch.randn(count, 4, 8, 8, generator=g),
        0.1 * torch.rand(count, 4, 8, 8, generator=g),
        torch.randn(len(captions), 7, 16, generator=g),
        torch.arange(count) % len(captions),
        torch.zeros(7, 16),
        list(captions),
    )


def three_tasks():
    prompt_embeds = [
        ("a red rose", "a blue tulip"),
        ("a pink lily",),
        ("a white poppy", "a red poppy"),
    ]
    return [Task(f"task {i}", latents(seed=i, captions=w)) for i, w in enumerate(prompt_embeds)]


tasks = pytest.fixture(three_tasks, scope="module")


def two_stages(*widths):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type=None,
            block_out_channels=widths,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )


def narrowed(teacher):
    """The mini teacher's pipeline around a U-Net of two narrow stages, which is quick to train."""
    return kdc.with_unet(teacher, two_stages(8, 16))


narrow = pytest.fixture(narrowed)


def weights(unet):
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


def probe(pipeline, task):
    """A cheap score of the weights and of the task, the same every time."""
    data = task.train
    with torch.no_grad():
        t = torch.full((4,), 300)
        out = pipeline.unet(data.mean[:4], t, data.embeddings[data.caption_index[:4]]).sample
    return {"error": out.square().mean().item(), "level": -out.mean().item()}


HIGHER_IS_BETTER = {"error": False, "level": True}


def buffer_for(strategy, **settings):
    if not strategy.mechanism.uses_buffer:
        return None
    return ReplayBuffer(**({"capacity": 8, "policy": "class_balanced", "seed": 3} | settings))


def run(tasks, strategy, narrow, student=None, **settings):
    strategy = QUICK[strategy] if isinstance(strategy, str) else strategy
    student = student or copy.deepcopy(narrow.unet)
    settings = {
        "steps": 4, "batch_size": 3, "ema_decay": 0.9, "save_every": 2, "seed": 1,
        "evaluate": probe, "higher_is_better": HIGHER_IS_BETTER, "buffer": buffer_for(strategy),
    } | settings  # fmt: skip
    result = run_sequence(tasks, strategy, student, narrow, **settings)
    return student, result


class Killed(BaseException):
    """Nothing catches it."""


def dying(monkeypatch, after):
    """From here on the process dies at the given call of a step; returns how many were made."""
    calls, original = [], Learner._new

    def new(self, *arguments):
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Learner, "_new", new)
    return calls


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequence_killed_anywhere_ends_as_one_that_was_not(
    strategy, tasks, narrow, tmp_path, monkeypatch
):
    """Killed in the first task, in the second after a checkpoint, and in a later evaluation."""
    whole, expected = run(tasks, strategy, narrow, reference=Task("other", latents(seed=9)))
    again = dict(reference=Task("other", latents(seed=9)), output_dir=tmp_path, resume=True)
    for after in (3, 3 + 1):  # step 3 of task 0; then, from step 2, step 3 of task 1
        with monkeypatch.context() as patch:
            dying(patch, after)
            with pytest.raises(Killed):
                run(tasks, strategy, narrow, **again)
    asked = []

    def dying_probe(pipeline, task):
        asked.append(task.name)
        if len(asked) == 6:  # four scores after task 1, then the second after task 2
            raise Killed
        return probe(pipeline, task)

    with pytest.raises(Killed):
        run(tasks, strategy, narrow, evaluate=dying_probe, **again)
    with monkeypatch.context() as patch:
        calls = dying(patch, None)
        resumed, result = run(tasks, strategy, narrow, **again)
    assert not calls, "a task that was learnt was learnt again"
    assert asked[4] == "task 0" and torch.equal(weights(resumed), weights(whole))
    for metric in HIGHER_IS_BETTER:
        assert result.matrices[metric] == expected.matrices[metric]
    plain = [c for c in expected.counts if c != "seconds"]
    pd.testing.assert_frame_equal(result.counts[plain], expected.counts[plain])
    assert (result.counts["seconds"] > 0).all()
    last = load_student(tmp_path / "task-2", narrow).unet
    assert torch.equal(weights(last), weights(whole))
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("checkpoint-*"))


def test_the_matrix_holds_what_evaluate_said(tasks, narrow, tmp_path):
    student, result = run(tasks, "replay", narrow, output_dir=tmp_path)
    for metric, direction in HIGHER_IS_BETTER.items():
        matrix = result.matrices[metric]
        assert (matrix.metric, matrix.higher_is_better) == (metric, direction)
        assert matrix.names == ("task 0", "task 1", "task 2")
        for t, name in [(-1, "start"), (0, "task-0"), (1, "task-1"), (2, "task-2")]:
            pipeline = load_student(tmp_path / name, narrow)
            row = matrix.start if t < 0 else matrix.values[t]
            assert row.tolist() == [probe(pipeline, task)[metric] for task in tasks]
    assert result.matrix is result.matrices["error"]


def test_only_what_was_learnt_is_scored_where_nothing_ahead_is_wanted(tasks, narrow):
    other = Task("other", latents(seed=9))
    _, result = run(tasks, "finetune", narrow, ahead=False, reference=other)
    below = np.tril(np.ones((3, 3), bool))
    assert np.array_equal(~np.isnan(result.matrix.values), below)
    assert result.matrix.start is None and np.isfinite(result.matrix.reference).all()
    assert np.isfinite(result.matrix.retention) and np.isnan(result.matrix.forward_transfer)


TAUGHT = QUICK | {
    "replay, other terms": QUICK["replay"].replace(old_weights=LossWeights.only("task", "feature")),
    "replay, old model, all terms": QUICK["replay"].replace(old_target="old model"),
}


@pytest.mark.parametrize("name", TAUGHT)
def test_a_narrower_student_learns_through_projections_by_every_strategy(
    name, tasks, narrow, tmp_path, monkeypatch
):
    """They are neither part of what the penalty holds nor left behind, and survive a kill."""
    strategy, settings = TAUGHT[name], {"weights": LossWeights()}
    whole, expected = run(tasks[:2], strategy, narrow, two_stages(4, 8), **settings)
    settings |= {"output_dir": tmp_path, "resume": True}
    with monkeypatch.context() as patch:
        dying(patch, 4 + 3)  # in step 4 of task 1, after a checkpoint
        with pytest.raises(Killed):
            run(tasks[:2], strategy, narrow, two_stages(4, 8), **settings)
    (file,) = tmp_path.glob("task-1/checkpoint-*/model.safetensors")
    added = {n.split(".")[0] for n in load_file(file) if n.startswith("feature_projections")}
    # replay follows the teacher with one loss for old and new images, so through the same ones
    assert len(added) == (2 if name == "replay, other terms" else 1)
    student, result = run(tasks[:2], strategy, narrow, two_stages(4, 8), **settings)
    assert torch.equal(weights(student), weights(whole)) and result.matrices == expected.matrices
    assert set(student.state_dict()) == set(two_stages(4, 8).state_dict())
    assert not any(m._forward_hooks for u in (student, narrow.unet) for m in u.modules())
    assert not torch.equal(weights(student), weights(two_stages(4, 8)))
    log = pd.read_csv(tmp_path / "task-1" / "log.csv")
    assert (log["feature"] > 0).all() and log.notna().all(axis=None)
    if strategy.mechanism is RankOneEWC:
        penalty = log["penalty"]
        assert penalty.iloc[0] == pytest.approx(0, abs=1e-12) and penalty.iloc[-1] > 1e-12
        size = 4 * sum(p.numel() for p in student.parameters())
        assert result.counts["model_bytes"].tolist() == [2 * size, 3 * size]


def test_costs_are_counted(tasks, narrow):
    """By hand for 3 tasks of 4 steps of 3 new images, a ratio of 1, and buffers of 8 items."""
    parameters = sum(p.numel() for p in narrow.unet.parameters())
    item = item_bytes((4, 8, 8), "float16")
    table = {name: run(tasks, name, narrow)[1].counts for name in STRATEGIES}
    for name, counts in table.items():
        assert counts["new_images"].tolist() == [12, 12, 12], name
        assert counts["teacher_images"].sum() == 0
    columns = ["old_images", "old_teacher_images", "sampler_images", "fisher_images"]
    expected = {
        "finetune": ([0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        "last_sample": ([3, 4, 4], [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        "replay": ([0, 12, 12], [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        "replay+distil": ([0, 12, 12], [0, 12, 12], [0, 0, 0], [0, 0, 0]),
        # 6 images in 2 sampler steps, each with and without the caption
        "generative_replay": ([0, 12, 12], [0, 0, 0], [0, 24, 24], [0, 0, 0]),
        "generative_distillation": ([0, 12, 12], [0, 12, 12], [0, 24, 24], [0, 0, 0]),
        "ewc": ([0, 0, 0], [0, 0, 0], [0, 0, 0], [6, 6, 6]),
        "agem": ([0, 12, 12], [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        "joint": ([0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]),
    }
    assert set(expected) == set(STRATEGIES)
    for name, rows in expected.items():
        assert [table[name][c].tolist() for c in columns] == list(map(list, rows)), name
    assert table["replay"]["buffer_bytes"].tolist() == [8 * item] * 3
    assert table["finetune"][["buffer_bytes", "model_bytes"]].eq(0).all(axis=None)
    assert table["replay+distil"]["model_bytes"].tolist() == [0, 4 * parameters, 4 * parameters]
    assert table["ewc"]["model_bytes"].tolist() == [4 * parameters * n for n in (2, 3, 4)]
    taught = run(tasks[:2], "replay", narrow, weights=LossWeights.only("output", "feature"))[1]
    assert taught.counts["teacher_images"].tolist() == [12, 12]
    assert taught.counts["old_teacher_images"].tolist() == [0, 12]


def test_every_strategy_takes_the_same_first_task(tasks, narrow):
    """Nothing is old yet: up to the first task they agree bit for bit (joint sees all tasks)."""
    first = {name: run(tasks[:1], name, narrow)[0] for name in STRATEGIES if name not in ("joint",)}
    plain = weights(first["finetune"])
    for name, student in first.items():
        assert torch.equal(weights(student), plain) == (name != "last_sample"), name


def test_a_fine_tuned_task_is_plain_distillation(tasks, narrow):
    """The loop adds nothing of its own: the first task equals `distill` on the same seed."""
    student, _ = run(tasks[:1], "finetune", narrow)
    other = copy.deepcopy(narrow.unet)
    kdc.distill(
        other, narrow, tasks[0].train, steps=4, batch_size=3, ema_decay=0.9, seed=1000,
        weights=LossWeights.only("task"),
    )  # fmt: skip
    # `run` draws the same numbers in the same order, so not even the last bit differs.
    assert torch.equal(weights(student), weights(other))


def test_every_strategy_sees_the_same_new_images(tasks, narrow, monkeypatch):
    """Noise, timesteps and images of the second task, as the student is shown them."""
    seen, compute = {}, type(narrow.unet).forward

    def watching(unet, sample, timestep, *arguments, **named):
        if torch.is_grad_enabled() and unet is not narrow.unet:
            seen[name].append((sample.detach().clone(), timestep))
        return compute(unet, sample, timestep, *arguments, **named)

    for name in ("finetune", "replay", "replay+distil", "generative_distillation"):
        seen[name] = []
        with monkeypatch.context() as patch:
            patch.setattr(type(narrow.unet), "forward", watching)
            run(tasks[:2], name, narrow)
    alone = seen.pop("finetune")
    assert len(alone) == 8
    for name, calls in seen.items():
        with_old = calls[4:]
        assert len(with_old) == 8, name
        for (new, t), (other, u) in zip(alone[4:], with_old[::2], strict=True):
            assert torch.equal(new, other) and torch.equal(t, u), name


def test_old_and_new_images_count_by_their_number(tasks, narrow, tmp_path):
    """The first step of the second task by hand: 3 new and 6 old images, noise and all."""
    strategy = QUICK["replay"].replace(ratio=2.0)
    run(tasks[:2], strategy, narrow, output_dir=tmp_path)
    row = pd.read_csv(tmp_path / "task-1" / "log.csv").iloc[0]
    student = load_student(tmp_path / "task-0", narrow).unet
    buffer = ReplayBuffer.load(tmp_path / "task-0" / "buffer.safetensors")
    g, data = torch.Generator().manual_seed(1001 * 1009), tasks[1].train
    alphas = DDPMScheduler.from_config(narrow.scheduler.config).alphas_cumprod

    def error(mean, std, embedding, g=g):
        latent = mean + std * torch.randn(mean.shape, generator=g)
        dropped = torch.rand(len(mean), generator=g) < 0.1
        embedding[dropped] = 0
        noise = torch.randn(mean.shape, generator=g)
        t = torch.randint(1000, (len(mean),), generator=g)
        a = alphas[t][:, None, None, None]
        with torch.no_grad():
            guess = student(a.sqrt() * latent + (1 - a).sqrt() * noise, t, embedding).sample
        return (guess - noise).square().mean().item()

    new = error(**data[torch.randint(12, (3,), generator=g)])
    old, aside = buffer.sample(6), torch.Generator()
    aside.set_state(g.get_state())  # old images draw from a generator that g's state seeds
    aside.manual_seed(torch.randint(2**62, (), generator=aside).item())
    old = error(old["mean"], old["std"], old["embedding"], aside)
    assert row["new_loss"] == pytest.approx(new, rel=1e-4)
    assert row["old_loss"] == row["old_task"] == pytest.approx(old, rel=1e-4)
    assert row["loss"] == pytest.approx(new / 3 + 2 * old / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "zero"),
    [("replay+distil", "old_output"), ("generative_distillation", "old_loss"), ("ewc", "penalty")],
)
def test_what_holds_the_student_is_the_student_before_the_task(
    strategy, zero, tasks, narrow, tmp_path
):
    """At the first step they are the same, so nothing pulls; later it does."""
    run(tasks[:2], strategy, narrow, output_dir=tmp_path)
    log = pd.read_csv(tmp_path / "task-1" / "log.csv")
    assert log[zero].iloc[0] == pytest.approx(0, abs=1e-12) and log[zero].iloc[-1] > 1e-12
    assert log["loss"].iloc[0] > 0


def test_a_small_buffer_is_gone_through_again():
    buffer = ReplayBuffer(3, dtype="float32", seed=1)
    buffer.add(latents(3))
    batch = draw_items(buffer, 8)
    found = (batch["mean"][:, None] == buffer.items()["mean"]).all(dim=(2, 3, 4)).long()
    assert found.sum(dim=1).eq(1).all() and sorted(found.sum(dim=0).tolist()) == [2, 3, 3]
    assert batch["embedding"].shape == (8, 7, 16)


def test_last_sample_rehearses_the_last_image_of_the_step_before(tasks, narrow, monkeypatch):
    seen = []
    original = Learner._posterior

    def watching(self, batch, generator):
        seen.append(batch["mean"])
        return original(self, batch, generator)

    monkeypatch.setattr(Learner, "_posterior", watching)
    stored = []
    monkeypatch.setattr(LastSample, "finish", lambda self, t: stored.append(self.stored["mean"]))
    run(tasks[:2], "last_sample", narrow)
    assert torch.equal(stored[-1], seen[-2][-1:])
    assert [len(m) for m in seen] == [3] + [3, 1] * 7
    new, old = [m for m in seen if len(m) == 3], [m for m in seen if len(m) == 1]
    for before, carried in zip(new, old, strict=False):
        assert torch.equal(carried[0], before[-1])


def test_joint_draws_from_every_task(tasks, narrow, monkeypatch):
    seen = []
    original = Learner._posterior
    monkeypatch.setattr(
        Learner, "_posterior", lambda self, b, g: seen.append(b["mean"]) or original(self, b, g)
    )
    run(tasks, "joint", narrow, steps=1, batch_size=60, ahead=False)
    for batch in seen:
        assert len(batch) == 60
        counts = [(batch[:, None] == t.train.mean).all(dim=(2, 3, 4)).sum() for t in tasks]
        assert min(counts) > 5 and sum(counts) == 60


def test_the_rank_one_fisher_is_the_best_of_its_form():
    """A linear model, float64 by hand: m is the mean gradient, c minimises |G - c m m^T|."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=True)
    x, y = torch.randn(8, 3) + 1, torch.randn(8, 1) + 2
    fisher = RankOneFisher()

    def loss(i):
        return (model(x[i]) - y[i]).square().mean()

    fisher.learn(model, loss, 8)
    w, b = model.weight.detach().double(), model.bias.detach().double()
    error = x.double() @ w.T + b - y.double()
    gradients = 2 * error * torch.cat([x.double(), torch.ones(8, 1)], dim=1)
    mean, exact = gradients.mean(dim=0), gradients.T @ gradients / 8
    grid = torch.linspace(0.2, 5, 48001, dtype=torch.float64)
    outer = torch.outer(mean, mean)
    best = grid[((exact - grid[:, None, None] * outer) ** 2).sum(dim=(1, 2)).argmin()]
    assert fisher.scales[0] == pytest.approx(best.item(), abs=2e-4)
    assert torch.allclose(fisher.directions[0].double(), mean, atol=1e-5)
    assert fisher.penalty(model.parameters()) == 0
    step = torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64)
    with torch.no_grad():
        model.weight += step[:3].float()
        model.bias += step[3:].float()
    expected = 0.5 * best * (mean @ step) ** 2
    assert fisher.penalty(model.parameters()).item() == pytest.approx(expected.item(), rel=1e-3)
    fisher.learn(model, loss, 8)
    assert fisher.penalty(model.parameters()) == 0 and fisher.bytes == 4 * 4 * 3
    other = RankOneFisher()
    other.load_state_dict(fisher.state_dict())
    with torch.no_grad():
        model.weight += 0.1
    assert other.penalty(model.parameters()) == fisher.penalty(model.parameters()) > 0


def test_the_penalty_holds_the_weights_along_its_direction(tasks, narrow):
    """With a heavy weight the second task moves less along the first one's mean gradient."""

    def moved(weight):
        strategy = QUICK["ewc"].replace(weight=weight)
        student = copy.deepcopy(narrow.unet)
        fishers = []
        original = RankOneFisher.learn

        def learn(self, model, loss, samples):
            if not self.directions:
                fishers.append(copy.deepcopy(self))
                original(fishers[0], model, loss, samples)
            else:
                fishers.append(fishers[0].penalty(model.parameters()).item())
            original(self, model, loss, samples)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RankOneFisher, "learn", learn)
            run_sequence(
                tasks[:2], strategy, student, narrow, steps=8, batch_size=4, evaluate=probe,
                higher_is_better=HIGHER_IS_BETTER, learning_rate=5e-3, ahead=False,
            )  # fmt: skip
        return fishers[-1]

    assert moved(1e4) < 0.3 * moved(1e-9)


def test_a_pool_holds_what_the_pipeline_draws(tasks, narrow):
    """Against the pipeline called by hand on the same noise and captions."""
    how = {"size": 5, "sampling_steps": 2, "guidance": 1.5}
    pool = generate_pool(narrow, tasks[:2], **how, seed=3)
    items = pool.items()
    assert items["task"].tolist() == [0, 0, 0, 1, 1] and items["std"].eq(0).all()
    g = torch.Generator().manual_seed(3)
    data = tasks[0].train
    prompt_embeds = data.embeddings[data.caption_index[torch.randint(12, (3,), generator=g)]]
    generated = narrow(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=data.empty.expand_as(prompt_embeds),
        latents=torch.randn(3, 4, 8, 8, generator=g), num_inference_steps=2,
        guidance_scale=1.5, output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(items["mean"][:3], generated, atol=1e-5)


def test_classes_become_tasks():
    kinds = ("rose", "tulip", "lily", "poppy")
    captions = [f"a {c} {k} on a sand background" for k in kinds for c in ("red", "blue")]
    data, test = latents(40, captions=captions), latents(16, seed=5, captions=captions)

    def kind(caption):
        return worlds.read_caption(caption).kind

    tasks = split_classes(data, kind, per_task=2, test=test)
    assert [task.name for task in tasks] == ["lily + poppy", "rose + tulip"]
    for task in tasks:
        assert {kind(p) for p in task.prompts} == set(task.name.split(" + "))
        assert len(task.train) == 20 and len(task.test) == 8 and len(task.prompts) == 4
        for row in range(20):
            caption = task.train.captions[task.train.caption_index[row]]
            source = (data.mean == task.train.mean[row]).all(dim=(1, 2, 3)).nonzero().item()
            assert caption == data.captions[data.caption_index[source]]
            assert task.labels[row] == kind(caption)
            assert torch.equal(task.train[row]["embedding"], data[source]["embedding"])
    orders = {tuple(t.name for t in split_classes(data, kind, order=seed)) for seed in range(6)}
    assert len(orders) > 3 and all(sorted(o) == sorted(kinds) for o in orders)
    named = split_classes(data, kind, order=["tulip", "rose"])
    assert [task.name for task in named] == ["tulip", "rose"]
    assert len(split_classes(data)) == 8  # every caption a class
    for settings, message in (
        (dict(order=["rose", "orchid"]), r"no images of \['orchid'\]"),
        (dict(order=["rose"]), "a sequence needs two tasks"),
        (dict(per_task=0), "per_task"),
    ):
        with pytest.raises(ValueError, match=message):
            split_classes(data, kind, **settings)


def killed_at(step, folder):
    """What the process below runs: it is killed, by a signal that nobody can catch."""
    original, calls = Learner._new, []

    def new(self, *arguments):
        calls.append(1)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    Learner._new = new
    run(three_tasks(), "replay", narrowed(kdc.load_teacher("mini", device="cpu")),
        output_dir=folder)  # fmt: skip


@pytest.mark.long
def test_a_killed_process_goes_on_as_if_nothing_had_happened(tasks, narrow, tmp_path):
    code = (
        "import kdc.training.loop as t; t.has_bf16 = lambda device: False\n"  # as here
        f"from test_sequence import killed_at; killed_at(7, {str(tmp_path)!r})"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    dead = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | threads
    )
    assert dead.returncode == -signal.SIGKILL and not (tmp_path / "task-2").exists()
    whole, expected = run(tasks, "replay", narrow)
    resumed, result = run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert result.matrices == expected.matrices


def test_resume_refuses_another_experiment_and_a_new_run_an_old_folder(tasks, narrow, tmp_path):
    run(tasks[:2], "replay", narrow, output_dir=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True, or give another output_dir"):
        run(tasks[:2], "replay", narrow, output_dir=tmp_path)
    again = dict(output_dir=tmp_path, resume=True)
    for change, message in (
        (dict(seed=2), "seed=1, now seed=2"),
        (dict(steps=5), "steps=4, now steps=5"),
        (dict(buffer=ReplayBuffer(9)), "buffer="),
        (dict(tasks=tasks), "tasks="),
        (dict(strategy="replay+distil"), "strategy="),
        (dict(tasks=[tasks[0], Task("task 1", latents(seed=77))]), "data="),
    ):
        arguments = {"tasks": tasks[:2], "strategy": "replay"} | again | change
        with pytest.raises(ValueError, match=message):
            run(arguments.pop("tasks"), arguments.pop("strategy"), narrow, **arguments)
    note = json.loads((tmp_path / "sequence.json").read_text())
    assert note["learnt"] == 2 and len(note["scores"]) == 6


@pytest.mark.parametrize("name", ["replay", "agem"])
def test_a_new_sequence_refuses_a_buffer_that_holds_items_and_resume_takes_it(
    name, tasks, narrow, tmp_path, monkeypatch
):
    def never(*arguments):
        raise AssertionError("scored")

    def buffer():
        return buffer_for(QUICK[name])

    whole, expected = run(tasks[:2], name, narrow, buffer=buffer())
    used = buffer()
    with monkeypatch.context() as patch:
        dying(patch, 5)
        with pytest.raises(Killed):
            run(tasks[:2], name, narrow, buffer=used, output_dir=tmp_path / "kept")
    held = used.state_dict()
    assert len(used)
    new = {"output_dir": tmp_path / "new"}
    for fresh in ({}, new, new | {"resume": True}):
        with pytest.raises(ValueError, match="already holds .* give it a new one"):
            run(tasks[:2], name, narrow, buffer=used, evaluate=never, **fresh)
    assert not (tmp_path / "new").exists()
    assert all(torch.equal(held[k], v) for k, v in used.state_dict().items())
    again = {"output_dir": tmp_path / "kept", "resume": True}
    student, result = run(tasks[:2], name, narrow, buffer=used, **again)
    assert torch.equal(weights(student), weights(whole)) and result.matrices == expected.matrices


def test_what_cannot_be_run_is_refused_before_anything_is_scored(tasks, narrow):
    def never(*arguments):
        raise AssertionError("scored")

    wide = Task("wide", dataclasses.replace(latents(), mean=torch.zeros(12, 4, 4, 4)))
    for settings, message in (
        (dict(strategy=Strategy("replay", BufferReplay), buffer=None), "replay needs a buffer"),
        (dict(strategy="finetune", buffer=ReplayBuffer(3)), "finetune uses no buffer"),
        (dict(strategy="last_sample", buffer=ReplayBuffer(3)), "last_sample uses no buffer"),
        (dict(tasks=[]), "names of their own"),
        (dict(tasks=[tasks[0], tasks[0]]), "names of their own"),
        (dict(tasks=[wide]), r"latents of \(4, 4, 4\), the student takes \(4, 8, 8\)"),
        (dict(higher_is_better={"error": "down"}), "True or False"),
        (dict(batch_size=0), "batch_size"),
    ):
        arguments = {"tasks": tasks, "strategy": "finetune", "evaluate": never} | settings
        with pytest.raises(ValueError, match=message):
            run(arguments.pop("tasks"), arguments.pop("strategy"), narrow, **arguments)
    with pytest.raises(ValueError, match="unknown strategy 'nothing'; the strategies are finetune"):
        run_sequence(
            tasks,
            "nothing",
            narrow.unet,
            narrow,
            steps=1,
            evaluate=never,
            higher_is_better=HIGHER_IS_BETTER,
        )
    with pytest.raises(ValueError, match=r"evaluate gave \['fd'\], but higher_is_better names"):
        run(tasks, "finetune", narrow, evaluate=lambda p, t: {"fd": 1.0})
    with pytest.raises(ValueError, match="old_target must be one of teacher, old model, not 'me'"):
        Strategy("wrong", old_target="me")
    with pytest.raises(ValueError, match="pool must be at least 1"):
        Strategy("wrong", Generated, options={"pool": 0})
    with pytest.raises(TypeError, match="did you mean guidance"):
        Strategy("wrong", Generated, options={"guidence": 2.0})
    for value in (np.nan, np.inf, -np.inf, -0.5):
        with pytest.raises(ValueError, match=f"ratio must be positive and finite, not {value}"):
            Strategy("wrong", BufferReplay, ratio=value)
        with pytest.raises(
            ValueError, match=f"weight must be finite and not negative, not {value}"
        ):
            Strategy("wrong", RankOneEWC, options={"weight": value})
    with pytest.raises(ValueError, match="2 labels, 12 images"):
        Task("few", latents(), labels=["a", "b"])


@pytest.mark.parametrize("strategy", [n for n in STRATEGIES if n not in ("joint", "last_sample")])
def test_a_first_task_learnt_before_changes_nothing(strategy, tasks, narrow):
    settings = dict(steps=4, batch_size=3, ema_decay=0.9, seed=1)
    first = learn_first(tasks[0], copy.deepcopy(narrow.unet), narrow, **settings)
    whole, expected = run(tasks[:2], strategy, narrow)
    student, result = run(tasks[:2], strategy, narrow, first=first)
    assert torch.equal(weights(student), weights(whole))
    assert result.matrices == expected.matrices
    same = [name for name in result.counts if name != "seconds"]
    assert result.counts[same].equals(expected.counts[same])


def test_a_first_task_of_their_own_is_not_taken_from_elsewhere(tasks, narrow):
    first = learn_first(tasks[0], copy.deepcopy(narrow.unet), narrow, steps=1, batch_size=2)
    for name in ("joint", "last_sample"):
        with pytest.raises(ValueError, match=f"{name} learns the first task in its own way"):
            run(tasks[:2], name, narrow, first=first)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


SEQUENCE_DAMAGE = {
    "the student's weights": lambda f: flip(next((f / "task-1" / "unet").glob("*.safetensors"))),
    "the buffer": lambda f: flip(f / "task-1" / "buffer.safetensors"),
    "no manifest": lambda f: (f / "task-1" / "manifest.json").unlink(),
    "an empty note": lambda f: (f / "task-1" / "kdc.json").write_bytes(b""),
    "the folder is gone": lambda f: shutil.rmtree(f / "task-1"),
}


def stopped_in_the_third_task(tasks, narrow, folder, monkeypatch):
    with monkeypatch.context() as patch:
        dying(patch, 4 + 4 + 3)
        with pytest.raises(Killed):
            run(tasks, "replay", narrow, output_dir=folder)
    assert (folder / "task-2" / "checkpoint-0000002").is_dir()


@pytest.mark.parametrize("kind", SEQUENCE_DAMAGE)
def test_a_damaged_task_is_learnt_again_from_the_one_before(
    kind, tasks, narrow, tmp_path, monkeypatch
):
    whole, expected = run(tasks, "replay", narrow)
    stopped_in_the_third_task(tasks, narrow, tmp_path, monkeypatch)
    SEQUENCE_DAMAGE[kind](tmp_path)
    with monkeypatch.context() as patch:
        calls = dying(patch, None)
        with pytest.warns(UserWarning, match="task-1.* is damaged.*Learning that task again"):
            student, result = run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)
    assert len(calls) == 4 + 2, "task 1 anew, and task 2 from its checkpoint"
    assert torch.equal(weights(student), weights(whole)) and result.matrices == expected.matrices


def test_the_notes_of_a_sequence_fall_back_to_the_version_before(
    tasks, narrow, tmp_path, monkeypatch
):
    whole, expected = run(tasks, "replay", narrow)
    stopped_in_the_third_task(tasks, narrow, tmp_path, monkeypatch)
    (tmp_path / "sequence.json").write_text('{"identity": {')
    with pytest.warns(UserWarning, match="sequence.json is damaged.*sequence.previous.json"):
        student, result = run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)
    assert torch.equal(weights(student), weights(whole)) and result.matrices == expected.matrices
    for name in ("sequence.json", "sequence.previous.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="sequence.previous.json is damaged: it has no identity"):
        run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)


def test_where_nothing_of_a_sequence_is_whole_it_says_so(tasks, narrow, tmp_path, monkeypatch):
    stopped_in_the_third_task(tasks, narrow, tmp_path, monkeypatch)
    for name in ("start", "task-0", "task-1"):
        flip(next((tmp_path / name / "unet").glob("*.safetensors")))
    with (
        pytest.warns(UserWarning, match="Learning that task again"),
        pytest.raises(ValueError, match="start is damaged: unet/.* is not what was written"),
    ):
        run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)


def test_what_a_kill_left_in_learnt_tasks_is_cleaned(tasks, narrow, tmp_path, monkeypatch):
    stopped_in_the_third_task(tasks, narrow, tmp_path, monkeypatch)
    left = tmp_path / "task-0" / "checkpoint-0000002"
    shutil.copytree(tmp_path / "task-2" / "checkpoint-0000002", left)
    mine = tmp_path / "task-0" / "checkpoint-0000002-notes"
    mine.mkdir()
    (tmp_path / "sequence.json.partial").mkdir()
    run(tasks, "replay", narrow, output_dir=tmp_path, resume=True)
    assert mine.is_dir() and not left.exists()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("change", ["std", "empty", "labels", "prediction_type", "frozen"])
def test_a_sequence_knows_all_that_its_next_step_depends_on(
    change, tasks, narrow, tmp_path, monkeypatch
):
    stopped_in_the_third_task(tasks, narrow, tmp_path, monkeypatch)
    student, said = None, {"std": "data", "empty": "data", "prediction_type": "noise"}
    data = tasks[1].train
    if change in ("std", "empty"):
        data = dataclasses.replace(data, **{change: getattr(data, change) + 1})
    labels = list(tasks[1].labels)
    if change == "labels":
        labels[0] += " of another kind"
    tasks = [tasks[0], Task(tasks[1].name, data, labels=labels), tasks[2]]
    if change == "prediction_type":
        monkeypatch.setitem(narrow.scheduler.config, "prediction_type", "v_prediction")
    if change == "frozen":
        student = copy.deepcopy(narrow.unet)
        student.conv_in.requires_grad_(False)
    with pytest.raises(ValueError, match=f"made with .*{said.get(change, change)}="):
        run(tasks, "replay", narrow, student, output_dir=tmp_path, resume=True)
