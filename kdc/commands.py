"""The commands behind `python -m kdc`: what each one takes, and the functions that it calls.

Nothing heavy is imported before a command runs, so that `--help` answers at once. Options of
training are the fields of `TrainSettings`; terms, plans, strategies, policies and metrics are
looked up in their tables, whose names an error lists.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from kdc.paths import STUDENT_FILES, as_path
from kdc.training.settings import TrainSettings, refuse_unknown

CONFIG = "config.yaml"
DATASET_NAMES = "worlds, flora, lepidoptera, scenes, flowers102, butterflies"
PACKAGES = ("kdc", "torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Option:
    """One option of a command, also a key of its configuration file."""

    name: str
    help: str
    type: type = str
    default: Any = None
    # Whether it takes several values.
    many: bool = False
    # Whether it stands first on the command line, without its name.
    positional: bool = False
    # Whether the command cannot run without it.
    required: bool = False


@dataclass(frozen=True)
class Command:
    """One command: its options, and the function that runs it with their values."""

    help: str
    options: tuple[Option, ...]
    run: Callable[[dict[str, Any]], None]
    # What it writes into `output_dir`, beside its configuration; tried before anything costly.
    writes: tuple[str, ...] = ()


def _training_options() -> tuple[Option, ...]:
    """The fields of `TrainSettings`."""
    hints = typing.get_type_hints(TrainSettings, include_extras=True)
    options = []
    for field in dataclasses.fields(TrainSettings):
        kind, text = typing.get_args(hints[field.name])
        many = typing.get_origin(kind) is tuple
        if typing.get_origin(kind) is types.UnionType:  # int | None
            kind = typing.get_args(kind)[0]
        missing = field.default is dataclasses.MISSING
        options.append(
            Option(
                field.name,
                text,
                float if many else kind,
                None if missing else field.default,
                many=many,
                required=missing,
            )
        )
    return tuple(options)


TEACHER = Option("teacher", "mini, a hub id or a diffusers folder", default="mini", positional=True)
OUTPUT = Option("output_dir", "where results go; the folder is made", required=True)
STUDENT = Option("student", "a student's folder to start from, instead of a fresh cut")
PLAN = Option("plan", "which layers the student keeps", default="kdc")
INIT = Option("init", "first weights of a fresh cut: copy, or random", default="copy")
RESUME = Option("resume", "go on where a stopped run was", bool, False)
WEIGHTS = Option("weights", "weights and options of the loss: soft=0.1 temperature=2", many=True)
CACHE = Option(
    "cache_dir", "folder where encoded images stay, for later runs too; default: in memory only"
)
IMAGES = Option("images", "training images at most; default: all of a folder, 2000 of a world", int)
TRAINING = _training_options()
SAMPLE_PROMPTS = Option("sample_prompts", "what the grids show; default: captions", many=True)
SAMPLING = (
    Option("seed", "of the starting noise", int, 0),
    Option("steps", "steps of the sampler", int, 25),
    Option("guidance", "classifier-free guidance; 1 switches it off", float, 7.5),
    Option("batch_size", "images generated at a time", int, 32),
)
PROMPTS = (
    Option("prompt", "a prompt; several may be given", many=True),
    Option("prompts", "a text file with a prompt in each line"),
)


def _slim(values: dict[str, Any]) -> None:
    import kdc
    from kdc.unet.slimming import count_parameters

    teacher = kdc.load_teacher(values["teacher"])
    student = kdc.slim(teacher.unet, values["plan"], values["init"], values["seed"])
    kdc.save_student(student, values["output_dir"])
    before, after = count_parameters(teacher.unet), count_parameters(student)
    print(f"{values['plan']}: {before:,} -> {after:,} parameters ({after / before:.1%})")
    print(values["output_dir"])


def _distill(values: dict[str, Any]) -> None:
    import kdc

    settings, weights = _settings(values), _weights(values["weights"])
    teacher = kdc.load_teacher(values["teacher"])
    student = _student(values, teacher)
    how = _images_and_folders(values, teacher)
    _report(values, kdc.distill(student, teacher, settings=settings, weights=weights, **how))


def _few_steps(values: dict[str, Any]) -> None:
    import kdc

    settings = _settings(values)
    teacher = kdc.load_teacher(values["teacher"])
    student = _student(values, teacher)
    how = _images_and_folders(values, teacher)
    how |= {name: values[name] for name in ("guidance", "grid")}
    _report(values, kdc.distill_few_steps(student, teacher, settings=settings, **how))


def _finetune(values: dict[str, Any]) -> None:
    import kdc

    settings = _settings(values)
    teacher = kdc.load_teacher(values["teacher"])
    how = _images_and_folders(values, teacher)
    _report(values, kdc.finetune(teacher, settings=settings, **how))


def _images_and_folders(values: Mapping[str, Any], teacher) -> dict[str, Any]:
    """What distillation and fine-tuning are given besides their networks and settings."""
    import kdc

    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    named = {name: values[name] for name in ("output_dir", "resume", "cache_dir")}
    dataset = kdc.load_dataset(values["dataset"], "train", size, count=values["images"])
    return named | {"dataset": dataset, "sample_prompts": values["sample_prompts"] or ()}


def _report(values: Mapping[str, Any], log) -> None:
    """The last row of a training's log, and where the rest is."""
    _say(log.tail(1).to_string(index=False))
    _say(values["output_dir"])


def _continue(values: dict[str, Any]) -> None:
    import torch

    import kdc
    from kdc.continual.sequence import check_sequence
    from kdc.continual.strategies import find_strategy
    from kdc.evaluation.metrics import METRICS, Evidence

    settings, strategy = _settings(values), find_strategy(values["strategy"])
    weights = _weights(values["weights"]) if values["weights"] else None
    teacher = kdc.load_teacher(values["teacher"])
    student = _student(values, teacher)
    buffer = None
    if strategy.mechanism.uses_buffer:
        buffer = kdc.ReplayBuffer(
            values["capacity"], values["policy"], values["dtype"], seed=settings.seed
        )
    check_sequence(
        strategy,
        student,
        teacher,
        buffer=buffer,
        settings=settings,
        weights=weights or kdc.LossWeights.only("task"),
        output_dir=values["output_dir"],
        resume=values["resume"],
    )
    tasks = _tasks(values["dataset"], teacher, values["images"], values["cache_dir"])
    error = METRICS["output_error"]

    def evaluate(pipeline, task) -> dict[str, float]:
        evidence = Evidence(
            images=torch.empty(0), latents=task.test, pipeline=pipeline, teacher=teacher
        )
        return {"output_error": float(error.function(evidence))}

    result = kdc.run_sequence(
        tasks,
        strategy,
        student,
        teacher,
        evaluate=evaluate,
        higher_is_better={"output_error": error.higher_is_better},
        buffer=buffer,
        settings=settings,
        weights=weights,
        output_dir=values["output_dir"],
        resume=values["resume"],
    )
    if not is_first_process():
        return
    folder = as_path(values["output_dir"])
    matrices = {name: matrix.to_dict() for name, matrix in result.matrices.items()}
    _write_json(folder / "scores.json", matrices)
    _write_text(folder / "counts.csv", result.counts.to_csv())
    print(result.matrix.to_frame().to_string())
    print(result.matrix.measures().to_string())
    print(folder)


def _generate(values: dict[str, Any]) -> None:
    import kdc
    from kdc.io import write_image
    from kdc.pipelines import as_grid

    prompts = _prompts(values)
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, several if you like, or --prompts FILE")
    pipeline = _pipeline(values["pipeline"], values["teacher"])
    how = {name: values[name] for name in ("seed", "steps", "guidance", "batch_size")}
    images = kdc.generate(pipeline, prompts, **how)
    folder = as_path(values["output_dir"])
    digits = max(3, len(str(len(prompts))))
    for number, image in enumerate(images):
        write_image(folder / f"{number:0{digits}}.png", image)
    write_image(folder / "grid.png", as_grid(images))
    print(f"{len(images)} images and a grid of them in {folder}")


def _evaluate(values: dict[str, Any]) -> None:
    import kdc
    from kdc.data import scenes, worlds

    pipeline = _pipeline(values["pipeline"], values["teacher"])
    prompts, reference = _prompts(values), values["reference"]
    if not prompts:
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        dataset = kdc.load_dataset(reference or "worlds", "test", size, count=values["count"])
        count = min(values["count"], len(dataset))
        prompts = [dataset.caption(index) for index in range(count)]
    asked: dict[str, Any] = {}
    for name, module in (("attributes", worlds), ("scenes", scenes)):
        try:
            asked = {name: [module.read_caption(prompt) for prompt in prompts]}
            break
        except ValueError:  # not of the procedural ones, whose answers are known
            continue
    scores = kdc.evaluate(
        pipeline,
        prompts,
        reference,
        **asked,
        teacher=_pipeline(values["teacher"], "mini") if values["teacher"] else None,
        metrics=tuple(values["metrics"] or ()),
        extractor=values["extractor"],
        seeds=values["seeds"],
        steps=values["steps"],
        guidance=values["guidance"],
        batch_size=values["batch_size"],
    )
    folder = as_path(values["output_dir"])
    table = scores.table
    plain = table.astype(object).where(table.notna(), None).to_dict("index")
    _write_json(folder / "scores.json", plain)
    _write_text(folder / "scores.csv", table.to_csv())
    print(table[["value", "spread", "samples", "extractor", "note"]].to_string())
    print(folder)


def _export(values: dict[str, Any]) -> None:
    import kdc

    teacher = kdc.load_teacher(values["teacher"])
    source = values["student"]
    folder = kdc.export(
        kdc.load_student("mini", teacher).unet if source == "mini-student" else source,
        teacher,
        values["output_dir"],
        teacher_name=values["teacher"],
        data_name=values["data"],
        licence=values["licence"],
        scores=values["scores"],
        half=values["half"],
        onnx=values["onnx"],
    )
    print(folder)


def _costs(values: dict[str, Any]) -> None:
    import pandas as pd

    import kdc
    from kdc.unet.layouts import sd_unet

    whole = sd_unet() if values["teacher"] == "sd-v1" else kdc.load_teacher(values["teacher"]).unet
    plans = values["plan"] or list(kdc.PLANS)
    inputs = {"size": values["size"], "sequence_length": values["sequence_length"]}
    rows = {}
    for plan in plans:
        total = kdc.count_costs(kdc.slim(whole, plan), **inputs).loc["total"]
        rows[plan] = {
            "parameters": f"{int(total['parameters']):,}",
            "GMACs": f"{total['macs'] / 1e9:.3f}",
            "GMACs, convolutions and linear layers": f"{total['linear_macs'] / 1e9:.3f}",
        }
    print(pd.DataFrame(rows).T.to_string())


COMMANDS: dict[str, Command] = {
    "slim": Command(
        "cut a student from a teacher's U-Net",
        (TEACHER, PLAN, INIT, Option("seed", "of random weights", int, 0), OUTPUT),
        _slim,
        STUDENT_FILES,
    ),
    "distill": Command(
        "train a student to generate as its teacher does",
        (
            TEACHER,
            STUDENT,
            PLAN,
            INIT,
            Option("dataset", DATASET_NAMES + ", or a folder", default="worlds"),
            IMAGES,
            CACHE,
            WEIGHTS,
            *TRAINING,
            SAMPLE_PROMPTS,
            OUTPUT,
            RESUME,
        ),
        _distill,
    ),
    "few-steps": Command(
        "train a student once more, to draw in two to four steps without guidance's second call",
        (
            TEACHER,
            Option("student", "mini, or a student's folder: where it begins", required=True),
            Option("dataset", DATASET_NAMES + ", or a folder", default="worlds"),
            IMAGES,
            CACHE,
            Option("guidance", "what is folded in", float, 7.5),
            Option("grid", "steps of the sampler whose path is shortened", int, 50),
            *(dataclasses.replace(o, default=0.0) if o.name == "caption_dropout" else o
              for o in TRAINING),
            SAMPLE_PROMPTS,
            OUTPUT,
            RESUME,
        ),
        _few_steps,
    ),
    "finetune": Command(
        "train a teacher's U-Net on images first, as the authors did",
        (
            TEACHER,
            Option("dataset", DATASET_NAMES + ", or a folder", default="worlds"),
            IMAGES,
            CACHE,
            *TRAINING,
            SAMPLE_PROMPTS,
            OUTPUT,
            RESUME,
        ),
        _finetune,
    ),
    "continue": Command(
        "learn data sets one after the other, with a strategy against forgetting",
        (
            TEACHER,
            STUDENT,
            PLAN,
            INIT,
            Option("dataset", '"A then B"; one name is halved by classes', default="worlds"),
            IMAGES,
            CACHE,
            Option("strategy", "how old images are kept in mind", default="replay"),
            Option("capacity", "items of the replay buffer", int, 64),
            Option("policy", "which items stay in it", default="reservoir"),
            Option("dtype", "how latents are stored: float32, float16, int8", default="float16"),
            WEIGHTS,
            *TRAINING,
            OUTPUT,
            RESUME,
        ),
        _continue,
        ("scores.json", "counts.csv"),
    ),
    "generate": Command(
        "generate images for prompts",
        (
            Option("pipeline", "mini, mini-student, a hub id, or a folder", positional=True,
                   default="mini"),
            Option("teacher", "lends its other parts to a folder with only a U-Net",
                   default="mini"),
            *PROMPTS,
            *SAMPLING,
            OUTPUT,
        ),
        _generate,
        ("000.png", "grid.png"),
    ),
    "evaluate": Command(
        "score a pipeline's images",
        (
            Option("pipeline", "mini, mini-student, a hub id, or a folder", positional=True,
                   default="mini"),
            Option("teacher", "compare with its images of the same prompts and noise"),
            *PROMPTS,
            Option("reference", f"real images: {DATASET_NAMES}, or a folder"),
            Option("count", "captions of the reference that are used without prompts", int, 32),
            Option("metrics", "which; default: all that can be had", many=True),
            Option("extractor", "what computes features", default="mini-clip"),
            Option("seeds", "of the starting noise, a set of images each", int, (0, 1, 2),
                   many=True),
            *(option for option in SAMPLING if option.name != "seed"),
            OUTPUT,
        ),
        _evaluate,
        ("scores.json", "scores.csv"),
    ),
    "export": Command(
        "write a student as a whole pipeline with a model card",
        (
            Option("student", "mini-student, or a student's folder", positional=True,
                   required=True),
            Option("teacher", "mini, a hub id or a folder: whose student it is", default="mini"),
            Option("data", "what the card says of the data"),
            Option("licence", "the teacher's; default: known for teachers with a short name"),
            Option("scores", "scores.json of `python -m kdc evaluate`, for the card"),
            Option("half", "store weights as float16", bool, False),
            Option("onnx", "models for ONNX Runtime as well", bool, False),
            OUTPUT,
        ),
        _export,
        ("model_index.json", "README.md"),
    ),
    "costs": Command(
        "count parameters and multiply-accumulates of plans",
        (
            Option("teacher", "mini, sd-v1 (random weights), a hub id or a folder",
                   default="mini", positional=True),
            Option("plan", "which plans; default: all", many=True),
            Option("size", "side of the latents; default: the network's", int),
            Option("sequence_length", "tokens of a caption", int, 77),
        ),
        _costs,
    ),
}  # fmt: skip


def settle(name: str, given: Mapping[str, Any], config: str | Path | None = None) -> dict[str, Any]:
    """The values of all options of a command: defaults, under a file's, under those given.

    Raises `ValueError` for a configuration that is none or of another command, and for an option
    that is required and not there, `TypeError` for an unknown key.
    """
    command = COMMANDS[name]
    values = {option.name: option.default for option in command.options}
    values |= read_config(name, config) if config else {}
    values |= given
    missing = [o.name for o in command.options if o.required and values[o.name] is None]
    if missing:
        flags = ", ".join("--" + one.replace("_", "-") for one in missing)
        raise ValueError(f"{name} needs {flags}")
    return values


def read_config(name: str, file: str | Path) -> dict[str, Any]:
    """The options that a YAML or JSON file sets, as `write_config` wrote it or by hand."""
    file = as_path(file, "the configuration")
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}")
    try:
        values = yaml.safe_load(file.read_text())  # which reads JSON as well
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold options by name, not {type(values).__name__}")
    made_by = values.pop("command", name)
    if made_by != name:
        raise ValueError(f"{file} is of the command {made_by}, not {name}")
    values.pop("made_with", None)
    refuse_unknown(values, [option.name for option in COMMANDS[name].options])
    for option in COMMANDS[name].options:
        if option.name in values:
            values[option.name] = _converted(option, values[option.name], file)
    return values


def _converted(option: Option, value: Any, file: Path) -> Any:
    """A value of a file in the option's type; whole numbers are numbers, nothing else is turned."""
    if value is None:
        return None
    if option.many:
        value = value if isinstance(value, list) else [value]
        return [_converted(dataclasses.replace(option, many=False), one, file) for one in value]
    wanted = (int, float) if option.type is float else (option.type,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and option.type is not bool):
        raise ValueError(f"{file}: {option.name} must be {option.type.__name__}, not {value!r}")
    return option.type(value)


def write_config(name: str, values: Mapping[str, Any], folder: str | Path) -> Path:
    """Write what a command was run with, so that `--config` gives the same run again."""
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    made_with = {package: _version(package) for package in PACKAGES}
    text = yaml.safe_dump(
        {"command": name, **plain, "made_with": made_with}, sort_keys=False, allow_unicode=True
    )
    return _write_text(as_path(folder) / CONFIG, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _settings(values: Mapping[str, Any]) -> TrainSettings:
    return TrainSettings(**{f.name: values[f.name] for f in dataclasses.fields(TrainSettings)})


def _weights(pairs: Sequence[str] | None):
    """Weights and options of the loss from texts such as "soft=0.1"."""
    from kdc import LossWeights

    given = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--weights takes NAME=VALUE, not {pair!r}")
        given[name] = yaml.safe_load(value)
    return LossWeights(**given)


def _student(values: Mapping[str, Any], teacher):
    import kdc

    if values["student"]:
        return kdc.load_student(values["student"], teacher).unet
    return kdc.slim(teacher.unet, values["plan"], values["init"], values["seed"])


def _pipeline(source: str, teacher: str | None):
    """A pipeline by name: a teacher, a student's folder, or the embedded student."""
    import kdc

    if source == "mini-student":
        return kdc.load_student("mini")
    folder = as_path(source, "the pipeline")
    if (folder / "unet").is_dir() and not (folder / "model_index.json").is_file():
        return kdc.load_student(folder, kdc.load_teacher(teacher or "mini"))
    return kdc.load_teacher(source)


def is_first_process() -> bool:
    """Whether this is the one process that says and writes what a command came to."""
    from kdc.processes import this_process

    return this_process().is_main_process


def _say(text: str) -> None:
    if is_first_process():
        print(text)


def _prompts(values: Mapping[str, Any]) -> list[str]:
    prompts = list(values["prompt"] or ())
    if values["prompts"]:
        file = as_path(values["prompts"], "the file of prompts")
        if not file.is_file():
            raise FileNotFoundError(f"no file of prompts {file}")
        prompts += [line.strip() for line in file.read_text().splitlines() if line.strip()]
    return prompts


def _tasks(text: str, teacher, images: int, folder: str | None) -> list:
    """Tasks by a text: "A then B" names a world or folder for each, one name is halved."""
    import kdc
    from kdc.continual.tasks import Task, half_of_classes, names_of, split_classes
    from kdc.data import worlds

    size = teacher.unet.config.sample_size * teacher.vae_scale_factor
    names = names_of(text)
    loaded = {
        name: [kdc.load_dataset(name, split, size, count=images) for split in ("train", "test")]
        for name in names
    }
    known = names[0] in worlds.WORLDS
    label_of = (lambda caption: worlds.read_caption(caption).kind) if known else str
    if len(names) == 1:  # looked at here, before anything is encoded
        labels = ([label_of(d.caption(i)) for i in range(len(d))] for d in loaded[names[0]])
        half = half_of_classes(names[0], *labels)
    encoded = {
        name: [kdc.cache_latents(teacher, dataset, folder=folder) for dataset in both]
        for name, both in loaded.items()
    }
    if len(names) > 1:
        return [Task(Path(n).name, train, test=test) for n, (train, test) in encoded.items()]
    train, test = encoded[names[0]]
    return split_classes(train, label_of, per_task=half, test=test)


def _write_text(file: Path, text: str) -> Path:
    from kdc.io import write_text

    return write_text(file, text)


def _write_json(file: Path, values: Any) -> Path:
    return _write_text(file, json.dumps(values, indent=2) + "\n")
