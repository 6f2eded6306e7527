import copy
import dataclasses
import math

import pytest
import torch

from kdc.distillation.losses import (
    TERMS,
    DistillationLoss,
    LossWeights,
    feature_term,
    min_snr_weight,
    soft_term,
)


def batch(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    student = draw(2, 4, 8, 8).requires_grad_()
    hooks = [draw(2, 3, 4, 4).requires_grad_(), draw(2, 5, 2, 2).requires_grad_()]
    return student, draw(2, 4, 8, 8), draw(2, 4, 8, 8), hooks, [torch.randn_like(t) for t in hooks]


def kl_by_hand(s, t, temperature):
    """Sum over pixels and images of T^2 KL(t || s), in Python floats."""
    total = 0.0
    for b in range(s.shape[0]):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                a = [v / temperature for v in t[b, :, y, x].tolist()]
                c = [v / temperature for v in s[b, :, y, x].tolist()]
                za, zc = sum(map(math.exp, a)), sum(map(math.exp, c))
                for u, v in zip(a, c, strict=True):
                    p, q = math.exp(u) / za, math.exp(v) / zc
                    total += temperature**2 * p * math.log(p / q)
    return total


@pytest.mark.parametrize("name", TERMS)
def test_every_enabled_term_has_a_gradient(name):
    student, target, teacher, hooks, teacher_features = batch()
    terms = DistillationLoss(LossWeights.only(name))(
        student, target, teacher, hooks, teacher_features
    )
    assert set(terms) == {name, "loss"}
    grads = torch.autograd.grad(terms["loss"], [student, *hooks], allow_unused=True)
    of_output, of_hooks = grads[0], grads[1:]
    if name == "feature":
        assert all(g is not None and g.abs().sum() > 0 for g in of_hooks)
    else:
        assert of_output is not None and of_output.abs().sum() > 0


def test_the_published_output_term_has_a_value_but_no_gradient():
    student, target, teacher, hooks, teacher_features = batch()
    published = LossWeights.as_published()
    terms = DistillationLoss(published)(student, target, teacher, hooks, teacher_features)
    assert terms["output"] > 0 and not terms["output"].requires_grad
    corrected = DistillationLoss(LossWeights())(student, target, teacher, hooks, teacher_features)
    assert corrected["output"].requires_grad
    assert torch.equal(corrected["output"].detach(), terms["output"])


def test_the_loss_is_the_weighted_sum_of_its_terms():
    student, target, teacher, hooks, teacher_features = batch()
    weights = LossWeights(task=0.5, output=2.0, soft=3.0, feature=0.25)
    terms = DistillationLoss(weights)(student, target, teacher, hooks, teacher_features)
    expected = sum(getattr(weights, n) * terms[n].item() for n in TERMS)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert terms["task"].item() == pytest.approx((student - target).square().mean().item())
    assert terms["output"].item() == pytest.approx((student - teacher).square().mean().item())


@pytest.mark.parametrize("temperature", [0.7, 2.0, 8.0])
def test_the_soft_term_is_the_kl_divergence_over_channels(temperature):
    student, _, teacher, *_ = batch(dtype=torch.float64)
    by_hand = kl_by_hand(student.detach(), teacher, temperature)
    mean = soft_term(student, teacher, temperature, "mean").item()
    summed = soft_term(student, teacher, temperature, "batchmean").item()
    assert mean == pytest.approx(by_hand / (2 * 64), rel=1e-4)
    assert summed == pytest.approx(by_hand / 2, rel=1e-4)


def test_the_soft_term_tends_to_half_the_centred_squared_error():
    student, _, teacher, *_ = batch()
    difference = student - teacher
    centred = difference - difference.mean(dim=1, keepdim=True)
    limit = centred.square().mean().item() / 2
    assert soft_term(student, teacher, 100.0, "mean").item() == pytest.approx(limit, rel=0.03)


def test_the_soft_term_is_blind_to_an_error_that_all_channels_share():
    student, _, teacher, *_ = batch()
    shifted = teacher + torch.randn(2, 1, 8, 8)
    assert soft_term(shifted, teacher, 2.0, "mean").item() == pytest.approx(0, abs=1e-6)
    assert soft_term(student, teacher, 2.0, "mean") > 0.01


def test_the_feature_term_does_not_depend_on_the_scale_of_a_hook():
    *_, hooks, teacher_features = batch()
    once = feature_term(hooks, teacher_features)
    scaled = feature_term([1000 * t for t in hooks], [1000 * t for t in teacher_features])
    assert scaled.item() == pytest.approx(once.item(), rel=1e-4)
    raw = feature_term(
        [10 * t for t in hooks], [10 * t for t in teacher_features], normalised=False
    )
    assert raw.item() == pytest.approx(
        100 * feature_term(hooks, teacher_features, False).item(), 1e-4
    )


@pytest.mark.parametrize("names", [("task",), ("output",), ("soft",), ("feature",), TERMS])
def test_gradients_agree_with_finite_differences_in_float64(names):
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    student, hooks = draw(2, 4, 2, 2).requires_grad_(), [draw(2, 3).requires_grad_()]
    target, teacher, teacher_features = draw(2, 4, 2, 2), draw(2, 4, 2, 2), [draw(2, 3)]
    loss = DistillationLoss(LossWeights.only(*names))

    def total(student, hooked):
        return loss(student, target, teacher, [hooked], teacher_features)["loss"]

    assert torch.autograd.gradcheck(total, (student, *hooks))


def test_min_snr_caps_the_weight():
    snr = torch.tensor([0.01, 1.0, 5.0, 50.0])
    assert min_snr_weight(snr, 5.0).tolist() == pytest.approx([1, 1, 1, 0.1])
    expected = [0.01 / 1.01, 0.5, 5 / 6, 5 / 51]
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx(expected)


def test_min_snr_has_its_limit_where_nothing_is_left_but_noise():
    """min(snr, cap) / snr tends to 1, min(snr, cap) / (snr + 1) to 0."""
    snr = torch.tensor([0.0, 1e-30, 1e-3])
    assert min_snr_weight(snr, 5.0).tolist() == [1, 1, 1]
    weights = min_snr_weight(snr, 5.0, "v_prediction").tolist()
    assert weights == pytest.approx([0, 1e-30, 1e-3], rel=1e-2)
    assert min_snr_weight(torch.tensor([float("nan")]), 5.0).isnan()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(task=-1), "weight of task must be finite and not negative, not -1"),
        (dict(output=math.nan), "weight of output must be finite and not negative, not nan"),
        (dict(soft=math.inf), "weight of soft must be finite"),
        (dict(feature=-math.inf), "weight of feature must be finite"),
        (dict(temperature=0), "temperature"),
        (dict(temperature=math.nan), "temperature must be positive and finite, not nan"),
        (dict(temperature=math.inf), "temperature must be positive and finite, not inf"),
        (dict(min_snr=-5), "min_snr must be positive, not -5.*None"),
        (dict(min_snr=0), "min_snr must be positive, not 0"),
        (dict(min_snr=math.nan), "min_snr must be positive, not nan"),
        (dict(soft_reduction="sum"), "soft_reduction"),
        (dict(feature_reduction="max"), "feature_reduction must be one of mean, sum"),
        (dict(features_at="skips"), "features_at must be one of blocks, attention, both"),
        (dict(task=0, output=0, soft=0, feature=0), "nothing"),
    ],
)
def test_unusable_weights_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**wrong)


def test_unknown_terms_and_missing_parts_are_refused():
    with pytest.raises(ValueError, match="task, output, soft, feature"):
        LossWeights.only("task", "style")
    student, target, *_ = batch()
    with pytest.raises(ValueError, match="teacher"):
        DistillationLoss(LossWeights())(student, target)
    with pytest.raises(ValueError, match="features"):
        feature_term([], [])
    with pytest.raises(ValueError, match="feature 0"):
        feature_term([torch.zeros(1, 2)], [torch.zeros(1, 3)])


def test_weights_are_immutable_comparable_and_survive_plain_values():
    weights = LossWeights(soft=0.5, temperature=4.0)
    assert weights == LossWeights(**weights.to_dict()) != LossWeights()
    assert len({weights, LossWeights(soft=0.5, temperature=4.0)}) == 1
    assert weights.replace(soft=0.1, temperature=2.0) == LossWeights()
    assert copy.deepcopy(weights) == weights
    with pytest.raises(dataclasses.FrozenInstanceError, match="replace"):
        weights.soft = 1.0
    with pytest.raises(TypeError, match="did you mean temperature"):
        LossWeights(temprature=1.0)
    with pytest.raises(AttributeError):
        print(weights.temprature)


def test_features_are_averaged_or_summed_over_blocks():
    *_, hooks, teacher_features = batch()
    errors = [(s - t).square().mean() for s, t in zip(hooks, teacher_features, strict=True)]
    mean = feature_term(hooks, teacher_features, normalised=False)
    total = feature_term(hooks, teacher_features, normalised=False, reduction="sum")
    assert torch.allclose(mean, (errors[0] + errors[1]) / 2)
    assert torch.allclose(total, errors[0] + errors[1])
