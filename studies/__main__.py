"""The studies of the book: `python -m studies CHAPTER [STAGE ...]` measures and resumes them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from studies.common import runner


def parser_of(chapter: str) -> argparse.ArgumentParser:
    """The options of a chapter's study; its help names the stages."""
    stages = runner.stages_of(chapter)
    width = max(map(len, stages))
    lines = [f"  {name:{width}}  {stage.help}" for name, stage in stages.items()]
    parser = argparse.ArgumentParser(
        prog=f"python -m studies {chapter}",
        description=f"Stages of {chapter}, in their order:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all stages")
    parser.add_argument("--results", help="where result files go (default: results/)")
    parser.add_argument("--output-dir", help=f"rows, for resuming (default: outputs/{chapter})")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study")
    parser.add_argument("--photos", help="a folder of photographs, for stages that need one")
    parser.add_argument("--device", default="cpu", help="where networks of full size run")
    if chapter == "mini":
        parser.add_argument("--steps", type=int, help="steps of every training, for a trial run")
        parser.add_argument("--install", action="store_true", help="put them into the package")
    return parser


def _context(chapter: str, args: argparse.Namespace) -> runner.Context:
    settings = {} if args.seeds is None else {"seeds": tuple(args.seeds)}
    folder = args.output_dir or f"outputs/{chapter}"
    if chapter == "mini" and args.steps is not None:
        if args.install:
            raise ValueError("--steps is for a trial, whose models are not to be installed")
        settings["steps"] = args.steps
        folder = args.output_dir or "outputs/mini-trial"
    return runner.Context(args.results, Path(folder), args.device, args.photos, settings)


def _mini_stages(args: argparse.Namespace) -> list[str]:
    """The trainings where no stage is named: grades are those of the installed models."""
    from studies.mini.make import TRAININGS

    return args.stages or list(TRAININGS)


def main(argv: list[str] | None = None) -> None:
    """Run a study's stages; a mistake is one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    chapter = argv[0] if argv else "--help"
    if chapter in ("-h", "--help"):
        print(__doc__, "\n\nchapters:")
        for name in runner.CHAPTERS:
            print(f"  {name:13} {', '.join(runner.stages_of(name))}")
        print("\n`python -m studies CHAPTER --help` says what each stage measures.")
        return
    try:
        args = parser_of(chapter).parse_args(argv[1:])
        stages = runner.stages_of(chapter)
        names = _mini_stages(args) if chapter == "mini" else args.stages
        for path in runner.run(stages, names, _context(chapter, args)):
            print(path)
        if chapter == "mini" and args.install:
            from studies.mini.make import install

            install(args.output_dir or "outputs/mini")
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m studies: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
