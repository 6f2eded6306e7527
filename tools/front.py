"""Draws the picture on the first page, `notebooks/images/front.jpg`: `python tools/front.py`.

Teacher and student at the steps that chapter 06 chose, from the same noise; times from `results/`.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import kdc
from kdc.io import fingerprint
from studies.common import ledger
from studies.figures import WIDTH, image_grid

FILE = Path(__file__).resolve().parent.parent / "notebooks" / "images" / "front.jpg"
PROMPTS = (
    "a purple daisy on a sand background",
    "a red rose on a night background",
    "a yellow tulip on a sky background",
    "a pink spotted butterfly on a sky background",
    "a blue striped butterfly on a sand background",
    "an orange eyed butterfly on a night background",
)


def costs() -> dict[str, dict]:
    """Steps and seconds an image of teacher and student, one at a time, as chapter 06 measured."""
    timed = ledger.read("evaluation_timing")["images"]
    chosen = next(
        row
        for row in ledger.read("evaluation_steps")["chosen"]
        if row["pipeline"] == "shipped student" and "best" in row["rules"]
    )
    wanted = {"teacher": 50, "shipped student": chosen["steps"]}
    return {
        name: next(
            row
            for row in timed
            if (row["pipeline"], row["steps"], row["batch_size"]) == (name, steps, 1)
        )
        for name, steps in wanted.items()
    }


def models() -> dict:
    """The two pipelines, by their names in `costs`."""
    teacher = kdc.load_teacher("mini")
    return {"teacher": teacher, "shipped student": kdc.load_student("mini", teacher)}


def made_with(pipelines) -> str:
    """Names the weights of both U-Nets: a picture by others is out of date."""
    states = [p.unet.state_dict().values() for p in pipelines.values()]
    return fingerprint(*(value for state in states for value in state))


def main() -> None:
    pipelines, rows = models(), {}
    for name, cost in costs().items():
        size = sum(p.numel() for p in pipelines[name].unet.parameters()) / 1e6
        time = f"{cost['steps']} steps, {cost['median']:.1f} s"
        label = f"{name.split()[-1]}\n{size:.2f}M parameters\n{time}"
        rows[label] = kdc.generate(pipelines[name], list(PROMPTS), seed=0, steps=cost["steps"])
    image_grid(rows, [prompt.replace(" background", "") for prompt in PROMPTS])
    assert plt.gcf().get_size_inches()[0] <= WIDTH + 0.01
    stored = io.BytesIO()
    plt.savefig(stored, format="png", dpi=192)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    Image.open(stored).convert("RGB").save(
        FILE, quality=90, subsampling=0, optimize=True, comment=made_with(pipelines).encode()
    )


if __name__ == "__main__":
    main()
