"""Loading the teacher and the students, saving students, and the one way to make images."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from kdc.io import write_json
from kdc.unet.plans import SlimPlan

ASSETS = Path(__file__).parent / "assets"
MINI_TEACHER = ASSETS / "mini-teacher"
TEACHERS = {"mini": MINI_TEACHER}  # short names of diffusers folders, for `load_teacher`
MINI_STUDENT = ASSETS / "mini-student"


def pick_device() -> torch.device:
    """The device that Accelerate gives this process: its own accelerator, else the CPU."""
    return PartialState().device


def load_teacher(
    source: str | Path = "mini", dtype: torch.dtype = torch.float32, device=None
) -> StableDiffusionPipeline:
    """The text-to-image pipeline that teaches: "mini", a hub id, or a diffusers folder.

    "mini" is embedded in the package and needs no network; `TEACHERS` holds such names. Only
    safetensors are read. Raises `FileNotFoundError` for a folder that is none, and `ValueError`
    where a hub id cannot be had or weights are damaged; both say what to do.
    """
    path = TEACHERS.get(str(source)) or Path(source).expanduser()
    if not path.is_dir() and (path.is_absolute() or str(source).startswith((".", "~"))):
        raise FileNotFoundError(f"no folder {path}: give 'mini', a hub id or a diffusers folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json: not a diffusers pipeline")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(path) if path.is_dir() else str(source),
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
        return pipeline.to(device or pick_device())
    except (OSError, SafetensorError, NotImplementedError) as error:
        raise ValueError(
            f"could not load {source!r}: {error}\nIf it is a hub id, the network or the hub's cache"
            " must have it; if it is a folder, its safetensors may be damaged or incomplete."
        ) from error


def load_student(
    source: str | Path = "mini",
    teacher: StableDiffusionPipeline | None = None,
    dtype: torch.dtype = torch.float32,
    device=None,
) -> StableDiffusionPipeline:
    """A distilled student as a pipeline: "mini", or a folder that `save_student` wrote.

    A folder that holds only a U-Net borrows the other parts from `teacher` (default: the mini
    teacher); they are shared, not copied.
    """
    path = MINI_STUDENT if str(source) == "mini" else Path(source)
    if (path / "model_index.json").is_file():
        return load_teacher(path, dtype, device)
    if not (path / "unet" / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no student: neither model_index.json nor unet/")
    try:
        unet = UNet2DConditionModel.from_pretrained(
            path, subfolder="unet", dtype=dtype, use_safetensors=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the student in {path} cannot be read: {error}") from error
    if plan := read_plan(path):
        unet.slim_plan = plan
    return with_unet(teacher or load_teacher("mini", dtype, device), unet)


def with_unet(
    pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The same pipeline around another U-Net; all other parts are shared.

    `unet` itself is moved to the pipeline's device and precision, as `torch.nn.Module.to` does it.
    """
    parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
    parts["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if unet.dtype != pipeline.dtype:
        unet = unet.to(dtype=pipeline.dtype)
    unet = unet.to(device=pipeline.device).eval()
    return StableDiffusionPipeline(**parts, unet=unet, requires_safety_checker=False)


def in_pipeline(
    pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """`with_unet`, but a pipeline of another precision gets a copy: `unet` stays as it is."""
    return with_unet(pipeline, unet if unet.dtype == pipeline.dtype else copy.deepcopy(unet))


def save_student(unet: UNet2DConditionModel, folder: str | Path, **notes) -> Path:
    """Write a student as `folder/unet`; its plan and `notes` (loss, steps) in `kdc.json`."""
    folder = Path(folder)
    if plan := getattr(unet, "slim_plan", None):
        notes = {"plan": plan.to_dict()} | notes
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    write_json(folder / "kdc.json", notes, default=str)
    return folder


def read_plan(folder: str | Path) -> SlimPlan | None:
    """The plan by which the student in that folder was cut; None where none is recorded."""
    note = Path(folder) / "kdc.json"
    plan = json.loads(note.read_text()).get("plan") if note.is_file() else None
    return SlimPlan.from_dict(plan) if plan else None


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """A list of prompts; a text by itself is one prompt, and not its letters."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


@functools.lru_cache(maxsize=8)
def _noise(seed: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """The first latents of `count` images: image i has the same noise in any batch."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(count)]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


@torch.inference_mode()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 32,
    decode: bool = True,
    progress: bool | None = None,
) -> Tensor:
    """Images for prompts, (N, 3, H, W) uint8 on the CPU; not decoded, latents (N, C, h, w).

    The starting noise of image i depends on `seed` and i alone, so teacher and student start
    from the same noise whatever the batch size or the device. `guidance` 1 switches
    classifier-free guidance off. `progress` None shows a bar for more than one batch.
    """
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("no prompts to draw")
    unet, images = pipeline.unet, []
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = _noise(seed, len(prompts), shape)
    pipeline.set_progress_bar_config(disable=True)
    starts = range(0, len(prompts), batch_size)
    hidden = progress is False or (progress is None and len(starts) == 1)
    for start in tqdm(starts, desc="generating", disable=hidden, mininterval=2):
        stop = min(start + batch_size, len(prompts))
        out = pipeline(
            prompts[start:stop],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise[start:stop].to(pipeline.device, pipeline.dtype),
            output_type="pt" if decode else "latent",
        ).images.float()
        images.append(((out.clamp(0, 1) * 255 + 0.5).to(torch.uint8) if decode else out).cpu())
    return torch.cat(images)
