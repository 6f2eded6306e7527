import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from kdc import figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_grid_shows_the_pictures_it_was_given():
    signed = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    whole = ((signed + 1) * 127.5 + 0.5).to(torch.uint8)
    figure = figures.picture_grid({"a": [signed, signed], "b": [whole]}, ["one two", "three"])
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 3
    assert (images[0] == images[2]).all()
    assert figure.axes[0].get_title() == "one two" and figure.axes[0].get_ylabel() == "a"


def test_curves_draw_mean_and_range_and_skip_missing_terms():
    runs = [pd.DataFrame({"step": [1, 2], "loss": [2.0, v]}) for v in (1.0, 3.0)]
    figure = figures.curves({"two seeds": runs, "other": runs[0]}, ["loss", "task"])
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == [2.0, 2.0]
    assert len(figure.axes[0].collections) == 1 and not figure.axes[1].lines


def test_bars_are_as_high_as_their_values():
    figure = figures.bars({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 3.0}}, "height")
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights[:2] == [1.0, 3.0] and heights[2] == 2.0


def test_a_u_net_is_drawn_to_scale_and_missing_blocks_are_outlines():
    areas = {
        "cost": {"down_blocks.0.resnets.0": 4.0, "up_blocks.3.attentions.1": 1.0, "other": 5.0}
    }
    figure = figures.u_nets(
        {"all": list(areas["cost"]), "cut": ["up_blocks.3.attentions.1"]}, areas
    )
    whole, cut = ([p for p in axis.patches] for axis in figure.axes[:2])
    large, small = (p.get_width() * p.get_height() for p in whole)
    assert large / small == pytest.approx(4) and len(whole) == 2  # what has no place is not drawn
    assert [p.get_facecolor()[3] for p in cut] == [0.0, 1.0]
    assert [axis.get_title() for axis in figure.axes] == ["all: 100% of cost", "cut: 10% of cost"]
    (x, y), (u, v) = (p.get_center() for p in whole)
    assert x < u and y == v  # the same stage, down at the left and up at the right


def test_a_heat_map_shows_the_table():
    table = pd.DataFrame([[1.0, 10.0], [100.0, 0.1]], index=["a", "b"], columns=[5, 9])
    axis = figures.heat_map(table, "error").axes[0]
    assert (axis.images[0].get_array() == table.to_numpy()).all()
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b"]


def test_trade_offs_show_means_and_spread_and_every_control():
    rows = pd.DataFrame(
        {
            "candidate": ["kdc", "kdc", "random: x", "random: x"],
            "size": [1, 1, 2, 3],
            "error": [1.0, 3.0, 5.0, 6.0],
        }
    )
    figure = figures.trade_offs(rows, {"size": "MB"}, {"error": "E"}, levels={"error": 0.5})
    axis = figure.axes[0]
    container = axis.containers[0]
    assert container[0].get_xydata().tolist() == [[1.0, 2.0]]
    assert container[2][0].get_segments()[0][:, 1].tolist() == [1.0, 3.0]
    control = next(line for line in axis.lines if line.get_label() == "random: x")
    assert control.get_xydata().tolist() == [[2.0, 5.0], [3.0, 6.0]]
    assert axis.get_xlabel() == "MB" and axis.get_ylabel() == "E"
