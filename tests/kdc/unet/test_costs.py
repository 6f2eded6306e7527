import functools
import time

import pytest
import torch
from diffusers import UNet2DConditionModel

import kdc
from kdc.unet.blocks import kept_blocks
from kdc.unet.costs import call_of, count_costs, measure_latency, time_blocks
from kdc.unet.plans import PLANS

# Parameters, GMACs of convolutions and linear layers, and GMACs with attention products at
# 64 x 64 latents, batch 1, 77 words (None: not published).
SD1 = {
    "full": (859_520_964, 338.6, 401.6),
    "bk-base": (579_384_964, 223.7, 261.5),
    "kdc": (482_346_884, 217.6, 255.4),
    "kdc-v2": (420_423_044, None, 266.6),
    "bk-tiny": (323_384_964, 205.0, 242.8),
}


@functools.cache
def sd1():
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, sample_size=64, attention_head_dim=8)


@pytest.mark.parametrize("plan", SD1)
def test_the_published_table_to_the_digit(plan):
    parameters, linear, both = SD1[plan]
    total = count_costs(kdc.slim(sd1(), plan)).loc["total"]
    assert total["parameters"] == parameters
    assert linear is None or round(total["linear_macs"] / 1e9, 1) == linear
    assert round(total["macs"] / 1e9, 1) == both


def test_blocks_add_up_and_a_convolution_has_its_closed_form(tiny_unet):
    table = count_costs(tiny_unet, size=16, sequence_length=5)
    assert (table.drop("total").sum() == table.loc["total"]).all()
    assert table.loc["total", "parameters"] == sum(p.numel() for p in tiny_unet.parameters())
    # conv_in: 3 x 3 kernel, 4 to 8 channels, on 16 x 16 pixels
    assert table.loc["conv_in", "macs"] == 9 * 4 * 8 * 16 * 16
    assert set(table.index) >= {"down_blocks.0.attentions.1", "mid_block.resnets.0", "conv_out"}


def test_attention_products_have_their_closed_form(tiny_unet):
    table = count_costs(tiny_unet, size=16, sequence_length=5)
    # queries with keys and weights with values: 2 x pixels x (pixels + words) x channels
    pixels, sequence_length, channels = 16 * 16, 5, 8
    expected = 2 * pixels * (pixels + sequence_length) * channels
    assert table.loc["down_blocks.0.attentions.0", "attention_macs"] == expected
    assert table.loc["down_blocks.0.resnets.0", "attention_macs"] == 0


def test_costs_grow_with_the_batch_and_parameters_do_not(tiny_unet):
    one, four = (count_costs(tiny_unet, size=16, batch_size=b).loc["total"] for b in (1, 4))
    assert four["parameters"] == one["parameters"]
    convolved = count_costs(tiny_unet, 16).loc["conv_in", "macs"]
    assert count_costs(tiny_unet, 16, batch_size=4).loc["conv_in", "macs"] == 4 * convolved
    assert 3.9 < four["activation_bytes"] / one["activation_bytes"] <= 4.01


def test_activations_are_what_autograd_saves_on_a_real_device(tiny_unet):
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in tiny_unet.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    math = torch.nn.attention.SDPBackend.MATH
    with (
        torch.nn.attention.sdpa_kernel(math),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        tiny_unet(torch.randn(1, 4, 16, 16), torch.tensor(1), torch.randn(1, 5, 16))
    measured = sum(size for size, _ in kept.values())
    counted = count_costs(tiny_unet, 16, sequence_length=5).loc["total", "activation_bytes"]
    assert counted == pytest.approx(measured, rel=0.05)


def test_latency_is_interleaved_and_a_slower_call_has_the_larger_ratio():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {n: functools.partial(call, n, s) for n, s in (("a", 0.01), ("b", 0.03))}
    table = measure_latency(calls, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert table.loc["a", "ratio"] == 1 and 2 < table.loc["b", "ratio"] < 4
    assert (table["low"] <= table["median"]).all() and (table["median"] <= table["high"]).all()
    with pytest.raises(ValueError, match="at least one candidate"):
        measure_latency({})


def test_a_call_of_a_unet_draws_a_batch(tiny_unet):
    assert call_of(tiny_unet, size=16, sequence_length=5, batch_size=2)().shape == (2, 4, 16, 16)


def test_times_of_blocks_add_up_to_the_call(tiny_unet):
    seconds = time_blocks(tiny_unet, rounds=2, size=16, sequence_length=5)
    assert set(kept_blocks(PLANS["full"])) == set(seconds.index)
    assert (seconds.drop("other") > 0).all() and seconds["other"] > 0
    assert not any(m._forward_pre_hooks for m in tiny_unet.modules())


def test_what_is_done_to_a_table_does_not_reach_the_next(tiny_unet):
    first = count_costs(tiny_unet, 16, 5)
    whole = first.loc["total", "macs"]
    first.loc["total", "macs"] = 0
    assert count_costs(tiny_unet, 16, 5).loc["total", "macs"] == whole
    assert count_costs(tiny_unet, 8, 5).loc["total", "macs"] < whole
