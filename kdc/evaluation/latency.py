"""How long images take: end to end and a U-Net call, by steps, scheduler and batch size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from kdc.pipelines import generate, with_unet
from kdc.unet.costs import call_of, measure_latency

SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
}


def with_scheduler(pipeline: StableDiffusionPipeline, name: str) -> StableDiffusionPipeline:
    """The same networks with another sampler for the same noise schedule.

    Raises `ValueError` for a name that is not in `SCHEDULERS`.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")
    other = with_unet(pipeline, pipeline.unet)
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "algorithm_type"}
    kept = pipeline.scheduler.config if name == "dpm++" else config
    unclipped = {"clip_sample": False} if name == "ddim" else {}  # latents are not in [-1, 1]
    other.scheduler = SCHEDULERS[name].from_config(kept, **unclipped)
    return other


def time_images(
    pipelines: Mapping[str, StableDiffusionPipeline],
    prompt: str,
    *,
    steps: Sequence[int] = (25,),
    batch_sizes: Sequence[int] = (1,),
    guidance: float = 7.5,
    rounds: int = 5,
    warmup: int = 1,
) -> pd.DataFrame:
    """Seconds an image, end to end, of every pipeline at every number of steps and batch size.

    All are interleaved in one run (see `measure_latency`); `ratio` is over the first pipeline at
    the first setting. Columns besides: pipeline, steps, batch_size, guidance. A row each.
    """
    settings = list(itertools.product(pipelines, steps, batch_sizes))
    calls = {}
    for name, count, batch in settings:
        draw = functools.partial(
            generate,
            pipelines[name],
            [prompt] * batch,
            steps=count,
            guidance=guidance,
            batch_size=batch,
            progress=False,
        )
        calls[str((name, count, batch))] = draw
    device = next(iter(pipelines.values())).device
    times = measure_latency(calls, rounds=rounds, warmup=warmup, device=device)
    rows = []
    for (name, count, batch), row in zip(settings, times.to_dict("records"), strict=True):
        shared = {k: row[k] / batch for k in ("median", "low", "high")}
        shared |= {k: row[k] / batch * settings[0][2] for k in ("ratio", "ratio_low", "ratio_high")}
        rows.append(
            {"pipeline": name, "steps": count, "batch_size": batch, "guidance": guidance}
            | shared
            | {"peak_bytes": row["peak_bytes"]}
        )
    return pd.DataFrame(rows)


def time_calls(
    pipelines: Mapping[str, StableDiffusionPipeline],
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 10,
) -> pd.DataFrame:
    """Seconds of one call of each U-Net, without guidance, at every batch size, interleaved."""
    first = next(iter(pipelines.values()))
    sequence_length = first.tokenizer.model_max_length
    settings = list(itertools.product(pipelines, batch_sizes))
    calls = {
        str(one): call_of(
            pipelines[one[0]].unet, sequence_length=sequence_length, batch_size=one[1]
        )
        for one in settings
    }
    times = measure_latency(calls, rounds=rounds, device=first.device)
    known = pd.DataFrame(settings, columns=["pipeline", "batch_size"])
    return known.join(times.reset_index(drop=True))


def fastest_within(
    rows: pd.DataFrame, goal: float, loss: float = 0.05, score: str = "accuracy"
) -> pd.Series | None:
    """The row with the least `median` whose score is at most a share `loss` below `goal`, or None.

    For a score that is better when higher.
    """
    good = rows[rows[score] >= (1 - loss) * goal]
    return good.loc[good["median"].idxmin()] if len(good) else None
