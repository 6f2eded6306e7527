"""Looks at the provenance of every stored result, and says what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from studies.common import ledger


def faults(name: str, folder: Path = ledger.RESULTS) -> list[str]:
    """What is wrong with the provenance of a result: its commit, its date, its models."""
    known = ledger.provenance_of(name, folder)
    commit, found = known.get("commit"), []
    if not commit:
        found.append("no commit")
    elif commit.endswith("-dirty"):
        found.append(f"a tree with changes that were not committed: {commit}")
    elif not in_history(commit):
        found.append(f"a commit that is not in the history: {commit}")
    if not known.get("made"):
        found.append("no date")
    if others := ledger.other_models(name, folder):
        found.append(f"other models than are shipped: {', '.join(others)}")
    return found


def in_history(commit: str) -> bool:
    """Whether the present commit comes after that one."""
    command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, cwd=ledger.RESULTS.parent, capture_output=True).returncode == 0


def main(folder: Path = ledger.RESULTS) -> int:
    """Print a line for each file with a fault; 1 where there is one."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    found = {name: faults(name, folder) for name in names}
    wrong = {name: said for name, said in found.items() if said}
    for name, said in wrong.items():
        print(f"{name}: {'; '.join(said)}")
    print(f"{len(wrong)} of {len(names)} results have a fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
