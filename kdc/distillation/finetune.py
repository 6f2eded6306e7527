"""Training the teacher itself on new images first, as the authors did before they distilled it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import StableDiffusionPipeline
from torch.utils.data import Dataset

from kdc.data.latents import LatentDataset
from kdc.distillation.distill import distill
from kdc.distillation.losses import LossWeights
from kdc.paths import try_writing
from kdc.pipelines import TEACHER_FILES, save_other_parts
from kdc.processes import this_process


def finetune(
    teacher: StableDiffusionPipeline,
    dataset: Dataset | LatentDataset,
    *,
    output_dir: str | Path | None = None,
    label: str = "fine-tuning",
    **how: Any,
) -> pd.DataFrame:
    """Train the U-Net of `teacher` in place on images and captions; returns the log.

    The loss is the task term alone, the error of the noise (Ho et al. 2006.11239, equation 14). All
    else is as in `distill`, whose other arguments are given by `how`, and so is what is raised.
    With an `output_dir` the whole pipeline is written there, and `load_teacher(output_dir)` opens
    it. The authors trained theirs for 20,000 steps on the images of the first data set.
    """
    if output_dir is not None:
        try_writing(output_dir, TEACHER_FILES)
    only = LossWeights.only("task")
    log = distill(
        teacher.unet, teacher, dataset, weights=only, output_dir=output_dir, label=label, **how
    )
    if output_dir is not None:
        if this_process().is_main_process:
            save_other_parts(teacher, output_dir)
        this_process().wait_for_everyone()
    return log
