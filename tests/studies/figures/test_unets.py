import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kdc.unet.costs import count_costs
from studies.figures import unets

BLOCKS = ["down_blocks.0.resnets.0", "up_blocks.3.attentions.1", "other"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_u_net_is_drawn_to_scale_and_missing_blocks_are_outlines():
    table = pd.DataFrame({"all": [4.0, 1.0, 5.0], "cut": [None, 1.0, None]}, BLOCKS)
    figure = unets.u_nets({"cost": table.astype(float)}, ["outermost"])
    whole, cut = ([p for p in axis.patches] for axis in figure.axes)
    large, small = (p.get_width() * p.get_height() for p in whole)
    assert large / small == pytest.approx(4) and len(whole) == 2  # what has no place is not drawn
    assert [p.get_facecolor()[3] for p in cut] == [0.0, 1.0]
    assert cut[0].get_width() == pytest.approx(whole[0].get_width())  # as large as what is missing
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["all: 100% of the cost", "cut: 10% of the cost"]
    (x, y), (u, v) = (p.get_center() for p in whole)
    assert x < u and y == v  # the same stage, down at the left and up at the right
    assert figure.axes[0].texts[0].get_text() == "outermost"


def test_no_two_blocks_overlap_even_where_all_are_as_large(tiny_unet):
    blocks = [b for b in count_costs(tiny_unet).index if b != "total"]
    axis = unets.u_nets({"cost": pd.DataFrame({"all": 1.0}, blocks)}).axes[0]
    boxes = [patch.get_bbox() for patch in axis.patches]
    assert len(boxes) == sum(b.count(".") >= 2 for b in blocks)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
