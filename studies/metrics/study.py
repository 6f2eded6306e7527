"""The metrics on trial: which score notices which planted fault, and at which dose."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kdc.data import worlds
from kdc.evaluation.extractors import find_extractor, find_perceptual
from kdc.evaluation.metrics import METRICS, Evidence, means, score
from kdc.evaluation.statistics import share_nearer
from kdc.io import make_once
from studies.common.protocol import slug
from studies.common.renderings import balanced_prompts, renderings_of
from studies.metrics.faults import FAULTS, Exhibit

SCORES = (
    "fd", "kid", "precision", "recall", "clip", "lpips_to_teacher", "accuracy", "leakage",
)  # fmt: skip


# What each score is expected to notice at the largest dose, written before the trial was held.
NOTICED: Mapping[str, Sequence[str]] = {
    "blur": ("fd", "kid", "precision", "lpips_to_teacher", "accuracy"),
    "colour shift": ("fd", "kid", "clip", "lpips_to_teacher", "accuracy"),
    "mode dropping": ("fd", "kid", "recall"),
    "wrong caption": ("clip", "accuracy"),
    "memorised copies": ("leakage",),
    "one image": ("fd", "kid", "recall", "clip", "accuracy"),
    "resize": ("fd", "kid", "precision", "lpips_to_teacher"),
    "jpeg": ("fd", "kid", "precision", "lpips_to_teacher"),
}


def exhibit(count: int, seed: int) -> Exhibit:
    """`count` renderings of balanced attributes, and twice as many others of the same."""
    every = balanced_prompts(1, held_out=False)
    rows = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    asked = [every[rows[i % len(every)]] for i in range(count)]
    images, *others = (renderings_of(asked, base + seed) for base in (100, 200, 300))
    return Exhibit(images, asked, *others)


def judge(spoilt: Exhibit, original: Exhibit) -> dict[str, float]:
    """All scores of spoilt images; LPIPS pairs them with the originals.

    `leakage` is the share of images whose nearest neighbour, in normalised features of the
    embedded CLIP, is in the reference and not among those held back: a half for strangers.
    """
    evidence = Evidence(
        images=spoilt.images,
        extractor=find_extractor("mini-clip"),
        perceptual=find_perceptual("mini-lpips"),
        prompts=[worlds.caption(a) for a in spoilt.asked],
        attributes=spoilt.asked,
        reference=_features(original.reference),
        teacher_images=original.images,
    )
    scores = means(score(evidence, [name for name in SCORES if name in METRICS])[0])
    held_back = _features(original.held_back)
    leaks = share_nearer(evidence.features, evidence.reference, held_back)
    return scores | {"leakage": leaks}


@functools.lru_cache(maxsize=2)
def _features(images: Tensor) -> Tensor:
    """Those of the sets that every fault is compared with, computed once for each set."""
    return find_extractor("mini-clip")(images)


def hold(
    faults: Sequence[str] = (),
    count: int = 192,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """A row for each fault (default: all), dose and seed, with all scores.

    With a `folder` each is stored there, so that a trial that was stopped goes on. Raises
    `ValueError` for an unknown fault, or where `folder` holds rows of another count.
    """
    if unknown := set(faults) - set(FAULTS):
        raise ValueError(f"unknown faults {sorted(unknown)}; they are {', '.join(FAULTS)}")
    rows = []
    todo = [(f, d, s) for s in seeds for f in faults or FAULTS for d in FAULTS[f][1]]
    shown = functools.lru_cache(maxsize=1)(functools.partial(exhibit, count))
    for fault, dose, seed in tqdm(todo, desc="trial", mininterval=2):

        def make(fault=fault, dose=dose, seed=seed) -> dict:
            original, generator = shown(seed), torch.Generator().manual_seed(seed)
            return judge(FAULTS[fault][0](original, dose, generator), original)

        made_with = {"fault": fault, "dose": dose, "seed": seed}
        file = Path(folder) / f"{slug(fault)}-{slug(str(dose))}-{seed}.json" if folder else None
        found = make_once(file, made_with | {"count": count}, make) if file else make()
        rows.append(made_with | found)
    return pd.DataFrame(rows)


def bias(
    counts: Sequence[int], width: int = 16, shift: float = 1.0, seeds: Sequence[int] = range(20)
) -> pd.DataFrame:
    """Fréchet distance and KID of Gaussians, equal and shifted, by the number of samples.

    The true Fréchet distances are 0 for "equal" and `shift`^2 for "shifted": the means of two unit
    Gaussians of that width differ by `shift`.
    """
    rows = []
    for count in counts:
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 * count + seed)
            a, b = (
                torch.randn(count, width, generator=generator, dtype=torch.float64)
                for _ in range(2)
            )
            for name, delta in (("equal", 0.0), ("shifted", shift)):
                moved = b.clone()
                moved[:, 0] += delta
                scores = {n: METRICS[n].measure(a, moved) for n in ("fd", "kid")}
                rows.append({"count": count, "seed": seed, "pair": name} | scores)
    return pd.DataFrame(rows)
