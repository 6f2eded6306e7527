"""A pipeline as ONNX models, and the pipeline whose networks ONNX Runtime computes."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from kdc.io import read_json
from kdc.paths import as_path
from kdc.pipelines import classes_of

NETWORKS = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}


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
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


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


class _Session(nn.Module):
    """A network that ONNX Runtime computes, with the configuration of the one it was made from."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, session: Any, config: dict):
        super().__init__()
        self.session, self.config = session, FrozenDict(config)

    def run(self, **inputs: np.ndarray) -> tuple[Tensor]:
        return (torch.from_numpy(self.session.run(None, inputs)[0]),)


class _TextSession(_Session):
    def forward(self, input_ids: Tensor, **_) -> tuple[Tensor]:
        return self.run(input_ids=input_ids.numpy())


class _UNetSession(_Session):
    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_):
        return self.run(
            sample=sample.float().numpy(),
            timestep=np.full(len(sample), float(timestep), np.float32),
            encoder_hidden_states=encoder_hidden_states.numpy(),
        )


class _DecoderSession(_Session):
    def decode(self, latents: Tensor, **_) -> tuple[Tensor]:
        return self.run(latents=latents.float().numpy())


SESSIONS = {"text_encoder": _TextSession, "unet": _UNetSession, "vae_decoder": _DecoderSession}


def load_onnx(folder: str | Path, threads: int | None = None) -> StableDiffusionPipeline:
    """The pipeline in what `export` wrote with `onnx`, its networks computed by ONNX Runtime.

    `kdc.generate` draws with it what it draws with PyTorch, up to the rounding of 8-bit colours.
    It runs on the CPU with `threads` threads (default: as many as PyTorch has) and cannot be
    trained, moved or saved. Raises `FileNotFoundError` for a folder without ONNX models.
    """
    _, runtime = find_onnx()
    place = as_path(folder)
    if not (place / "onnx" / "unet" / "model.onnx").is_file():
        raise FileNotFoundError(f"{place} holds no onnx/unet/model.onnx: export it with onnx=True")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    parts: dict[str, Any] = {}
    for name, part in NETWORKS.items():
        file = place / "onnx" / name / "model.onnx"
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        parts[part] = SESSIONS[name](session, read_json(place / part / "config.json"))
    others = classes_of(read_json(place / "model_index.json"), ("tokenizer", "scheduler"))
    parts |= {name: kind.from_pretrained(place / name) for name, kind in others.items()}
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
