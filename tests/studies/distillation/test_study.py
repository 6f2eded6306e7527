import contextlib
import dataclasses
import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch

import kdc
from kdc import LossWeights
from kdc.data import worlds
from kdc.pipelines import ASSETS
from kdc.training.settings import TrainSettings
from studies.common import recipes as recipe_table
from studies.common import runner
from studies.common.protocol import MEASURES, prepare
from studies.common.recipes import STUDENT_RECIPE
from studies.common.teacher_cache import remembering
from studies.distillation import report, stages, study
from studies.mini import make as mini
from studies.mini.grades import balanced_prompts

TINY = study.Settings(
    seeds=(0, 1), steps=1, batch_size=2, images=16, test_images=64, copies=0, unseen_copies=0,
    sampling_steps=1, made_images=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def setup(teacher):
    return prepare(teacher, TINY)


def test_the_recipes_differ_and_change_one_thing_at_a_time():
    recipes = study.RECIPES
    assert len(set(recipes.values())) == len(recipes)
    corrected = recipes["corrected"]
    weights = corrected.weights.to_dict()
    for name in ("temperature 8", "features at both", "raw features", "no caption dropout"):
        changed = recipes[name]
        fields = [field.name for field in dataclasses.fields(changed)]
        outer = [k for k in fields if getattr(changed, k) != getattr(corrected, k)]
        inner = [k for k, value in changed.weights.to_dict().items() if value != weights[k]]
        assert len(inner) + len(outer) - ("weights" in outer) == 1, name
    assert recipes["corrected"].weights == LossWeights()
    averaged = recipes["random start: authors' terms, features averaged"].weights
    assert averaged == LossWeights.as_published().replace(feature_reduction="mean")


def test_the_authors_recipes_are_those_of_their_script():
    first, newest, ours = recipe_table.AUTHORS.values()
    assert first.weights == ours.weights == LossWeights.as_published()
    assert newest.weights == LossWeights.as_published(newest=True)
    assert (first.plan, first.init) == ("kdc", "copy")
    assert (newest.plan, newest.init) == ("kdc-v2", "random")
    training = TrainSettings(40, **dict(first.training))
    assert (training.batch_size, training.accumulation) == (1, 4)
    assert (training.learning_rate, training.schedule, training.warmup) == (5e-5, "constant", 0)
    assert (training.caption_dropout, training.ema_decay) == (0.0, 0.0)
    assert (training.betas, training.weight_decay) == ((0.9, 0.999), 0.01)
    assert first.last_sample and newest.last_sample and not ours.last_sample


def test_the_authors_step_is_followed_exactly(setup):
    """Two images a forward pass: a new one, and from the second step on one of the step before."""
    two = dataclasses.replace(TINY, steps=2)
    recipe = recipe_table.AUTHORS["as in the authors' code"]
    unet, log = study.follow(setup, setup.train, recipe, 0, two)
    assert log["learning_rate"].tolist() == [5e-5] * len(log)
    assert "old_loss" not in log or log["old_loss"].iloc[-1] > 0
    assert log["old_loss"].iloc[-1] > 0 and pd.isna(log["old_loss"].iloc[0])
    last = log.iloc[-1]
    assert last["loss"] == pytest.approx((last["new_loss"] + last["old_loss"]) / 2, rel=1e-4)


def test_the_ratio_of_features_to_kl_is_measured_on_a_fresh_student(setup):
    rows = study.authors_ratio(setup, seeds=(0, 1), batches=1, batch_size=4)
    assert (rows["ratio"] == rows["feature"] / rows["soft"]).all() and (rows["ratio"] > 0).all()
    assert rows["per 4096"].tolist() == pytest.approx((rows["ratio"] / 16).tolist())


def test_unknown_data_is_refused():
    with pytest.raises(ValueError, match="real, teacher-made, swapped captions"):
        recipe_table.Recipe(data="invented")


def test_swapped_captions_and_made_images_reach_the_combinations_never_trained(setup):
    rare = {worlds.caption(a) for a in balanced_prompts(1, held_out=True)}
    swapped = recipe_table.images_of("swapped captions", setup.teacher, setup.train)
    assert torch.equal(swapped.mean, setup.train.mean)
    shown = {swapped.captions[i] for i in swapped.caption_index.tolist()}
    assert len(shown) > 10 and not rare & set(setup.train.captions)
    with pytest.MonkeyPatch.context() as patch:
        some = balanced_prompts(1, held_out=True)[:3]
        patch.setattr(recipe_table, "every_combination", lambda: some)
        made = recipe_table.images_of(
            "teacher-made", setup.teacher, setup.train, made_images=1, steps=1
        )
    assert set(made.captions) == {worlds.caption(a) for a in some} and set(made.captions) < rare
    assert made.mean.shape == (3, 4, 16, 16) and not made.std.any()


def test_a_remembered_teacher_teaches_what_it_would_have_said(setup, monkeypatch):
    two = dataclasses.replace(TINY, steps=2)
    recipes = [study.RECIPES[name] for name in ("corrected", "features at both", "task, soft")]
    answers, calls, compute = {}, [], type(setup.teacher.unet).forward
    monkeypatch.setattr(
        type(setup.teacher.unet),
        "forward",
        lambda unet, *a, **k: calls.append(unet is setup.teacher.unet) or compute(unet, *a, **k),
    )
    for recipe in recipes:
        alone, log = study.follow(setup, setup.train, recipe, 0, two)
        before = sum(calls)
        shared, same = study.follow(setup, setup.train, recipe, 0, two, answers)
        assert sum(calls) - before == (2 if recipe is recipes[0] else 0)
        assert log.equals(same) and len(answers) == 2
        pairs = zip(alone.parameters(), shared.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert setup.teacher.unet.forward.__func__ is type(setup.teacher.unet).forward
    unet, latents = setup.teacher.unet, setup.train.mean[:1]
    prompt_embeds = setup.train.embeddings[:1]
    with remembering(unet, [], answers := {}), torch.no_grad():
        unet(latents, torch.tensor([5]), prompt_embeds, return_dict=False)
        hooked = kdc.FeatureHooks(unet, ["mid_block"])
        with pytest.raises(RuntimeError, match="mid_block has a hook"):
            unet(latents, torch.tensor([5]), prompt_embeds, return_dict=False)
        hooked.close()
        with remembering(unet, [], inner := {}):  # one around another: both remember
            unet(latents, torch.tensor([6]), prompt_embeds, return_dict=False)
        unet(latents, torch.tensor([7]), prompt_embeds, return_dict=False)
        assert len(inner) == 1 and len(answers) == 3
    assert "forward" not in vars(unet)


def test_a_remembered_teacher_teaches_the_same_in_lower_precision(setup):
    """bf16 copies the teacher; the copy must compute, and remember, for itself."""

    def trained(answers):
        student = kdc.slim(setup.teacher.unet, "kdc")
        names = [name for _, name in kdc.feature_pairs(student, setup.teacher.unet)]
        with (
            remembering(setup.teacher.unet, names, answers)
            if answers is not None
            else (contextlib.nullcontext())
        ):
            kdc.distill(
                student, setup.teacher, setup.train, steps=1, batch_size=2, precision="bf16"
            )
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    plain, answers = trained(None), {}
    assert torch.equal(trained(answers), plain) and len(answers) == 1
    assert torch.equal(trained(answers), plain) and len(answers) == 1
    assert all(key.startswith("torch.bfloat16") for key in answers)


def test_images_of_every_recipe_come_from_one_seed_and_lie_beside_the_rows(
    setup, tmp_path, monkeypatch
):
    asked = dataclasses.replace(setup, asked=[object()])
    monkeypatch.setattr(study, "judge", lambda setup, unet, seed: {"accuracy": 0.5})
    monkeypatch.setattr(stages, "prepare", lambda teacher, settings: asked)
    monkeypatch.setattr(stages, "score", lambda setup, pipeline, seed: {"accuracy": 1.0})
    small = dataclasses.asdict(TINY)
    two = {name: study.RECIPES[name] for name in ("task", "random start: task")}
    monkeypatch.setattr(stages, "RECIPES", two)
    context = runner.Context(tmp_path, tmp_path / "rows", settings=small)
    (path,) = runner.run(stages.STAGES, ["recipes"], context)
    rows, logs, teacher = report.stored(path.parent)
    assert set(rows["candidate"]) == {"task", "random start: task"} == set(logs)
    images, captions = report.shown(path.parent)
    assert list(images) == ["teacher", "task", "random start: task"] and len(captions) == 8
    generated = kdc.generate(setup.teacher, list(captions), seed=0, steps=1)
    assert torch.equal(torch.stack([torch.tensor(x) for x in images["teacher"]]), generated)
    assert not (images["task"][0] == images["teacher"][0]).all()
    assert len(list((tmp_path / "rows").glob("*.png"))) == 2  # of the first seed alone


def test_every_claim_compares_recipes_that_are_followed():
    rows = [c for claims in report.CLAIMS.values() for c in claims]
    assert len(rows) == 52 and all({c.candidate, c.baseline} <= set(study.RECIPES) for c in rows)
    used = {name for claim in rows for name in (claim.candidate, claim.baseline)}
    left = set(study.RECIPES) - used
    assert not {name for name in left if "random start" not in name}, left
    assert set(report.MAIN) <= used and all(c.measure in MEASURES for c in rows)


def test_the_gap_to_the_teacher_is_0_for_the_start_and_1_for_the_teacher():
    rows = pd.DataFrame(
        {
            "candidate": ["task", "task", "half", "half", "same"],
            "accuracy": [0.2, 0.4, 0.6, 0.7, 1.0],
            "output_error": [0.3, 0.1, 0.1, 0.1, 0.0],
        }
    )
    teacher = pd.DataFrame({"accuracy": [1.0, 1.0]})
    closed = report.gap_closed(rows, teacher)
    assert closed.loc["task"].tolist() == [0, 0] and closed.loc["same"].tolist() == [1, 1]
    assert closed.loc["half"].tolist() == pytest.approx([0.5, 0.5])  # output error, accuracy


def test_the_best_recipe_has_the_lowest_mean_rank_among_those_of_the_same_plan():
    names = ["task", "corrected", "output", "authors' newest terms"]
    rows = pd.DataFrame(
        {
            "candidate": names,
            "accuracy": [0.2, 0.9, 0.8, 1.0],
            "output_error": [0.3, 0.1, 0.05, 0.0],
            "fd": [9.0, 4.0, 5.0, 0.0],
        }
    )
    assert report.best(rows) == "corrected"
    assert report.best(rows[rows["candidate"] != "corrected"]) == "output"


def test_the_closed_forms_are_what_the_panels_show():
    panels, limit = report.closed_forms()
    temperatures, soft = panels["limit"]["soft term"]
    assert soft[-1].item() == pytest.approx(limit, rel=0.02) and soft[0].item() < 0.7 * limit
    sizes, seen = panels["null space"]["output term"]
    assert np.allclose(np.array(seen) / sizes**2, seen[-1] / sizes[-1] ** 2)
    assert max(panels["null space"]["soft term"][1]) < 1e-5
    kinds = panels["feature term"]
    normalised, raw = (np.array(kinds[name][1]) for name in ("normalised", "raw"))
    assert np.allclose(normalised, normalised[0], rtol=1e-3)
    assert raw[-1] == pytest.approx(1e4 * raw[0], rel=1e-3)


def test_differences_fall_on_the_gradient_as_the_square_of_the_step():
    """A central difference errs by h^2, not at all for a square, and by round-off / h at last."""
    lines = report.closed_forms()[0]["gradients"]
    steps = lines["soft"][0]
    assert steps[0] == 0.1 and np.isclose(steps[-1], 1e-7) and (np.diff(steps) < 0).all()
    errors = {name: np.array(values) for name, (_, values) in lines.items()}
    assert all((values > 0).all() for values in errors.values())
    wide = steps > 0.9e-3
    for name in ("soft", "corrected loss"):
        slope = np.polyfit(np.log(steps[wide]), np.log(errors[name][wide]), 1)[0]
        assert slope == pytest.approx(2, abs=0.05), name
        assert errors[name].argmin() < len(steps) - 1 and errors[name].min() < 1e-9, name
    squares = errors["task, output, feature"]
    assert (squares[wide] < 1e-11).all() and squares[-1] > 10 * squares[0]
    for a, b in zip(lines.values(), report.closed_forms()[0]["gradients"].values(), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.long
def test_a_stopped_study_goes_on_and_keeps_logs(setup, tmp_path, monkeypatch):
    recipes = {name: study.RECIPES[name] for name in ("task", "random start: task")}
    made, follow = [], study.follow

    def counted(setup, data, recipe, seed, settings, answers):
        made.append((recipe.init, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return follow(setup, data, recipe, seed, settings, answers)

    monkeypatch.setattr(study, "follow", counted)
    with pytest.raises(KeyboardInterrupt):
        study.study(setup, TINY, tmp_path, recipes)
    rows, logs = study.study(setup, TINY, tmp_path, recipes)
    assert made == [("copy", 0), ("random", 0), ("copy", 1), ("copy", 1), ("random", 1)]
    assert rows["candidate"].tolist() == list(recipes) * 2 and (rows["output_error"] > 0).all()
    assert [len(runs) for runs in logs.values()] == [2, 2]
    assert logs["task"][0]["step"] == [1] and logs["task"][0]["task"] != logs["task"][1]["task"]
    with pytest.raises(ValueError, match="was made with .*, now "):
        study.study(setup, dataclasses.replace(TINY, steps=2), tmp_path, recipes)


def test_the_shipped_student_is_of_the_best_recipe_of_the_stored_study():
    rows, _, _ = report.stored()
    assert len(rows) == 3 * len(study.RECIPES)
    assert STUDENT_RECIPE == report.best(rows)
    notes = json.loads((ASSETS / "mini-student" / "kdc.json").read_text())
    assert notes["recipe"] == STUDENT_RECIPE
    steps = inspect.signature(mini.make_student).parameters["steps"].default
    assert notes["steps"] == steps
