import pytest
from PIL import Image

from kdc import pipelines
from studies.__main__ import main
from studies.common import ledger
from studies.mini import grades
from studies.mini import stages as mini


def test_grades_are_written_and_shown_beside_their_goals(tmp_path, monkeypatch, capsys):
    generated = dict.fromkeys(("colour", "kind", "background"), 0.97)
    generated |= {f"held_out_{name}": 0.7 for name in list(generated)} | {
        "fd_over_real_vs_real": 2.5
    }
    monkeypatch.setattr(pipelines, "load_teacher", lambda *a: "teacher")
    monkeypatch.setattr(pipelines, "load_student", lambda *a: "student")
    monkeypatch.setattr(grades, "grade_classifier", lambda: dict.fromkeys(grades.GOALS, 1.0))
    found = {"psnr_worlds": 29.0, "psnr_photos": 21.0}
    monkeypatch.setattr(grades, "grade_autoencoder", lambda pipeline, photos: found)
    seen = []
    monkeypatch.setattr(grades, "grade_pipeline", lambda p: seen.append(p) or generated)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        main(["grades", "--photos", str(tmp_path / "nowhere")])
    assert not seen
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    main(["grades", "--photos", str(tmp_path), "--results", str(tmp_path)])
    stored = ledger.read("mini_grades", tmp_path)
    assert seen == ["teacher", "student"] and stored["teacher"] == generated
    shown = capsys.readouterr().out
    assert "| autoencoder on photographs | 22.0 dB | 21.0 dB | no | - |" in shown
    assert "| 97.0 % | yes | 97.0 % |" in shown


def test_mini_passes_stages_and_steps_on_and_installs_when_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(mini, "make", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(mini, "install", lambda folder: calls.append(folder))
    main(["mini", "--only", "clip", "trunk", "--steps", "3", "--output-dir", str(tmp_path)])
    assert calls == [((str(tmp_path), ("clip", "trunk")), {"steps": 3})]
    main(["mini", "--install", "--output-dir", str(tmp_path)])
    assert calls[1:] == [((str(tmp_path), ()), {}), str(tmp_path)]
    main(["mini", "--steps", "3"])
    assert calls[3] == (("outputs/mini-trial", ()), {"steps": 3})
    with pytest.raises(ValueError, match="trial"):
        main(["mini", "--steps", "0", "--install"])


def test_an_unknown_stage_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unet.*autoencoder, classifier"):
        main(["mini", "--only", "unet"])
