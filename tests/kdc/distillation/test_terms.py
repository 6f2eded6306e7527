"""A fifth loss term is one entry of the table, and everything follows it."""

import pandas as pd
import pytest
import torch

import kdc
from kdc.distillation import losses
from kdc.distillation.losses import TERMS, DistillationLoss, LossWeights, Term
from studies import figures


@pytest.fixture
def fifth(monkeypatch):
    """The three lines: |s - t| as one more term."""
    absolute = Term(
        lambda parts, _: (parts.student - parts.teacher).abs().mean(),
        needs=frozenset({"teacher"}),
        weight=0.25,
    )
    monkeypatch.setitem(TERMS, "absolute", absolute)  # fmt: skip


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, kdc.load_dataset("worlds", count=8))


def test_the_weights_know_it(fifth):
    assert LossWeights().absolute == 0.25 and LossWeights(absolute=2.0).absolute == 2.0
    only = LossWeights.only("absolute")
    assert list(only.enabled) == ["absolute"] and only.needs_teacher
    assert LossWeights.as_published().absolute == 0.0
    with pytest.raises(ValueError, match="weight of absolute"):
        LossWeights(absolute=-1.0)


def test_the_loss_computes_and_differentiates_it(fifth):
    draw = torch.Generator().manual_seed(0)
    student, target, other = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(3))
    student.requires_grad_()
    terms = DistillationLoss(LossWeights.only("absolute"))(student, target, other)
    assert terms["loss"].item() == pytest.approx(0.25 * (student - other).abs().mean().item())
    (gradient,) = torch.autograd.grad(terms["loss"], student)
    expected = 0.25 * (student - other).sign() / student.numel()
    assert torch.allclose(gradient, expected)


def test_training_logs_it_and_the_curves_show_it(fifth, teacher, data):
    student = kdc.slim(teacher.unet, "kdc")
    log = kdc.distill(student, teacher, data, steps=1, batch_size=2)
    assert log["absolute"].iloc[0] > 0
    parts = sum(LossWeights().enabled[name] * log[name].iloc[0] for name in TERMS)
    assert log["loss"].iloc[0] == pytest.approx(parts, rel=1e-5)
    figure = figures.curves({"run": log}, list(LossWeights().enabled))
    assert "absolute" in [axis.get_title() for axis in figure.axes]


def test_the_diagnosis_differentiates_it(fifth, teacher, data):
    student = kdc.slim(teacher.unet, "kdc")
    found = kdc.diagnose(student, teacher, data, LossWeights(), batch_size=2)
    assert found.terms.loc["absolute", "gradient_norm"] > 0
    assert found.terms["share"].sum() == pytest.approx(1)
    assert "absolute" in found.cosines
    assert isinstance(found.terms, pd.DataFrame)


def test_it_is_gone_again():
    assert list(TERMS) == ["task", "output", "soft", "feature"] == list(LossWeights().enabled)
    assert losses.TERMS is TERMS
