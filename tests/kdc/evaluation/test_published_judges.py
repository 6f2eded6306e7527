"""The published judges, from files of their format with random weights, against the packages that
define them: nothing but the weights differs where those are there."""

import json
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torchmetrics.multimodal.clip_score import CLIPScore
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from kdc.evaluation import extractors
from kdc.evaluation.extractors import find_extractor, find_perceptual
from kdc.evaluation.metrics import clip_score, kernel_distance
from kdc.pipelines import MINI_TEACHER


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Caches of the hubs in a folder of their own, and judges that are loaded anew."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    for cached in (find_extractor, find_perceptual):
        cached.cache_clear()
    yield
    for cached in (find_extractor, find_perceptual):
        cached.cache_clear()


def images(count, size, seed=0):
    """Smooth random images, uint8 (N, 3, size, size)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=g)
    return (torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).byte()


def folder_of(found, place):
    place.mkdir(parents=True)
    for number, image in enumerate(found):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:03}.png")
    return str(place)


@pytest.mark.long
def test_inception_and_kid_are_torch_fidelitys(tmp_path, monkeypatch):
    """The file lies where the package looks for it; KID of two folders of PNGs agrees.

    The second set is darker, so that the distance is far from 0: near it, only rounding is left.
    """
    with monkeypatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        patched.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        made = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in made.modules():  # so that something of the image is left after 48 layers
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    name = Path(inception.URL_INCEPTION_V3).name
    file = tmp_path / "torch" / "hub" / "checkpoints" / name
    torch.save(made.state_dict(), file)
    see = find_extractor("inception-v3")
    assert all(torch.equal(a, b) for a, b in zip(
        see.model.state_dict().values(), made.state_dict().values(), strict=True))  # fmt: skip
    pair = images(12, 64), images(12, 64, seed=1) // 2
    ours = kernel_distance(see(pair[0]), see(pair[1]))
    folders = [folder_of(found, tmp_path / str(i)) for i, found in enumerate(pair)]
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], kid=True, kid_subsets=1, kid_subset_size=12,
        feature_extractor_weights_path=str(file), cuda=False, cache=False, verbose=False,
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-3) and ours > 1e-3


@pytest.mark.parametrize("name", ["clip-vit-b16", "openai-vit-b16"])
def test_clip_scores_are_torchmetrics(name, tmp_path, monkeypatch):
    """A small CLIP in the hub's format; preprocessing is transformers' but for 8-bit rounding."""
    tokenizer = CLIPTokenizer.from_pretrained(MINI_TEACHER, subfolder="tokenizer")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": len(tokenizer), "projection_dim": 16,
            "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
              "projection_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip", safe_serialization=True)
    tokenizer.save_pretrained(tmp_path / "clip")
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    prepare.save_pretrained(tmp_path / "clip")
    source = extractors.EXTRACTORS[name].args[1]
    read = {cls: cls.from_pretrained for cls in (CLIPModel, CLIPTokenizer)}
    for cls, function in read.items():

        def from_folder(asked, *args, function=function, **kwargs):
            assert asked == source
            return function(tmp_path / "clip", *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_folder)
    see = find_extractor(name)
    assert see.name == name and see.width == 16
    monkeypatch.undo()

    found = images(6, 64)
    pixels = prepare([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in found],
                     return_tensors="pt")["pixel_values"]  # fmt: skip
    ours = extractors._normalised(found, 32, extractors.OPENAI)
    step = 1 / 255 / min(extractors.OPENAI[1])  # what one of 256 levels is
    assert (ours - pixels).abs().max() < 1.5 * step, "PIL rounds to 8 bits after resizing"

    prompts = ["a red rose", "a white tulip on a sand background"] * 3
    scores = clip_score(see(found), see.read(prompts))
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    for one in ("get_image_features", "get_text_features"):  # torchmetrics expects tensors of them
        function = getattr(model, one)

        def features(*args, function=function, **kwargs):
            return function(*args, **kwargs).pooler_output

        monkeypatch.setattr(model, one, features)
    whole = CLIPScore(model_name_or_path=lambda: (model, CLIPProcessor(prepare, tokenizer)))
    for image, prompt, value in zip(found, prompts, scores.tolist(), strict=True):
        theirs = whole(image, prompt).item()  # which is cut at 0
        assert max(value, 0) == pytest.approx(theirs, abs=0.5)
    assert json.loads((tmp_path / "clip" / "config.json").read_text())["projection_dim"] == 16
    with torch.inference_mode():  # the same pixels give the same features
        given = see.model.get_image_features(pixel_values=ours)
        given = getattr(given, "pooler_output", given)
    assert torch.allclose(see(found), given, atol=1e-5)


def test_lpips_is_the_packages_own(tmp_path):
    torch.manual_seed(0)
    backbone = alexnet(weights=None)
    file = tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    torch.save(backbone.state_dict(), file)
    ours = find_perceptual("lpips-alex")
    assert ours.name == "lpips-alex"
    weights = dict(ours.model.net.named_parameters())
    assert torch.equal(weights["slice1.0.weight"], backbone.features[0].weight)
    a, b = images(3, 64), images(3, 64, seed=1)
    theirs = lpips.LPIPS(net="alex", verbose=False).eval()
    signed = [torch.from_numpy(np.asarray(x)).float() / 127.5 - 1 for x in (a, b)]
    with torch.inference_mode():
        expected = theirs(*signed).flatten()
    assert torch.allclose(ours(a, b), expected, atol=1e-6) and (ours(a, a) == 0).all()
