"""Slimming: cutting a student from a teacher's U-Net, and where its weights come from.

Kept layers keep the teacher's weights, tensor by tensor, as BK-SDM does it (Kim et al., arXiv
2305.15798). Which layers are kept is said by a plan: see `kdc.unet.plans`.
"""

from __future__ import annotations

import warnings

import torch
from diffusers import UNet2DConditionModel

from kdc.checks import MOST_SEEDS, whole_number
from kdc.unet.plans import DOWN_TYPES, LAYERS, MID_TYPE, STAGES, UP_TYPES, SlimPlan, find_plan

PER_STAGE = (  # entries of the configuration that may be one value or one for each stage
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


def check_layout(unet: UNet2DConditionModel) -> None:
    """Refuse what is not laid out as Stable Diffusion 1.x or 2.x, with the reason."""
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"expected a diffusers UNet2DConditionModel, got {type(unet).__name__}")
    expected = {
        "down_block_types": DOWN_TYPES,
        "up_block_types": UP_TYPES,
        "mid_block_type": MID_TYPE,
        "layers_per_block": LAYERS,
    }
    for name, wanted in expected.items():
        found = unet.config[name]
        found = tuple(found) if isinstance(found, list) else found
        if name == "layers_per_block" and isinstance(found, tuple) and set(found) == {LAYERS}:
            continue
        if found != wanted:
            raise ValueError(
                f"not the layout of Stable Diffusion 1.x or 2.x: {name} is {found}, not {wanted}"
            )


def refuse_adapters(unet: torch.nn.Module, whose: str) -> None:
    """Raise `ValueError` where adapters (LoRA) hang in a network: they would be lost."""
    names = [name for name, _ in unet.named_parameters()]
    found = [name for name in names if ".base_layer." in name or "lora" in name.lower()]
    if found or getattr(unet, "peft_config", None):
        raise ValueError(
            f"{whose} has adapters{': ' + found[0] if found else ''}: merge them first, with"
            " pipeline.fuse_lora() and pipeline.unload_lora_weights()"
        )


def student_config(unet: UNet2DConditionModel, plan: str | SlimPlan) -> dict:
    """The diffusers configuration of the student that the plan cuts from `unet`."""
    check_layout(unet)
    plan = find_plan(plan)
    stages = STAGES - plan.dropped
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    for name in PER_STAGE:
        if isinstance(config.get(name), list | tuple):
            config[name] = list(config[name][:stages])
    layers = [len(kept) for kept in plan.down[:stages]]
    return config | {
        "block_out_channels": list(config["block_out_channels"][:stages]),
        "down_block_types": _types(DOWN_TYPES, plan.down_attention)[:stages],
        "up_block_types": _types(UP_TYPES, plan.up_attention)[plan.dropped :],
        "mid_block_type": MID_TYPE if plan.mid else None,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
    }


def _types(types: tuple[str, ...], attention: tuple[bool, ...]) -> list[str]:
    """Names of diffusers' blocks, without "CrossAttn" where a plan drops the transformers."""
    return [
        kind if keep else kind.removeprefix("CrossAttn")
        for kind, keep in zip(types, attention, strict=True)
    ]


def source_of(name: str, plan: SlimPlan) -> str:
    """The teacher's name of a student's parameter, submodule or block."""
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        going_up = parts[0] == "up_blocks"
        stage = int(parts[1]) + (plan.dropped if going_up else 0)
        parts[1] = str(stage)
        if parts[2] in ("resnets", "attentions"):
            parts[3] = str((plan.up if going_up else plan.down)[stage][int(parts[3])])
    return ".".join(parts)


def _build(config: dict, device: torch.device | str) -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel.from_config(config)


def copy_map(unet: UNet2DConditionModel, plan: str | SlimPlan) -> dict[str, str | None]:
    """For every parameter of the student, the teacher's parameter it copies; None if it is new."""
    plan = find_plan(plan)
    student = _build(student_config(unet, plan), "meta")
    theirs = dict(unet.named_parameters())
    sources = {}
    for name, parameter in student.named_parameters():
        source = source_of(name, plan)
        fits = source in theirs and theirs[source].shape == parameter.shape
        sources[name] = source if fits else None
    return sources


def slim(
    unet: UNet2DConditionModel, plan: str | SlimPlan, init: str = "copy", seed: int = 0
) -> UNet2DConditionModel:
    """Cut a student from a teacher's U-Net; the teacher is left as it is and shares nothing.

    `init` "copy" takes the teacher's weights wherever the plan keeps a layer (which is everywhere
    in the named plans), "random" draws all of them from `seed`. Works on the meta device. The
    student is a plain diffusers model on the teacher's device and in its precision.

    Where a copy lacks tensors, which only a teacher with stages of unlike settings can cause, they
    are drawn from `seed`, and a warning names them. Raises `ValueError` for an unknown plan or
    init, for a U-Net of another layout, and for one with adapters.
    """
    refuse_adapters(unet, "the teacher")
    whole_number("seed", seed, 0, MOST_SEEDS)
    if init not in ("copy", "random"):
        raise ValueError(f"init must be copy or random, not {init!r}")
    config, sources = student_config(unet, plan), copy_map(unet, plan)
    new = [name for name, source in sources.items() if source is None]
    if init == "copy" and new:
        warnings.warn(
            f"{len(new)} of the student's {len(sources)} tensors have no counterpart in the teacher"
            f" and are drawn at random, {new[0]} for one",
            stacklevel=2,
        )
    if init == "random" or new:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = _build(config, "cpu" if unet.device.type != "meta" else "meta")
        if student.dtype != unet.dtype:
            student = student.to(dtype=unet.dtype)
        student = student.to(device=unet.device)
    else:
        student = _build(config, "meta")
    if init == "copy":
        theirs = dict(unet.named_parameters())
        copied = {
            name: theirs[source].detach().clone() for name, source in sources.items() if source
        }
        student.load_state_dict(copied, strict=None not in sources.values(), assign=True)
    student.slim_plan = find_plan(plan)  # for `save_student`: how this network was made
    return student.requires_grad_(True).train(unet.training)


def count_parameters(unet: torch.nn.Module) -> int:
    """Number of parameters; works on the meta device."""
    return sum(parameter.numel() for parameter in unet.parameters())
