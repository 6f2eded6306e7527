import pandas as pd
import pytest

from kdc.unet.blocks import INNERMOST, PARTS, every_subset

panel = pytest.importorskip(
    "studies.figures.panel", reason="ipywidgets comes with the extra 'book'"
)


@pytest.fixture
def costs():
    """A part costs as many parameters as its place, and a tenth of the time."""
    subsets = every_subset()
    left = [100.0 - sum(PARTS.index(part) for part in subset) for subset in subsets]
    table = pd.DataFrame({"parameters": left, "macs": 2e9, "latency": [x / 100 for x in left]})
    table.index = pd.Index(subsets, tupleize_cols=False)
    return table


def test_the_slider_ticks_parts_in_order_and_boxes_can_be_changed(costs):
    order = list(reversed(PARTS))  # stage 3, mid-block, ...
    slider, boxes, shown = panel.removal_panel(costs, order).children
    assert "(the plan &#x27;full&#x27;)" in shown.value or "(the plan 'full')" in shown.value
    slider.value = 2
    assert [box.description for box in boxes.children if box.value] == ["mid-block", INNERMOST]
    assert "79.0%: 79" in shown.value and "2.0 G" in shown.value  # 100 - 11 - 10
    boxes.children[3].value = True  # layer 3 of a stage that is not there
    assert boxes.children[3].disabled and "79.0%: 79" in shown.value
    slider.value = 0
    assert "100.0%" in shown.value and not any(box.value for box in boxes.children)


def test_a_published_plan_is_called_by_its_name(costs):
    single = [part for part in PARTS if part.startswith("layer")]
    assert "the plan 'kdc'" in panel.describe([*single, "mid-block"], costs)
    assert "the plan 'bk-tiny'" in panel.describe([*single, "mid-block", INNERMOST], costs)
    assert "the plan" not in panel.describe(["mid-block"], costs)
