"""Fine-tuning the teacher: the noise's error alone, and a folder that any program opens."""

import subprocess
import sys

import pytest
import torch

import kdc
from tests.robustness.trials import latents, narrow

HOW = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "no",
    "schedule": "constant",
}


def weights(pipeline):
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])


def test_it_is_the_task_term_on_the_teacher_itself():
    teacher, other = narrow(), narrow()
    before = weights(teacher)
    log = kdc.finetune(teacher, latents(teacher, 1), **HOW)
    only = kdc.LossWeights.only("task")
    kdc.distill(other.unet, other, latents(other, 1), weights=only, **HOW)
    assert torch.equal(weights(teacher), weights(other))
    assert not torch.equal(weights(teacher), before) and {"task", "loss"} <= set(log)


def test_the_folder_is_a_teacher_and_a_pipeline_for_diffusers_alone(tmp_path):
    teacher = narrow()
    kdc.finetune(teacher, latents(teacher, 1), output_dir=tmp_path, **HOW)
    again = kdc.load_teacher(tmp_path, device="cpu")
    assert torch.equal(weights(again), weights(teacher))
    prompts = ["a red rose on a night background"]
    assert torch.equal(
        kdc.generate(again, prompts, steps=2), kdc.generate(teacher, prompts, steps=2)
    )
    code = (
        "import sys; sys.modules['kdc'] = None\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"print(type(StableDiffusionPipeline.from_pretrained({str(tmp_path)!r}).unet).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "UNet2DConditionModel", done.stderr[-1000:]


def test_it_is_extended_and_resumed(tmp_path):
    whole, parts = narrow(), narrow()
    kdc.finetune(whole, latents(whole, 1), **HOW)
    kdc.finetune(parts, latents(parts, 1), output_dir=tmp_path, **(HOW | {"steps": 2}))
    fresh = narrow()
    kdc.finetune(fresh, latents(fresh, 1), output_dir=tmp_path, resume=True, **HOW)
    assert torch.equal(weights(fresh), weights(whole))
    with pytest.raises(FileExistsError, match="resume=True"):
        kdc.finetune(narrow(), latents(fresh, 1), output_dir=tmp_path, **HOW)


def test_what_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "vae").write_text("")
    with pytest.raises(NotADirectoryError, match="vae is a file"):
        teacher = narrow()
        kdc.finetune(teacher, latents(teacher, 1), output_dir=tmp_path, **HOW)
