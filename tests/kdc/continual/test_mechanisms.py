"""Mechanisms against their definitions, and a new one in a few lines."""

import copy

import pytest
import torch

from kdc import ReplayBuffer
from kdc.continual.mechanisms.agem import AGEM, project
from kdc.continual.mechanisms.base import Mechanism
from kdc.continual.sequence import run_sequence
from kdc.continual.strategies import STRATEGIES, Strategy
from tests.kdc.continual import test_sequence as sequences

tasks, narrow = sequences.tasks, sequences.narrow
run, weights = sequences.run, sequences.weights


def split(vector, shapes):
    parts = vector.split([torch.Size(shape).numel() for shape in shapes])
    return [part.view(shape).clone() for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_agem_projects_only_what_would_raise_the_old_loss(seed):
    """g - (g.r / r.r) r where g.r < 0, else g: equation 11 of 1812.00420, in float64."""
    draw = torch.Generator().manual_seed(seed)
    g, r = (torch.randn(31, generator=draw, dtype=torch.float64) for _ in range(2))
    shapes = [(2, 3), (5,), (4, 5)]
    parts = split(g, shapes)
    project(parts, split(r, shapes))
    found = torch.cat([part.flatten() for part in parts])
    expected = g if g @ r >= 0 else g - (g @ r) / (r @ r) * r
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert found @ r >= -1e-12
    assert (g @ r < 0) == bool((found - g).abs().max() > 1e-9)


def test_agem_leaves_parameters_without_a_gradient_alone():
    g, r = [torch.tensor([-1.0, 0.0]), None], [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    project(g, r)
    # g . r = -1 and r . r = 5
    assert g[1] is None and torch.allclose(g[0], torch.tensor([-1.0 + 1 / 5, 0.0]))


def test_a_step_of_agem_does_not_raise_the_old_loss_to_first_order(tasks, narrow, monkeypatch):
    """On a real U-Net: after the hook every gradient agrees with that on the stored images."""
    found, original = [], AGEM.before_step

    def watching(self, t, old_gradient):
        seen = []

        def remembering(items):
            seen.append(old_gradient(items))
            return seen[0]

        before = [p.grad.clone() for p in self.trainable()]
        original(self, t, remembering)
        if seen:
            after = [p.grad for p in self.trainable()]
            dots = [
                sum((g * r).sum().item() for g, r in zip(side, seen[0], strict=True))
                for side in (before, after)
            ]
            found.append((*dots, sum(r.square().sum().item() for r in seen[0])))

    monkeypatch.setattr(AGEM, "before_step", watching)
    run(tasks[:2], "agem", narrow, steps=12, learning_rate=5e-3)
    assert len(found) == 12  # in the second task alone
    for before, after, size in found:
        assert after >= -1e-5 * size
        if before >= 0:
            assert after == before
    assert any(before < 0 for before, *_ in found), "nothing was ever projected"


def test_the_first_task_of_agem_is_fine_tuning_bit_for_bit(tasks, narrow):
    plain, _ = run(tasks[:1], "finetune", narrow)
    first, _ = run(tasks[:1], "agem", narrow)
    assert torch.equal(weights(first), weights(plain))
    two, _ = run(tasks[:2], "agem", narrow, steps=12, learning_rate=5e-3)
    other, _ = run(tasks[:2], "finetune", narrow, steps=12, learning_rate=5e-3)
    assert not torch.equal(weights(two), weights(other))


class Frozen(Mechanism):
    """A new mechanism in a few lines: the first layer learns in the first task alone."""

    def before_step(self, t, old_gradient):
        if t > 0:
            for p in self.run.student.conv_in.parameters():
                p.grad.zero_()


def test_a_new_mechanism_is_one_class(tasks, narrow, tmp_path):
    strategy = Strategy("frozen", Frozen)
    student, _ = run(tasks[:2], strategy, narrow, output_dir=tmp_path)
    first = sequences.load_student(tmp_path / "task-0", narrow).unet
    assert torch.equal(student.conv_in.weight, first.conv_in.weight)
    assert not torch.equal(student.conv_out.weight, first.conv_out.weight)


@pytest.mark.parametrize("name", STRATEGIES)
def test_micro_batches_are_accumulated_by_every_strategy(name, tasks, narrow):
    student, result = run(tasks[:2], name, narrow, steps=2, accumulation=2)
    assert result.counts["new_images"].tolist() == [12, 12]
    assert not torch.equal(weights(student), weights(narrow.unet))


def test_recomputing_activations_changes_no_sequence(tasks, narrow):
    plain, _ = run(tasks[:2], "replay", narrow)
    saving, _ = run(tasks[:2], "replay", narrow, gradient_checkpointing=True)
    torch.testing.assert_close(weights(saving), weights(plain), rtol=0, atol=1e-6)


def test_settings_are_checked_before_anything_is_scored(tasks, narrow):
    def never(*arguments):
        raise AssertionError("scored")

    arguments = tasks, "replay", copy.deepcopy(narrow.unet), narrow
    common = dict(evaluate=never, higher_is_better={"a": True}, buffer=ReplayBuffer(3))
    with pytest.raises(TypeError, match="did you mean batch_size"):
        run_sequence(*arguments, steps=1, batchsize=3, **common)
    with pytest.raises(TypeError, match="steps must be a whole number"):
        run_sequence(*arguments, steps=2.5, **common)
