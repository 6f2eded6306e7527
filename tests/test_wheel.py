"""The built wheel works in an empty folder: it holds the library and the mini models, no more."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EXAMPLE = """
import kdc
pipeline = kdc.load_teacher("mini")
student = kdc.slim(pipeline.unet, "kdc")
data = kdc.cache_latents(pipeline, kdc.load_dataset("flora", count=8))
kdc.distill(student, pipeline, data, steps=2, batch_size=2)
kdc.save_student(student, "student")
image = kdc.generate(kdc.load_student("student", pipeline), "a red rose", steps=2)
print(kdc.__file__, image.shape)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was unpacked, and an empty one to work in."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a build leaves traces beside its sources
    names = subprocess.run(
        ["git", "ls-files", "kdc", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, *build, "-w", str(place), str(source)], check=True)
    (wheel,) = place.glob("kdc-*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    (place / "empty").mkdir()
    return place


def run(installed, *command, fails=False):
    """Run Python in the empty folder, with the unpacked wheel before the clone's own library."""
    environment = os.environ | {"PYTHONPATH": str(installed / "site")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=installed / "empty",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def test_it_holds_the_library_and_the_models_and_nothing_else(installed):
    top = {p.name for p in (installed / "site").iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"kdc"}
    weights = {p.parts[-3] for p in (installed / "site").rglob("unet/*.safetensors")}
    assert weights == {"mini-teacher", "mini-student"}


def test_the_library_runs_from_an_empty_folder(installed):
    said = run(installed, "-c", EXAMPLE)
    assert str(installed / "site") in said
    assert (installed / "empty" / "student" / "unet" / "config.json").is_file()


def test_the_command_line_runs_from_an_empty_folder(installed):
    assert "distill" in run(installed, "-m", "kdc", "--help")
    told = [
        "mini",
        "--dataset",
        "flora",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--output-dir",
        "cut",
    ]
    run(installed, "-m", "kdc", "distill", *told)
    assert (installed / "empty" / "cut" / "unet" / "config.json").is_file()
    run(installed, "-m", "kdc", "generate", "cut", "--prompt", "a rose", "--output-dir", "images")
    assert list((installed / "empty" / "images").rglob("*.png"))
