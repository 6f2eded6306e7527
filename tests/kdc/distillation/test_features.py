import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import kdc
from kdc import pipelines
from kdc.distillation.features import FeatureHooks, feature_pairs, projections
from kdc.distillation.losses import feature_term
from kdc.unet.slimming import slim


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x, skip=False):
        hidden = self.first(x)
        return hidden if skip else self.second(hidden)


def test_hooks_collect_in_order_forget_and_miss_nothing():
    model, x = TwoLayers(), torch.ones(1, 2)
    hooks = FeatureHooks(model, ["second", "first"])
    out = model(x)
    second, first = hooks.take()
    assert torch.equal(second, out) and torch.equal(first, model.first(x))
    model(x, skip=True)
    with pytest.raises(RuntimeError, match="second"):
        hooks.take()
    hooks.close()
    model(x)
    with pytest.raises(RuntimeError):
        hooks.take()
    with pytest.raises(ValueError, match="third"):
        FeatureHooks(model, ["third"])


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, so that DDP can wrap."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_hooks_survive_data_parallel_wrapping_and_compilation(one_process):
    model, x = TwoLayers(), torch.ones(1, 2)
    hooks = FeatureHooks(model, ["first", "second"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    for call in (wrapped, torch.compile(model, backend="eager"), torch.compile(wrapped.module)):
        for scale in (1.0, 2.0):  # a second call must not see what the first has left
            out = call(scale * x)
            first, second = hooks.take()
            assert torch.allclose(first, model.first(scale * x)) and torch.equal(second, out)
            with pytest.raises(RuntimeError):
                hooks.take()
            model(x), hooks.take()


@pytest.mark.parametrize("plan", ["full", "bk-base", "kdc", "kdc-v2", "bk-tiny"])
def test_corresponding_hooks_agree_in_shape(plan, tiny_unet):
    teacher = tiny_unet.eval()
    student = slim(teacher, plan).eval()
    pairs = feature_pairs(student, teacher)
    assert len(pairs) >= 6
    ours = FeatureHooks(student, [s for s, _ in pairs])
    theirs = FeatureHooks(teacher, [t for _, t in pairs])
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 5, 16)
    with torch.no_grad():
        for unet in (student, teacher):
            unet(*inputs)
    collected = list(zip(ours.take(), theirs.take(), strict=True))
    assert all(s.shape == t.shape for s, t in collected)
    if plan == "full":
        assert feature_term(*zip(*collected, strict=True)).item() == 0


def collect(student, teacher, at):
    pairs = feature_pairs(student, teacher, at)
    hooks = [
        FeatureHooks(student, [s for s, _ in pairs]),
        FeatureHooks(teacher, [t for _, t in pairs]),
    ]
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([500]), torch.randn(2, 5, 16)
    with torch.no_grad():
        for unet in (student, teacher):
            unet(*inputs)
    return [hooked.take() for hooked in hooks]


@pytest.mark.parametrize("plan", ["full", "kdc", "bk-tiny"])
def test_attention_hooks_are_those_the_students_were_cut_from(plan, tiny_unet):
    """Slimming copies a layer's weights; so tapped layers must hold the same ones."""
    student = slim(tiny_unet, plan)
    pairs = feature_pairs(student, tiny_unet, "attention")
    for ours, theirs in pairs:
        a, b = (
            unet.get_submodule(n).to_q.weight for unet, n in ((student, ours), (tiny_unet, theirs))
        )
        assert torch.equal(a, b), (ours, theirs)
    kept = sum(name.endswith("attn1") for name, _ in student.named_modules())
    assert len(pairs) == kept > 0
    both = feature_pairs(student, tiny_unet, "both")
    assert both == feature_pairs(student, tiny_unet) + pairs
    s, t = collect(student.eval(), tiny_unet.eval(), "both")
    assert all(a.shape == b.shape for a, b in zip(s, t, strict=True))


@pytest.mark.parametrize("plan", ["kdc", "bk-tiny"])
def test_a_student_that_lost_its_plan_is_refused_at_its_attentions(plan, tiny_unet, tmp_path):
    """What plain diffusers reopens does not know that its second layer was the teacher's third."""
    folder = kdc.save_student(slim(tiny_unet, plan), tmp_path)
    reopened = UNet2DConditionModel.from_pretrained(folder / "unet")
    for at in ("attention", "both"):
        with pytest.raises(ValueError, match=r"kdc\.load_student.*kdc\.slim"):
            feature_pairs(reopened, tiny_unet, at)
    assert feature_pairs(reopened, tiny_unet) == feature_pairs(slim(tiny_unet, plan), tiny_unet)
    reopened.slim_plan = pipelines.read_plan(folder)
    assert len(feature_pairs(reopened, tiny_unet, "attention")) > 0


@pytest.mark.parametrize("plan", ["bk-base", "bk-tiny"])
def test_a_student_and_its_older_self_are_tapped_at_the_same_attentions(plan, tiny_unet):
    student = slim(tiny_unet, plan)
    for guide in (slim(tiny_unet, plan), UNet2DConditionModel.from_config(student.config)):
        pairs = feature_pairs(student, guide, "attention")
        assert pairs and all(ours == theirs for ours, theirs in pairs)


def test_hooks_elsewhere_or_without_attention_are_refused(tiny_unet):
    with pytest.raises(ValueError, match="blocks, attention, both"):
        feature_pairs(tiny_unet, tiny_unet, "skips")
    bare = kdc.SlimPlan("bare", ((0,),) * 4, ((0, 2),) * 4, False, (False,) * 4, (False,) * 4)
    with pytest.raises(ValueError, match="kept no self-attention"):
        feature_pairs(slim(tiny_unet, bare), tiny_unet, "attention")


def test_narrow_students_are_projected_to_the_teachers_width(tiny_unet):
    config = dict(tiny_unet.config) | {"block_out_channels": (4, 8, 12, 12)}
    narrow = UNet2DConditionModel.from_config(config).eval()
    s, t = collect(narrow, tiny_unet.eval(), "both")
    with pytest.raises(ValueError, match="feature 0"):
        feature_term(s, t)
    layers = projections(s, t, seed=1)
    projected = [layer(hooked) for layer, hooked in zip(layers, s, strict=True)]
    assert [p.shape for p in projected] == [hooked.shape for hooked in t]
    assert {type(layer) for layer in layers} == {nn.Conv2d, nn.Linear}
    again = projections(s, t, seed=1)
    assert all(torch.equal(a, again.state_dict()[k]) for k, a in layers.state_dict().items())
    same = projections(t, t)
    assert all(isinstance(layer, nn.Identity) for layer in same)
    with pytest.raises(ValueError, match="more than their width"):
        projections([torch.zeros(1, 4, 8, 8)], [torch.zeros(1, 4, 4, 4)])
