"""Paths as callers give them."""

from pathlib import Path

import pytest

from kdc.paths import as_path


def test_the_home_folder_is_put_in_once_and_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/runs") == as_path(Path("~/runs")) == tmp_path / "runs"
    assert as_path("runs") == Path("runs") and as_path(".") == Path(".")


@pytest.mark.parametrize("given", ["", "  ", "a\0b", "~nobody-of-that-name/x"])
def test_a_name_that_no_file_can_have_is_refused(given):
    with pytest.raises(ValueError, match="output_dir"):
        as_path(given, "output_dir")


@pytest.mark.parametrize("given", [102, None, b"bytes", ["a"]])
def test_what_is_no_path_is_refused(given):
    with pytest.raises(TypeError, match="output_dir must be a text or a Path"):
        as_path(given, "output_dir")
