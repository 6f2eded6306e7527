"""The stages of the mini models: each training, and then their grades."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from kdc import pipelines
from kdc.data.datasets import load_dataset
from kdc.processes import this_process
from studies.common import ledger
from studies.common.runner import Context, Stage
from studies.mini import criteria, grades, make, pilots


def _train(name: str, context: Context) -> list[Path]:
    if context.device == "cuda" and this_process().device.type != "cuda":
        raise ValueError("PyTorch sees no CUDA device here: leave --device out")
    usual = make.ON_CUDA.get(name, {}) if context.device == "cuda" else {}
    make.make(context.folder, (name,), **(usual | dict(context.settings)))
    return [context.folder / name / "final"]


def _grades(context: Context) -> list[Path]:
    if context.photos:
        load_dataset(context.photos, "test")  # what is wrong with the folder is said at once
    teacher = pipelines.load_teacher("mini")
    values = {
        "goals": grades.GOALS,
        "classifier": grades.grade_classifier(),
        "autoencoder": grades.grade_autoencoder(teacher, context.photos),
        "teacher": grades.grade_pipeline(teacher),
        "student": grades.grade_pipeline(pipelines.load_student("mini", teacher)),
    }
    settings = {"steps": grades.STEPS, "guidance": grades.GUIDANCE, "seed": grades.SEED}
    path = ledger.write("mini_grades", values, context.results, **settings)
    print(grades.markdown(grades.report(values)))
    return [path]


def _scenes(context: Context) -> list[Path]:
    values = {"goal": grades.SCENE_JUDGE_GOAL, "judge": grades.grade_scene_judge()}
    return [ledger.write("scene_judge", values, context.results)]


def _scene_grades(context: Context) -> list[Path]:
    teacher = pipelines.load_teacher("mini")
    models = {"teacher": teacher, "student": pipelines.load_student("mini", teacher)}
    found = {name: grades.grade_scenes(model) for name, model in models.items()}
    values = {"goals": grades.SCENE_GOALS, "models": found}
    settings = {"steps": grades.STEPS, "guidance": grades.GUIDANCE, "seed": grades.SEED}
    path = ledger.write("scene_grades", values, context.results, **settings)
    print(grades.markdown(grades.report_scenes(values)))
    return [path]


def _fd(context: Context) -> list[Path]:
    values = grades.explain_fd(pipelines.load_teacher("mini"))
    return [ledger.write("mini_fd", values, context.results, seed=grades.SEED + 1)]


def _pilots(context: Context) -> list[Path]:
    settings = pilots.Settings(**context.settings)
    rows = [pilots.measure(name, context.folder, settings) for name in pilots.VARIANTS]
    return [ledger.write("mini_pilots", {"rows": rows}, context.results, **vars(settings))]


def _second_legs(context: Context) -> list[Path]:
    settings = replace(pilots.LEG_SETTINGS, **context.settings)
    rows = [pilots.measure_second(name, context.folder, settings) for name in pilots.SECOND_LEGS]
    return [ledger.write("mini_second_legs", {"rows": rows}, context.results, **vars(settings))]


def _legs(context: Context) -> list[Path]:
    settings = replace(pilots.LEG_SETTINGS, **context.settings)
    rows = pilots.measure_legs(context.folder, settings)
    return [ledger.write("mini_legs", {"rows": rows}, context.results, **vars(settings))]


def _criteria(context: Context) -> list[Path]:
    settings, folder = criteria.Settings(**context.settings), context.folder / "criteria"
    teacher = pipelines.load_teacher("mini")
    values = {
        "bypassed": criteria.bypassed(teacher, settings, folder),
        "recovered": criteria.recovered(teacher, settings, folder),
    }
    return [ledger.write("mini_criteria", values, context.results, **vars(settings))]


STAGES = {
    **{
        name: Stage(functools.partial(_train, name), f"train the {name} of the mini models")
        for name in make.TRAININGS
    },
    "grades": Stage(
        _grades, "grade the installed models on held-out renderings", ("mini_grades.json",)
    ),
    "scene-grades": Stage(
        _scene_grades, "grade the installed models on held-back scenes", ("scene_grades.json",)
    ),
    "scenes": Stage(_scenes, "grade the judge of scenes on real renderings", ("scene_judge.json",)),
    "pilots": Stage(
        _pilots, "try layouts of the teacher in small runs on scenes", ("mini_pilots.json",)
    ),
    "second-legs": Stage(
        _second_legs,
        "try what wakes the teacher's inner blocks, from its first leg on (an hour)",
        ("mini_second_legs.json",),
    ),
    "legs": Stage(_legs, "measure the teacher after each leg of its training", ("mini_legs.json",)),
    "criteria": Stage(
        _criteria,
        "measure whether slimming can be studied on the installed teacher (hours)",
        ("mini_criteria.json",),
    ),
    "fd": Stage(_fd, "say where the teacher's Fréchet distance comes from", ("mini_fd.json",)),
}
