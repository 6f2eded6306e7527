import lpips
import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from kdc.data import worlds
from kdc.evaluation import judges, metrics
from kdc.evaluation.extractors import find_perceptual
from kdc.evaluation.judges import clip_features, clip_text_features
from studies.common.renderings import balanced_prompts, renderings_of


@pytest.fixture(scope="module")
def renderings():
    shown = balanced_prompts(1, False)
    return renderings_of(shown, seed=77), shown


def clip_scores(images, shown):
    captions = [worlds.caption(a) for a in shown]
    return metrics.clip_score(clip_features(images), clip_text_features(captions))


def test_the_classifier_reads_real_renderings(renderings):
    images, shown = renderings
    scores = judges.attribute_accuracy(images, shown)
    assert all(scores[name] >= 0.98 for name in ("colour", "kind", "background"))
    wrong = shown[1:] + shown[:1]
    assert judges.attribute_accuracy(images, wrong)["all"] < 0.1


def test_the_frechet_distance_is_that_of_gaussians():
    """Against the closed form ||m||^2 + tr(A + B - 2 (AB)^1/2) in float64."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 5))
    a = rng.standard_normal((400, 5))
    b = rng.standard_normal((400, 5)) @ mixing + 0.5
    ca, cb = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots
    value = metrics.frechet_distance(torch.tensor(a), torch.tensor(b))
    assert value == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 10"):
        metrics.frechet_distance(torch.tensor(a[:9]), torch.tensor(b))


def test_clip_prefers_the_right_caption(renderings):
    images, shown = renderings
    right = clip_scores(images[:96], shown[:96])
    wrong = clip_scores(images[:96], shown[96:192])
    assert (right > wrong).float().mean() > 0.95


def test_lpips_is_the_packages_arithmetic_on_our_trunk(renderings):
    a, b = renderings[0][:4], renderings[0][4:8]
    net = judges.mini_lpips()
    assert isinstance(net, lpips.LPIPS) and not net.training
    with torch.no_grad():
        signed = [x.float() / 127.5 - 1 for x in (a, b)]
        layers = [net.net.forward(net.scaling_layer(x)) for x in signed]
        by_hand = 0
        for f, g in zip(*layers, strict=True):
            f, g = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (f, g))
            by_hand = by_hand + (f - g).square().sum(1).mean(dim=(1, 2))
    assert torch.allclose(find_perceptual("mini-lpips")(a, b), by_hand, rtol=1e-3)


def test_lpips_grows_with_the_distortion(renderings):
    images = renderings[0][:32]
    assert find_perceptual("mini-lpips")(images, images).abs().max() < 1e-6
    distances = [
        find_perceptual("mini-lpips")(images, gaussian_blur(images, 9, sigma)).mean().item()
        for sigma in (0.5, 1.0, 2.0)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_wrong_ranges_and_sizes_are_refused(renderings):
    images, shown = renderings
    with pytest.raises(ValueError, match="uint8"):
        judges.clip_features(images[:2].float() / 255)
    with pytest.raises(ValueError, match="uint8"):
        judges.clip_features(images[0])
    with pytest.raises(ValueError, match="attributes"):
        judges.attribute_accuracy(images[:2], shown[:3])
    with pytest.raises(ValueError, match="shape"):
        find_perceptual("mini-lpips")(images[:2], images[:3])
