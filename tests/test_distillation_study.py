import dataclasses

import pytest
import torch

import kdc
from kdc import LossWeights
from kdc.mini.grades import balanced_prompts
from kdc.studies import distillation as study
from kdc.studies.bench import prepare

TINY = study.Settings(
    seeds=(0, 1), steps=1, batch_size=2, pictures=16, test_pictures=64, copies=0, unseen_copies=0,
    sampling_steps=1, made=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(teacher):
    return prepare(teacher, TINY)


def test_the_recipes_differ_and_change_one_thing_at_a_time():
    recipes = study.RECIPES
    assert len(set(recipes.values())) == len(recipes)
    corrected = dataclasses.asdict(recipes["corrected"])
    for name in ("temperature 8", "taps at both", "features raw", "no caption dropout"):
        changed = dataclasses.asdict(recipes[name])
        outer = [k for k in corrected if changed[k] != corrected[k]]
        inner = [
            k for k in corrected["weights"] if changed["weights"][k] != corrected["weights"][k]
        ]
        assert len(inner) + len(outer) - ("weights" in outer) == 1, name
    assert recipes["corrected"].weights == LossWeights()
    assert recipes["random start: as published"].weights == LossWeights.as_published()
    with pytest.raises(ValueError, match="real, teacher-made, swapped captions"):
        study.Recipe(data="invented")


def test_swapped_captions_and_made_pictures_reach_the_combinations_never_trained(bench):
    rare = {kdc.worlds.caption(a) for a in balanced_prompts(1, held_out=True)}
    swapped = study.pictures_of("swapped captions", bench, TINY)
    assert torch.equal(swapped.mean, bench.train.mean)
    shown = {swapped.captions[i] for i in swapped.caption_index.tolist()}
    assert len(shown) > 10 and not rare & set(bench.train.captions)
    few = dataclasses.replace(bench)
    with pytest.MonkeyPatch.context() as patch:
        some = balanced_prompts(1, held_out=True)[:3]
        patch.setattr(study, "balanced_prompts", lambda copies, held_out: some if held_out else [])
        made = study.pictures_of("teacher-made", few, TINY)
    assert set(made.captions) == {kdc.worlds.caption(a) for a in some} and set(made.captions) < rare
    assert made.mean.shape == (3, 4, 16, 16) and not made.std.any()


def test_a_stopped_study_goes_on_and_keeps_logs(bench, tmp_path, monkeypatch):
    recipes = {name: study.RECIPES[name] for name in ("task", "random start: task")}
    made, follow = [], study.follow

    def counted(bench, data, recipe, seed, settings):
        made.append((recipe.init, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return follow(bench, data, recipe, seed, settings)

    monkeypatch.setattr(study, "follow", counted)
    with pytest.raises(KeyboardInterrupt):
        study.study(bench, TINY, tmp_path, recipes)
    rows, logs = study.study(bench, TINY, tmp_path, recipes)
    assert made == [("copy", 0), ("random", 0), ("copy", 1), ("copy", 1), ("random", 1)]
    assert rows["candidate"].tolist() == list(recipes) * 2 and (rows["output_error"] > 0).all()
    assert [len(runs) for runs in logs.values()] == [2, 2]
    assert logs["task"][0]["step"] == [1] and logs["task"][0]["task"] != logs["task"][1]["task"]
    with pytest.raises(ValueError, match="other settings"):
        study.study(bench, dataclasses.replace(TINY, steps=2), tmp_path, recipes)
