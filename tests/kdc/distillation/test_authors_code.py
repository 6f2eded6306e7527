"""The loss as in the authors' code against an independent re-statement of their arithmetic.

Written from an audit of their training script (commits 6901ef2 to 7f0947e for the first
configuration, 685bce4 for the newest); nothing here calls the loss of `kdc`.
"""

import pytest
import torch

import kdc
from kdc.distillation.features import FeatureHooks
from kdc.distillation.losses import DistillationLoss, LossWeights
from kdc.unet.slimming import slim
from studies.distillation.study import AUTHORS_LOG

BLOCKS = [f"up_blocks.{i}" for i in range(4)] + [f"down_blocks.{i}" for i in range(4)]


def their_terms(student, target, teacher, student_blocks, teacher_blocks):
    """Task, output, softened KL and features, as their script computes them."""
    task = ((student - target) ** 2).sum() / student.numel()
    output = ((student.detach() - teacher) ** 2).sum() / student.numel()
    temperature, batch = 2.0, len(student)
    q = torch.exp(teacher / temperature)
    q = q / q.sum(dim=1, keepdim=True)
    p = torch.exp(student / temperature)
    p = p / p.sum(dim=1, keepdim=True)
    soft = temperature * temperature * (q * (q.log() - p.log())).sum() / batch
    feature = 0.0
    for ours, theirs in zip(student_blocks, teacher_blocks, strict=True):
        feature = feature + ((ours - theirs) ** 2).sum() / ours.numel()
    return {"task": task, "output": output, "soft": soft, "feature": feature}


@pytest.fixture(scope="module")
def networks():
    """A U-Net of Stable Diffusion's layout in float64, random, and its student of the plan kdc."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    teacher = (
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 24, 24),
            layers_per_block=2,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        .double()
        .eval()
    )
    return slim(teacher, "kdc").eval(), teacher


def passes(networks, batch=3):
    """Both predictions and the outputs of the eight blocks of both, for one random batch."""
    draw = torch.Generator().manual_seed(1)
    noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    inputs = noise(batch, 4, 16, 16), torch.tensor([3, 500, 900]), noise(batch, 5, 16)
    target, found = noise(batch, 4, 16, 16), []
    for unet in networks:
        hooks = FeatureHooks(unet, BLOCKS)
        found.append((unet(*inputs).sample, hooks.take()))
        hooks.close()
    (student, ours), (teacher, theirs) = found
    return student, target, teacher.detach(), ours, [x.detach() for x in theirs]


def test_every_term_and_the_total_are_theirs(networks):
    student, target, teacher, ours, theirs = passes(networks)
    expected = their_terms(student, target, teacher, ours, theirs)
    found = DistillationLoss(LossWeights.as_published())(student, target, teacher, ours, theirs)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name
    total = sum(expected.values())
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-12)
    parameters = list(networks[0].parameters())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)])
        for x in (found["loss"], total)
    ]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_the_library_hooks_the_same_eight_blocks(networks):
    pairs = kdc.tap_names(*networks)
    assert sorted(ours for ours, _ in pairs) == sorted(BLOCKS)
    assert all(ours == theirs for ours, theirs in pairs)


def test_the_newest_configuration_has_no_features(networks):
    student, target, teacher, *_ = passes(networks)
    expected = their_terms(student, target, teacher, [], [])
    found = DistillationLoss(LossWeights.as_published(newest=True))(student, target, teacher)
    assert set(found) == {"task", "output", "soft", "loss"}
    for name in ("task", "output", "soft"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-12)


def test_averaging_over_blocks_would_make_features_eight_times_too_weak(networks):
    parts = passes(networks)
    exact = LossWeights.as_published()
    summed = DistillationLoss(exact)(*parts)["feature"]
    mean = DistillationLoss(exact.replace(feature_reduction="mean"))(*parts)["feature"]
    assert summed.item() == pytest.approx(8 * mean.item(), rel=1e-12)


@pytest.mark.parametrize("side", [16, 64])
def test_the_soft_term_sums_over_all_pixels(side):
    """On Stable Diffusion's latents, 64 x 64, its value is 4,096 times the mean over pixels."""
    draw = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 4, side, side, generator=draw).double() for _ in range(2))
    exact = LossWeights.as_published(newest=True)
    summed = DistillationLoss(exact)(student, student, teacher)["soft"]
    mean = DistillationLoss(exact.replace(soft_reduction="mean"))(student, student, teacher)["soft"]
    assert summed.item() == pytest.approx(side * side * mean.item(), rel=1e-12)


def test_their_log_adds_up_to_a_sum_over_pixels():
    """Both lines of their log; a KL for each pixel over the output error is a third, as anywhere.

    With the mean over pixels the KL would be 4,096 times smaller. The features' sum cannot be read
    off the log in this way: they have no such bound.
    """
    for line in AUTHORS_LOG.values():
        parts = line["task"] + line["output"] + line["feature"] + line["soft"]
        assert parts == pytest.approx(line["loss"], abs=0.5)
        assert line["soft"] / (line["output"] * 4096) == pytest.approx(0.34, abs=0.01)
    draw = torch.Generator().manual_seed(3)
    teacher = torch.randn(64, 4, 64, 64, generator=draw).double()
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=draw)
    found = DistillationLoss(LossWeights.as_published(newest=True))(student, teacher, teacher)
    assert 0.3 < found["soft"] / (found["output"] * 4096) < 0.375  # for hot softmaxes 3/8


def test_a_student_with_a_mid_block_is_outside_the_restatement():
    """`feature_pairs` adds the mid-block where both have it, and the docstring says so."""
    teacher = kdc.load_teacher("mini").unet
    assert len(kdc.tap_names(slim(teacher, "kdc"), teacher)) == len(BLOCKS)
    assert len(kdc.tap_names(slim(teacher, "bk-base"), teacher)) == len(BLOCKS) + 1
