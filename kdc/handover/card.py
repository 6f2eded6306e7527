"""The model card of a student: what it is, how it was made, and what does not fit it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from diffusers import UNet2DConditionModel

from kdc.pipelines import TEACHERS
from kdc.unet.costs import count_costs
from kdc.unet.plans import PLANS
from kdc.unet.slimming import count_parameters


def model_card(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    notes: Mapping[str, Any],
    *,
    teacher_name: str | None = None,
    data_name: str | None = None,
    licence: str | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    onnx: bool = False,
) -> str:
    """The card of a student in the hub's format: what it is, how it was made, what it breaks.

    `notes` are those of `kdc.json`. What is not known is said to be not known.
    """
    teachers = [t for n, t in TEACHERS.items() if teacher_name in (n, str(t.source))]
    source = str(teachers[0].source) if teachers else teacher_name
    known = licence or (teachers[0].licence if teachers else None)
    plan = getattr(student, "slim_plan", None)
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head["tags"] = ["stable-diffusion", "knowledge-distillation", "kdc"]
    if known:
        head["license"] = known
    if source and "/" in source and not Path(source).is_dir():  # a hub id
        head["base_model"] = source
    before, after = count_parameters(teacher), count_parameters(student)
    macs = [count_costs(unet).loc["total", "macs"] / 1e9 for unet in (teacher, student)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# A slimmed text-to-image model{f' ({plan.name})' if plan else ''}",
        f"Distilled with kdc from {teacher_name or 'a teacher whose name was not recorded'}.",
        _table(
            ("", "teacher", "student"),
            [
                ("parameters of the U-Net", f"{before:,}", f"{after:,} ({after / before:.1%})"),
                ("GMACs of one call", f"{macs[0]:.1f}", f"{macs[1]:.1f}"),
            ],
        ),
        "## Use\n\n" + _usage(onnx),
        "## How it was made\n\n" + _made(plan, notes, data_name),
        "## Scores\n\n" + _scores_table(scores or {}),
        "## What does not fit\n\n" + _breaks(student, teacher),
        "## Licence\n\n" + _licence(known, teacher_name),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _usage(onnx: bool) -> str:
    text = textwrap.dedent("""\
        ```python
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained("FOLDER_OR_HUB_ID")
        pipeline("a photo of a flower", num_inference_steps=25).images[0]
        ```""")
    if onnx:
        text += "\n\nThe folder `onnx/` holds the same networks for ONNX Runtime."
    return text


def _made(plan, notes: Mapping[str, Any], data_name: str | None) -> str:
    weights, training = notes.get("weights"), notes.get("training")
    lines = [f"- Layers kept: `{plan}`" if plan else "- Layers kept: not recorded"]
    lines += [f"- Data: {data_name or 'not recorded'}"]
    if weights:
        terms = ", ".join(f"{name} {value!r}" for name, value in weights.items())
        lines += [f"- Loss (weights of the terms, then options): {terms}"]
    else:
        lines += ["- Loss: not recorded"]
    if training:
        shown = ", ".join(f"{name} {value!r}" for name, value in training.items())
        lines += [f"- Training: {shown}"]
    else:
        lines += ["- Training: not recorded"]
    return "\n".join(lines)


def _scores_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{row['value']:.4g}",
            f"{row['spread']:.2g}" if row.get("spread") is not None else "-",
            str(row.get("samples", "-")),
            str(row.get("extractor", "-")),
        )
        for name, row in scores.items()
        if row["value"] is not None
    ]
    if not rows:
        return "None were given. `python -m kdc evaluate FOLDER` measures them."
    table = _table(("score", "value", "spread over seeds", "images a seed", "judge"), rows)
    return table + "\n\nScores of different judges or numbers of images do not compare."


def _breaks(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> str:
    """What was made for the whole U-Net and does not fit this one; each was tried."""
    ours, theirs = _skips(student), _skips(teacher)
    lines = []
    if ours != theirs:
        lines += [
            f"- **A ControlNet made for the teacher does not fit**: it adds {theirs} residuals to"
            f" the skip connections, and this U-Net has {ours}.",
            "- **LoRA and other adapters by layer name do not fit**: where layers were left out the"
            " rest was numbered anew, so `up_blocks.1.attentions.1` may be the teacher's"
            " `.attentions.2`, and an adapter would change the wrong layer without an error. An"
            " IP-Adapter counts attention layers and does not fit for the same reason.",
        ]
    if student.mid_block is None:
        keep = [name for name, plan in PLANS.items() if plan.mid and name != "full"]
        lines += [
            "- **There is no mid-block.** `ControlNetModel.from_unet` refuses such a U-Net"
            " (`unknown mid_block_type : None`), so no ControlNet can be begun from it. The plans"
            f" that keep the mid-block are {', '.join(keep)}.",
        ]
    if len(student.up_blocks) < len(teacher.up_blocks):
        lines += [
            "- **FreeU acts on other stages**: it scales the first two on the way up, and an inner"
            " stage is missing here.",
        ]
    else:
        lines += ["- FreeU runs; its published factors were chosen for whole U-Nets."]
    return "\n".join(lines)


def _skips(unet: UNet2DConditionModel) -> int:
    """Skip connections of a U-Net: one of the first layer, of each layer and downsampler one."""
    return 1 + sum(len(b.resnets) + (b.downsamplers is not None) for b in unet.down_blocks)


def _licence(known: str | None, teacher_name: str | None) -> str:
    if known:
        return f"The student is derived from its teacher, whose licence applies: {known}."
    return (
        "The student is derived from its teacher, whose licence applies. It is not known for"
        f" {teacher_name or 'a teacher whose name was not recorded'}: add it before you share this."
    )
