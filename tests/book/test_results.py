"""`make results-check` finds each fault of a provenance."""

import json
import subprocess

from studies.common import ledger
from tools import results


def head() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, cwd=ledger.RESULTS.parent, capture_output=True, text=True)
    return found.stdout.strip()


def stored(folder, name, **provenance):
    known = {"commit": head(), "made": "2026-01-01", "models": {}}
    text = json.dumps({"values": {}, "provenance": known | provenance})
    (folder / f"{name}.json").write_text(text)


def test_each_fault_is_found(tmp_path, capsys):
    stored(tmp_path, "right")
    stored(tmp_path, "dirty", commit=f"{head()}-dirty")
    stored(tmp_path, "unknown", commit="0" * 12)
    stored(tmp_path, "nameless", commit=None, made=None)
    stored(tmp_path, "mini_grades", models={"teacher": "another"})
    assert results.main(tmp_path) == 1
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert "not committed" in lines["dirty"] and "not in the history" in lines["unknown"]
    assert lines["nameless"] == "no commit; no date" and "right" not in lines
    assert "other models" in lines["mini_grades"]
    for path in tmp_path.glob("*.json"):
        if path.stem != "right":
            path.unlink()
    assert results.main(tmp_path) == 0
