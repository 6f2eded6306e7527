"""The library's command line: the same functions, names and defaults as in Python."""

import dataclasses
import json
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import kdc
from kdc.__main__ import build_parser, main
from kdc.commands import COMMANDS, CONFIG, settle, write_config
from kdc.training.settings import TrainSettings

TINY = ["--images", "6", "--batch-size", "2", "--steps", "2", "--seed", "3"]


def stopped(argv, capsys):
    """The exit code and what was said on stderr."""
    with pytest.raises(SystemExit) as found:
        main([str(one) for one in argv])
    return found.value.code, capsys.readouterr().err


def weights(folder):
    unet = kdc.load_student(folder).unet
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


def test_help_answers_at_once_and_names_everything():
    for command in ([], *([name] for name in COMMANDS)):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "kdc", *command, "--help"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert time.perf_counter() - started < 3  # 0.1 s on a quiet machine
        if command:
            for option in COMMANDS[command[0]].options:
                assert option.name.replace("_", "-") in done.stdout.replace("_", "-")
        else:
            assert all(name in done.stdout for name in COMMANDS)


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys, kdc.__main__ as m; m.build_parser();"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_options_are_the_fields_of_the_settings():
    for name in ("distill", "continue"):
        options = {option.name: option for option in COMMANDS[name].options}
        for field in dataclasses.fields(TrainSettings):
            option = options[field.name]
            if field.default is dataclasses.MISSING:
                assert option.required
            else:
                assert option.default == field.default


def test_slim_cuts_and_saves(tmp_path, capsys):
    main(["slim", "mini", "--plan", "bk-tiny", "--output-dir", str(tmp_path / "cut")])
    assert "parameters" in capsys.readouterr().out
    saved = kdc.load_student(tmp_path / "cut").unet
    assert saved.slim_plan == kdc.PLANS["bk-tiny"]
    config = yaml.safe_load((tmp_path / "cut" / CONFIG).read_text())
    assert config["command"] == "slim" and config["plan"] == "bk-tiny"
    assert config["made_with"]["torch"]


def test_distill_equals_the_function_and_its_config_gives_the_same_run_again(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    main(["distill", *TINY, "--weights", "soft=0.5", "output=0", "--output-dir", str(first)])
    config = first / CONFIG
    main(["distill", "--config", str(config), "--output-dir", str(again)])
    assert torch.equal(weights(first), weights(again))
    other = yaml.safe_load((again / CONFIG).read_text())
    expected = yaml.safe_load(config.read_text()) | {"output_dir": str(again)}
    assert other == expected

    teacher = kdc.load_teacher("mini", device="cpu")
    student = kdc.slim(teacher.unet, "kdc", seed=3)
    kdc.distill(
        student, teacher, kdc.load_dataset("worlds", count=6), steps=2, batch_size=2, seed=3,
        weights=kdc.LossWeights(soft=0.5, output=0),
    )  # fmt: skip
    flat = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert torch.equal(flat, weights(first))
    assert len(pd.read_csv(first / "log.csv")) == 2


def test_options_given_win_over_the_file_and_json_is_read_as_well(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"steps": 7, "batch_size": 3, "learning_rate": 1}))
    given = vars(build_parser().parse_args(["distill", "--steps", "9", "--config", str(file)]))
    given = {k: v for k, v in given.items() if k not in ("command", "config", "traceback")}
    values = settle("distill", given | {"output_dir": "x"}, file)
    assert (values["steps"], values["batch_size"], values["learning_rate"]) == (9, 3, 1.0)
    assert values["plan"] == "kdc"


@pytest.mark.long
def test_continue_learns_two_tasks_and_goes_on(tmp_path, capsys):
    folder = tmp_path / "sequence"
    run = ["continue", "--dataset", "flora then lepidoptera", *TINY, "--strategy", "agem",
           "--capacity", "4", "--output-dir", str(folder)]  # fmt: skip
    main(run)
    shown = capsys.readouterr().out
    assert "after lepidoptera" in shown and "forgetting" in shown
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["output_error"]["names"] == ["flora", "lepidoptera"]
    assert not scores["output_error"]["higher_is_better"]
    assert pd.read_csv(folder / "counts.csv")["new_images"].tolist() == [4, 4]
    code, said = stopped(run, capsys)
    assert code == 1 and "resume=True" in said
    main([*run, "--resume"])


@pytest.mark.long
def test_one_data_set_is_halved_by_its_classes(tmp_path):
    folder = tmp_path / "halves"
    main(["continue", "--dataset", "flora", "--images", "40", "--batch-size", "2", "--steps", "1",
          "--strategy", "finetune", "--output-dir", str(folder)])  # fmt: skip
    names = json.loads((folder / "scores.json").read_text())["output_error"]["names"]
    assert len(names) == 2 and sum(name.count("+") + 1 for name in names) == 6


def test_generate_writes_images_and_a_grid(tmp_path, teacher):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue eyed butterfly on a sand background\n\n")
    main(["generate", "mini", "--prompt", "a red rose on a night background", "--prompts",
          str(prompts), "--steps", "2", "--output-dir", str(tmp_path / "out")])  # fmt: skip
    files = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert files == ["000.png", "001.png", "grid.png"]
    texts = ["a red rose on a night background", "a blue eyed butterfly on a sand background"]
    expected = kdc.generate(teacher, texts, steps=2)[1].permute(1, 2, 0)
    with Image.open(tmp_path / "out" / "001.png") as found:
        assert torch.equal(torch.tensor(list(found.getdata())).view(64, 64, 3), expected.long())
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (128, 64)


def test_evaluate_scores_and_writes(tmp_path, capsys):
    main(["evaluate", "mini-student", "--count", "4", "--steps", "2", "--seeds", "0", "1",
          "--teacher", "mini", "--output-dir", str(tmp_path)])  # fmt: skip
    shown = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name in ("accuracy", "clip", "lpips_to_teacher", "diversity"):
        assert name in shown and scores[name]["value"] is not None
    assert scores["fd"]["value"] is None and "no reference" in scores["fd"]["note"]
    assert "accuracy" in pd.read_csv(tmp_path / "scores.csv")["score"].tolist()


def test_costs_counts_stable_diffusion_without_weights(capsys):
    main(["costs", "sd-v1", "--plan", "full", "kdc"])
    shown = capsys.readouterr().out
    assert "859,520,964" in shown and "482,346,884" in shown and "401.6" in shown


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["slim"], 2, "slim needs --output-dir"),
        (["distill", "--output-dir", "x"], 2, "distill needs --steps"),
        (["distill", "--steps", "2", "--output-dir", "x", "--config", "no.yaml"], 2, "no config"),
        (["slim", "--plan", "kcd", "--output-dir", "x"], 1, "unknown plan 'kcd'; the plans are"),
        (["slim", "./nowhere", "--output-dir", "x"], 1, "no folder"),
        (["distill", *TINY, "--weights", "sft=1", "--output-dir", "x"], 1, "did you mean soft"),
        (["distill", *TINY, "--weights", "soft", "--output-dir", "x"], 1, "NAME=VALUE"),
        (["continue", *TINY, "--strategy", "pray", "--output-dir", "x"], 1, "unknown strategy"),
        (["generate", "--output-dir", "x"], 1, "no prompts"),
        (["evaluate", "--metrics", "is", "--output-dir", "x"], 1, "unknown metric 'is'"),
    ],
)
def test_mistakes_are_one_line(argv, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, shown = stopped(argv, capsys)
    shown = [line for line in shown.splitlines() if line.startswith("python -m kdc")]
    assert found == code and len(shown) == 1 and said in shown[0]
    assert not (tmp_path / "x" / CONFIG).exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3\n", "did you mean steps"),
        ("command: slim\n", "of the command slim, not distill"),
        ("- 1\n", "must hold options by name"),
        ("steps: [1\n", "neither YAML nor JSON"),
        ("steps: many\n", "steps must be int, not 'many'"),
        ("resume: 1\n", "resume must be bool, not 1"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(text, said, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    code, shown = stopped(["distill", "--config", file, "--output-dir", tmp_path / "x"], capsys)
    assert code == 2 and said in shown


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="unknown plan"):
        main(["slim", "--plan", "kcd", "--output-dir", str(tmp_path), "--traceback"])


def test_a_written_configuration_holds_every_option(tmp_path):
    for name, command in COMMANDS.items():
        values = {option.name: option.default for option in command.options}
        written = yaml.safe_load(write_config(name, values, tmp_path / name).read_text())
        assert set(values) | {"command", "made_with"} == set(written)


def test_classes_that_cannot_be_halved_are_refused_before_anything_is_encoded(
    tmp_path, capsys, monkeypatch
):
    from diffusers import AutoencoderKL
    from PIL import Image

    def never(*args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(AutoencoderKL, "encode", never)
    for name in ("flat/1.png", "flat/2.png", "flat/3.png", "flat/4.png", "flat/5.png",
                 "own/train/a/1.png", "own/train/b/1.png", "own/train/c/1.png", "own/test/a/2.png",
                 "untested/train/a/1.png", "untested/train/a/2.png", "untested/train/b/1.png",
                 "untested/test/a/3.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), hash(name) % 255, 0)).save(tmp_path / name)
    common = ["--steps", "1", "--strategy", "finetune", "--output-dir", str(tmp_path / "out")]
    flat = tmp_path / "flat"
    for dataset, said in ((flat, "has one class"), (tmp_path / "own", "a caption of its own"),
                          (tmp_path / "untested", "no test images of a photo of a b"),
                          (f"{flat} then {flat}", "names of their own")):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["continue", "--dataset", str(dataset), *common])
        assert said in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "scores.json").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["continue", "--dataset", "flora", *common])
    assert stopped.value.code == 2 and "scores.json is a folder" in capsys.readouterr().err
