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
