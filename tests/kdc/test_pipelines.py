import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import kdc
from kdc import pipelines
from kdc.data import worlds


def test_the_mini_teacher_is_an_ordinary_pipeline_in_the_layout_of_sd_v1(teacher):
    assert type(teacher) is StableDiffusionPipeline
    config = teacher.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert config.layers_per_block == 2 and config.sample_size == 16
    assert teacher.vae.config.latent_channels == 4 and teacher.vae_scale_factor == 4


def test_nothing_is_shipped_but_safetensors_and_text_and_it_is_small():
    files = [f for f in pipelines.ASSETS.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".csv", ".txt"}
    assert sum(f.stat().st_size for f in files) < 40e6


def test_the_same_function_opens_a_folder(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    again = kdc.load_teacher(tmp_path)
    ours, theirs = teacher.unet.state_dict(), again.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_first_image_needs_no_network(tmp_path):
    """The README's one line, with every socket refused."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('the network is cut off')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse\n"
        "import kdc; p = kdc.load_teacher('mini')\n"
        "p('a purple daisy on a sand background').images[0].save('x.png')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_teacher_draws_what_it_is_asked_for(teacher):
    from kdc.evaluation.judges import attribute_accuracy

    asked = [a for w in worlds.WORLDS.values() for a in w.combinations()[::6]]
    generated = kdc.generate(teacher, [worlds.caption(a) for a in asked], seed=1, steps=15)
    scores = attribute_accuracy(generated, asked)
    # Far below the published grades, far above chance (1/7, 1/12, 1/4): a broken teacher fails.
    assert scores["colour"] > 0.6 and scores["kind"] > 0.5 and scores["background"] > 0.7


def test_the_noise_of_a_image_does_not_depend_on_the_batch(teacher):
    prompts = ["a red rose on a sky background"] * 3
    together = kdc.generate(teacher, prompts, seed=3, steps=4)
    alone = kdc.generate(teacher, prompts, seed=3, steps=4, batch_size=1)
    assert (together.int() - alone.int()).abs().max() <= 2
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 3, 64, 64) and together.dtype == torch.uint8
    with pytest.raises(ValueError, match="no prompts"):
        kdc.generate(teacher, [])


def test_the_mini_student_is_the_kdc_plan_and_opens_without_kdc(teacher):
    student = kdc.load_student("mini", teacher)
    expected = kdc.slim(teacher.unet, "kdc").state_dict()
    assert {k: v.shape for k, v in student.unet.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    assert student.vae is teacher.vae and student.scheduler is not teacher.scheduler
    assert pipelines.read_plan(pipelines.MINI_STUDENT) == student.unet.slim_plan == kdc.PLANS["kdc"]
    code = (
        "import sys; sys.modules['kdc'] = None\n"
        "from diffusers import UNet2DConditionModel as U\n"
        f"U.from_pretrained({str(pipelines.MINI_STUDENT)!r}, subfolder='unet')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kdc.load_teacher(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        kdc.load_teacher(tmp_path)
    with pytest.raises(FileNotFoundError, match="no student"):
        kdc.load_student(tmp_path)
    shutil.copytree(pipelines.MINI_STUDENT, tmp_path / "student")
    file = next((tmp_path / "student" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cannot be read"):
        kdc.load_student(tmp_path / "student")
    for part in ("unet", "vae", "text_encoder"):
        folder = tmp_path / part
        shutil.copytree(pipelines.MINI_TEACHER, folder)
        file = next((folder / part).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            kdc.load_teacher(folder)
    weights = load_file(pipelines.MINI_TEACHER / "unet" / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_out.weight")
    shutil.rmtree(tmp_path / "unet" / "unet")
    shutil.copytree(pipelines.MINI_TEACHER / "unet", tmp_path / "unet" / "unet")
    save_file(weights, tmp_path / "unet" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        kdc.load_teacher(tmp_path / "unet")


def test_an_unreachable_hub_id_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="hub id"):
        kdc.load_teacher("someone/some-model")
