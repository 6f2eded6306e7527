import pytest
from PIL import Image

from kdc import pipelines
from studies.__main__ import main
from studies.common import ledger, runner
from studies.mini import grades, make


def test_grades_are_written_and_shown_beside_their_goals(tmp_path, monkeypatch, capsys):
    generated = dict.fromkeys(("colour", "kind", "background"), 0.97)
    generated |= {f"held_out_{name}": 0.7 for name in list(generated)}
    generated |= {"fd_over_real_vs_real": 2.5}
    monkeypatch.setattr(pipelines, "load_teacher", lambda *a: "teacher")
    monkeypatch.setattr(pipelines, "load_student", lambda *a: "student")
    monkeypatch.setattr(grades, "grade_classifier", lambda: dict.fromkeys(grades.GOALS, 1.0))
    found = {"psnr_worlds": 29.0, "psnr_photos": 21.0}
    monkeypatch.setattr(grades, "grade_autoencoder", lambda pipeline, photos: found)
    seen = []
    monkeypatch.setattr(grades, "grade_pipeline", lambda p: seen.append(p) or generated)
    with pytest.raises(SystemExit):
        main(["mini", "grades", "--photos", str(tmp_path / "nowhere")])
    assert "neither a folder" in capsys.readouterr().err and not seen
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    main(["mini", "grades", "--photos", str(tmp_path), "--results", str(tmp_path)])
    stored = ledger.read("mini_grades", tmp_path)
    assert seen == ["teacher", "student"] and stored["teacher"] == generated
    shown = capsys.readouterr().out
    assert "| autoencoder on photographs | 22.0 dB | 21.0 dB | no | - |" in shown
    assert "| 97.0 % | yes | 97.0 % |" in shown


def test_mini_passes_stages_and_steps_on_and_installs_when_asked(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(make, "make", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(make, "install", lambda folder: calls.append(folder))
    main(["mini", "trunk", "clip", "--steps", "3", "--output-dir", str(tmp_path)])
    assert calls == [((tmp_path, (name,)), {"steps": 3}) for name in ("clip", "trunk")]
    calls.clear()
    main(["mini", "--install", "--output-dir", str(tmp_path)])
    assert [call[0][1] for call in calls[:-1]] == [(name,) for name in make.TRAININGS]
    assert calls[-1] == str(tmp_path)
    with pytest.raises(SystemExit):
        main(["mini", "--steps", "1", "--install"])
    assert "trial" in capsys.readouterr().err


@pytest.mark.parametrize("chapter", runner.CHAPTERS)
def test_the_help_names_every_stage_and_a_wrong_one_is_one_line(chapter, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([chapter, "--help"])
    shown = capsys.readouterr().out
    assert not stopped.value.code
    for name, stage in runner.stages_of(chapter).items():
        assert name in shown and stage.help.split()[0] in shown
    with pytest.raises(SystemExit) as stopped:
        main([chapter, "roof"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "unknown stages roof" in said and next(iter(runner.stages_of(chapter))) in said


def test_an_unknown_chapter_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["slim"])
    assert "mini, slimming, distillation" in capsys.readouterr().err


def test_photographs_are_asked_for_before_anything_else(capsys):
    with pytest.raises(SystemExit):
        main(["replay", "buffers", "photos"])
    assert "--photos FOLDER" in capsys.readouterr().err
