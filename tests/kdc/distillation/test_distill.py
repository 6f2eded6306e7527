import copy
import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import kdc
from kdc import LossWeights
from kdc.data.datasets import WorldDataset
from kdc.distillation.features import FeatureHooks
from kdc.distillation.step import DistillationStep, forward_process
from tests.helpers import calls_counted, draws_counted, weights


@pytest.fixture(scope="module")
def data(teacher):
    return kdc.cache_latents(teacher, WorldDataset(["flora", "lepidoptera"], count=48))


def run(teacher, data, steps=6, plan="kdc", **settings):
    student = kdc.slim(teacher.unet, plan)
    settings = {"batch_size": 4} | settings
    log = kdc.distill(student, teacher, data, steps=steps, **settings)
    return student, log


@pytest.mark.long
def test_distillation_brings_the_student_nearer_to_the_teacher(teacher, data):
    before = kdc.output_error(kdc.slim(teacher.unet, "kdc"), teacher, data, count=16).mean()
    student, log = run(teacher, data, steps=25, batch_size=8, ema_decay=0.9)
    after = kdc.output_error(student, teacher, data, count=16)
    assert after.mean() < 0.6 * before and len(after) == 8
    assert set(log.columns) >= {"task", "output", "soft", "feature", "loss"}


def test_the_teacher_is_left_as_it_was(teacher, data):
    before = weights(teacher.unet).clone()
    run(teacher, data, steps=2)
    assert torch.equal(weights(teacher.unet), before)
    assert not any(m._forward_hooks for m in teacher.unet.modules())
    assert all(p.grad is None for p in teacher.unet.parameters())


def test_the_same_seed_gives_the_same_student_bit_for_bit(teacher, data):
    a, b, c = (weights(run(teacher, data, steps=3, seed=s)[0]) for s in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_resumed_distillation_equals_an_unbroken_one(teacher, data, tmp_path):
    whole, whole_log = run(teacher, data, save_every=2)
    with draws_counted(stop_at=6), pytest.raises(KeyboardInterrupt):
        run(teacher, data, save_every=2, output_dir=tmp_path)
    with draws_counted() as draws:
        resumed, log = run(teacher, data, save_every=2, output_dir=tmp_path, resume=True)
    assert len(draws) == 2, "resume did not go on from step 4"
    assert torch.equal(weights(resumed), weights(whole))
    assert log.equals(whole_log)


def test_resume_refuses_another_experiment(teacher, data, tmp_path):
    run(teacher, data, save_every=2, output_dir=tmp_path)
    again = {"save_every": 2, "output_dir": tmp_path, "resume": True}
    with pytest.raises(ValueError, match="made with weights="):
        run(teacher, data, weights=LossWeights.only("task", "output"), **again)
    with pytest.raises(ValueError, match="made with batch_size=4"):
        run(teacher, data, batch_size=3, **again)
    with pytest.raises(ValueError, match="made with student="):
        run(teacher, data, plan="bk-base", **again)
    other = kdc.cache_latents(teacher, WorldDataset(["flora"], count=48))
    with pytest.raises(ValueError, match="made with data="):
        run(teacher, other, **again)


def test_what_cannot_be_distilled_is_refused_before_images_are_encoded(teacher):
    nothing = object()  # encoding it would be a TypeError
    half = kdc.slim(teacher.unet, "kdc").half()
    with pytest.raises(ValueError, match="float32, not torch.float16"):
        kdc.distill(half, teacher, nothing, steps=1)
    with pytest.raises(ValueError, match="its own teacher"):
        kdc.distill(teacher.unet, teacher, nothing, steps=1)


@pytest.mark.parametrize("term", ["task", "output", "soft", "feature"])
def test_every_term_alone_moves_the_weights_of_the_student(teacher, data, term):
    """Through the real hooks and hooks: a detached hook or output would leave the weights alone."""
    student, log = run(
        teacher, data, steps=2, weights=LossWeights.only(term), ema_decay=0, learning_rate=1e-3
    )
    moved = weights(student) - weights(kdc.slim(teacher.unet, "kdc"))
    assert (moved != 0).float().mean() > 0.5 and log["grad_norm"].iloc[0] > 0


def test_the_student_is_left_as_a_plain_diffusers_folder(teacher, data, tmp_path):
    student, _ = run(teacher, data, steps=2, output_dir=tmp_path)
    plain = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert torch.equal(weights(plain), weights(student))
    assert torch.equal(weights(kdc.load_student(tmp_path, teacher).unet), weights(student))


def test_fine_tuning_never_calls_the_teacher(teacher, data, monkeypatch):
    student = kdc.slim(teacher.unet, "kdc")
    monkeypatch.setattr(type(teacher.unet), "forward", refuse_teacher(teacher.unet))
    log = kdc.distill(
        student, teacher, data, steps=2, batch_size=2, weights=LossWeights.only("task")
    )
    assert "task" in log and "output" not in log


def refuse_teacher(unet):
    original = type(unet).forward

    def forward(self, *args, **kwargs):
        assert self is not unet, "the teacher was called"
        return original(self, *args, **kwargs)

    return forward


def test_a_perfect_student_has_no_distillation_loss(teacher, data):
    student = kdc.slim(teacher.unet, "full")
    teacher.unet.eval()
    log = kdc.distill(student, teacher, data, steps=1, batch_size=4)
    first = log.iloc[0]
    # Training mode changes nothing in this U-Net: it has no dropout and no batch statistics.
    assert first["output"] == pytest.approx(0, abs=1e-9)
    assert first["feature"] == pytest.approx(0, abs=1e-9)
    assert first["task"] > 0.001


@pytest.mark.parametrize("plan", ["bk-base", "kdc-v2", "bk-tiny"])
def test_every_plan_can_be_distilled_with_every_term(teacher, data, plan):
    _, log = run(teacher, data, steps=1, plan=plan, batch_size=2)
    assert log[["task", "output", "soft", "feature"]].notna().all(axis=None)


def test_velocity_is_the_target_where_the_teacher_predicts_velocity(teacher, data, monkeypatch):
    monkeypatch.setitem(teacher.scheduler.config, "prediction_type", "sample")
    with pytest.raises(ValueError, match="v_prediction"):
        run(teacher, data, steps=1)
    monkeypatch.setitem(teacher.scheduler.config, "prediction_type", "v_prediction")
    student = kdc.slim(teacher.unet, "kdc")
    log = kdc.distill(
        student, teacher, data, steps=1, batch_size=8, weights=LossWeights.only("task"), seed=3
    )
    g = torch.Generator().manual_seed(3 * 1009)
    latents, prompt_embeds = data.draw(8, g, 0.1)
    noise = torch.randn(latents.shape, generator=g)
    t = torch.randint(1000, (8,), generator=g)
    process = DDPMScheduler.from_config(teacher.scheduler.config)
    a = process.alphas_cumprod[t][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.no_grad():
        expected = (
            kdc.slim(teacher.unet, "kdc")(noisy, t, prompt_embeds).sample - velocity
        ).square()
    assert log["task"].iloc[0] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_what_does_not_fit_is_refused_before_training(teacher, data):
    config = dict(teacher.unet.config) | {"cross_attention_dim": 32}
    other = UNet2DConditionModel.from_config(config)
    with pytest.raises(ValueError, match="cross_attention_dim: 32 and"):
        kdc.distill(other, teacher, data, steps=1)
    with pytest.raises(ValueError, match="batch_size"):
        run(teacher, data, steps=1, batch_size=0)


def test_a_narrow_student_is_distilled_through_projections_that_do_not_stay(teacher, data):
    config = dict(teacher.unet.config) | {"block_out_channels": (16, 32, 64, 64)}
    narrow = UNet2DConditionModel.from_config(config)
    names = set(narrow.state_dict())
    only = LossWeights.only("feature")
    distillation_step = DistillationStep(narrow, teacher.unet, forward_process(teacher), only)
    generator = torch.Generator().manual_seed(0)
    distillation_step(narrow, *data.draw(2, generator, 0.1), generator)["loss"].backward()
    added = dict(narrow.feature_projections.named_parameters())
    assert added and all(p.grad.abs().sum() > 0 for p in added.values())
    distillation_step.close()
    assert set(narrow.state_dict()) == names
    log = kdc.distill(narrow, teacher, data, steps=2, batch_size=2)
    assert set(narrow.state_dict()) == names and log["feature"].notna().all()


@pytest.mark.parametrize("closed_first", [0, 1])
def test_steps_of_one_student_have_projections_of_their_own(teacher, data, closed_first):
    """One follows the teacher, one the student's older self, one the teacher once more."""
    config = dict(teacher.unet.config) | {"block_out_channels": (16, 32, 64, 64)}
    narrow = UNet2DConditionModel.from_config(config)
    old, names = copy.deepcopy(narrow), set(narrow.state_dict())
    only, process = LossWeights.only("feature"), forward_process(teacher)

    def loss(distillation_step):
        g = torch.Generator().manual_seed(0)
        return distillation_step(narrow, *data.draw(2, g, 0.1), g)["loss"]

    alone = DistillationStep(narrow, teacher.unet, process, only)
    expected = loss(alone).item()
    alone.close()
    first, mine, second = (
        DistillationStep(narrow, guide, process, only, seed)
        for guide, seed in ((teacher.unet, 0), (old, 0), (teacher.unet, 1))
    )
    assert loss(first).item() == expected != loss(second).item() > 0
    assert loss(mine).item() == 0  # through a projection the older self would be at a distance
    pair = [first, second]
    left = pair.pop(1 - closed_first)
    pair[0].close()
    mine.close()
    assert set(narrow.state_dict()) > names, "one distillation step took another's projections away"
    loss(left).backward()
    added = [p for name, p in narrow.named_parameters() if name not in names]
    assert added and all(p.grad.abs().sum() > 0 for p in added)
    left.close()
    assert set(narrow.state_dict()) == names


@pytest.mark.parametrize("at", ["attention", "both"])
def test_features_can_be_compared_at_the_attentions(teacher, data, at):
    weights = LossWeights(features_at=at)
    _, log = run(teacher, data, steps=1, batch_size=2, weights=weights)
    _, blocks = run(teacher, data, steps=1, batch_size=2)
    assert log["feature"].iloc[0] != blocks["feature"].iloc[0] > 0
    assert log["task"].iloc[0] == blocks["task"].iloc[0]


def test_recomputing_activations_changes_no_weights(teacher, data):
    """kdc-v2 is hooked at a transformer, whose insides run again in the backward pass."""
    plain, _ = run(teacher, data, steps=2, plan="kdc-v2")
    saving, _ = run(teacher, data, steps=2, plan="kdc-v2", gradient_checkpointing=True)
    torch.testing.assert_close(weights(saving), weights(plain), rtol=0, atol=1e-6)
    assert not saving.is_gradient_checkpointing


def test_a_compiled_run_is_not_resumed_by_another(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr("kdc.training.efficiency.refuse_unusable", lambda *_, **__: None)
    monkeypatch.setattr("kdc.distillation.distill.refuse_unusable", lambda *_, **__: None)
    again = {"save_every": 1, "output_dir": tmp_path, "steps": 2}
    run(teacher, data, compile=True, **again)
    with pytest.raises(ValueError, match="made with compile=True, now compile=False"):
        run(teacher, data, resume=True, **again)


@pytest.fixture
def encodings(teacher):
    """How often the teacher's autoencoder and text encoder are called."""
    with calls_counted((teacher.vae, "encode"), (teacher.text_encoder, "forward")) as calls:
        yield calls


FOUND_EARLY = {
    "fractional steps": (dict(steps=2.5), TypeError, "steps must be a whole number"),
    "no step": (dict(steps=0), ValueError, "steps must be at least 1"),
    "no saving": (dict(save_every=0), ValueError, "save_every must be at least 1"),
    "a rate that is none": (dict(learning_rate=float("nan")), ValueError, "must be finite"),
    "an infinite rate": (dict(learning_rate=float("inf")), ValueError, "must be finite"),
    "a misspelt setting": (dict(learing_rate=1e-4), TypeError, "did you mean learning_rate"),
    "a forgotten resume": (dict(), FileExistsError, "go on with resume=True"),
    "another seed": (dict(resume=True, seed=3), ValueError, "made with seed=0, now seed=3"),
    "another loss": (
        dict(resume=True, weights=LossWeights.only("task")), ValueError, "made with weights=",
    ),
    "fewer steps": (dict(resume=True, steps=1), ValueError, "has 4 steps behind it, now steps=1"),
    "another plan": (dict(resume=True, plan="bk-base"), ValueError, "made with student="),
    "no folder to resume": (
        dict(resume=True, output_dir=None), ValueError, "resume=True needs the output_dir",
    ),
    "a number for a folder": (dict(output_dir=3), TypeError, "output_dir must be a text"),
    "an empty folder name": (dict(output_dir=""), ValueError, "output_dir is ''"),
    "a file for a folder": (dict(output_dir=__file__), NotADirectoryError, "is a file"),
    "no right to write": (dict(output_dir="/proc/x"), OSError, "nothing can be written there"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND_EARLY)
def test_what_can_be_known_is_said_before_the_first_image_is_encoded(
    kind, teacher, data, tmp_path, encodings
):
    run(teacher, data, steps=4, save_every=2, output_dir=tmp_path)
    settings, error, said = FOUND_EARLY[kind]
    images = WorldDataset(["flora"], count=4)
    settings = {"output_dir": tmp_path, "steps": 4, "save_every": 2} | settings
    encodings.clear()
    with pytest.raises(error, match=said):
        run(teacher, images, **settings)
    assert not encodings


def altered(teacher, **config):
    """The pipeline around a U-Net that says something else of itself."""
    unet = copy.copy(teacher.unet)
    unet._internal_dict = type(unet.config)(dict(unet.config) | config)
    return kdc.pipelines.with_unet(teacher, unet)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"in_channels": 9}, "9 input and 4 output channels"),
        ({"addition_embed_type": "text_time"}, "as in SDXL"),
        ({"class_embed_type": "timestep"}, "as in SDXL"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_early(config, said, teacher, encodings):
    student = kdc.slim(teacher.unet, "kdc")
    images = WorldDataset(["flora"], count=4)
    with pytest.raises(ValueError, match=said):
        kdc.distill(student, altered(teacher, **config), images, steps=1)
    assert not encodings


def test_a_frozen_student_is_refused_early(teacher, encodings):
    student = kdc.slim(teacher.unet, "kdc").requires_grad_(False)
    with pytest.raises(ValueError, match="all weights of the student are frozen"):
        kdc.distill(student, teacher, WorldDataset(["flora"], count=4), steps=1)
    assert not encodings


def test_adapters_are_refused_by_name(teacher, tmp_path):
    student = kdc.slim(teacher.unet, "kdc")
    layer = student.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    layer.lora_A = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="the student has adapters: .*to_q.lora_A.*fuse_lora"):
        kdc.distill(student, teacher, object(), steps=1)
    with pytest.raises(ValueError, match="the student has adapters"):
        kdc.save_student(student, tmp_path)
    with pytest.raises(ValueError, match="the teacher has adapters"):
        kdc.slim(student, "kdc")


@pytest.mark.long
def test_a_run_as_the_readme_shows_it_goes_on_from_a_checkpoint(teacher, data, tmp_path):
    """Nothing said of saving, killed after half of its steps."""
    settings = {"steps": 60, "batch_size": 2}
    whole, _ = run(teacher, data, **settings)
    with draws_counted(stop_at=31), pytest.raises(KeyboardInterrupt):
        run(teacher, data, output_dir=tmp_path, resume=True, **settings)
    with draws_counted() as draws:
        resumed, _ = run(teacher, data, output_dir=tmp_path, resume=True, **settings)
    assert len(draws) == 40, "it did not go on from step 20"
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_distillation_is_extended_and_not_written_over(teacher, data, tmp_path):
    fixed = {"schedule": "constant", "warmup": 0, "output_dir": tmp_path}
    whole, _ = run(teacher, data, steps=5, **{k: fixed[k] for k in ("schedule", "warmup")})
    run(teacher, data, steps=3, **fixed)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000003"]
    with pytest.raises(FileExistsError, match="resume=True"):
        run(teacher, data, steps=5, **fixed)
    longer, log = run(teacher, data, steps=5, resume=True, **fixed)
    assert torch.equal(weights(longer), weights(whole)) and log["step"].iloc[-1] == 5
    stored = kdc.load_student(tmp_path, teacher).unet
    assert torch.equal(weights(stored), weights(whole))


def test_a_student_without_its_state_is_neither_written_over_nor_extended(teacher, data, tmp_path):
    settings = {"steps": 3, "keep_state": False, "output_dir": tmp_path}
    student, log = run(teacher, data, **settings)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FileExistsError, match="holds a student already"):
        run(teacher, data, **settings)
    with pytest.raises(ValueError, match="through after 3 steps and left no checkpoint"):
        run(teacher, data, **settings | {"steps": 5}, resume=True)
    with pytest.raises(ValueError, match="made with seed=0, now seed=1"):
        run(teacher, data, **settings, seed=1, resume=True)
    again, read = run(teacher, data, **settings, resume=True)
    assert torch.equal(weights(again), weights(student)) and len(read) == len(log)


@pytest.mark.parametrize("change", ["std", "empty", "prediction_type"])
def test_resume_knows_all_that_the_next_step_depends_on(
    change, teacher, data, tmp_path, monkeypatch
):
    run(teacher, data, steps=2, output_dir=tmp_path)
    other, said = data, "noise" if change == "prediction_type" else "data"
    if change == "prediction_type":
        monkeypatch.setitem(teacher.scheduler.config, change, "v_prediction")
    else:
        other = dataclasses.replace(data, **{change: getattr(data, change) + 1})
    with pytest.raises(ValueError, match=f"made with {said}="):
        run(teacher, other, steps=2, output_dir=tmp_path, resume=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_an_interrupted_student_is_left_as_it_was(error, teacher, data):
    student = kdc.slim(teacher.unet, "kdc")
    with draws_counted(stop_at=2, error=error), pytest.raises(error):
        kdc.distill(student, teacher, data, steps=3, batch_size=2, precision="bf16")
    assert not student.training and all(p.grad is None for p in student.parameters())
    inputs = data.mean[:1], torch.tensor([500]), data.embeddings[:1]
    with torch.no_grad():
        exact = type(student).forward(student, *inputs).sample
        assert torch.equal(student(*inputs).sample, exact), "the wrapper for bf16 is still there"
    assert not any(m._forward_hooks for m in student.modules())


@pytest.mark.parametrize("at", ["blocks", "attention", "both"])
@pytest.mark.parametrize("plan", ["bk-base", "kdc", "kdc-v2", "bk-tiny"])
def test_paired_features_are_of_one_size(plan, at, teacher, data):
    student = kdc.slim(teacher.unet, plan)
    pairs = kdc.tap_names(student, teacher.unet, at)
    inputs = data.mean[:1], torch.tensor([500]), data.embeddings[:1]
    found = []
    for unet, names in zip((student, teacher.unet), zip(*pairs, strict=True), strict=True):
        hooks = FeatureHooks(unet, names)
        with torch.no_grad():
            unet(*inputs)
        found.append([x.shape for x in hooks.take()])
        hooks.close()
    assert found[0] == found[1]
