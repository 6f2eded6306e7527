import json

import pytest

from studies.common import ledger


def test_a_result_comes_back_with_its_provenance(tmp_path):
    path = ledger.write("speed", {"ratio": 0.5}, tmp_path, seed=3)
    assert ledger.read("speed", tmp_path) == {"ratio": 0.5}
    stored = json.loads(path.read_text())["provenance"]
    assert stored["seed"] == 3 and stored["packages"]["torch"] and "made" in stored
    assert [p.name for p in tmp_path.iterdir()] == ["speed.json"]


def test_a_failed_write_leaves_the_old_result(tmp_path):
    ledger.write("speed", {"ratio": 0.5}, tmp_path)
    with pytest.raises(TypeError):
        ledger.write("speed", {"ratio": object()}, tmp_path)
    assert ledger.read("speed", tmp_path) == {"ratio": 0.5}


def test_an_unknown_result_names_the_known_ones(tmp_path):
    ledger.write("speed", {}, tmp_path)
    with pytest.raises(FileNotFoundError, match="there are: speed"):
        ledger.read("sped", tmp_path)
