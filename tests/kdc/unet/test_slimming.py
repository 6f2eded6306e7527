import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import kdc
from kdc.pipelines import read_plan
from kdc.unet.plans import PLANS, SlimPlan
from kdc.unet.slimming import copy_map, count_parameters, student_config

SD1 = {"cross_attention_dim": 768, "sample_size": 64, "attention_head_dim": 8}
SD2 = {
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}

# From which of the teacher's layers each student layer is copied, written out by hand from
# BK-SDM's published rule; what is not named keeps its name.
LAST_UP = {f"up_blocks.{i}.{part}.1.": f"up_blocks.{i}.{part}.2." for i in range(4) for part in
           ("resnets", "attentions")}  # fmt: skip
SHIFTED_UP = {
    "up_blocks.0.resnets.0.": "up_blocks.1.resnets.0.",
    "up_blocks.0.resnets.1.": "up_blocks.1.resnets.2.",
    "up_blocks.0.attentions.0.": "up_blocks.1.attentions.0.",
    "up_blocks.0.attentions.1.": "up_blocks.1.attentions.2.",
    "up_blocks.0.upsamplers.0.": "up_blocks.1.upsamplers.0.",
    "up_blocks.1.resnets.0.": "up_blocks.2.resnets.0.",
    "up_blocks.1.resnets.1.": "up_blocks.2.resnets.2.",
    "up_blocks.1.attentions.0.": "up_blocks.2.attentions.0.",
    "up_blocks.1.attentions.1.": "up_blocks.2.attentions.2.",
    "up_blocks.1.upsamplers.0.": "up_blocks.2.upsamplers.0.",
    "up_blocks.2.resnets.0.": "up_blocks.3.resnets.0.",
    "up_blocks.2.resnets.1.": "up_blocks.3.resnets.2.",
    "up_blocks.2.attentions.0.": "up_blocks.3.attentions.0.",
    "up_blocks.2.attentions.1.": "up_blocks.3.attentions.2.",
}
COPIED_FROM = {"bk-base": LAST_UP, "kdc": LAST_UP, "kdc-v2": SHIFTED_UP, "bk-tiny": SHIFTED_UP}
KEPT = {  # stages, mid-block
    "full": (4, True),
    "bk-base": (4, True),
    "kdc": (4, False),
    "kdc-v2": (3, True),
    "bk-tiny": (3, False),
}


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def inputs(unet, size=16):
    g = torch.Generator().manual_seed(3)
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=g)
    sequence_length = torch.randn(2, 5, unet.config.cross_attention_dim, generator=g)
    return latents, torch.tensor([3, 700]), sequence_length


@torch.no_grad()
def predict(unet, size=16):
    return unet.eval()(*inputs(unet, size)).sample


@torch.no_grad()
def walk(teacher, down, up, stages, mid, bare=()):
    """A student's output, computed through the teacher's own modules by skipping layers.

    Stages in `bare`, counted from the outermost, go without their transformer blocks.
    """
    x, t, sequence_length = inputs(teacher)
    emb = teacher.time_embedding(teacher.time_proj(t))
    x = teacher.conv_in(x)
    skips = [x]

    def layer(block, index, x, stage):
        x = block.resnets[index](x, emb)
        if hasattr(block, "attentions") and stage not in bare:
            x = block.attentions[index](x, encoder_hidden_states=sequence_length).sample
        return x

    for number, block in enumerate(teacher.down_blocks[:stages]):
        for index in down:
            x = layer(block, index, x, number)
            skips.append(x)
        if number < stages - 1:
            x = block.downsamplers[0](x)
            skips.append(x)
    if mid:
        x = teacher.mid_block(x, emb, encoder_hidden_states=sequence_length)
    for number, block in enumerate(teacher.up_blocks[4 - stages :]):
        for index in up:
            x = layer(block, index, torch.cat([x, skips.pop()], dim=1), stages - 1 - number)
        if block.upsamplers is not None:
            x = block.upsamplers[0](x)
    assert not skips
    return teacher.conv_out(teacher.conv_act(teacher.conv_norm_out(x)))


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        ("full", 859_520_964),
        ("bk-base", 579_384_964),
        ("kdc", 482_346_884),
        ("kdc-v2", 420_423_044),
        ("bk-tiny", 323_384_964),
    ],
)
def test_students_of_sd1_have_the_published_number_of_parameters(plan, count):
    student = kdc.slim(on_meta(SD1), plan)
    assert count_parameters(student) == count
    assert {p.device.type for p in student.parameters()} == {"meta"}  # nothing was allocated


def test_sd2_is_cut_the_same_way_with_its_heads_and_linear_projections():
    teacher = on_meta(SD2)
    assert count_parameters(teacher) == 865_910_724
    for plan, (stages, mid) in KEPT.items():
        student = kdc.slim(teacher, plan)
        assert student.config.attention_head_dim == [5, 10, 20, 20][:stages]
        assert (student.mid_block is not None) == mid
        assert None not in copy_map(teacher, plan).values()
        assert student.down_blocks[0].attentions[0].proj_in.weight.ndim == 2


@pytest.mark.parametrize("plan", COPIED_FROM)
def test_copied_weights_are_the_teachers_tensor_by_tensor(tiny_unet, plan):
    theirs = tiny_unet.state_dict()
    for number, tensor in enumerate(theirs.values()):
        tensor += number  # so that no two tensors are alike, biases and norms included
    sources = copy_map(tiny_unet, plan)
    for name, tensor in kdc.slim(tiny_unet, plan).state_dict().items():
        prefix = re.match(r"up_blocks\.\d\.\w+\.\d\.", name)
        moved = COPIED_FROM[plan].get(prefix[0] if prefix else "", prefix and prefix[0])
        source = moved + name[prefix.end() :] if prefix else name
        assert torch.equal(tensor, theirs[source]), f"{name} is not {source}"
        assert sources[name] == source


@pytest.mark.parametrize("plan", KEPT)
def test_a_student_computes_what_the_teacher_does_when_its_layers_are_skipped(tiny_unet, plan):
    stages, mid = KEPT[plan]
    down, up = ((0, 1), (0, 1, 2)) if plan == "full" else ((0,), (0, 2))
    expected = walk(tiny_unet.eval(), down, up, stages, mid)
    assert torch.allclose(predict(kdc.slim(tiny_unet, plan)), expected, atol=1e-6)


def test_a_plan_that_removes_nothing_gives_the_same_outputs_bit_for_bit(tiny_unet, teacher):
    for unet in (tiny_unet, teacher.unet):
        assert torch.equal(predict(kdc.slim(unet, "full")), predict(unet))


def test_plans_may_differ_from_stage_to_stage(tiny_unet):
    plan = SlimPlan("mixed", ((0, 1), (0,), (0, 1), ()), ((), (0, 1, 2), (0, 2), (0, 1, 2)), True)
    student = kdc.slim(tiny_unet, plan)
    assert [len(b.resnets) for b in student.down_blocks] == [2, 1, 2]
    assert [len(b.resnets) for b in student.up_blocks] == [3, 2, 3]
    assert predict(student).shape == (2, 4, 16, 16)


def test_every_parameter_is_accounted_for_as_copied_or_new(tiny_unet):
    theirs = dict(tiny_unet.named_parameters())
    for plan in PLANS:
        sources = copy_map(tiny_unet, plan)
        assert set(sources) == set(dict(kdc.slim(tiny_unet, plan).named_parameters()))
        copied = [source for source in sources.values() if source]
        assert len(copied) == len(set(copied)) == len(sources)  # once each, and nothing new
        assert set(copied) <= set(theirs)


def test_the_teacher_is_unchanged_and_shares_nothing(tiny_unet):
    before = {k: v.clone() for k, v in tiny_unet.state_dict().items()}
    student = kdc.slim(tiny_unet, "full")
    own = {p.data_ptr() for p in student.parameters()}
    assert not own & {p.data_ptr() for p in tiny_unet.parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in tiny_unet.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone(tiny_unet):
    state = torch.get_rng_state()
    a, b, c = (kdc.slim(tiny_unet, "kdc", init="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "conv_in.weight"
    assert torch.equal(a.state_dict()[weight], b.state_dict()[weight])
    assert not torch.equal(a.state_dict()[weight], c.state_dict()[weight])
    assert not torch.equal(a.state_dict()[weight], tiny_unet.state_dict()[weight])


@pytest.mark.long
def test_a_student_opens_without_kdc_and_draws_the_same(tiny_unet, tmp_path):
    student = kdc.slim(tiny_unet, "kdc-v2")
    student.save_pretrained(tmp_path / "unet")
    latents, times, sequence_length = inputs(student)
    save_file({"x": latents, "t": times, "w": sequence_length}, tmp_path / "in.safetensors")
    code = (
        "import sys; sys.modules['kdc'] = None\n"
        "import torch; from diffusers import UNet2DConditionModel as U\n"
        "from safetensors.torch import load_file, save_file\n"
        "i = load_file('in.safetensors'); u = U.from_pretrained('unet')\n"
        "with torch.no_grad(): y = u(i['x'], i['t'], i['w']).sample\n"
        "save_file({'y': y}, 'out.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    generated = load_file(tmp_path / "out.safetensors")["y"]
    assert torch.allclose(generated, predict(student), atol=1e-6)


def test_what_cannot_be_cut_is_refused_with_the_reason(tiny_unet):
    with pytest.raises(TypeError, match="a name or a SlimPlan, not {'name': 'x'}"):
        kdc.slim(tiny_unet, {"name": "x"})
    with pytest.raises(ValueError, match="unknown plan 'bk-huge'.*bk-base.*bk-tiny"):
        kdc.slim(tiny_unet, "bk-huge")
    with pytest.raises(ValueError, match="init must be copy or random"):
        kdc.slim(tiny_unet, "kdc", init="zeros")
    with pytest.raises(ValueError, match="layers_per_block is 1, not 2"):
        kdc.slim(kdc.slim(tiny_unet, "bk-base"), "kdc")  # a student is no teacher
    xl = on_meta(
        {
            "block_out_channels": (8, 16, 24),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 2,
        }
    )
    with pytest.raises(ValueError, match=r"not the layout .* down_block_types is"):
        kdc.slim(xl, "kdc")
    with pytest.raises(TypeError, match="Linear"):
        kdc.slim(torch.nn.Linear(2, 2), "kdc")


@pytest.mark.parametrize(
    ("down", "up", "reason"),
    [
        (((0,),) * 3, ((0, 2),) * 4, "4 stages"),
        (((0,),) * 4, ((0, 1, 2),) + ((0, 2),) * 3, "need 2 up"),
        (((1,),) + ((0,),) * 3, ((0, 2),) * 4, "layer 0"),
        (((0,),) * 4, ((0, 1),) + ((0, 2),) * 3, "layer 2"),
        (((0, 3),) + ((0,),) * 3, ((0, 2),) * 3 + ((0, 1, 2),), "increasing layers of 0 to 1"),
        (((), (0,), (0,), (0,)), ((0, 2), (0, 2), (0, 2), ()), "innermost"),
    ],
)
def test_a_plan_that_diffusers_cannot_hold_is_refused_when_it_is_made(down, up, reason):
    with pytest.raises(ValueError, match=reason):
        SlimPlan("bad", down, up, True)


def test_a_plan_prints_its_layers():
    assert str(PLANS["bk-tiny"]) == "bk-tiny: down 0 0 0 - | no mid-block | up - 02 02 02"
    plan = dataclasses.replace(PLANS["kdc"], name="bare", down_attention=(False, True, True, False))
    assert str(plan) == "bare: down 0~ 0 0 0 | no mid-block | up 02 02 02 02"


def test_plans_compare_by_what_they_keep_and_survive_json(tiny_unet, tmp_path):
    plan = dataclasses.replace(PLANS["kdc"], name="bare", up_attention=[False, True, False, False])
    again = SlimPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.name == "bare" and hash(again) == hash(plan)
    assert plan != PLANS["kdc"] and dataclasses.replace(PLANS["kdc"], name="x") == PLANS["kdc"]
    kdc.save_student(kdc.slim(tiny_unet, plan), tmp_path, steps=3)
    assert read_plan(tmp_path) == plan
    with pytest.raises(ValueError, match="not a slimming plan"):
        SlimPlan.from_dict({"layers": 3})


def test_transformer_blocks_can_be_dropped_by_stage(tiny_unet):
    plan = SlimPlan(
        "bare",
        ((0,),) * 4,
        ((0, 2),) * 4,
        False,
        down_attention=(False, True, True, False),
        up_attention=(False, True, True, False),
    )
    student = kdc.slim(tiny_unet, plan)
    assert student.config.down_block_types[0] == "DownBlock2D"
    assert student.config.up_block_types[-1] == "UpBlock2D"
    assert None not in copy_map(tiny_unet, plan).values()
    assert set(copy_map(tiny_unet, plan)) < set(copy_map(tiny_unet, "kdc"))
    expected = walk(tiny_unet.eval(), (0,), (0, 2), 4, False, bare=(0,))
    assert torch.allclose(predict(student), expected, atol=1e-6)


@pytest.mark.parametrize(
    "attention",
    [
        {"down_attention": (True, True, True, True)},  # the innermost stage has none
        {"up_attention": (True, True, True, True)},
        {"up_attention": (True, False)},
    ],
)
def test_attention_where_there_is_none_is_refused(attention):
    with pytest.raises(ValueError, match=f"{next(iter(attention))} must be 4 truth values"):
        dataclasses.replace(PLANS["kdc"], name="bad", **attention)
    assert student_config(on_meta(SD1), "kdc")["mid_block_type"] is None


@pytest.mark.long
def test_once_for_real_at_full_size():
    """860M parameters in bf16, 1.7 GB: every tensor of the student is the teacher's own."""
    teacher = on_meta(SD1).to(torch.bfloat16).to_empty(device="cpu")
    for number, parameter in enumerate(teacher.parameters()):
        parameter.data.view(torch.int16).fill_(16_000 + number)  # a bit pattern each
    student = kdc.slim(teacher, "kdc")
    assert count_parameters(student) == 482_346_884
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        source = LAST_UP.get(".".join(name.split(".")[:4]) + ".")
        source = source + ".".join(name.split(".")[4:]) if source else name
        assert torch.equal(parameter, theirs[source]), name
    del teacher, theirs
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1e-3)
        generated = student(torch.ones(1, 4, 8, 8).bfloat16(), 5, torch.ones(1, 7, 768).bfloat16())
    assert generated.sample.shape == (1, 4, 8, 8) and generated.sample.isfinite().all()
