"""The mini teacher's training: quiet skips, dropped skips, and legs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kdc.data import scenes
from kdc.distillation.losses import min_snr_weight
from kdc.pipelines import load_teacher
from kdc.unet.blocks import plan_without
from kdc.unet.slimming import slim
from studies.mini import text
from studies.mini.images import scene_images, to_signed
from studies.mini.teacher import (
    LEGS,
    Layout,
    Leg,
    TextToNoise,
    encoded_pool,
    level_weight,
    new_unet,
    noise_scheduler,
    train_teacher,
)

SMALL = Layout(widths=(16, 16, 32, 32), heads=(1, 1, 2, 2), side=8)


def called(unet, count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    noisy = torch.randn(count, 4, unet.config.sample_size, unet.config.sample_size, generator=g)
    words = torch.randn(count, 5, unet.config.cross_attention_dim, generator=g)
    return unet(noisy, torch.full((count,), 500), words).sample


def read_by_up_blocks(unet, call):
    """What each residual layer of the upward path reads in a call, and how much comes by a skip."""
    read, widths = [], []
    hooks = []
    for block in unet.up_blocks:
        hooks.append(
            block.register_forward_pre_hook(
                lambda module, args, inputs: widths.extend(
                    s.shape[1]
                    for s in reversed(inputs["res_hidden_states_tuple"][-len(module.resnets) :])
                ),
                with_kwargs=True,
            )
        )
        for resnet in block.resnets:
            hooks.append(resnet.register_forward_pre_hook(lambda m, args: read.append(args[0])))
    call()
    for hook in hooks:
        hook.remove()
    return read, widths


@torch.no_grad()
def test_quiet_skips_scale_the_channels_that_diffusers_gives_by_a_skip():
    torch.manual_seed(0)
    loud = new_unet(Layout(SMALL.widths, SMALL.heads, SMALL.side, skips=1.0))
    torch.manual_seed(0)
    quiet = new_unet(Layout(SMALL.widths, SMALL.heads, SMALL.side, skips=0.25))
    read, widths = read_by_up_blocks(loud, lambda: called(loud))
    layers = [[r for b in u.up_blocks for r in b.resnets] for u in (loud, quiet)]
    assert len(widths) == len(layers[0]) == 12
    for before, after, inputs, skip in zip(*layers, read, widths, strict=True):
        for name in ("conv1", "conv_shortcut"):
            a, b = (getattr(layer, name).weight for layer in (before, after))
            inner = inputs.shape[1] - skip
            torch.testing.assert_close(b[:, inner:], 0.25 * a[:, inner:])
            grown = (b[:, :inner] / a[:, :inner]).flatten()
            torch.testing.assert_close(grown, grown[:1].expand_as(grown))
            # Of inputs of equal variance the sum keeps its own.
            variance = inner * grown[0] ** 2 + skip * 0.25**2
            assert variance.item() == pytest.approx(inputs.shape[1], rel=1e-4)
    others = [
        torch.equal(p, q)
        for (name, p), q in zip(loud.named_parameters(), quiet.parameters(), strict=True)
        if not (name.startswith("up_blocks") and ("conv1.w" in name or "shortcut.w" in name))
    ]
    assert len(others) > 200 and all(others)


@torch.no_grad()
def test_quiet_skips_let_the_mid_block_be_heard_from_the_start():
    changes = []
    for skips in (1.0, 0.25):
        torch.manual_seed(1)
        unet = new_unet(Layout(skips=skips)).eval()
        before = called(unet)
        without = called(slim(unet, plan_without(["mid-block"])))
        changes.append(((without - before).square().mean() / before.square().mean()).item())
    assert changes[1] > 30 * changes[0]


def small_model():
    """A small teacher, what it is called with for two images, and the tokens of no caption."""
    torch.manual_seed(0)
    tokenizer = text.new_tokenizer(text.scene_captions())
    model = TextToNoise(new_unet(SMALL), text.new_text_encoder(tokenizer)).eval()
    noisy, times = torch.randn(2, 4, 8, 8), torch.full((2,), 500)
    ids = text.tokenize(tokenizer, ["a red rose", "two small guppies"])
    return model, noisy, times, ids, text.tokenize(tokenizer, [""])


@torch.no_grad()
def test_a_dropped_skip_is_zero_for_its_image_and_level_alone():
    model, noisy, times, ids, empty = small_model()
    kept = torch.ones(2, 3, 3)
    kept[1, 0, 2] = kept[0, 2, 0] = 0

    def read(*given):
        return read_by_up_blocks(model.unet, lambda: model(noisy, times, ids, *given))[0]

    usual, outside = read(), read(kept)
    assert all(torch.equal(a, b) for a, b in zip(usual, outside, strict=True))  # no effect outside
    with model.dropping():
        whole, dropped = read(), read(kept)
        assert torch.equal(whole[0], usual[0])
    # Skips are taken from the end: the last of a level's three is the first that it reads.
    widths = read_by_up_blocks(model.unet, lambda: model(noisy, times, ids))[1]
    first, last_of_third = 0, 8
    assert not dropped[first][1, -widths[first] :].any()
    assert torch.equal(dropped[first][0], usual[first][0])
    assert not dropped[last_of_third][0, -widths[last_of_third] :].any()
    assert dropped[last_of_third][1, -widths[last_of_third] :].any()
    assert not model.unet.up_blocks[0]._forward_pre_hooks


@torch.no_grad()
def test_a_hidden_caption_is_read_by_the_mid_block_alone():
    model, noisy, times, ids, empty = small_model()
    hidden = torch.tensor([True, False])
    outside = torch.cat([empty, ids[1:]])
    told, untold = (model.text_encoder(i).last_hidden_state for i in (ids, outside))
    read = {}
    for name, module in model.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(
                lambda m, args, inputs, name=name: read.update(
                    {name: inputs["encoder_hidden_states"]}
                ),
                with_kwargs=True,
            )
    usual = model(noisy, times, ids, None, hidden, empty)  # no effect outside
    for words in read.values():
        torch.testing.assert_close(words, told)
    with model.dropping():
        found = model(noisy, times, ids, None, hidden, empty)
    assert len(read) == 16
    for name, words in read.items():
        expected = told if name.startswith("mid_block") else untold
        torch.testing.assert_close(words, expected, msg=name)
    assert not torch.allclose(found[0], usual[0]) and torch.allclose(found[1], usual[1], atol=1e-5)
    assert not any(block._forward_pre_hooks for block in model.unet.up_blocks)


def test_legs_follow_one_another_and_a_finished_one_is_not_trained_again(tmp_path):
    vae = load_teacher("mini").vae
    legs = (Leg(0.5, 0.5, 0.5), Leg(0.5, 0.0, 0.0, 1.0, "cosine"))
    settings = dict(steps=4, batch_size=2, pool=8, legs=legs, layout=Layout(SMALL.widths, (1,) * 4))
    model, _, log = train_teacher(vae, tmp_path / "whole", **settings)
    assert log["step"].tolist() == [1, 2, 3, 4] and log["leg"].tolist() == [1, 1, 2, 2]
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(tmp_path / "whole" / "leg-1.safetensors", begun)
    again, _, _ = train_teacher(vae, begun, **settings)
    assert not (begun / "leg-1").exists() and (begun / "leg-2" / "log.csv").is_file()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(module._forward_pre_hooks for module in again.modules())
    # Where the last leg lies, those before it may be gone.
    (begun / "leg-1.safetensors").unlink()
    last, _, _ = train_teacher(vae, begun, **settings)
    assert torch.equal(last.unet.conv_in.weight, again.unet.conv_in.weight)
    assert not (begun / "leg-1").exists()


def test_the_pool_is_encoded_once_and_anew_for_another_autoencoder(tmp_path, monkeypatch):
    vae, tokenizer = load_teacher("mini").vae, text.new_tokenizer(text.scene_captions())
    file = tmp_path / "run" / "pool.safetensors"
    pool = encoded_pool(vae, tokenizer, file, 4, 0)
    images, shown = scene_images(4, "train", seed=1)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in pool["ids"][0]] == [
        scenes.caption(scene).replace(",", " ,") for scene in shown
    ]
    posterior = vae.encode(to_signed(images)).latent_dist
    expected = posterior.mean * vae.config.scaling_factor
    torch.testing.assert_close(pool["mean"].float(), expected, atol=2e-2, rtol=2e-2)
    monkeypatch.setattr("studies.mini.teacher.encode_images", None)
    again = encoded_pool(vae, tokenizer, file, 4, 0)
    assert all(torch.equal(pool[name], again[name]) for name in pool)
    vae.decoder.conv_out.bias.data += 1
    with pytest.raises(TypeError):
        encoded_pool(vae, tokenizer, file, 4, 0)


SHARED = """
import sys
from pathlib import Path
import kdc.training.loop
kdc.training.loop.has_bf16 = lambda device: False
from kdc.processes import this_process
this_process()
from kdc.pipelines import load_teacher
from studies.mini.teacher import Layout, Leg, train_teacher
layout = Layout((16, 16, 32, 32), (1, 1, 2, 2))
train_teacher(load_teacher("mini").vae, Path(sys.argv[1]), 3, 4, 8,
              legs=(Leg(1.0, hiding=0.5, skip_dropout=0.5),), layout=layout)
"""


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    kept = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
                   "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
                   str(tmp_path / "shared.py"), str(tmp_path / str(count))]  # fmt: skip
        subprocess.run(
            command, check=True, timeout=300, cwd=Path(__file__).parents[3],
            env=kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "PYTHONPATH": str(Path(__file__).parents[3])},
        )  # fmt: skip
    one, two = (load_file(tmp_path / n / "leg-1.safetensors") for n in "12")
    # Adam's first steps are of one size, whatever the gradient, so single weights may part.
    apart = torch.cat([(two[name].float() - one[name].float()).flatten() for name in one])
    assert apart.abs().mean() < 5e-6
    logs = [pd.read_csv(tmp_path / n / "log.csv") for n in "12"]
    assert logs[1]["loss"].tolist() == pytest.approx(logs[0]["loss"].tolist(), rel=1e-4)
    assert logs[0]["images"].tolist() == logs[1]["images"].tolist() == [4, 12]


def test_the_legs_are_a_whole_training():
    assert sum(leg.share for leg in LEGS) == pytest.approx(1)
    assert LEGS[-1].schedule == "cosine"


def test_batches_taken_together_are_fewer_updates_at_a_higher_rate(tmp_path):
    settings = dict(steps=4, batch_size=2, pool=8, layout=Layout(SMALL.widths, (1,) * 4))
    legs = (Leg(0.5), Leg(0.5, together=2))
    _, _, log = train_teacher(load_teacher("mini").vae, tmp_path, legs=legs, **settings)
    first, second = (log[log["leg"] == number] for number in (1, 2))
    assert second["images"].tolist() == [4] and first["images"].tolist() == [2, 4]
    rates = [leg["learning_rate"].iloc[-1] for leg in (first, second)]
    assert rates[1] == pytest.approx(rates[0] * 2**0.5)


def test_a_power_of_one_is_min_snr_and_less_lets_noisy_levels_count_more():
    process = noise_scheduler()
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    torch.testing.assert_close(level_weight(snr, 1.0), min_snr_weight(snr, 5.0))
    # The squared error of the image is that of the noise over the ratio.
    noisy, half = snr < 1, level_weight(snr, 0.5)
    torch.testing.assert_close((half * snr)[noisy], snr[noisy].sqrt())
    assert torch.equal(half[~noisy], level_weight(snr, 1.0)[~noisy])


def test_the_tokenizer_has_a_token_for_every_word_of_scenes():
    captions = text.scene_captions()
    tokenizer = text.new_tokenizer(captions)
    words = set(" ".join(captions).replace(",", " ").split())
    assert {"guppies", "three", "under", "left", "one", "orange"} <= words
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)  # start, the word, end
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.draw_scene(rng)
        for template in range(4):
            said = scenes.caption(scene, template)
            assert set(said.replace(",", " ").split()) <= words
            assert len(tokenizer(said).input_ids) < text.MAX_TOKENS
