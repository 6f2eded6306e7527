"""Feature hooks: which submodules of student and teacher correspond, and hooks that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc.unet.slimming import source_of

FEATURES_AT = ("blocks", "attention", "both")


class FeatureHooks:
    """Forward hooks that collect the outputs of named submodules, in the order of the names.

    Hooks the bare module: unwrap DDP first. `take` empties the collection, so nothing of one step
    lives on in the next; it raises `RuntimeError` naming every hook that saw no forward pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names = tuple(names)
        self._seen: dict[str, Tensor] = {}
        self._handles = []
        modules = dict(model.named_modules())
        if missing := [name for name in self.names if name not in modules]:
            raise ValueError(f"{type(model).__name__} has no submodules {missing} to hook")
        for name in self.names:
            self._handles.append(modules[name].register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        def hook(module, inputs, output):
            if hasattr(output, "sample"):
                output = output.sample
            self._seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, and forget them."""
        seen, self._seen = self._seen, {}
        if missing := [name for name in self.names if name not in seen]:
            raise RuntimeError(f"no forward pass went through the hooks {missing}")
        return [seen[name] for name in self.names]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def feature_pairs(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, at: str = "blocks"
) -> list[tuple[str, str]]:
    """Pairs (student submodule, teacher submodule) whose outputs correspond and agree in size.

    `at` "blocks" are the outputs of every stage and of the mid-block. Where the student lacks the
    teacher's inner stages, its last stage has no downsampler, so that both are hooked at their
    last layer instead: its transformer, or its convolutions where the transformer is dropped.
    "attention" are the outputs of every self-attention that the student kept, the best targets in
    KOALA (Lee et al., arXiv 2312.04005); which of the teacher's it was cut from is read off the
    student's plan, unless all stages have as many layers as the teacher's. Raises `ValueError` for
    another `at`, for a student without attention, and for one with fewer layers and no plan.
    """
    if at not in FEATURES_AT:
        raise ValueError(f"features at {at!r}; they can be at {', '.join(FEATURES_AT)}")
    pairs = [] if at == "attention" else _stage_pairs(student, teacher)
    if at == "blocks":
        return pairs
    theirs = dict(teacher.named_modules())
    ours = [name for name, _ in student.named_modules() if name.endswith(".attn1")]
    if len(student.down_blocks) < len(teacher.down_blocks):  # it lies at another resolution then
        ours = [name for name in ours if not name.startswith("mid_block.")]
    if _layers(student) == _layers(teacher):  # as where a student follows its older self
        sources = [(name, name) for name in ours]
    elif plan := getattr(student, "slim_plan", None):
        sources = [(name, source_of(name, plan)) for name in ours]
    else:  # the same names would pair layers that do not correspond
        raise ValueError(
            f"features at {at!r}: the student has {_layers(student)} layers a stage, the"
            f" teacher {_layers(teacher)}, and no plan says which of them it kept; open the student"
            " with kdc.load_student, which reads the plan that kdc.save_student wrote, or cut it"
            " with kdc.slim"
        )
    if not ours or not all(source in theirs for _, source in sources):
        raise ValueError("the student kept no self-attention that the teacher has")
    return pairs + sources


def _layers(unet: UNet2DConditionModel) -> list[int]:
    """Layers of every stage, down and up."""
    return [len(block.resnets) for block in (*unet.down_blocks, *unet.up_blocks)]


def _stage_pairs(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel
) -> list[tuple[str, str]]:
    kept, every = len(student.down_blocks), len(teacher.down_blocks)
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(kept)]
    if kept < every:
        last = kept - 1
        ours, theirs = (
            f"down_blocks.{last}.{'attentions' if hasattr(block, 'attentions') else 'resnets'}"
            f".{len(block.resnets) - 1}"
            for block in (student.down_blocks[last], teacher.down_blocks[last])
        )
        pairs[last] = ours, theirs
    if student.mid_block is not None and teacher.mid_block is not None and kept == every:
        pairs.append(("mid_block", "mid_block"))
    return pairs + [(f"up_blocks.{i}", f"up_blocks.{i + every - kept}") for i in range(kept)]


def projections(student: Sequence[Tensor], teacher: Sequence[Tensor], seed: int = 0) -> nn.Module:
    """Projections of features to the teacher's width (FitNets, Romero et al. 1412.6550).

    One for each pair: the identity where the widths agree, a 1x1 convolution for maps (B, C, H, W),
    a linear layer for tokens (B, N, C). They are drawn from `seed`, trained with the student, and
    not part of it afterwards. Raises `ValueError` where anything but the width differs.
    """
    layers = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
            channel = 1 if t.ndim == 4 else -1
            ours, theirs = s.shape[channel], t.shape[channel]
            if s.ndim != t.ndim or s[:1].numel() * theirs != t[:1].numel() * ours:
                raise ValueError(
                    f"feature {index}: student {tuple(s.shape)} and teacher {tuple(t.shape)}"
                    " differ in more than their width"
                )
            if ours == theirs:
                layers.append(nn.Identity())
            elif t.ndim == 4:
                layers.append(nn.Conv2d(ours, theirs, 1))
            else:
                layers.append(nn.Linear(ours, theirs))
    return layers


# The names that `import kdc` has given since its first version.
FeatureTaps, tap_names = FeatureHooks, feature_pairs
