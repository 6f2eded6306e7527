"""Which species a photograph shows: a linear layer on a network that was trained on ImageNet.

It gives photographs a score that means something where too few of them are there for a distance of
distributions. It is fitted on real images of the species in question and knows no others, so that
a share of 1 / (number of species) is chance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdc.checks import as_texts
from kdc.evaluation.extractors import Extractor, find_extractor
from kdc.io import fingerprint

FEATURES = "efficientnet-lite0"
PENALTY = 1e-3  # of the weights' squares, halved; from 1e-4 to 1e-2 nothing hangs on it


@dataclass(frozen=True, eq=False)
class SpeciesJudge:
    """Names the species of images (N, 3, H, W) uint8, of any size; see `fit_species`."""

    # The species that it can name, in alphabetical order.
    names: tuple[str, ...]
    # What computes features (N, d), which are then centred and scaled.
    extractor: Extractor
    centre: Tensor
    scale: Tensor
    # The linear layer: weights (d, S) and biases (S,).
    weights: Tensor
    biases: Tensor
    # Its accuracy on real images that it was not fitted on; NaN where there were none.
    held_out: float = float("nan")

    @property
    def name(self) -> str:
        """What computed a score, for its row."""
        return f"{self.extractor.name}, {len(self.names)} species"

    @functools.cached_property
    def checksum(self) -> str:
        """A hash of all weights."""
        return fingerprint(self.weights, self.biases, self.centre, self.scale)

    def __call__(self, images: Tensor) -> Tensor:
        """The number of the species in `names` for each image, (N,)."""
        features = (self.extractor(images) - self.centre) / self.scale
        return (features @ self.weights + self.biases).argmax(dim=1)

    def right(self, images: Tensor, asked: Sequence[str]) -> Tensor:
        """Whether each image shows the species asked for, (N,) bool.

        Raises `ValueError` for a species that it does not know, and for another number of images.
        """
        asked = as_texts("species", asked)
        if len(asked) != len(images):
            raise ValueError(f"{len(images)} images for {len(asked)} species")
        if unknown := sorted(set(asked) - set(self.names)):
            raise ValueError(f"no judge for {unknown}: it knows {', '.join(self.names)}")
        numbers = torch.tensor([self.names.index(name) for name in asked])
        return self(images) == numbers


def fit_species(
    images: Tensor,
    labels: Sequence[str],
    held_out: tuple[Tensor, Sequence[str]] | None = None,
    *,
    extractor: str = FEATURES,
    penalty: float = PENALTY,
) -> SpeciesJudge:
    """A judge of the species in `labels`, one a real image, uint8 (N, 3, H, W).

    Logistic regression with a squared penalty on the weights, fitted from zeros by L-BFGS to its
    optimum, so that nothing in it is drawn at random. `held_out` are other real images and their
    species, for the accuracy that the judge reports of itself: generated images cannot be judged
    more surely than these. The judge sees images as small as those it is fitted on.

    Raises `ValueError` for fewer than two species and where images and labels are not as many;
    `RuntimeError` where the extractor cannot be loaded.
    """
    labels = as_texts("labels", labels)
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images for {len(labels)} labels")
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise ValueError(f"a judge tells species apart, and there is one alone: {', '.join(names)}")
    see = find_extractor(extractor)
    features = see(images).double()
    centre, scale = features.mean(dim=0), features.std(dim=0) + 1e-6
    features = (features - centre) / scale
    target = torch.tensor([names.index(label) for label in labels])
    weights = torch.zeros(see.width, len(names), dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    fitting = torch.optim.LBFGS(
        [weights, biases], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        fitting.zero_grad()
        value = F.cross_entropy(features @ weights + biases, target)
        value = value + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        fitting.step(loss)
    centre, scale = centre.float(), scale.float()
    judge = SpeciesJudge(
        names, see, centre, scale, weights.detach().float(), biases.detach().float()
    )
    if held_out is None:
        return judge
    share = judge.right(*held_out).double().mean().item()
    return dataclasses.replace(judge, held_out=share)
