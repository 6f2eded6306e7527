"""What can be known of an evaluation is said before the first image; what is not finite is none."""

import copy
import random

import numpy as np
import pytest
import torch

import kdc
from kdc.data import worlds
from kdc.data.datasets import WorldDataset
from kdc.data.latents import latents_of_captions
from kdc.evaluation import extractors, judges
from kdc.pipelines import with_unet
from tests.helpers import calls_counted

PROMPTS = ["a red rose on a night background", "a blue tulip on a sky background"]
ANY = worlds.read_caption(PROMPTS[0])


@pytest.fixture
def calls(teacher):
    """How often the U-Net, the autoencoder and the text encoder are called."""
    parts = (teacher.unet, "forward"), (teacher.text_encoder, "forward")
    with calls_counted(*parts, (teacher.vae, "encode"), (teacher.vae, "decode")) as made:
        yield made


GENERATE = [
    (dict(steps=0), ValueError, "steps must be at least 1"),
    (dict(steps=2.5), TypeError, "steps must be a whole number"),
    (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
    (dict(guidance=float("nan")), ValueError, "guidance must be finite"),
    (dict(guidance=-1.0), ValueError, "guidance must not be negative"),
    (dict(guidance="7"), TypeError, "guidance must be a number"),
    (dict(seed=-1), ValueError, "seed must be at least 0"),
    (dict(seed=1.5), TypeError, "seed must be a whole number"),
    (dict(prompts=[]), ValueError, "no prompts"),
    (dict(prompts=["a", None]), TypeError, "prompts must be texts, but number 1 is None"),
]
EVALUATE = [
    *(each for each in GENERATE if "seed" not in each[0]),
    (dict(seeds=()), ValueError, "seeds: give at least one"),
    (dict(seeds=(0, 0)), ValueError, "seeds must differ"),
    (dict(seeds="012"), TypeError, "seeds must be whole numbers"),
    (dict(seeds=(0.5,)), TypeError, "seeds must be a whole number"),
    (dict(seeds=(True,)), TypeError, "seeds must be a whole number"),
    (dict(seeds=(-1,)), ValueError, "seeds must be at least 0"),
    (dict(metrics="fidelity"), ValueError, "unknown metric 'fidelity'"),
    (dict(metrics="kid"), ValueError, "kid: there are no reference images"),
    (dict(baseline_draws=0), ValueError, "baseline_draws must be at least 1"),
    (dict(attributes=[ANY]), ValueError, "1 attributes for 2 prompts"),
    (dict(attributes=["red", "blue"]), TypeError, "attributes must be worlds.Attributes"),
    (dict(reference=torch.zeros(0, 3, 64, 64, dtype=torch.uint8)), ValueError, "no images"),
    (dict(reference=WorldDataset(["flora"], count=0)), ValueError, "holds no images"),
    (dict(reference=torch.zeros(9, 3, 64, 64)), ValueError, "expected uint8 images"),
    (dict(reference=torch.zeros(9, 3, 32, 32, dtype=torch.uint8)), ValueError, "resizing"),
    (dict(reference=""), ValueError, "the data set is ''"),
    (dict(extractor="none"), ValueError, "unknown extractor"),
]


@pytest.mark.parametrize("how, error, said", GENERATE)
def test_nothing_is_generated_for_arguments_that_make_no_sense(how, error, said, teacher, calls):
    prompts = how.get("prompts", PROMPTS)
    with pytest.raises(error, match=said):
        kdc.generate(teacher, prompts, **{k: v for k, v in how.items() if k != "prompts"})
    assert not calls


@pytest.mark.parametrize("how, error, said", EVALUATE)
def test_nothing_is_scored_for_arguments_that_make_no_sense(how, error, said, teacher, calls):
    prompts = how.get("prompts", PROMPTS)
    how = {k: v for k, v in how.items() if k != "prompts"}
    if prompts == []:
        said = "at least one prompt"
    with pytest.raises(error, match=said):
        kdc.evaluate(teacher, prompts, **{"steps": 1, "seeds": (0,)} | how)
    assert not calls


def test_a_text_by_itself_is_one_prompt_one_metric_one_seed(teacher):
    scores = kdc.evaluate(teacher, PROMPTS[0], metrics="clip", seeds=3, steps=1)
    assert list(scores.table.index) == ["clip"] and scores.images.shape[:2] == (1, 1)
    assert latents_of_captions(teacher, PROMPTS[0], steps=1).captions == [PROMPTS[0]]
    data = kdc.cache_latents(teacher, WorldDataset(["flora"], count=2))
    assert kdc.Task("one", data, prompts=PROMPTS[0]).prompts == (PROMPTS[0],)
    with pytest.raises(ValueError, match="1 labels, 2 images"):
        kdc.Task("one", data, labels="ab")


def poisoned(teacher, part):
    """The teacher with one weight of a network that is not a number."""
    pipeline = with_unet(teacher, copy.deepcopy(teacher.unet))
    network = copy.deepcopy(getattr(teacher, part))
    next(iter(network.parameters())).data.flatten()[0] = float("nan")
    pipeline.register_modules(**{part: network})
    return pipeline


@pytest.mark.parametrize("part, said", [("unet", "the U-Net gave"), ("vae", "the decoder gave"),
                                        ("text_encoder", "the U-Net gave")])  # fmt: skip
def test_a_network_that_is_broken_gives_no_black_images(part, said, teacher):
    pipeline = poisoned(teacher, part)
    if part == "vae":
        pipeline.vae.decoder.conv_in.weight.data[:] = float("nan")
    if part == "text_encoder":
        pipeline.text_encoder.final_layer_norm.weight.data[:] = float("inf")
    with pytest.raises(FloatingPointError, match=f"{said}.*red rose"):
        kdc.generate(pipeline, PROMPTS, steps=1)
    with pytest.raises(FloatingPointError, match=said):
        kdc.evaluate(pipeline, PROMPTS, steps=1, seeds=(0,))


def test_encodings_that_are_not_finite_are_not_cached(teacher):
    pipeline = poisoned(teacher, "vae")
    pipeline.vae.encoder.conv_in.weight.data[:] = float("nan")
    images = WorldDataset(["flora"], count=3)
    with pytest.raises(FloatingPointError, match=f"the autoencoder gave.*{images.caption(0)}"):
        kdc.cache_latents(pipeline, images)
    pipeline = poisoned(teacher, "text_encoder")
    pipeline.text_encoder.final_layer_norm.weight.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="the text encoder gave"):
        kdc.cache_latents(pipeline, images)


def test_features_that_are_not_finite_are_no_scores(monkeypatch):
    see = extractors.find_extractor("mini-clip")
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    broken = extractors.Extractor("broken", see.width, see.model, lambda x: see.see(x) / 0)
    with pytest.raises(FloatingPointError, match="broken gave features"):
        broken(images)
    distance = extractors.find_perceptual("mini-lpips")
    monkeypatch.setattr(distance.model, "forward", lambda a, b: torch.full((len(a),), float("nan")))
    with pytest.raises(FloatingPointError, match="mini-lpips gave distances"):
        distance(images, images)


@pytest.mark.long
def test_global_generators_stay_where_they_are(teacher, monkeypatch):
    """Also the first time, when networks are made."""
    for cached in (judges.attribute_classifier, judges.mini_clip, judges.mini_lpips,
                   extractors.find_extractor, extractors.find_perceptual):  # fmt: skip
        cached.cache_clear()
    legacy = np.random.mtrand._rand  # what libraries draw from that know no generators
    before = torch.get_rng_state(), legacy.get_state()[1].copy(), random.getstate()
    data = kdc.cache_latents(teacher, WorldDataset(["flora"], count=6))
    asked = [ANY, worlds.read_caption(PROMPTS[1])]
    kdc.evaluate(teacher, PROMPTS, "flora", attributes=asked, teacher=teacher, latents=data,
                 seeds=(0, 1), steps=1)  # fmt: skip
    student = kdc.slim(teacher.unet, "kdc", init="random")
    kdc.distill(student, teacher, data, steps=1, batch_size=2)
    kdc.diagnose(student, teacher, data, kdc.LossWeights(), batch_size=2)
    kdc.load_teacher("mini")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(legacy.get_state()[1], before[1]) and random.getstate() == before[2]


def samplers(teacher):
    import diffusers

    given = teacher.scheduler.config
    found = {cls.__name__: (cls, {}) for cls in teacher.scheduler.compatibles}
    found["SDE-DPM++"] = (diffusers.DPMSolverMultistepScheduler,
                          {"algorithm_type": "sde-dpmsolver++"})  # fmt: skip
    found["LCMScheduler"] = (diffusers.LCMScheduler, {})
    return {name: (cls, dict(given) | how) for name, (cls, how) in sorted(found.items())}


@pytest.mark.long
def test_no_sampler_draws_noise_that_the_seed_does_not_govern(teacher):
    """Each compatible one: the same images at each call and in each batch, other ones by seed."""
    tried, before = [], torch.get_rng_state()
    for name, (cls, config) in samplers(teacher).items():
        pipeline = with_unet(teacher, teacher.unet)
        try:
            pipeline.scheduler = cls.from_config(config)
        except ImportError:  # needs a package that is not there
            continue
        one, again = (kdc.generate(pipeline, PROMPTS, steps=5, seed=5) for _ in range(2))
        single = kdc.generate(pipeline, PROMPTS, steps=5, seed=5, batch_size=1, progress=False)
        other = kdc.generate(pipeline, PROMPTS, steps=5, seed=6)
        assert torch.equal(one, again), name
        assert (one.int() - single.int()).abs().max() <= 2, name
        assert (one.int() - other.int()).abs().float().mean() > 1, name
        tried.append(name)
    assert {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDPMScheduler",
            "LCMScheduler", "SDE-DPM++"} <= set(tried) and len(tried) >= 12  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_that_a_sampler_adds_is_not_that_of_the_start(teacher, monkeypatch):
    import diffusers

    pipeline = with_unet(teacher, teacher.unet)
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(teacher.scheduler.config)
    drawn = []
    from diffusers.schedulers import scheduling_ddpm

    original = scheduling_ddpm.randn_tensor

    def watching(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", watching)
    kdc.generate(pipeline, PROMPTS, steps=3, seed=5)
    start = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5 * 100_003))
    assert len(drawn) == 3 and not torch.equal(drawn[0][0], start)
    assert not torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[0][1])


def test_a_sampler_with_noise_of_its_own_is_refused(teacher, calls):
    class DPMSolverSDEScheduler(type(teacher.scheduler)):
        pass

    pipeline = with_unet(teacher, teacher.unet)
    pipeline.scheduler = DPMSolverSDEScheduler.from_config(teacher.scheduler.config)
    with pytest.raises(ValueError, match="draws noise that no seed governs: take"):
        kdc.generate(pipeline, PROMPTS, steps=1)
    assert not calls


@pytest.mark.parametrize("config", [{}, {"disable": False, "desc": "mine"}])
def test_the_bar_of_the_pipeline_is_left_as_it_was(config, teacher, monkeypatch):
    pipeline = with_unet(teacher, teacher.unet)
    pipeline.set_progress_bar_config(**config)

    def stop(*args, **kwargs):
        assert pipeline._progress_bar_config["disable"] is True
        raise KeyboardInterrupt

    monkeypatch.setattr(type(teacher.vae), "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        kdc.generate(pipeline, PROMPTS, steps=1)
    assert pipeline._progress_bar_config == config


def test_a_small_reference_leaves_scores_out_with_a_note(teacher):
    real = torch.randint(0, 255, (6, 3, 64, 64), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    table = kdc.evaluate(teacher, PROMPTS * 4, real, steps=1, seeds=(0,)).table
    assert np.isnan(table.loc["fd", "value"]) and "128 needed" in table.loc["fd", "note"]
    assert np.isfinite(table.loc["kid", "value"])
