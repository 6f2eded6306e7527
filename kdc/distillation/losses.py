"""The distillation terms: one table, `TERMS`, that everything else iterates over.

With student s and teacher t, predictions (B, C, H, W) of noise or velocity, and target y:

    task     E |s - y|^2                      (optionally Min-SNR weighted, Hang et al. 2303.09556)
    output   E |s - t|^2
    soft     T^2 KL(softmax(t / T) || softmax(s / T)) over the C channels of every pixel
    feature  mean over hooked blocks of E |f_s - f_t|^2 / E f_t^2

A new term is one more entry of `TERMS`: weights, loss, logs, `diagnose` and recipes follow. Where
features come from stands in `kdc.distillation.features`. `LossWeights.as_published` is the loss as
in the authors' code: no gradient through the output term, pixels of the soft term summed, the raw
errors of the features summed over eight blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdc.distillation.features import FEATURES_AT
from kdc.training.settings import refuse_unknown

REDUCTIONS = ("mean", "batchmean")
FEATURE_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class LossOptions:
    """How the terms are computed; what a term does not read does not concern it."""

    # Of the soft term: predictions are divided by it before the softmax.
    temperature: float = 2.0
    # Of the soft term: "mean" over images and pixels, or "batchmean" over images, pixels summed.
    soft_reduction: str = "mean"
    # Whether each error of the feature term is divided by the teacher's mean square there.
    feature_normalised: bool = True
    # "mean" or "sum" over the hooked blocks.
    feature_reduction: str = "mean"
    # Where features are compared: "blocks", "attention" or "both", see `feature_pairs`.
    features_at: str = "blocks"
    # False detaches the output term: it is logged and teaches nothing.
    output_gradient: bool = True
    # Cap of the signal-to-noise weight of the task term (5 is usual); None leaves the weight at 1.
    min_snr: float | None = None

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr must be positive, not {self.min_snr}; None leaves it out")
        for name, known in (
            ("soft_reduction", REDUCTIONS),
            ("feature_reduction", FEATURE_REDUCTIONS),
            ("features_at", FEATURES_AT),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


@dataclass(frozen=True)
class Parts:
    """What a distillation step has in hand when its terms are computed."""

    # The student's prediction (B, C, H, W).
    student: Tensor
    # What it is trained to predict, noise or velocity (B, C, H, W).
    target: Tensor
    # The teacher's prediction (B, C, H, W), where a term needs it.
    teacher: Tensor | None = None
    # Outputs of the hooked blocks, in pairs of equal shape.
    student_features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()
    # A weight for each image's task error (B,).
    task_weight: Tensor | None = None
    # The mean of a value over all parts of a batch that several processes share.
    over_parts: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(frozen=True)
class Term:
    """One entry of `TERMS`."""

    # The term as a scalar tensor.
    function: Callable[[Parts, LossOptions], Tensor]
    # What it needs besides the student's prediction and the target: "teacher", "features".
    needs: frozenset[str] = frozenset()
    # Its weight where nothing else is said.
    weight: float = 0.0


def _precise(x: Tensor) -> Tensor:
    """At least float32: a mean of squares in half precision loses small errors."""
    return x if x.dtype == torch.float64 else x.float()


def task_term(parts: Parts, options: LossOptions) -> Tensor:
    """E |s - y|^2, each image weighted by `task_weight` where there is one."""
    error = (_precise(parts.student) - _precise(parts.target)).square().mean(dim=(1, 2, 3))
    return (error if parts.task_weight is None else error * parts.task_weight).mean()


def output_term(parts: Parts, options: LossOptions) -> Tensor:
    """E |s - t|^2, without a gradient where `output_gradient` is False."""
    error = F.mse_loss(_precise(parts.student), _precise(parts.teacher))
    return error if options.output_gradient else error.detach()


def soft_term(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """Temperature-softened KL divergence over channels, scaled by T^2 (Hinton et al. 1503.02531).

    student, teacher (B, C, H, W). "mean" divides by B H W, "batchmean" by B alone. For T to
    infinity the mean tends to half the mean squared error of the channel-centred difference.
    """
    log_s = F.log_softmax(_precise(student) / temperature, dim=1)
    log_t = F.log_softmax(_precise(teacher) / temperature, dim=1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)
    total = divergence.mean() if reduction == "mean" else divergence.sum() / len(divergence)
    return temperature**2 * total


def feature_term(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    normalised: bool = True,
    reduction: str = "mean",
    over_parts: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Squared errors of features, each divided by the teacher's mean square if normalised.

    `reduction` is "mean" or "sum" over the hooked blocks; the mean squares are those of the whole
    batch, of which this may be a part. Raises `ValueError` when the lists differ
    in length or a pair differs in shape.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"{len(student)} student features for {len(teacher)} teacher features")
    errors = []
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"feature {index}: student {tuple(s.shape)}, teacher {tuple(t.shape)}")
        errors.append(F.mse_loss(_precise(s), _precise(t)))
    terms = torch.stack(errors)
    if normalised:
        squares = torch.stack([_precise(t).square().mean() for t in teacher])
        terms = terms / (over_parts(squares) + 1e-6)
    return terms.mean() if reduction == "mean" else terms.sum()


def _soft(parts: Parts, options: LossOptions) -> Tensor:
    return soft_term(parts.student, parts.teacher, options.temperature, options.soft_reduction)


def _feature(parts: Parts, options: LossOptions) -> Tensor:
    return feature_term(
        parts.student_features,
        parts.teacher_features,
        options.feature_normalised,
        options.feature_reduction,
        parts.over_parts,
    )


TERMS: dict[str, Term] = {
    "task": Term(task_term, weight=1.0),
    "output": Term(output_term, frozenset({"teacher"}), weight=1.0),
    "soft": Term(_soft, frozenset({"teacher"}), weight=0.1),
    "feature": Term(_feature, frozenset({"teacher", "features"}), weight=0.1),
}


class LossWeights:
    """The weight of each term of `TERMS` (0 switches it off) and the `LossOptions`; immutable.

    `LossWeights(soft=0.5, temperature=4.0)`: what is not given has the default of the table or of
    the options. Weights are attributes, and so are options: `weights.soft`, `weights.temperature`.
    Raises `TypeError` for an unknown name, `ValueError` for weights or options with which nothing
    could be learnt.
    """

    def __init__(self, **given: Any):
        options = {field.name for field in dataclasses.fields(LossOptions)}
        refuse_unknown(given, [*TERMS, *sorted(options)])
        of_terms = {name: given.get(name, term.weight) for name, term in TERMS.items()}
        for name, weight in of_terms.items():
            if not 0 <= weight < math.inf:  # which refuses NaN too
                raise ValueError(
                    f"the weight of {name} must be finite and not negative, not {weight};"
                    " 0 switches the term off"
                )
        if not any(of_terms.values()):
            raise ValueError("every term has weight 0: nothing would be learnt")
        self.__dict__["terms"] = of_terms
        self.__dict__["options"] = LossOptions(**{k: v for k, v in given.items() if k in options})

    def __getattr__(self, name: str) -> Any:
        if name in ("terms", "options"):  # not yet there, as while an object is being copied
            raise AttributeError(name)
        return self.terms[name] if name in self.terms else getattr(self.options, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot set {name}: use weights.replace({name}=...)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossWeights) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def __repr__(self) -> str:
        return f"LossWeights({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """All weights and options by name, in plain values; `LossWeights(**values)` reads it."""
        return self.terms | dataclasses.asdict(self.options)

    def replace(self, **changes: Any) -> LossWeights:
        """The same with other weights or options."""
        return LossWeights(**(self.to_dict() | changes))

    @classmethod
    def only(cls, *terms: str) -> LossWeights:
        """The default weights of the named terms, 0 for the others."""
        if unknown := set(terms) - set(TERMS):
            raise ValueError(f"unknown terms {sorted(unknown)}; the terms are {', '.join(TERMS)}")
        return cls(**{n: term.weight if n in terms else 0.0 for n, term in TERMS.items()})

    @classmethod
    def as_published(cls, newest: bool = False) -> LossWeights:
        """The loss as in the authors' code: all weights 1, one term dead, two of them sums.

        The output term has no gradient (since commit 6901ef2), the soft term sums over the pixels
        and the feature term over the eight blocks' raw errors. The newest training script (685bce4)
        leaves the feature term out.

        Exact for students without a mid-block, such as those of the plan "kdc". Where a student
        keeps it, `feature_pairs` adds it as a ninth, which the authors' code does not.
        """
        weights = dict.fromkeys(TERMS, 0.0) | {"task": 1.0, "output": 1.0, "soft": 1.0}
        return cls(
            **weights | {"feature": 0.0 if newest else 1.0},
            soft_reduction="batchmean",
            feature_normalised=False,
            feature_reduction="sum",
            output_gradient=False,
        )

    @property
    def enabled(self) -> dict[str, float]:
        """The weights of the terms that are switched on, in the order of `TERMS`."""
        return {name: self.terms[name] for name in TERMS if self.terms.get(name)}

    def needs(self, what: str) -> bool:
        """Whether an enabled term needs the "teacher" or "features"."""
        return any(what in TERMS[name].needs for name in self.enabled)

    @property
    def leaves_output_out(self) -> bool:
        """Whether no enabled term has a gradient for the student's last layers."""
        return all(
            "features" in TERMS[name].needs or (name == "output" and not self.output_gradient)
            for name in self.enabled
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's U-Net must be called at all."""
        return self.needs("teacher") or self.needs("features")


def min_snr_weight(snr: Tensor, cap: float, prediction_type: str = "epsilon") -> Tensor:
    """Min-SNR weights of each image's task error (Hang et al. 2303.09556, equation 8).

    snr (B,). At 0, where a schedule ends in noise alone, they are the limit: 1 for the noise,
    0 for the velocity.
    """
    if prediction_type != "epsilon":
        return snr.clamp(max=cap) / (snr + 1)
    return torch.where(snr == 0, 1.0, snr.clamp(max=cap) / snr)


@dataclass(frozen=True)
class DistillationLoss:
    """The weighted sum of the terms that are switched on."""

    weights: LossWeights = dataclasses.field(default_factory=LossWeights)

    def __call__(
        self,
        student: Tensor,
        target: Tensor,
        teacher: Tensor | None = None,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        task_weight: Tensor | None = None,
        over_parts: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> dict[str, Tensor]:
        """Scalar terms, unweighted, and their weighted sum under "loss"; see `Parts`.

        A term of weight 0 is not computed. Raises `ValueError` when an enabled term lacks the
        teacher's prediction.
        """
        if self.weights.needs_teacher and teacher is None:
            lacking = [name for name in self.weights.enabled if TERMS[name].needs]
            raise ValueError(f"the teacher's prediction is needed for {', '.join(lacking)}")
        features = student_features, teacher_features
        parts = Parts(student, target, teacher, *features, task_weight, over_parts)
        weights = self.weights.enabled
        terms = {name: TERMS[name].function(parts, self.weights.options) for name in weights}
        return terms | {"loss": weighted_sum(terms, weights)}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss: each term times its weight, summed."""
    total = sum(weights[name] * value for name, value in terms.items())
    assert isinstance(total, Tensor)  # at least one term is on
    return total
