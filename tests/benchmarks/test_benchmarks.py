import sys
import threading

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kdc
from benchmarks import floor, strategies
from benchmarks.contenders import Contender, live_bytes, peak_of_step, waiting
from benchmarks.distill_step import as_ratios, report
from benchmarks.reference import draw, encode, hook_every_block, plain_terms, train_plainly
from benchmarks.setups import twin
from kdc.data.datasets import WorldDataset
from kdc.distillation.step import forward_process


@pytest.fixture(scope="module")
def images():
    """Images (N, 3, 64, 64) uint8, their captions, and the same as a data set."""
    items = list(WorldDataset(["flora", "lepidoptera"], count=6))
    whole = torch.stack([((item["image"] + 1) * 127.5).round() for item in items]).byte()
    captions = [item["caption"] for item in items]
    pairs = zip(whole.float() / 127.5 - 1, captions, strict=True)
    return whole, captions, [{"image": image, "caption": caption} for image, caption in pairs]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_plain_loop_and_distill_compute_the_same_loss(teacher, images, seed):
    """The same images, captions, noise and timesteps: from files there, from the cache here."""
    whole, captions, items = images
    log = kdc.distill(
        kdc.slim(teacher.unet, "kdc"), teacher, items, steps=1, batch_size=5, seed=seed
    )
    student = kdc.slim(teacher.unet, "kdc")
    d = draw(5, len(whole), (4, 16, 16), torch.Generator().manual_seed(seed * 1009))
    asked = zip(d.index.tolist(), d.dropped.tolist(), strict=True)
    texts = ["" if dropped else captions[i] for i, dropped in asked]
    latents, prompt_embeds = encode(teacher, whole[d.index].float() / 127.5 - 1, texts, d.spread)
    process = forward_process(teacher)
    noisy = process.add_noise(latents, d.noise, d.timesteps)
    hooked = [hook_every_block(student), hook_every_block(teacher.unet)]
    seen = tuple(one for one, _ in hooked)
    inputs = noisy, d.timesteps, prompt_embeds, d.noise
    terms = plain_terms(student, teacher.unet, seen, *inputs, kdc.LossWeights())
    for handle in hooked[0][1] + hooked[1][1]:
        handle.remove()
    for name in ("task", "output", "soft", "feature", "loss"):
        assert log[name].iloc[0] == pytest.approx(terms[name].item(), rel=1e-4), name
    assert {"down_blocks.0", "down_blocks.0.resnets.0", "up_blocks.3.attentions.1"} <= set(seen[0])


def test_the_plain_loop_and_distill_train_the_same_student(teacher, images):
    whole, captions, items = images
    settings = dict(steps=3, batch_size=4, learning_rate=5e-4, ema_decay=0.9, seed=1)
    plain, ours = kdc.slim(teacher.unet, "kdc"), kdc.slim(teacher.unet, "kdc")
    before = torch.cat([p.detach().flatten() for p in plain.parameters()])
    losses = train_plainly(plain, teacher, whole, captions, **settings)
    log = kdc.distill(ours, teacher, items, **settings)
    assert log["loss"].iloc[-1] == pytest.approx(losses[-1], rel=1e-3)
    a, b = (torch.cat([p.detach().flatten() for p in u.parameters()]) for u in (plain, ours))
    assert (a - b).norm() < 0.05 * (a - before).norm()
    assert not any(m._forward_hooks for m in teacher.unet.modules())


def test_contenders_take_turns_and_pass_errors_on():
    done, names = [], {}

    def loop(name, steps):
        def run(wait):
            names[name] = threading.current_thread()
            for step in range(steps):
                wait()
                done.append((name, step))
            return steps

        return run

    a, b = Contender(loop("a", 2), 1), Contender(loop("b", 3), 1)
    for one in (a, b, a, b):
        one.step()
    assert done == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and a.result == 2
    assert b.result is None
    b.stop()
    assert not names["b"].is_alive() and done[-1] == ("b", 1)

    def failing(wait):
        wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Contender(failing, 1).step()


def test_a_waiting_cache_draws_what_the_cache_draws(teacher, images):
    cache = kdc.cache_latents(teacher, images[2])
    calls = []
    ours = waiting(cache, lambda: calls.append(1)).draw(3, torch.Generator().manual_seed(0))
    theirs = cache.draw(3, torch.Generator().manual_seed(0))
    assert calls == [1] and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_step_is_what_it_held_and_touched():
    held = torch.ones(10_000_000)  # 40 MB

    def step():
        a = torch.ones(20_000_000)
        del a
        return torch.ones(16_000_000)

    peak = peak_of_step(step, torch.device("cpu"))
    assert peak["held"] >= held.nbytes and peak["held"] == live_bytes()
    assert peak["peak"] - peak["held"] == pytest.approx(80e6, abs=8e6)


def test_the_floor_has_every_product_of_a_step(tiny_unet):
    student, teacher = twin(tiny_unet), tiny_unet
    assert next(student.parameters()) is next(teacher.parameters()) and student is not teacher
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16, generator=g), 5, torch.randn(1, 7, 16, generator=g)
    recorder, macs = floor.record_step(student, teacher, inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(*inputs)
    forward = counter.get_total_flops() // 2
    assert 3.9 * forward < macs <= 4 * forward  # once the teacher, three times the student
    convolutions = sum(isinstance(m, nn.Conv2d) for m in teacher.modules())
    counts = {}
    for key, count in recorder.calls.items():
        name = str(recorder.operators[key][0])
        counts[name] = counts.get(name, 0) + count
    assert counts["aten.convolution.default"] == 2 * convolutions
    assert counts["aten.convolution_backward.default"] == convolutions
    assert 0 < floor.seconds_of_products(recorder, torch.device("cpu"), repeats=1)


def test_goals_are_compared_the_right_way_round(capsys):
    table = {"median": [2.0, 1.0], "low": [1.9, 0.9], "high": [2.1, 1.1]}
    table |= {"ratio": [1.0, 0.5], "ratio_low": [1.0, 0.4], "ratio_high": [1.0, 0.8]}
    times = pd.DataFrame(table, index=["reference", "ours"])
    rows = as_ratios(times, batch_size=4)
    assert rows["ours"]["images_per_second"] == 4
    assert rows["ours"]["images_over_reference_quartiles"] == [1.25, 2.5]
    for name, peak in (("reference", 100), ("ours", 80)):
        rows[name] |= {"peak_bytes": peak, "held_bytes": 10}
    values = {"contenders": rows, "floor": {"products_alone_seconds": 0.5}}
    values["chosen_precision"] = "float32"
    report(values, {"equal": 2.0, "memory": 0.75, "chosen": 2.5})
    assert {name: goal["met"] for name, goal in values["goals"].items()} == {
        "equal": True,
        "memory": False,
        "chosen": False,
    }
    assert rows["ours"]["seconds_over_floor"] == 2


def test_strategies_are_timed_against_fine_tuning():
    found = strategies.measure(1, 2, 2, ("finetune", "replay"))
    assert found.shape == (2, 2) and (found > 0).all(axis=None)
    table = strategies.summary(pd.DataFrame({"finetune": [1.0, 2.0], "replay": [2.0, 3.0]}))
    assert table.loc["finetune", "ratio"] == 1 and table.loc["replay", "ratio"] == 1.75
    assert table.loc["replay", "seconds"] == 2.5
