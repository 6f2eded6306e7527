"""ONNX Runtime draws what PyTorch draws."""

import pytest

import kdc
from kdc.__main__ import main

PROMPTS = ["a red rose on a night background", "a white tulip on a sand background"]


@pytest.mark.long
def test_onnx_runtime_draws_the_same_images(tmp_path, teacher, capsys):
    """The embedded student, which has no mid-block, by the command; other numbers of images too."""
    main(["export", "mini-student", "--onnx", "--output-dir", str(tmp_path / "out")])
    assert str(tmp_path / "out") in capsys.readouterr().out
    whole = kdc.load_student("mini", teacher)
    runtime = kdc.load_onnx(tmp_path / "out", threads=1)
    for prompts, guidance in ((PROMPTS, 7.5), (PROMPTS[:1], 1.0), (PROMPTS * 2, 3.0)):
        ours = kdc.generate(runtime, prompts, seed=1, steps=5, guidance=guidance)
        expected = kdc.generate(whole, prompts, seed=1, steps=5, guidance=guidance)
        difference = (ours.int() - expected.int()).abs()
        assert ours.shape == expected.shape and difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01
    assert "onnx/" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="export it with onnx=True"):
        kdc.load_onnx(tmp_path)
