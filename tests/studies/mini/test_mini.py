import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdc import pipelines
from kdc.data import scenes, worlds
from kdc.evaluation import judges
from studies.common import ledger, runner
from studies.mini import grades, images, stages, text
from studies.mini import make as mini
from studies.mini.autoencoder import train_autoencoder
from studies.mini.teacher import train_teacher


def test_the_tokenizer_has_a_token_for_every_word_of_the_worlds():
    tokenizer = text.new_tokenizer()
    words = [*worlds.COLOURS, *judges.KINDS, *worlds.BACKGROUNDS, "butterfly", "background"]
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end
    longest = max(text.all_captions(), key=len)
    assert len(tokenizer(longest).input_ids) < text.MAX_TOKENS
    assert tokenizer.decode(tokenizer("Zürich 7!").input_ids, skip_special_tokens=True)


def test_the_shipped_tokenizer_is_the_one_that_is_made(teacher):
    captions = text.all_captions()[::37]
    ours = text.tokenize(text.new_tokenizer(), captions)
    assert torch.equal(text.tokenize(teacher.tokenizer, captions), ours)


def test_dead_leaves_have_the_spectrum_of_photographs():
    """Power falls with frequency as a power law; for photographs of this size the exponent, over
    these frequencies, is about 2.4. Above them the anti-aliasing of the edges takes over."""
    rng = np.random.default_rng(0)
    grey = np.stack([images.dead_leaves(rng).mean(axis=2) for _ in range(48)])
    power = np.abs(np.fft.rfft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
    use = (frequency > 0.02) & (frequency < 0.2)
    slope = np.polyfit(np.log(frequency[use]), np.log(power.mean(axis=0)[use]), 1)[0]
    assert -2.8 < slope < -1.9


@pytest.mark.long
def test_many_renderings_are_the_same_by_several_processes(monkeypatch):
    monkeypatch.setattr(images.os, "cpu_count", lambda: 2)
    several, shown = images.world_images(1000, "train", seed=3)
    alone, shown_alone = images.world_images(20, "train", seed=3)
    assert torch.equal(several[:20], alone) and shown[:20] == shown_alone and len(shown) == 1000


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sees no CUDA device"):
        list(stages.STAGES["student"].run(runner.Context(folder=tmp_path, device="cuda")))


def test_a_gpu_gets_fewer_and_larger_updates_and_no_setting_that_a_stage_lacks(
    tmp_path, monkeypatch
):
    called = []
    monkeypatch.setattr(mini, "make", lambda folder, names, **settings: called.append(settings))
    monkeypatch.setattr(
        stages, "this_process", lambda: SimpleNamespace(device=torch.device("cuda"))
    )
    for device, given in (("cuda", {}), ("cuda", {"steps": 2}), ("cpu", {})):
        context = runner.Context(folder=tmp_path, device=device, settings=given)
        list(stages.STAGES["teacher"].run(context))
    usual = mini.ON_CUDA["teacher"]
    assert called == [usual, usual | {"steps": 2}, {}]
    trained_by = {"autoencoder": train_autoencoder, "teacher": train_teacher}
    for name, training in (trained_by | {"student": mini.make_student}).items():
        assert mini.ON_CUDA[name].keys() <= inspect.signature(training).parameters.keys()


def test_world_images_show_what_they_say_and_leave_out_the_held_out():
    generated, shown = images.world_images(20, "train", seed=3)
    assert generated.shape == (20, 3, 64, 64) and len(shown) == 20
    assert all((a.colour, a.kind) not in worlds.world(a.world).held_out for a in shown)
    again, _ = images.world_images(20, "train", seed=3)
    assert torch.equal(generated, again)


def test_every_stage_runs_hands_on_and_is_not_repeated(tmp_path, capsys):
    for stage in mini.TRAININGS:
        pool = {"pool": 16} if stage == "student" else {"pool": 64}
        mini.make(tmp_path, (stage,), steps=1, batch_size=4, **pool)
    mini.make(tmp_path)
    assert capsys.readouterr().out.count("not trained again") == len(mini.TRAININGS)
    mini.install(tmp_path, tmp_path / "assets")
    configs = [f.read_text() for f in (tmp_path / "assets").rglob("*.json")]
    assert configs and not any(str(tmp_path) in text for text in configs)
    pipeline = pipelines.load_teacher(tmp_path / "assets" / "mini-teacher")
    student = pipelines.load_student(tmp_path / "assets" / "mini-student", pipeline)
    assert pipelines.generate(student, "a red rose on a sky background", steps=2).shape[0] == 1
    assert (tmp_path / "assets" / "logs" / "student.csv").is_file()
    with pytest.raises(ValueError, match="autoencoder"):
        mini.make(tmp_path, ("unet",))


def test_a_stage_that_was_cut_off_while_writing_is_not_taken_for_finished(tmp_path, monkeypatch):
    def dying(out):
        (out / "new").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(mini.TRAININGS, "trunk", dying)
    with pytest.raises(KeyboardInterrupt):
        mini.make(tmp_path, ("trunk",))
    monkeypatch.setitem(mini.TRAININGS, "trunk", lambda out: (out / "new").mkdir())
    mini.make(tmp_path, ("trunk",))
    assert (tmp_path / "trunk" / "final").is_dir() and not (tmp_path / "trunk" / "new").exists()


def test_balanced_prompts_name_every_combination_equally_often():
    asked = grades.balanced_prompts(2, False)
    assert len(asked) == 2 * len(set(asked)) and len(set(asked)) == 2 * (168 - 24)
    assert len(grades.balanced_prompts(1, True)) == 2 * 24


@pytest.mark.long
def test_a_generator_that_renders_what_it_is_asked_for_gets_full_grades(monkeypatch):
    """And one that draws one object where two were asked for does not; distances are ratios."""
    asked_at = []

    def rendered(pipeline, captions, seed, steps, guidance):
        asked_at.append(guidance)
        return grades.scene_renderings([scenes.read_caption(c) for c in captions], seed=5)

    monkeypatch.setattr(pipelines, "generate", rendered)
    found = grades.grade_scenes(None, parts=3)
    assert list(found["shown"]) == list(grades.SCENE_SETS)
    for shares in found["shown"].values():
        assert shares["binding"] >= 0.97 and shares["samples"] >= 40
    assert found["fd_samples"] == 80 + 133 + 53
    assert all(0.5 < ratio < 2 for ratio in found["fd"].values())
    assert set(asked_at) == {grades.GUIDANCE, grades.FD_GUIDANCE}

    def alone(pipeline, captions, seed, steps, guidance):
        firsts = [
            scenes.Scene(s.groups[:1], s.background) for s in map(scenes.read_caption, captions)
        ]
        return grades.scene_renderings(firsts, seed=5)

    monkeypatch.setattr(pipelines, "generate", alone)
    less = grades.grade_scenes(None, parts=3)
    shown = less["shown"]
    assert shown["one object"]["binding"] >= 0.97
    assert shown["two objects"]["binding"] < 0.4 and shown["two objects"]["background"] >= 0.97

    table = grades.report_scenes({"models": {"teacher": found, "student": less}})
    assert set(grades.SCENE_GOALS) <= set(table.index)
    assert set(table.loc[list(grades.SCENE_GOALS), "met"]) == {"yes"}
    two = "two objects, all attributes on the right one"
    assert table.loc[two, "student"] == f"{100 * shown['two objects']['binding']:.1f} %"
    table = grades.report_scenes({"models": {"teacher": less}})
    assert table.loc[two, "met"] == "no"


def test_psnr_of_a_known_error():
    class Off(torch.nn.Module):
        def encode(self, x):
            self.x = x
            return type("P", (), {"latent_dist": type("D", (), {"mean": x})})

        def decode(self, z):
            return type("S", (), {"sample": self.x * 0 + self.x + 0.02})

    pipeline = type("Pipe", (), {"vae": Off(), "device": "cpu"})
    images_ = torch.zeros(2, 3, 8, 8)
    # an error of 0.02 on a range of 2: 20 log10(2 / 0.02) = 40 dB
    assert grades.psnr(pipeline, images_).tolist() == pytest.approx([40, 40], abs=1e-3)


def test_the_stored_grades_are_complete_and_their_goals_the_codes():
    stored = ledger.read("mini_grades")
    assert stored["goals"] == grades.GOALS
    for name in ("teacher", "student"):
        assert stored[name]["samples"] >= 500
        for key in ("colour", "kind", "background", "fd_over_real_vs_real", "held_out_kind"):
            assert np.isfinite(stored[name][key])


def test_the_page_of_studies_shows_the_stored_grades():
    readme = (Path(__file__).parents[3] / "notebooks" / "studies.md").read_text()
    shown = readme.split("<!-- grades -->")[1].split("<!-- /grades -->")[0].strip()
    assert shown == grades.markdown(grades.report(ledger.read("mini_grades")))


def test_the_page_of_studies_says_where_the_frechet_distance_comes_from():
    readme = (Path(__file__).parents[3] / "notebooks" / "studies.md").read_text()
    stored = ledger.read("mini_fd")
    assert f"on {stored['samples']} images" in readme
    ratios = stored["ratios"]
    assert f"are at {ratios['autoencoder']:.1f} times" in readme
    for guidance in ("1.5", "3", "7.5"):
        told = f"guidance {guidance} at", f"guidance of {guidance} at"
        ratio = f"{ratios[f'guidance {guidance}']:.1f} times"
        assert any(f"{words} {ratio}" in " ".join(readme.split()) for words in told)


def test_the_report_says_which_goals_are_missed():
    row = dict.fromkeys(("colour", "kind", "background"), 0.96)
    row |= {f"held_out_{k}": v for k, v in zip(list(row), (0.9, 0.79, 0.9), strict=True)}
    stored = {
        "classifier": dict.fromkeys(("colour", "kind", "background"), 0.995),
        "autoencoder": {"psnr_worlds": 27.9},
        "teacher": row | {"fd_over_real_vs_real": 2.9},
        "student": row | {"fd_over_real_vs_real": 3.4},
    }
    met = grades.report(stored)["met"].tolist()
    assert met == ["yes", "no", "not measured", "yes", "yes", "yes", "no", "yes"]
