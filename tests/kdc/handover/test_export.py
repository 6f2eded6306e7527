"""A finished student leaves the project: a folder for diffusers alone, a card, and ONNX."""

import json
import subprocess
import sys

import pytest
import torch

import kdc
from kdc.handover.export import export
from kdc.pipelines import with_unet
from tests.helpers import head_of
from tests.robustness.trials import latents, narrow

PROMPTS = ["a red rose on a night background", "a white tulip on a sand background"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A narrow pipeline, and the folder of a student that was distilled from it."""
    pipeline, folder = narrow(), tmp_path_factory.mktemp("student")
    student = kdc.slim(pipeline.unet, "kdc")
    kdc.distill(student, pipeline, latents(pipeline, 1), steps=2, batch_size=2, output_dir=folder,
                weights=kdc.LossWeights(soft=0.3))  # fmt: skip
    return pipeline, folder


def test_the_folder_opens_where_only_diffusers_is_installed(distilled, tmp_path):
    pipeline, student = distilled
    folder = export(student, pipeline, tmp_path / "out", teacher_name="mini")
    code = f"""
import sys, torch
sys.modules["kdc"] = None
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
pipeline = StableDiffusionPipeline.from_pretrained({str(folder)!r})
generators = [torch.Generator().manual_seed(3 * 100_003 + i) for i in range(2)]
noise = torch.stack([torch.randn((4, 16, 16), generator=g) for g in generators])
images = pipeline({PROMPTS!r}, latents=noise, num_inference_steps=3, guidance_scale=7.5,
                  generator=generators, output_type="pt").images
save_file({{"images": (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8)}}, {str(tmp_path / "x")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    ours = with_unet(pipeline, kdc.load_student(student, pipeline).unet)
    expected = kdc.generate(ours, PROMPTS, seed=3, steps=3)
    assert torch.equal(load_file(tmp_path / "x")["images"], expected)
    again = kdc.load_teacher(folder, device="cpu")
    assert torch.equal(kdc.generate(again, PROMPTS, seed=3, steps=3), expected)


def test_the_card_says_how_it_was_made(distilled, tmp_path):
    pipeline, student = distilled
    (tmp_path / "scores.json").write_text(json.dumps({
        "accuracy": {"value": 0.875, "spread": 0.01, "samples": 64, "extractor": "mini-classifier"},
        "fid": {"value": None, "spread": None}}))  # fmt: skip
    folder = export(student, pipeline, tmp_path / "out", teacher_name="mini", data_name="flora",
                    scores=tmp_path / "scores.json")  # fmt: skip
    card = (folder / "README.md").read_text()
    assert head_of(card) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "mit",
        "tags": ["stable-diffusion", "knowledge-distillation", "kdc"],
    }  # fmt: skip
    before, after = (sum(p.numel() for p in u.parameters()) for u in
                     (pipeline.unet, kdc.load_student(student, pipeline).unet))  # fmt: skip
    for said in (f"{before:,}", f"{after:,} ({after / before:.1%})",
                 "kdc: down 0 0 0 0 | no mid-block", "soft 0.3", "steps 2", "Data: flora",
                 "| accuracy | 0.875 | 0.01 | 64 |",
                 "FreeU runs"):  # fmt: skip
        assert said in card, said
    assert "fid" not in card and "not recorded" not in card


def test_half_precision_is_half_the_size_and_refuses_what_it_cannot_hold(distilled, tmp_path):
    pipeline, student = distilled
    sizes = []
    for half in (False, True):
        folder = export(student, pipeline, tmp_path / str(half), half=half)
        sizes.append((folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert kdc.load_teacher(tmp_path / "True", torch.float16, "cpu").unet.dtype == torch.float16
    large = kdc.slim(pipeline.unet, "kdc")
    with torch.no_grad():
        large.conv_out.bias[0] = 1e6
    with pytest.raises(
        FloatingPointError, match="unet in torch.float16: the weights conv_out.bias"
    ):
        export(large, pipeline, tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists() and not (tmp_path / "large.partial").exists()


def test_nothing_is_written_over_and_errors_come_first(distilled, tmp_path, monkeypatch):
    pipeline, student = distilled
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="used holds something already"):
        export(student, pipeline, tmp_path / "used")
    with pytest.raises(ValueError, match="fid has no value: give what `kdc evaluate` wrote"):
        export(student, pipeline, tmp_path / "new", scores={"fid": {}})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'kdc\[onnx\]'"):
        export(student, pipeline, tmp_path / "new", onnx=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["used"]
