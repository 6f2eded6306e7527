import re

import pandas as pd
import pytest
import torch

import kdc
from kdc import LossWeights
from kdc.distillation.diagnostics import blind_terms, diagnose
from kdc.distillation.step import DistillationStep, forward_process
from kdc.unet.slimming import slim

TERMS = ("task", "output", "soft", "feature")


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, kdc.load_dataset("worlds", count=16))


@pytest.fixture(scope="module")
def student(teacher):
    return kdc.slim(teacher.unet, "kdc")


def whole_gradient(student, teacher, data, weights):
    """The gradient of the loss as training makes it: one backward pass."""
    student.zero_grad()
    distillation_step = DistillationStep(student, teacher.unet, forward_process(teacher), weights)
    generator = torch.Generator().manual_seed(0)
    distillation_step(student, *data.draw(4, generator, 0.1), generator)["loss"].backward()
    distillation_step.close()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    return gradient


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_norms_cosines_and_shares_make_up_the_gradient_of_the_loss(student, teacher, data):
    """|sum g|^2 = sum of |g_i| |g_j| cos_ij, against one backward pass through the whole loss."""
    found = diagnose(student, teacher, data, LossWeights(), batch_size=4)
    assert list(found.terms.index) == list(TERMS) == list(found.cosines)
    norms = found.terms["gradient_norm"]
    squared = norms @ found.cosines @ norms
    whole = whole_gradient(student, teacher, data, LossWeights())
    assert squared == pytest.approx(whole.square().sum().item(), rel=1e-3)
    assert found.terms["share"].sum() == pytest.approx(1)
    assert found.terms["adam_share"].sum() == pytest.approx(1)
    assert all(found.cosines.loc[n, n] == pytest.approx(1) for n in TERMS)
    alone = whole_gradient(student, teacher, data, LossWeights.only("output"))
    assert norms["output"] == pytest.approx(alone.norm().item(), rel=1e-3)
    for column, step in (("share", whole), ("adam_share", whole.sign())):
        share = (alone @ step / (whole @ step)).item()
        assert found.terms.loc["output", column] == pytest.approx(share, rel=1e-3)


def test_the_published_recipe_is_told_what_is_wrong_with_it(teacher, data):
    student, weights = slim(teacher.unet, "kdc"), LossWeights.as_published()
    with pytest.warns(UserWarning, match="output term is enabled and has no gradient"):
        found = diagnose(student, teacher, data, weights, batch_size=4)
    assert pd.isna(found.terms.loc["output", "gradient_norm"])
    assert found.terms.loc["output", "share"] == 0
    assert any("soft term is blind" in fault for fault in found.faults)
    assert 0.9 <= found.terms.loc["soft", "share"] < 0.98  # the rest is that of the features
    assert not any("makes up" in fault for fault in found.faults)
    averaged = weights.replace(feature_reduction="mean")
    with pytest.warns(UserWarning, match="soft term makes up"):
        found = diagnose(student, teacher, data, averaged, batch_size=4)
    assert 0.98 <= found.terms.loc["soft", "share"] < 1
    share = r"soft term makes up 99\.\d % of the update: all the others together have 0\.\d %"
    assert sum(bool(re.search(share, fault)) for fault in found.faults) == 1
    oversized = weights.replace(soft=1000.0)
    with pytest.warns(UserWarning, match="soft term's gradient norm is [0-9,]+ times"):
        found = diagnose(student, teacher, data, oversized, batch_size=4)
    assert not any("makes up" in fault for fault in found.faults)  # said once


def test_a_loss_of_dead_terms_alone_is_told_so(student, teacher, data):
    dead = LossWeights(task=0, output=1, soft=0, feature=0, output_gradient=False)
    with pytest.warns(UserWarning, match="output term is enabled and has no gradient"):
        found = diagnose(student, teacher, data, dead, batch_size=4)
    assert list(found.terms.index) == ["output"] and found.terms.loc["output", "value"] > 0
    assert found.terms.loc["output", ["gradient_norm", "share", "adam_share"]].isna().all()
    assert found.cosines.empty and len(found.faults) == 1


def test_a_gradient_of_zero_has_no_share_and_no_direction(teacher, data):
    """A student that is its teacher: there is nothing to learn from it."""
    same = kdc.slim(teacher.unet, "full").eval()
    with pytest.warns(UserWarning, match="output term is enabled and has no gradient"):
        found = diagnose(same, teacher, data, LossWeights.only("output"), batch_size=4)
    assert found.terms.loc["output", "gradient_norm"] == 0
    assert pd.isna(found.terms.loc["output", "share"]) and found.cosines.isna().all(axis=None)


def test_a_term_alone_does_not_outweigh_anything(student, teacher, data):
    assert diagnose(student, teacher, data, LossWeights.only("task"), batch_size=4).faults == ()


def test_a_sound_loss_has_no_fault(student, teacher, data, recwarn):
    found = diagnose(student, teacher, data, LossWeights.only("task", "output", "feature"))
    assert found.faults == () and not [w for w in recwarn if w.category is UserWarning]


def test_only_the_soft_term_is_blind():
    assert blind_terms(LossWeights.only("task", "output", "feature")) == []
    (fault,) = blind_terms(LossWeights())
    assert fault.startswith("the soft term is blind")
