"""Small trainings of other layouts on scenes, and what is measured of them."""

import pytest

from kdc.unet.blocks import PARTS
from studies.common import ledger, runner
from studies.mini import pilots, stages
from studies.mini.pilots import Settings, Variant

TINY = Settings(steps=2, batch_size=2, coding_steps=2, pool=24, scenes=2, sampling_steps=2,
                draws=1, count=2)  # fmt: skip


@pytest.mark.long
def test_a_pilot_trains_measures_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(pilots, "VARIANTS", {"small, 32": Variant((16, 16, 16, 16), 32)})
    context = runner.Context(tmp_path / "results", tmp_path, settings=vars(TINY))
    (path,) = stages.STAGES["pilots"].run(context)
    (row,) = ledger.read("mini_pilots", tmp_path / "results")["rows"]
    assert (row["variant"], row["side"], row["images"]) == ("small, 32", 32, 4)
    assert set(row["importance"]) == set(PARTS)
    assert all(one["low"] <= one["error"] <= one["high"] for one in row["importance"].values())
    assert 0 <= row["shown"]["binding"] <= row["shown"]["count"] <= 1
    assert 5 < row["psnr"] < 40
    monkeypatch.setattr(pilots, "train_teacher", None)
    assert list(stages.STAGES["pilots"].run(context)) == [path]
    with pytest.raises(ValueError, match="steps"):
        pilots.measure("small, 32", tmp_path / "pilots", Settings(**vars(TINY) | {"steps": 3}))


def test_today_is_the_layout_that_is_shipped(teacher):
    shipped = teacher.unet.config
    assert pilots.VARIANTS["today"] == Variant(
        tuple(shipped.block_out_channels), shipped.sample_size
    )
