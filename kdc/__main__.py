"""The library from the command line: `python -m kdc mini | grades`."""

from __future__ import annotations

import argparse

from kdc import ledger


def _mini(args) -> None:
    from kdc import mini

    settings = {"steps": args.steps} if args.steps else {}
    mini.make(args.output_dir, tuple(args.only), **settings)
    if args.install:
        mini.install(args.output_dir)


def _grades(args) -> None:
    from kdc import models
    from kdc.mini import grades

    teacher = models.load_teacher("mini")
    values = {
        "goals": grades.GOALS,
        "classifier": grades.grade_classifier(),
        "autoencoder": grades.grade_autoencoder(teacher, args.photos),
        "teacher": grades.grade_pipeline(teacher),
        "student": grades.grade_pipeline(models.load_student("mini", teacher)),
    }
    settings = {"steps": grades.STEPS, "guidance": grades.GUIDANCE, "seed": grades.SEED}
    print(ledger.write("mini_grades", values, args.results, **settings))
    print(grades.markdown(grades.report(values)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kdc", description=__doc__)
    commands = parser.add_subparsers(required=True)
    mini = commands.add_parser("mini", help="train the embedded mini models from nothing")
    mini.add_argument("--output-dir", default="outputs/mini")
    mini.add_argument("--only", nargs="*", default=[], help="stages to train (default: all)")
    mini.add_argument("--steps", type=int, help="steps of every stage, for a trial run")
    mini.add_argument("--install", action="store_true", help="copy the results into the package")
    mini.set_defaults(run=_mini)
    grades = commands.add_parser("grades", help="grade the mini models, write results/")
    grades.add_argument("--photos", help="a folder of photographs, for the autoencoder's grade")
    grades.add_argument("--results", help="where to write (default: results/)")
    grades.set_defaults(run=_grades)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
