"""What each distillation term does: its value, its gradient, and the faults it can have."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from kdc.data.latents import LatentDataset
from kdc.distillation.losses import TERMS, DistillationLoss, LossWeights
from kdc.distillation.step import DistillationStep, forward_process

OUTWEIGHS = 100.0  # a term whose gradient is this many times all the others' together rules alone
SOLE = 0.98  # and so does one that makes up this share of the update
BLIND = 1e-3  # a term that sees less than this share of an error does not see it


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    `terms` has a row for every enabled term: its weighted `value`, the `gradient_norm` over all
    weights of the student (NaN: there is no gradient), and two shares. To first order, a step d of
    the weights changes the loss by g . d, of which the term with gradient g_i makes g_i . d. Its
    `share` is that part for gradient descent (d = -g), its `adam_share` that for the first step of
    AdamW, which moves every weight by the learning rate (d = -sign(g)). Shares sum to 1, and are
    NaN where the whole gradient is 0 or there is none. `cosines` are those between the terms'
    gradients (NaN with one that is 0), `faults` sentences on what is wrong.
    """

    terms: pd.DataFrame
    cosines: pd.DataFrame
    faults: tuple[str, ...]


def diagnose(
    student: UNet2DConditionModel,
    teacher: StableDiffusionPipeline,
    data: LatentDataset,
    weights: LossWeights,
    *,
    batch_size: int = 16,
    caption_dropout: float = 0.1,
    seed: int = 0,
) -> Diagnosis:
    """Differentiate every weighted term by itself, on one batch, and look for faults.

    Each fault is a `UserWarning` as well: an enabled term without gradient, one whose gradient is
    a hundred times that of all the others or whose share of the update is at least 98 %, and one
    that cannot see an error which all channels of a pixel share. A loss that has no gradient at all
    is diagnosed like any other. The student is left as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    distillation_step = DistillationStep(
        student, teacher.unet, forward_process(teacher), weights, seed
    )
    with contextlib.closing(distillation_step):
        batch = data.draw(batch_size, generator, caption_dropout)
        values = distillation_step(student, *batch, generator)
        parameters = [p for p in student.parameters() if p.requires_grad]
        weighted = {name: weight * values[name] for name, weight in weights.enabled.items()}
        gradients = {name: _gradient(value, parameters) for name, value in weighted.items()}
    alive = {name: g for name, g in gradients.items() if g is not None}
    whole = sum(alive.values())
    none = 0.0 if alive else float("nan")  # no share of an update, or no update to have one of
    steps = {"share": whole, "adam_share": whole.sign()} if alive else {"share": 0, "adam_share": 0}
    terms = pd.DataFrame(
        {
            name: {
                "value": weighted[name].item(),
                "gradient_norm": alive[name].norm().item() if name in alive else float("nan"),
            }
            | {
                share: (alive[name] @ step / (whole @ step)).item() if name in alive else none
                for share, step in steps.items()
            }
            for name in weighted
        }
    ).T
    faults = (*_faults(terms), *blind_terms(weights))
    for fault in faults:
        warnings.warn(fault, stacklevel=2)
    return Diagnosis(terms, _cosines(alive), faults)


def _gradient(value: Tensor, parameters: list[Tensor]) -> Tensor | None:
    """The gradient of a term with respect to all weights as one vector; None without one."""
    if not value.requires_grad:
        return None
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters, parts, strict=True)
        ]
    ).double()


def _cosines(gradients: dict[str, Tensor]) -> pd.DataFrame:
    names = list(gradients)
    if not names:
        return pd.DataFrame()
    unit = torch.stack([g / g.norm() for g in gradients.values()])
    return pd.DataFrame((unit @ unit.T).tolist(), names, names)


def _faults(terms: pd.DataFrame) -> list[str]:
    faults = []
    norms = terms["gradient_norm"]
    for name, norm in norms.items():
        share = terms.loc[name, "share"]
        others = norms.drop(name).dropna().sum()
        if not norm > 0:
            faults.append(f"the {name} term is enabled and has no gradient: it teaches nothing")
        elif others > 0 and norm >= OUTWEIGHS * others:
            faults.append(
                f"the {name} term's gradient norm is {norm / others:,.0f} times that of all the"
                " others together: they hardly matter"
            )
        elif others > 0 and share >= SOLE:
            faults.append(
                f"the {name} term makes up {100 * share:.1f} % of the update: all the others"
                f" together have {100 * (1 - share):.1f} %"
            )
    return faults


def blind_terms(weights: LossWeights, channels: int = 4, seed: int = 0) -> list[str]:
    """A sentence for every enabled term that cannot see an error which all channels share.

    Each term of the predictions (those that need no features) is computed for a prediction that is
    wrong by a number of its own at every pixel, once the same for all channels and once not, both
    of the same size.
    """
    of_features = [name for name, term in TERMS.items() if "features" in term.needs]
    looked_at = [name for name in weights.enabled if name not in of_features]
    if not looked_at:
        return []
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(8, channels, 8, 8, generator=generator, dtype=torch.float64)
    errors = {
        "common": torch.randn(8, 1, 8, 8, generator=generator).double().expand_as(right),
        "any": torch.randn(right.shape, generator=generator).double(),
    }
    criterion = DistillationLoss(weights.replace(**dict.fromkeys(of_features, 0.0)))
    terms = {kind: criterion(right + error, right, right) for kind, error in errors.items()}
    return [
        f"the {name} term is blind to an error that all channels of a pixel share"
        for name in looked_at
        if terms["common"][name] < BLIND * terms["any"][name]
    ]
