"""What chapters 04 and 05 show of the study of forgetting: claims, tables, and what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from kdc.continual.matrix import ScoreMatrix
from kdc.evaluation.statistics import student_interval
from studies.common import ledger
from studies.common.claims import Claim, check
from studies.common.protocol import cut
from studies.replay.study import SHOWN
from studies.replay.variants import STAGES

SCORED = ("accuracy", "output_error", "fd", "species")
MEASURES = (
    *(f"{part}_{name}" for name in SCORED for part in ("old", "new", "forgetting")),
    "retention_accuracy",
    "leakage",
)
# How measures are called in figures and tables.
NAMES = {
    f"{part}_{name}": f"{part}, {called}"
    for part in ("old", "new", "forgetting", "retention")
    for name, called in (
        ("accuracy", "accuracy"),
        ("output_error", "output error"),
        ("fd", "Fréchet distance"),
        ("species", "right species"),
    )
}
# What chapter 04 opens with.
OPENING = ("teacher", "after the first task", "finetune", "last_sample", "replay", "joint")
BASELINES = ("finetune", "replay", "replay+distil", "generative_distillation", "joint")
BESIDE = ("buffers", "ratios", "teachers")  # stages whose baselines are rows of the domains
EXTREMES = (np.mean, np.min, np.max)
IMAGES = ("new_images", "old_images", "teacher_images", "old_teacher_images")
IMAGES += ("sampler_images", "fisher_images")
# Written before the study ran. Each: what is claimed, the variant, what it is compared with, the
# measure, and what is expected if it is not "better".
CLAIMS: dict[str, list[Claim]] = {
    "domains": [
        Claim("replay keeps the old task", "replay", "finetune", "old_accuracy"),
        Claim(
            "last-sample replay does not keep it", "last_sample", "finetune", "old_accuracy", "open"
        ),
        Claim("a penalty on the weights keeps nothing", "ewc", "finetune", "old_accuracy", "open"),
        Claim("following the old model adds to replay", "replay+distil", "replay", "old_accuracy"),
        Claim(
            "following the old model costs nothing new",
            "replay+distil",
            "replay",
            "new_accuracy",
            "not worse",
        ),
        Claim(
            "generated images keep less than stored ones",
            "generative_replay",
            "replay",
            "old_accuracy",
            "worse",
        ),
        Claim(
            "following the old model corrects generated images",
            "generative_distillation",
            "generative_replay",
            "old_accuracy",
        ),
        Claim(
            "then they keep as much as stored ones",
            "generative_distillation",
            "replay",
            "old_accuracy",
            "not worse",
        ),
        Claim(
            "replay keeps as much as joint training", "replay", "joint", "old_accuracy", "not worse"
        ),
    ],
    "buffers": [
        Claim("a tiny buffer keeps less", "replay 4", "replay", "old_accuracy", "worse"),
        Claim("a tiny buffer leaks", "replay 4", "replay", "leakage", "worse"),
        Claim("a large buffer keeps no more", "replay 256", "replay", "old_accuracy", "open"),
        Claim("int8 loses nothing", "replay 64 int8", "replay", "old_accuracy", "open"),
        Claim(
            "int8 loses nothing in a tiny buffer",
            "replay 4 int8",
            "replay 4",
            "old_accuracy",
            "open",
        ),
        Claim(
            "class balance changes nothing",
            "replay 64 class_balanced",
            "replay",
            "old_accuracy",
            "open",
        ),
        Claim(
            "first in, first out keeps nothing",
            "replay 64 fifo",
            "finetune",
            "old_accuracy",
            "open",
        ),
    ],
    "ratios": [
        Claim(
            "a quarter as many old images keep less",
            "replay ratio 0.25",
            "replay",
            "old_accuracy",
            "worse",
        ),
        Claim(
            "twice as many old images cost the new task",
            "replay ratio 2",
            "replay",
            "new_accuracy",
            "worse",
        ),
    ],
    "teachers": [
        Claim(
            "following the teacher keeps more",
            "replay, task and output",
            "replay, task only",
            "old_accuracy",
        ),
        Claim(
            "the teacher keeps more than the old model",
            "replay, task and output",
            "replay+distil",
            "old_accuracy",
        ),
        Claim("features keep more", "replay", "replay, task and output", "old_accuracy"),
        Claim(
            "even features of the old model keep more",
            "replay, old model, all terms",
            "replay+distil",
            "old_accuracy",
        ),
        Claim(
            "features of the teacher keep more than the old model's",
            "replay",
            "replay, old model, all terms",
            "old_accuracy",
        ),
        Claim(
            "replay by the task term alone forgets less",
            "replay, task only",
            "finetune",
            "old_accuracy",
        ),
        Claim(
            "a heavier task term does not do it",
            "replay, task times 4",
            "replay",
            "old_accuracy",
            "worse",
        ),
        Claim(
            "features keep more with generated images, too",
            "generated, all terms",
            "generative_distillation",
            "old_accuracy",
        ),
        Claim(
            "then no buffer is needed",
            "generated, all terms",
            "replay",
            "old_accuracy",
            "not worse",
        ),
    ],
    "plain": [
        Claim(
            "replay keeps the old task in plain training, too", "replay", "finetune", "old_accuracy"
        ),
        Claim(
            "replay costs nothing new in plain training",
            "replay",
            "finetune",
            "new_accuracy",
            "not worse",
        ),
        Claim(
            "replay keeps as much as joint training there",
            "replay",
            "joint",
            "old_accuracy",
            "not worse",
        ),
    ],
    "classes": [
        Claim("replay keeps the old task", "replay", "finetune", "old_accuracy"),
        Claim(
            "last-sample replay does not keep it", "last_sample", "finetune", "old_accuracy", "open"
        ),
        Claim(
            "class balance beats first in, first out",
            "replay class_balanced",
            "replay fifo",
            "old_accuracy",
        ),
        Claim(
            "herding is better than chance",
            "replay herding",
            "replay class_balanced",
            "old_accuracy",
        ),
    ],
    "photos": [
        Claim("replay keeps the old task", "replay", "finetune", "old_output_error"),
        Claim(
            "last-sample replay does not keep it",
            "last_sample",
            "finetune",
            "old_output_error",
            "open",
        ),
        Claim("generated images show it", "replay", "finetune", "old_fd"),
        Claim("last-sample replay does not show it", "last_sample", "finetune", "old_fd", "open"),
        Claim("replay costs nothing new", "replay", "finetune", "new_fd", "not worse"),
        Claim("replay keeps as much as joint training", "replay", "joint", "old_fd", "not worse"),
    ],
    # The first falls where its 95 % interval over seeds holds 0, the others where it lies below 0.
    "species": [
        Claim("replay keeps the old species", "replay", "finetune", "old_species"),
        Claim("replay costs nothing new", "replay", "finetune", "new_species", "not worse"),
        Claim(
            "replay keeps as much as joint training", "replay", "joint", "old_species", "not worse"
        ),
    ],
}


def stored(stage: str, results: str | Path | None = None) -> list[dict]:
    """The rows of a stage; those of `BESIDE` with what they are compared to."""
    rows = ledger.read(f"forgetting_{stage}", results)["rows"]
    if stage in BESIDE:
        known = {(row["order"], row["seed"]) for row in rows}
        rows = rows + [
            row
            for row in stored("domains", results)
            if row["candidate"] in BASELINES and (row["order"], row["seed"]) in known
        ]
    return rows


def matrices(row: Mapping) -> dict[str, ScoreMatrix]:
    """The score matrices of a row, by metric."""
    return {name: ScoreMatrix.from_dict(values) for name, values in row["matrices"].items()}


def table(rows: Iterable[Mapping]) -> pd.DataFrame:
    """A line for each sequence: the measures of `MEASURES`, and what it cost.

    `old_<metric>` is the final mean over all tasks but the last, `new_<metric>` the final score of
    the last; `seed` names order and seed, by which lines are paired. `images` counts how often a
    image went through a network (forwards and backwards once), `bytes` what was kept at most, of
    which `buffer_bytes` are the buffer's with the embeddings of its captions.
    """
    lines = []
    for row in rows:
        line = {"candidate": row["candidate"], "seed": f"{row['order']}, {row['seed']}"}
        for metric, matrix in matrices(row).items():
            final = matrix.values[-1]
            line |= {f"old_{metric}": final[:-1].mean(), f"new_{metric}": final[-1]}
            line |= {f"{k}_{metric}": v for k, v in matrix.measures().items()}
        counts = pd.DataFrame(row["counts"])
        line["images"] = counts[list(IMAGES)].to_numpy().sum()
        buffer = counts["buffer_bytes"] + counts["embedding_bytes"]
        line["bytes"] = (buffer + counts["model_bytes"]).max()
        line["buffer_bytes"] = buffer.max()
        leaks = row.get("leakage") or {}
        line["leakage"], line["old_items"] = leaks.get("share", np.nan), leaks.get("items", np.nan)
        lines.append(line)
    return pd.DataFrame(lines)


def goals(lines: pd.DataFrame, keep: float = 0.9, lose: float = 0.05) -> pd.DataFrame:
    """The goals of the chapter: value, Student's 95 % interval over sequences, and whether met.

    `finetune` forgets (its interval lies above 0); `replay` keeps the share `keep` of what `joint`
    reaches on the old tasks, and loses at most `lose` of accuracy on the new against `finetune`.
    The same for replay with the task term alone. Lines that a goal needs and `lines` lacks leave it
    out. Met means for all but the first that the mean reaches it; "surely" that the whole interval
    does.
    """
    wide, known = lines.pivot(index="seed", columns="candidate"), set(lines["candidate"])
    old, new = wide["old_accuracy"], wide["new_accuracy"]
    found = {"finetune forgets": (wide["forgetting_accuracy"]["finetune"], 0.0, 1)}
    for name in ("replay", "replay, task only"):
        if {name, "joint"} <= known:
            found[f"{name} keeps {keep:.0%} of joint"] = old[name] / old["joint"], keep, 1
        if name in known:
            lost = new["finetune"] - new[name]
            found[f"{name} loses at most {lose:g} on the new"] = lost, lose, -1
    out = {}
    for name, (values, goal, sign) in found.items():
        values = values.dropna()
        low, high = student_interval(values)
        worst = low if sign > 0 else high
        met = sign * (values.mean() - goal) >= 0
        surely = sign * (worst - goal) >= 0
        out[name] = {"value": values.mean(), "low": low, "high": high, "goal": goal}
        out[name] |= {"met": met, "surely": surely, "sequences": len(values)}
    out["finetune forgets"]["met"] = out["finetune forgets"]["surely"]  # the mean alone says little
    return pd.DataFrame(out).T


def check_stage(stage: str, lines: pd.DataFrame) -> pd.DataFrame:
    """The claims of a stage and what its lines say of them; see `claims.check`."""
    return check(lines, CLAIMS[stage])


def mean_matrices(rows: Iterable[Mapping], metric: str, order: str | None = None) -> dict:
    """The mean matrix over seeds of every trial, of one order (default: the first row's)."""
    rows = list(rows)
    order = order or rows[0]["order"]
    found: dict[str, list[pd.DataFrame]] = {}
    for row in rows:
        if row["order"] == order:
            found.setdefault(row["candidate"], []).append(matrices(row)[metric].to_frame())
    return {name: sum(frames) / len(frames) for name, frames in found.items()}


def along(rows: Iterable[Mapping], metric: str) -> dict[str, tuple[list, ...]]:
    """Lines of a panel: a metric's mean over the tasks learnt so far, after each task.

    A line for every trial: the number of tasks, the mean over sequences, the smallest, the largest.
    """
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        values = matrices(row)[metric].values
        so_far = [values[t, : t + 1].mean() for t in range(len(values))]
        found.setdefault(row["candidate"], []).append(so_far)
    return {
        name: (list(range(1, len(lines[0]) + 1)), *(f(lines, axis=0).tolist() for f in EXTREMES))
        for name, lines in found.items()
    }


def against_bytes(lines: pd.DataFrame, column: str, kind: str = "") -> tuple[list, ...]:
    """A line of a panel: bytes of the buffer, and a column's mean, smallest and largest.

    Of the replay trials of one `kind`: "" (reservoir, float16), "int8", or another policy. The
    extremes are those of the seeds.
    """
    names = [f"replay {n} {kind}".strip() for n in (4, 64, 256)]
    names = ["replay" if name == "replay 64" else name for name in names]
    return _extremes(lines, names, column, lines.groupby("candidate")["buffer_bytes"].mean())


def against_ratio(lines: pd.DataFrame) -> dict[str, tuple[list, ...]]:
    """Old and new accuracy by the number of old images for each new one, as lines of a panel."""
    ratios = {"replay ratio 0.25": 0.25, "replay": 1.0, "replay ratio 2": 2.0}
    columns = {"old task": "old_accuracy", "new task": "new_accuracy"}
    return {
        label: _extremes(lines, list(ratios), column, pd.Series(ratios))
        for label, column in columns.items()
    }


def _extremes(lines: pd.DataFrame, names: list[str], column: str, x: pd.Series) -> tuple[list, ...]:
    known = [name for name in names if name in set(lines["candidate"])]
    found = lines.groupby("candidate")[column].agg(["mean", "min", "max"]).loc[known]
    return x[known].tolist(), *(found[c].tolist() for c in found)


def shown(
    stage: str = "domains", results: str | Path | None = None
) -> tuple[dict[str, list], tuple[str, ...]]:
    """What the teacher draws, the student after the first task, and in the end every strategy's.

    All from one seed of the stage, "domains" or "photos"; the second value are the captions.
    """
    name = f"forgetting_{stage}"
    captions = tuple(ledger.read(name, results).get("shown", SHOWN))
    sheet = np.asarray(Image.open((Path(results or ledger.RESULTS) / name).with_suffix(".png")))
    return cut(sheet, ("teacher", "after the first task", *STAGES[stage]), len(captions)), captions
