import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import kdc
from kdc.data import worlds
from kdc.evaluation import metrics
from kdc.evaluation.judges import attribute_accuracy
from studies.common import ledger, runner
from studies.replay import report
from studies.replay import stages as sequences
from studies.replay import study as forgetting
from studies.replay import tasks as task_tests
from studies.replay.study import Settings
from studies.replay.variants import STAGES

TINY = Settings(
    images=12, test_images=4, steps=1, class_steps=1, batch_size=2, generated=2, generated_photos=2,
    sampling_steps=1, seeds=(0,), tuning=1,
)  # fmt: skip
SIZES = {"images": 12, "test_images": 4, "generated": 2}


@pytest.fixture(scope="module")
def both(teacher):
    return task_tests.domain_tasks(teacher, tuple(worlds.WORLDS), **SIZES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four classes of ten images each, one of which is for testing."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("aster", "iris", "lily", "rose"):
        for index in range(10):
            file = root / ("test" if index == 9 else "train") / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture(autouse=True)
def a_short_look(monkeypatch):
    monkeypatch.setattr(
        metrics, "output_error", functools.partial(kdc.output_error, count=2, levels=1)
    )


def test_domains_have_tests_of_what_they_show(both, teacher):
    flora, lepidoptera = both
    assert (flora.name, lepidoptera.name) == tuple(worlds.WORLDS)
    assert {a.world for a in flora.test.attributes} == {"flora"} and flora.test.reference is None
    assert [worlds.caption(a) for a in flora.test.attributes] == list(flora.prompts)
    assert set(flora.labels) <= set(worlds.FLORA.kinds) and len(flora.labels) == 12
    rest = task_tests.beyond(teacher, tuple(worlds.WORLDS), flora)
    unseen = {c for w in worlds.WORLDS.values() for c in map(worlds.caption, w.combinations(True))}
    assert set(rest.prompts) == unseen and len(rest.test.attributes) == len(unseen)


def test_classes_of_a_world_are_asked_for_their_own_kind(teacher):
    tasks = task_tests.class_tasks(
        teacher, "flora", order=1, images=60, test_images=60, generated=12
    )
    assert sorted(task.name for task in tasks) == sorted(worlds.FLORA.kinds)
    for task in tasks:
        assert {a.kind for a in task.test.attributes} == {task.name} and len(task.prompts) == 2
    other = task_tests.class_tasks(
        teacher, "flora", order=2, images=60, test_images=60, generated=12
    )
    assert [task.name for task in other] != [task.name for task in tasks]


def test_a_folder_makes_two_halves_or_a_task_for_each_folder(teacher, photos):
    first, second = task_tests.class_tasks(teacher, photos, per_task=None, generated=4)
    for task, names in ((first, ("aster", "iris")), (second, ("lily", "rose"))):
        assert [caption.split()[-1] for caption in sorted(task.prompts)] == list(names)
    assert len(first.train) == 18 and len(first.test.latents) == 2 and not first.test.attributes
    (task,) = task_tests.domain_tasks(teacher, [photos / "train"], generated=4)
    assert set(task.prompts) == set(task.train.captions) and task.test.reference is None


def test_two_tasks_by_one_text(teacher, photos):
    def names(dataset):
        return [task.name for task in task_tests.tasks_of(teacher, dataset, **SIZES)]

    assert names("worlds") == ["flora", "lepidoptera"]
    assert names(f"lepidoptera then {photos / 'train'}") == ["lepidoptera", "train"]
    halves = task_tests.tasks_of(teacher, photos, **SIZES)
    assert [len(set(task.train.captions)) for task in halves] == [2, 2]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        names("flora then nowhere/at/all")


def test_a_student_is_drawn_from_once_and_lacking_metrics_are_nan(both, teacher, monkeypatch):
    calls = []
    scorer = task_tests.Scorer(teacher, both[0], seed=0, steps=1)
    assert scorer.higher_is_better == {"output_error": False, "accuracy": True}
    generate = task_tests.pipelines.generate
    monkeypatch.setattr(
        task_tests.pipelines, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k)
    )
    pipeline = kdc.with_unet(teacher, kdc.slim(teacher.unet, "kdc"))
    scores = scorer(pipeline, both[0])
    assert scorer(pipeline, both[0]) == scores and len(calls) == 1
    right = attribute_accuracy(scorer.generated["flora"], both[0].test.attributes)["all"]
    held_back = both[0].test.latents
    expected = kdc.output_error(pipeline.unet, teacher, held_back, count=2, levels=1).mean()
    assert scores == {"output_error": pytest.approx(expected), "accuracy": pytest.approx(right)}
    assert scorer(teacher, both[0])["output_error"] == pytest.approx(0, abs=1e-6)
    unasked = dataclasses.replace(both[1], test=dataclasses.replace(both[1].test, attributes=()))
    assert np.isnan(scorer(pipeline, dataclasses.replace(unasked, name="x"))["accuracy"])


def test_leakage_is_half_for_strangers_and_whole_for_copies(both, teacher, monkeypatch):
    scorer = task_tests.Scorer(teacher, both[0], seed=0, steps=1)
    buffer = kdc.ReplayBuffer(4, "fifo", "float32")
    buffer.add(both[0].train, torch.arange(4))
    latents = buffer.items()["mean"]
    scale = teacher.vae.config.scaling_factor
    with torch.no_grad():
        images = teacher.vae.decode(latents / scale).sample.clamp(-1, 1)
    scorer.generated["flora"] = ((images + 1) * 127.5 + 0.5).to(torch.uint8)
    assert task_tests.leakage(buffer, both[0], scorer) == {"share": 1.0, "items": 4, "generated": 4}
    same = dataclasses.replace(both[0].train, mean=both[0].test.latents.mean[:4].clone())
    # copies of what is held back are nearer to that than to the buffer
    with torch.no_grad():
        theirs = teacher.vae.decode(same.mean / scale).sample.clamp(-1, 1)
    scorer.generated["flora"] = ((theirs + 1) * 127.5 + 0.5).to(torch.uint8)
    assert task_tests.leakage(buffer, both[0], scorer)["share"] == 0.0
    later = kdc.ReplayBuffer(4, "fifo", "float32")
    later.add(both[1].train, torch.arange(4), task=1)
    assert task_tests.leakage(later, both[0], scorer) is None


def run_stages(names, results=None, folder="outputs", photos=None, settings=None):
    context = runner.Context(results, Path(folder), photos=photos, settings=settings or {})
    return list(runner.run(sequences.STAGES, names, context))


@pytest.mark.long
def test_the_stages_keep_rows_and_write_results(teacher, tmp_path, monkeypatch, photos):
    small = {
        "domains": {n: STAGES["domains"][n] for n in ("finetune", "replay", "joint")},
        "buffers": {n: STAGES["buffers"][n] for n in ("replay 4",)},
        "classes": {n: STAGES["classes"][n] for n in ("replay fifo",)},
        "photos": {n: STAGES["photos"][n] for n in ("finetune",)},
        "species": {n: STAGES["species"][n] for n in ("finetune",)},
    }
    monkeypatch.setattr(sequences.variants, "STAGES", small)
    monkeypatch.setattr(report, "STAGES", small)
    settings = dataclasses.asdict(TINY) | {"images": 30, "test_images": 30}
    rest = task_tests.beyond(
        teacher, ("flora",), task_tests.domain_tasks(teacher, ("flora",), **SIZES)[0]
    )
    rest = dataclasses.replace(
        rest,
        prompts=rest.prompts[:2],
        test=dataclasses.replace(rest.test, attributes=rest.test.attributes[:2]),
    )
    monkeypatch.setattr(sequences, "beyond", lambda *arguments: rest)
    folder = tmp_path / "rows"
    paths = run_stages(list(small), tmp_path, folder, photos, settings)
    assert [path.stem for path in paths] == [f"forgetting_{stage}" for stage in small]
    rows = report.stored("domains", tmp_path)
    assert len(rows) == 6 and {row["order"] for row in rows} == {
        "flora first",
        "lepidoptera first",
    }
    lines = report.table(rows)
    assert lines["old_accuracy"].between(0, 1).all() and (lines["old_output_error"] > 0).all()
    assert lines.set_index("candidate")["bytes"].loc["replay"].min() > 0
    assert len(report.table(report.stored("buffers", tmp_path))) == 4
    images, captions = report.shown(results=tmp_path)
    assert (
        list(images) == ["teacher", "after the first task", *small["domains"]]
        and len(captions) == 8
    )
    assert (folder / "teacher" / "unet").is_dir()
    photo = report.stored("photos", tmp_path)[0]
    assert set(photo["matrices"]) == {"output_error"} and photo["leakage"] is None
    found = ledger.read("forgetting_species", tmp_path)
    (row,) = found["rows"]
    matrix = np.array(row["matrices"]["species"]["values"])
    assert ((matrix >= 0) & (matrix <= 1)).all() and matrix.shape == (2, 2)
    assert found["judge"]["species"] == 4 and 0 <= found["judge"]["held_out"] <= 1
    assert len(found["teacher"]) == 1 and (folder / "teacher-species" / "unet").is_dir()
    images, captions = report.shown("photos", tmp_path)
    assert [c.split()[-1] for c in captions] == ["aster", "iris", "lily", "rose"]
    assert list(images) == ["teacher", "after the first task", "finetune"]

    def never(*arguments, **settings):
        raise AssertionError("made again")

    monkeypatch.setattr(forgetting, "run_sequence", never)
    assert run_stages(["buffers"], tmp_path, folder, None, settings)  # read back
    with pytest.raises(ValueError, match="was made with .*, now "):
        run_stages(["buffers"], tmp_path, folder, None, settings | {"batch_size": 3})
    with pytest.raises(ValueError, match="unknown stages"):
        run_stages(["domain"])
    with pytest.raises(ValueError, match="--photos"):
        run_stages(["photos"])
    with pytest.raises(FileNotFoundError):
        run_stages(["photos"], photos=tmp_path / "nothing")


def matrix(values, higher_is_better, metric):
    return kdc.ScoreMatrix(np.array(values), higher_is_better, metric).to_dict()


def rows_of(name, old, new, seeds=(0, 1, 2)):
    counts = {n: [3, 4] for n in report.IMAGES} | {
        "buffer_bytes": [10, 20], "embedding_bytes": [0, 2], "model_bytes": [0, 5],
    }  # fmt: skip
    return [
        {
            "candidate": name,
            "order": "a first",
            "seed": seed,
            "counts": counts,
            "leakage": {"share": 0.5, "items": 3},
            "matrices": {
                "accuracy": matrix([[0.9, 0.1], [old + 0.01 * seed, new]], True, "accuracy"),
                "output_error": matrix([[0.1, 0.9], [0.3, 0.1]], False, "output_error"),
            },
        }
        for seed in seeds
    ]


def test_the_table_the_goals_and_the_claims_say_what_the_matrices_say():
    rows = (
        rows_of("finetune", 0.2, 0.9) + rows_of("replay", 0.8, 0.88) + rows_of("joint", 0.85, 0.8)
    )
    lines = report.table(rows)
    first = lines.iloc[0]
    assert (first["old_accuracy"], first["new_accuracy"]) == (0.2, 0.9)
    assert first["forgetting_accuracy"] == pytest.approx(0.7)
    assert first["forgetting_output_error"] == pytest.approx(0.2)
    assert first["images"] == 7 * len(report.IMAGES) and first["bytes"] == 27
    assert first["buffer_bytes"] == 22 and first["seed"] == "a first, 0"
    met = report.goals(lines)
    assert met["met"].tolist() == [True, True, True]
    assert met.loc["replay keeps 90% of joint", "value"] == pytest.approx(0.942, abs=1e-3)
    assert met.loc["replay loses at most 0.05 on the new", "value"] == pytest.approx(0.02)
    worse = report.table(
        rows_of("finetune", 0.2, 0.9) + rows_of("replay", 0.7, 0.84) + rows_of("joint", 0.85, 0.8)
    )
    assert report.goals(worse)["met"].tolist() == [True, False, False]
    few = report.table(rows_of("finetune", 0.2, 0.9) + rows_of("replay, task only", 0.3, 0.84))
    assert report.goals(few)["met"].to_dict() == {
        "finetune forgets": True, "replay, task only loses at most 0.05 on the new": False,
    }  # fmt: skip
    means = report.mean_matrices(rows, "accuracy")
    assert means["replay"].to_numpy()[1].tolist() == pytest.approx([0.81, 0.88])
    checked = report.check_stage("domains", lines)
    assert checked.set_index("claim").loc["replay keeps the old task", "outcome"] == "holds"
    found = report.against_bytes(lines, "old_accuracy")
    assert [x[0] for x in found] == pytest.approx([22, 0.81, 0.8, 0.82])
    lines = pd.concat([lines, report.table(rows_of("replay ratio 2", 0.9, 0.7))])
    ratios, old, *_ = report.against_ratio(lines)["old task"]
    assert ratios == [1.0, 2.0] and old == pytest.approx([0.81, 0.91])
    tasks, *curve = report.along(rows, "accuracy")["replay"]  # .9, then the mean of old and new
    assert tasks == [1, 2] and curve == [
        pytest.approx([0.9, 0.845]), pytest.approx([0.9, 0.84]), pytest.approx([0.9, 0.85]),
    ]  # fmt: skip


def test_every_claim_compares_trials_of_its_stage_by_a_known_measure():
    for stage, claims in report.CLAIMS.items():
        known = set(STAGES[stage])
        known |= set(STAGES["domains"]) if stage in report.BESIDE else set()
        for claim in claims:
            assert {claim.candidate, claim.baseline} <= known, claim
            assert claim.measure in report.MEASURES
    assert len({json.dumps(t.to_dict()) for t in STAGES["classes"].values()}) == 7
    stages = ["domains", "buffers", "ratios", "teachers", "plain", "classes", "photos", "species"]
    assert list(STAGES) == stages
    alike = [*STAGES["teachers"].values()]
    alike += [STAGES["domains"][name] for name in ("replay", "replay+distil")]
    stored = [t for t in alike if t.strategy.mechanism.uses_buffer]
    assert len({(t.strategy.old_target, str(t.strategy.old_weights)) for t in stored}) == 6
    assert {(t.capacity, t.strategy.ratio) for t in alike} == {(64, 1.0)} and len(alike) == 7


def test_a_study_begins_with_a_given_student(both, teacher, tmp_path):
    start = kdc.slim(teacher.unet, "kdc")
    with torch.no_grad():
        start.conv_out.bias += 100
    before = {name: value.clone() for name, value in start.state_dict().items()}
    trials, errors = {"finetune": STAGES["domains"]["finetune"]}, []
    for each in (None, start):
        folder = tmp_path / str(each is None)
        rows = forgetting.study(
            "x", {"x": both}, trials, teacher, TINY, folder, steps=1, start=each
        )
        errors.append(report.matrices(rows[0])["output_error"].start[0])
    assert errors[1] > 1000 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
