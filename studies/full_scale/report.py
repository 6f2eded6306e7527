"""What full size takes: steps, hours and memory by GPU, measured on one and computed for others."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdc.unet.costs import count_costs
from kdc.unet.layouts import sd_unet
from kdc.unet.slimming import slim
from studies.common import ledger


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it."""

    # The highest rate of dense bf16 products (fp16 on the T4, which has no bf16), TFLOP/s.
    peak: float
    # Memory, GiB.
    memory: float


CARDS = {
    "T4": Card(65, 16),
    "L4": Card(121, 24),
    "RTX 4090": Card(165, 24),
    "A100 80 GB": Card(312, 80),
    "H100": Card(989, 80),
    "H200": Card(989, 141),
}
MEASURED = "H200"


@dataclass(frozen=True)
class Job:
    """One part of the way: so many updates of so many images."""

    # Updates, and images in each.
    updates: int
    images: int
    # How many forward passes' worth of the whole U-Net and of the student an image takes: a
    # training step is three forward passes, a teacher's answer one.
    whole: int
    student: int
    # Where the numbers come from.
    source: str


JOBS = {
    "fine-tune the teacher": Job(20_000, 4, 3, 0, "the authors' updates, batch 1 x 4"),
    "distil, as in the authors' script": Job(40, 4, 1, 3, "kd_train.sh: 40 updates, batch 1 x 4"),
    "distil, as this chapter does": Job(20_000, 64, 1, 3, "1.3M images"),
    "distil, as BK-SDM": Job(50_000, 256, 1, 3, "arXiv 2305.15798"),
    "learn a task by replay": Job(5_000, 64, 2, 6, "as many old images as new ones"),
}


@functools.cache
def flops(plan: str = "kdc") -> tuple[float, float]:
    """Floating-point operations of one call, 512 x 512: the whole U-Net's and the student's."""
    whole = sd_unet()
    macs = (count_costs(unet).loc["total", "macs"] for unet in (whole, slim(whole, plan)))
    first, second = (2 * float(value) for value in macs)
    return first, second


def rate(results: str | Path | None = None) -> float:
    """FLOP/s that distillation reached on the measured card, at its fastest batch."""
    rows = ledger.read("throughput_cuda", results)["rows"]
    fastest = max(np.mean(row["images_per_second"]) for row in rows)
    whole, student = flops()
    return fastest * (whole + 3 * student)


def hours(results: str | Path | None = None, plan: str = "kdc") -> pd.DataFrame:
    """Hours of each job on each card: from what one card reached, scaled by the cards' peaks.

    Only the column of the measured card rests on a measurement; none of these jobs was run whole.
    """
    share = rate(results) / (CARDS[MEASURED].peak * 1e12)
    whole, student = flops(plan)
    table = {}
    for name, job in JOBS.items():
        work = job.updates * job.images * (job.whole * whole + job.student * student)
        row = {card: work / (share * spec.peak * 1e12) / 3600 for card, spec in CARDS.items()}
        table[name] = row
    return pd.DataFrame(table).T


def spoken(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return (
        f"{hours * 60:.0f} min"
        if hours < 1
        else f"{hours:,.2g} h"
        if hours < 10
        else f"{hours:,.0f} h"
    )


def memory(results: str | Path | None = None) -> pd.DataFrame:
    """What distillation took on the measured card, and which cards have so much memory."""
    rows = []
    for row in ledger.read("throughput_cuda", results)["rows"]:
        if row["memory_gib"] is None:
            continue
        fits = [name for name, card in CARDS.items() if card.memory > row["memory_gib"]]
        low, high = row["images_per_second"]
        rows.append(
            {
                "batch": row["batch_size"],
                "recomputed activations": "yes" if row["gradient_checkpointing"] else "no",
                "images a second": f"{low}" if low == high else f"{low} to {high}",
                "GiB": row["memory_gib"],
                "fits on": ", ".join(fits),
            }
        )
    return pd.DataFrame(rows).set_index("batch")


# What others report: FID and CLIP score (of ViT-g/14) on COCO-30K at 256 pixels (Kim et al.
# 2305.15798, table 2), and the authors' own FID of 5 generated against 11 real images of one class.
OTHERS = {
    "Stable Diffusion 1.4": {"parameters": 859_520_964, "FID": 13.05, "CLIP": 0.2958},
    "BK-SDM-Base": {"parameters": 579_384_964, "FID": 15.76, "CLIP": 0.2878},
    "BK-SDM-Small (the plan kdc)": {"parameters": 482_346_884, "FID": 16.98, "CLIP": 0.2677},
    "BK-SDM-Small-2M": {"parameters": 482_346_884, "FID": 17.05, "CLIP": 0.2734},
    "BK-SDM-Tiny": {"parameters": 323_384_964, "FID": 17.12, "CLIP": 0.2653},
    "the authors' script, 5 images of one class": {"parameters": 482_346_884, "FID": 255.8},
}


def beside(yours: str | Path | None = None) -> pd.DataFrame:
    """The figures of others, and a row for the reader's own run, from `python -m kdc evaluate`.

    `yours` is its `scores.json`; None, or a file that is not there, leaves the row empty.
    """
    table = pd.DataFrame(OTHERS).T
    own = {"parameters": np.nan, "FID": np.nan, "CLIP": np.nan}
    if yours is not None and Path(yours).is_file():
        scores = pd.read_json(yours, orient="index")["value"]
        own |= {"FID": scores.get("fid", np.nan), "CLIP": scores.get("clip", np.nan) / 100}
    table.loc["your run"] = own
    return table
