"""The studies of the book: `python -m studies COMMAND`, `--help` lists the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.common import ledger


def _mini(args) -> None:
    from studies.mini import stages as mini

    settings = {} if args.steps is None else {"steps": args.steps}
    if settings and args.install:
        raise ValueError("--steps is for a trial, whose models are not to be installed")
    folder = args.output_dir or ("outputs/mini-trial" if settings else "outputs/mini")
    mini.make(folder, tuple(args.only), **settings)
    if args.install:
        mini.install(folder)


def _grades(args) -> None:
    from kdc import pipelines
    from kdc.data.datasets import load_dataset
    from studies.mini import grades

    if args.photos:
        load_dataset(args.photos, "test")  # what is wrong with the folder is said at once
    if args.results:
        Path(args.results).mkdir(parents=True, exist_ok=True)
    teacher = pipelines.load_teacher("mini")
    values = {
        "goals": grades.GOALS,
        "classifier": grades.grade_classifier(),
        "autoencoder": grades.grade_autoencoder(teacher, args.photos),
        "teacher": grades.grade_pipeline(teacher),
        "student": grades.grade_pipeline(pipelines.load_student("mini", teacher)),
    }
    settings = {"steps": grades.STEPS, "guidance": grades.GUIDANCE, "seed": grades.SEED}
    print(ledger.write("mini_grades", values, args.results, **settings))
    print(grades.markdown(grades.report(values)))


def _frechet(args) -> None:
    from kdc import pipelines
    from studies.mini import grades

    values = grades.explain_fd(pipelines.load_teacher("mini"))
    print(ledger.write("mini_fd", values, args.results, seed=grades.SEED + 1))


def _slimming(args) -> None:
    from studies.slimming import stages

    settings = {} if args.seeds is None else {"seeds": tuple(args.seeds)}
    for path in stages.run(args.stages, args.results, args.output_dir, args.device, **settings):
        print(path)


def _distillation(args) -> None:
    from studies.distillation import study

    settings = {} if args.seeds is None else {"seeds": tuple(args.seeds)}
    print(study.run(args.results, args.output_dir, args.only, **settings))


def _forgetting(args) -> None:
    from studies.replay import stages as sequences

    settings = {} if args.seeds is None else {"seeds": tuple(args.seeds)}
    for path in sequences.run(args.stages, args.results, args.output_dir, args.photos, **settings):
        print(path)


def _trial(args) -> None:
    from studies.metrics import study

    print(study.run(args.results, args.output_dir))


def _evaluation(args) -> None:
    from studies.evaluation import stages as evaluations

    for path in evaluations.run(args.results, args.output_dir, args.stages):
        print(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    commands = parser.add_subparsers(required=True)
    mini = commands.add_parser("mini", help="train the embedded mini models from nothing")
    mini.add_argument("--output-dir", help="default: outputs/mini, a trial's outputs/mini-trial")
    mini.add_argument("--only", nargs="*", default=[], help="stages to train (default: all)")
    mini.add_argument("--steps", type=int, help="steps of every stage, for a trial run")
    mini.add_argument("--install", action="store_true", help="copy the results into the package")
    mini.set_defaults(run=_mini)
    grades = commands.add_parser("grades", help="grade the mini models, write results/")
    grades.add_argument("--photos", help="a folder of photographs, for the autoencoder's grade")
    grades.add_argument("--results", help="where to write (default: results/)")
    grades.set_defaults(run=_grades)
    frechet = commands.add_parser("fd", help="say where the Fréchet distance comes from")
    frechet.add_argument("--results", help="where to write (default: results/)")
    frechet.set_defaults(run=_frechet)
    slimming = commands.add_parser("slimming", help="the study of chapter 01, writes results/")
    slimming.add_argument("stages", nargs="*", help="which stages, in this order (default: all)")
    slimming.add_argument("--seeds", nargs="+", type=int, help="seeds of the stage recovery")
    slimming.add_argument("--device", default="cpu", help="where the full-size stages run")
    slimming.add_argument("--output-dir", default="outputs/slimming", help="rows, for resuming")
    slimming.add_argument("--results", help="where to write (default: results/)")
    slimming.set_defaults(run=_slimming)
    recipes = commands.add_parser("distillation", help="the study of chapter 02, writes results/")
    recipes.add_argument("--only", nargs="+", default=(), help="recipes to follow (default: all)")
    recipes.add_argument("--seeds", nargs="+", type=int, help="seeds (default: 0 1 2)")
    recipes.add_argument("--output-dir", default="outputs/distillation", help="for resuming")
    recipes.add_argument("--results", help="where to write (default: results/)")
    recipes.set_defaults(run=_distillation)
    forgetting = commands.add_parser("forgetting", help="the study of chapter 03, writes results/")
    forgetting.add_argument("stages", nargs="*", help="which stages (default: all but photos)")
    forgetting.add_argument("--photos", help="a folder of images, for the stage photos")
    forgetting.add_argument("--seeds", nargs="+", type=int, help="seeds (default: 0 1 2)")
    forgetting.add_argument("--output-dir", default="outputs/forgetting", help="for resuming")
    forgetting.add_argument("--results", help="where to write (default: results/)")
    forgetting.set_defaults(run=_forgetting)
    trial = commands.add_parser("trial", help="spoil images, see which score notices (A2)")
    trial.add_argument("--results", help="where to write (default: results/)")
    trial.add_argument("--output-dir", default="outputs/trial", help="for resuming")
    trial.set_defaults(run=_trial)
    evaluation = commands.add_parser("evaluation", help="the study of chapter 04")
    evaluation.add_argument("stages", nargs="*", help="which stages (default: all)")
    evaluation.add_argument("--output-dir", default="outputs/evaluation", help="for resuming")
    evaluation.add_argument("--results", help="where to write (default: results/)")
    evaluation.set_defaults(run=_evaluation)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
