"""The distillation terms. Where the features of one of them come from stands in `kdc.hooks`.

With student s and teacher t, predictions (B, C, H, W) of noise or velocity, and target y:

    task     E |s - y|^2                      (optionally Min-SNR weighted, Hang et al. 2303.09556)
    output   E |s - t|^2
    soft     T^2 KL(softmax(t / T) || softmax(s / T)) over the C channels of every pixel
    feature  mean over hooks of E |f_s - f_t|^2 / E f_t^2

`LossWeights.as_published` keeps what the public code of KDC-Diff does instead: no gradient through
the output term, pixels of the soft term summed, features not normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdc.distillation.features import FEATURES_AT


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term (0 switches it off) and the options of the terms.

    `temperature` belongs to the soft term. `soft_reduction` is "mean" (over images and pixels) or
    "batchmean" (over images; pixels are summed). `output_gradient` False detaches the output
    term, which then is logged but teaches nothing. `features_at` says where the feature term compares: see
    `feature_pairs`. `min_snr` caps the signal-to-noise weight of the task term (5 is usual), None
    leaves it at 1. Raises `ValueError` for weights or options with which nothing could be learnt.
    """

    task: float = 1.0
    output: float = 1.0
    soft: float = 0.1
    feature: float = 0.1
    temperature: float = 2.0
    soft_reduction: str = "mean"
    feature_normalised: bool = True
    features_at: str = "blocks"
    output_gradient: bool = True
    min_snr: float | None = None

    def __post_init__(self):
        for name in ("task", "output", "soft", "feature"):
            if not 0 <= (weight := getattr(self, name)) < math.inf:  # which refuses NaN too
                raise ValueError(
                    f"the weight of {name} must be finite and not negative, not {weight};"
                    " 0 switches the term off"
                )
        if not any((self.task, self.output, self.soft, self.feature)):
            raise ValueError("every term has weight 0: nothing would be learnt")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, not {self.temperature}")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr must be positive, not {self.min_snr}; None leaves it out")
        if self.soft_reduction not in ("mean", "batchmean"):
            raise ValueError(f"soft_reduction must be mean or batchmean: {self.soft_reduction!r}")
        if self.features_at not in FEATURES_AT:
            raise ValueError(
                f"features_at must be one of {', '.join(FEATURES_AT)}, not {self.features_at!r}"
            )

    @classmethod
    def only(cls, *terms: str) -> LossWeights:
        """The default weights of the named terms, 0 for the others."""
        default, every = cls(), ("task", "output", "soft", "feature")
        if unknown := set(terms) - set(every):
            raise ValueError(f"unknown terms {sorted(unknown)}; the terms are {', '.join(every)}")
        return cls(**{name: getattr(default, name) if name in terms else 0.0 for name in every})

    @classmethod
    def as_published(cls, newest: bool = False) -> LossWeights:
        """What KDC-Diff's public code computes: all weights 1, one term dead, one oversized.

        Its newest commit leaves the feature term out as well.
        """
        return cls(
            soft=1.0,
            feature=0.0 if newest else 1.0,
            soft_reduction="batchmean",
            feature_normalised=False,
            output_gradient=False,
        )

    @property
    def needs_teacher(self) -> bool:
        return bool(self.output or self.soft or self.feature)


def _precise(x: Tensor) -> Tensor:
    """At least float32: a mean of squares in half precision loses small errors."""
    return x if x.dtype == torch.float64 else x.float()


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
    student: Sequence[Tensor], teacher: Sequence[Tensor], normalised: bool = True
) -> Tensor:
    """Mean over hooks of the squared error, each divided by the teacher's mean square if normalised.

    Raises `ValueError` when the lists differ in length or a pair differs in shape.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"{len(student)} student hooks for {len(teacher)} teacher hooks")
    terms = []
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"hook {index}: student {tuple(s.shape)}, teacher {tuple(t.shape)}")
        s, t = _precise(s), _precise(t)
        error = F.mse_loss(s, t)
        terms.append(error / (t.square().mean() + 1e-6) if normalised else error)
    return torch.stack(terms).mean()


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
    """The weighted sum of the four terms."""

    weights: LossWeights = LossWeights()

    def __call__(
        self,
        student: Tensor,
        target: Tensor,
        teacher: Tensor | None = None,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        task_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scalar terms, unweighted, and their weighted sum under "loss".

        student, target, teacher (B, C, H, W); task_weight (B,) or None. A term of weight 0 is
        not computed. Raises `ValueError` when an enabled term lacks the teacher's part.
        """
        w, terms = self.weights, {}
        if w.needs_teacher and teacher is None:
            raise ValueError("the output, soft and feature terms need the teacher's prediction")
        student = _precise(student)
        if w.task:
            error = (student - _precise(target)).square().mean(dim=(1, 2, 3))
            terms["task"] = (error if task_weight is None else error * task_weight).mean()
        if w.output:
            terms["output"] = F.mse_loss(student, _precise(teacher))
            if not w.output_gradient:
                terms["output"] = terms["output"].detach()
        if w.soft:
            terms["soft"] = soft_term(student, teacher, w.temperature, w.soft_reduction)
        if w.feature:
            terms["feature"] = feature_term(
                student_features, teacher_features, w.feature_normalised
            )
        terms["loss"] = sum(getattr(w, name) * value for name, value in terms.items())
        return terms
