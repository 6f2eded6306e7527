import json

import pytest
import torch
from PIL import Image

import kdc
from kdc.data import worlds
from kdc.data.datasets import WorldDataset
from kdc.data.folders import FolderDataset
from kdc.data.latents import LatentDataset, embed_captions, latents_of_captions, with_captions


def image_folder(root, classes=("red_tulip", "bluebell"), each=6):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (90, 70), (40 * i, 60 * number, 120)).save(root / name / f"{i}.jpg")
    return root


@pytest.mark.parametrize("name, shown", [("flora", 1), ("lepidoptera", 1), ("worlds", 2)])
def test_worlds_are_data_sets_by_name(name, shown):
    dataset = kdc.load_dataset(name, count=40)
    assert len(dataset) == 40
    items = [dataset[i] for i in range(len(dataset))]
    assert len({item["attributes"].world for item in items}) == shown
    for i, item in enumerate(items):
        assert item["image"].shape == (3, 64, 64) and item["image"].abs().max() <= 1
        assert worlds.read_caption(item["caption"]) == item["attributes"]
        assert dataset.caption(i) == item["caption"]
    assert torch.equal(dataset[7]["image"], items[7]["image"])
    with pytest.raises(IndexError):
        dataset[40]


def test_splits_and_held_out_combinations_keep_apart():
    train = {kdc.load_dataset("flora", "train", count=50)[i]["image"].sum() for i in range(50)}
    test = {kdc.load_dataset("flora", "test", count=50)[i]["image"].sum() for i in range(50)}
    assert not train & test
    rare = kdc.load_dataset("flora", count=30, held_out=True)
    pairs = {(rare[i]["attributes"].colour, rare[i]["attributes"].kind) for i in range(30)}
    assert pairs <= worlds.FLORA.held_out


def test_a_folder_captions_by_its_class_folders(tmp_path):
    dataset = kdc.load_dataset(image_folder(tmp_path), size=32)
    assert isinstance(dataset, FolderDataset)
    assert {dataset.caption(i) for i in range(len(dataset))} == {
        "a photo of a red tulip",
        "a photo of a bluebell",
    }
    for index, file in enumerate(dataset.files):
        name = file.parent.name.replace("_", " ").lower()
        assert dataset[index]["caption"] == dataset.caption(index) == f"a photo of a {name}"
    item = dataset[0]
    assert item["image"].shape == (3, 32, 32) and -1 <= item["image"].min()


def test_a_folder_without_splits_is_divided_by_name(tmp_path):
    image_folder(tmp_path, each=30)
    train, test = (kdc.load_dataset(tmp_path, split) for split in ("train", "test"))
    assert not set(train.files) & set(test.files)
    assert len(train) + len(test) == 60 and 3 <= len(test) <= 24


def test_train_and_test_folders_are_used(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", each=2)
    assert len(kdc.load_dataset(tmp_path)) == 12
    assert len(kdc.load_dataset(tmp_path, "test")) == 4


def test_metadata_gives_the_captions(tmp_path):
    image_folder(tmp_path / "train", classes=("x",), each=3)
    rows = [{"file_name": f"x/{i}.jpg", "text": f"image number {i}"} for i in range(3)]
    listing = tmp_path / "train" / "metadata.jsonl"
    listing.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = kdc.load_dataset(tmp_path)
    for index, file in enumerate(dataset.files):
        assert dataset.caption(index) == f"image number {file.stem}"
    for wrong in (b'{"file": 1}', b"[1]", b"\xff", b'{"file_name": "x/0.jpg", "text": null}'):
        listing.write_bytes(wrong)
        with pytest.raises(ValueError, match="metadata.jsonl:1"):
            kdc.load_dataset(tmp_path)


def test_images_right_in_a_split_folder_are_named_after_the_data_set(tmp_path):
    image_folder(tmp_path / "my_Roses", classes=("train", "test"), each=2)
    dataset = kdc.load_dataset(tmp_path / "my_Roses")
    assert [dataset.caption(i) for i in range(2)] == ["a photo of a my roses"] * 2
    image_folder(tmp_path / "irises", classes=("Iris",), each=2)
    assert kdc.load_dataset(tmp_path / "irises").caption(0) == "a photo of an iris"


def test_few_images_still_make_a_test_split(tmp_path):
    image_folder(tmp_path, classes=("x",), each=2)
    assert len(kdc.load_dataset(tmp_path)) == len(kdc.load_dataset(tmp_path, "test")) == 1


def test_worlds_show_what_their_captions_say():
    """Read off the images by the classifier, which never saw these renderings."""
    from kdc.evaluation.judges import attribute_accuracy

    dataset = kdc.load_dataset("worlds", "test", count=64)
    items = [dataset[i] for i in range(64)]
    images = torch.stack([((item["image"] + 1) * 127.5).round().to(torch.uint8) for item in items])
    said = [worlds.read_caption(item["caption"]) for item in items]
    assert min(attribute_accuracy(images, said).values()) > 0.95


def test_files_that_are_no_images_are_named_and_left_out(tmp_path, monkeypatch):
    image_folder(tmp_path / "train")
    whole = (tmp_path / "train" / "bluebell" / "5.jpg").read_bytes()
    (tmp_path / "train" / "bluebell" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "bluebell" / "text.png").write_text("not an image")
    (tmp_path / "train" / "notes.txt").write_text("hello")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7000)
    Image.new("RGB", (150, 150)).save(tmp_path / "train" / "bomb.png")
    with pytest.warns(UserWarning) as caught:
        dataset = kdc.load_dataset(tmp_path)
    text = str(caught[0].message)
    assert "left out 4 files" in text
    for name in ("bomb.png", "broken.jpg", "text.png", "notes.txt"):
        assert name in text
    assert len(dataset) == 12 and all(dataset[i] for i in range(12))


def test_missing_and_empty_folders_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="flora, lepidoptera, worlds"):
        kdc.load_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no readable image"):
        kdc.load_dataset(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no sub-folder"):
        kdc.load_dataset(tmp_path, "test")
    with pytest.raises(ValueError, match="train and test"):
        kdc.load_dataset("flora", "everything")


def latents(count=50, captions=3):
    g = torch.Generator().manual_seed(0)
    return LatentDataset(
        torch.randn(count, 4, 2, 2, generator=g),
        torch.zeros(count, 4, 2, 2),
        torch.arange(captions).float()[:, None, None].expand(captions, 5, 6) + 1,
        torch.arange(count) % captions,
        torch.zeros(5, 6),
        [f"caption {i}" for i in range(captions)],
    )


def test_draws_come_from_the_generator_and_keep_image_and_caption_together():
    data = latents()
    first = data.draw(20, torch.Generator().manual_seed(1), dropout=0)
    again = data.draw(20, torch.Generator().manual_seed(1), dropout=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for latent, prompt_embeds in zip(*first, strict=True):
        index = next(i for i in range(len(data)) if torch.equal(data.mean[i], latent))
        assert torch.equal(prompt_embeds, data[index]["embedding"])


def test_one_caption_in_ten_is_dropped():
    prompt_embeds = latents().draw(20_000, torch.Generator().manual_seed(2), dropout=0.1)[1]
    empty = (prompt_embeds == 0).all(dim=2).all(dim=1).float().mean().item()
    # 20,000 draws: five standard deviations of a binomial share are 0.0106
    assert empty == pytest.approx(0.1, abs=0.0106)


def test_posterior_noise_is_scaled_by_the_deviation():
    data = latents(count=1)
    data.std += 0.5
    generated = data.draw(20_000, torch.Generator().manual_seed(3))[0]
    assert generated.std(dim=0).mean().item() == pytest.approx(0.5, rel=0.02)
    assert torch.allclose(generated.mean(dim=0), data.mean[0], atol=0.03)


def test_cached_latents_are_the_autoencoders_and_captions_the_pipelines(teacher):
    dataset = WorldDataset(["flora"], count=5)
    data = kdc.cache_latents(teacher, dataset, batch_size=2)
    assert len(data) == 5
    images = torch.stack([dataset[i]["image"] for i in range(5)])
    with torch.no_grad():
        posterior = teacher.vae.encode(images).latent_dist
    scale = teacher.vae.config.scaling_factor
    assert torch.allclose(data.mean, posterior.mean * scale, atol=1e-4)
    assert torch.allclose(data.std, posterior.std * scale, atol=1e-4)
    for i in range(5):
        expected = embed_captions(teacher, [dataset.caption(i)])[0]
        assert torch.allclose(data[i]["embedding"], expected, atol=1e-5)
    assert torch.allclose(data.empty, embed_captions(teacher, [""])[0], atol=1e-5)
    with pytest.raises(ValueError, match="size=64"):
        kdc.cache_latents(teacher, WorldDataset(["flora"], size=32, count=2))
    with pytest.raises(ValueError, match="empty"):
        kdc.cache_latents(teacher, WorldDataset(["flora"], count=0))


def test_other_captions_leave_the_images_as_they_are(teacher):
    data = kdc.cache_latents(teacher, WorldDataset(["flora"], count=3))
    captions = ["a red rose on a night background", "", "a red rose on a night background"]
    other = with_captions(data, teacher, captions)
    assert torch.equal(other.mean, data.mean)
    assert [other.captions[i] for i in other.caption_index.tolist()] == captions
    assert torch.allclose(
        other[0]["embedding"], embed_captions(teacher, captions[:1])[0], atol=1e-5
    )
    assert torch.allclose(other[1]["embedding"], data.empty, atol=1e-5)
    with pytest.raises(ValueError, match="1 captions for 3 images"):
        with_captions(data, teacher, ["a rose"])


def test_what_a_pipeline_draws_can_be_a_data_set(teacher):
    captions = ["a red rose on a night background", "a blue tulip on a sky background"]
    data = latents_of_captions(teacher, captions, seed=2, steps=1)
    generated = kdc.generate(teacher, captions, seed=2, steps=1, decode=False)
    assert torch.equal(data.mean, generated) and not data.std.any()
    assert [data.captions[i] for i in data.caption_index.tolist()] == captions
    latents, prompt_embeds = data.draw(4, torch.Generator().manual_seed(0))
    assert latents.shape == (4, 4, 16, 16) and prompt_embeds.requires_grad is False
