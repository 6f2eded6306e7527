"""The spelling of the prose is British, and the check of it sees prose and nothing else."""

from tools import spelling

PAGE = """A colour of teh page, `color` in code, and [a link](center.md).

```python
color = "behavior"
```
The center.
"""
MODULE = '''"""Of the color."""

# Its behavior.
color = "flavor"  # as matplotlib says: `color`


def gray(center):
    r"""Of an honor, `center`."""
    return f"""labor"""
'''


def test_prose_is_checked_and_code_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(spelling, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "module.py").write_text(MODULE)
    found = spelling.findings([tmp_path / "page.md", tmp_path / "module.py"])
    assert sorted(found) == [
        "module.py:1: color ==> colour",
        "module.py:3: behavior ==> behaviour",
        "module.py:8: honor ==> honour",
        "page.md:1: teh ==> the",
        "page.md:6: center ==> centre",
    ]


def test_everything_that_is_written_is_british():
    files = spelling.known_files()
    assert len(files) > 200
    assert spelling.findings(files) == []
