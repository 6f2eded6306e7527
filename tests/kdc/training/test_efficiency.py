import copy
import functools
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import nn

import kdc
from kdc.distillation.features import FeatureHooks
from kdc.training.efficiency import (
    REPEATED,
    average,
    compile_unet,
    plain_attention,
    quickened,
    reduced,
    refuse_infinite,
)  # fmt: skip


def inputs(unet, count=2):
    g = torch.Generator().manual_seed(1)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    noisy = torch.randn(count, unet.config.in_channels, size, size, generator=g)
    return noisy, torch.tensor([10, 700]), torch.randn(count, 5, width, generator=g)


def attentions(unet):
    return [name for name, _ in unet.named_modules() if name.endswith(".attn1")]


def gradients(unet, hooks):
    """Gradients of a loss through output and hooks, and the bytes kept for the backward pass."""
    kept, own = {}, {p.data_ptr() for p in unet.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(*inputs(unet), return_dict=False)[0]
        seen = hooks.take()
        loss = out.square().mean() + sum(hooked.square().mean() for hooked in seen)
    size = sum(kept.values())
    loss.backward()
    grads = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()
    return grads, size


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(tiny_unet):
    unet = tiny_unet.train()
    hooks = FeatureHooks(unet, attentions(unet))  # within what is recomputed
    plain, plain_bytes = gradients(unet, hooks)
    with quickened(unet, unet, [hooks], gradient_checkpointing=True):
        saving, saving_bytes = gradients(unet, hooks)
        assert hooks._seen == {}, "the recomputation left something in the hooks"
    for a, b in zip(plain, saving, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert saving_bytes < 0.6 * plain_bytes
    assert not unet.is_gradient_checkpointing


def test_the_networks_are_left_as_they_were_even_after_an_error(tiny_unet, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: refuse_compiling(self))
    with pytest.raises(KeyboardInterrupt):
        with quickened(tiny_unet, tiny_unet, gradient_checkpointing=True):
            raise KeyboardInterrupt
    assert not tiny_unet.is_gradient_checkpointing
    monkeypatch.setattr("kdc.training.efficiency.refuse_unusable", lambda *_: None)
    with quickened(tiny_unet, tiny_unet, compile=True):
        assert tiny_unet._compiled_call_impl is not None
    assert tiny_unet._compiled_call_impl is None


def refuse_compiling(module):
    module._compiled_call_impl = module._call_impl


def test_what_cannot_be_quickened_is_refused(teacher, monkeypatch):
    nothing = object()  # encoding it would be a TypeError
    student = kdc.slim(teacher.unet, "kdc")
    both = {"compile": True, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match="exclude each other"):
        kdc.distill(student, teacher, nothing, steps=1, **both)

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler in sight")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="does not work on cpu here.*no compiler in sight"):
        kdc.distill(student, teacher, nothing, steps=1, compile=True)


def tiny_pair():
    """Two small networks that compile in a minute or so, and hooks on both."""
    unets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        unets.append(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                mid_block_type=None,
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=4,
            )
        )
    names = ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", *attentions(unets[0])]
    return unets, [FeatureHooks(unet, names) for unet in unets]


def test_plain_attention_computes_the_same_and_is_taken_off_even_after_an_error(tiny_unet):
    given, before = inputs(tiny_unet), tiny_unet.attn_processors
    results = []
    for plain in (False, True):
        with plain_attention(*([tiny_unet] if plain else [])):
            kinds = {type(p).__name__ for p in tiny_unet.attn_processors.values()}
            assert kinds == {"AttnProcessor" if plain else "AttnProcessor2_0"}
            output = tiny_unet(*given).sample
            tiny_unet.zero_grad()
            output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in tiny_unet.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    with pytest.raises(KeyError), plain_attention(tiny_unet):
        raise KeyError
    after = tiny_unet.attn_processors
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_training_in_bf16_on_a_cpu_writes_attention_out(tiny_unet):
    twin = copy.deepcopy(tiny_unet)
    for bf16, kind in ((False, "AttnProcessor2_0"), (True, "AttnProcessor")):
        with quickened(tiny_unet, twin, bf16=bf16):
            for unet in (tiny_unet, twin):
                assert {type(p).__name__ for p in unet.attn_processors.values()} == {kind}
    assert type(twin.mid_block.attentions[0].transformer_blocks[0].attn1.processor) is (
        AttnProcessor2_0
    )


def test_regions_are_the_blocks_that_repeat(tiny_unet):
    parts = compile_unet(tiny_unet, by_regions=True)
    compiled = [m for m in tiny_unet.modules() if m._compiled_call_impl is not None]
    assert parts == compiled and {type(m).__name__ for m in parts} == set(REPEATED)
    assert compile_unet(tiny_unet) == [tiny_unet], "one piece on a CPU"


@pytest.mark.slow
@pytest.mark.parametrize("by_regions", [False, True])
def test_hooks_and_gradients_survive_compiling(by_regions, monkeypatch):
    how = functools.partial(compile_unet, by_regions=by_regions)
    monkeypatch.setattr("kdc.training.efficiency.compile_unet", how)
    (student, teacher), (ours, theirs) = tiny_pair()
    student.train()
    batch, results = inputs(student), []
    for compile in (False, True):
        with quickened(student, teacher, [ours, theirs], compile=compile):
            for _ in range(2):  # the second call runs what the first compiled
                with torch.no_grad():
                    guide = teacher(*batch, return_dict=False)[0]
                out = student(*batch, return_dict=False)[0]
                pairs = zip(ours.take(), theirs.take(), strict=True)
                loss = (out - guide).square().mean()
                loss = loss + sum((s - t).square().mean() for s, t in pairs)
                loss.backward()
                grads = [p.grad.clone() for p in student.parameters()]
                student.zero_grad()
        results.append([loss.detach(), *grads])
    assert ours._seen == theirs._seen == {}
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)


def test_a_reduced_teacher_is_a_frozen_copy_and_the_original_stays(tiny_unet):
    before = {k: v.clone() for k, v in tiny_unet.state_dict().items()}
    half = reduced(tiny_unet, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not any(p.requires_grad for p in half.parameters())
    assert reduced(half, torch.bfloat16) is half
    for name, value in tiny_unet.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
        assert torch.equal(half.state_dict()[name], value.bfloat16())
    with torch.no_grad():
        noisy, timesteps, prompt_embeds = inputs(tiny_unet)
        exact = tiny_unet(noisy, timesteps, prompt_embeds).sample
        rough = half(noisy.bfloat16(), timesteps, prompt_embeds.bfloat16()).sample
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_in_bf16_the_teacher_is_cast_once():
    """In a process of its own: Accelerate keeps one precision for all that follows."""
    code = (
        "import torch, kdc\n"
        "from kdc.data.datasets import WorldDataset\n"
        "teacher = kdc.load_teacher('mini', device='cpu')\n"
        "student, seen = kdc.slim(teacher.unet, 'bk-tiny'), []\n"
        "unets = type(teacher.unet)\n"
        "original = unets.forward\n"
        "def forward(self, sample, *args, **kwargs):\n"
        "    seen.append((self is student, self.dtype, sample.dtype))\n"
        "    return original(self, sample, *args, **kwargs)\n"
        "unets.forward = forward\n"
        "data = kdc.cache_latents(teacher, WorldDataset(['flora'], count=4))\n"
        "kdc.distill(student, teacher, data, steps=1, batch_size=2, precision='bf16')\n"
        "assert (False, torch.bfloat16, torch.bfloat16) in seen, seen\n"
        "assert teacher.unet.dtype == student.dtype == torch.float32\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_average_in_place_is_that_of_diffusers():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    settings = dict(decay=0.9, use_ema_warmup=True, inv_gamma=10.0, power=0.9)
    ours, theirs = EMAModel(parameters, **settings), EMAModel(parameters, **settings)
    for _ in range(6):
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p))
        average(ours, parameters)
        theirs.step(parameters)
    assert ours.optimization_step == theirs.optimization_step == 6
    for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_infinite_loss_is_found_late_but_named_rightly():
    losses = (1.0, float("inf"), float("nan"))
    unseen = [(step, torch.tensor(loss)) for step, loss in enumerate(losses, 10)]
    with pytest.raises(FloatingPointError, match="run: the loss is inf at step 11"):
        refuse_infinite(unseen, "run")
    fine = [(0, torch.tensor(1.0)), (1, torch.tensor(2.0))]
    refuse_infinite(fine, "run")
    assert fine == []
