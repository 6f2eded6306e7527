import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from studies import figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_grid_shows_the_images_it_was_given():
    signed = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    whole = ((signed + 1) * 127.5 + 0.5).to(torch.uint8)
    figure = figures.image_grid({"a": [signed, signed], "b": [whole]}, ["one two", "three"])
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


def test_lines_go_through_their_points_on_the_axes_that_were_asked_for():
    panels = {"a": {"one": ([1, 2], [3, 4]), "two": ([1, 2], [5, 6])}, "b": {"one": ([1], [2])}}
    figure = figures.lines(panels, ["x", "y"], ["semilogx", "log"], {"a": ("goal", 3.5)})
    left, right = figure.axes
    assert left.lines[1].get_xydata().tolist() == [[1, 5], [2, 6]]
    assert left.lines[2].get_ydata() == [3.5, 3.5] and len(right.lines) == 1
    assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == ("log", "linear", "log")
    assert [axis.get_xlabel() for axis in figure.axes] == ["x", "y"]


def test_long_numbers_do_not_run_into_each_other_on_an_axis():
    panels = {"few": {"": ([1, 50], [1, 2])}, "long": {"": ([27_000, 1_840_000], [1, 2])}}
    figure = figures.lines(panels, ["x", "x"], ["semilogx"] * 2)
    figure.canvas.draw()
    few, long = ([t.get_text() for t in axis.get_xticklabels()] for axis in figure.axes)
    assert {"1", "2", "5", "10", "20", "50"} <= set(few)
    assert all("10^" in text for text in long if text)


def test_bars_are_as_high_as_their_values():
    figure = figures.bars({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 3.0}}, "height")
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights[:2] == [1.0, 3.0] and heights[2] == 2.0


def test_bars_reach_to_the_mean_and_over_the_draws():
    draws = {
        "x": pd.DataFrame([[1.0, 3.0], [5.0, 5.0]], index=["a", "b"]),
        "y": pd.DataFrame([[7.0], [9.0]], index=["b", "a"]),  # rows go by name
    }
    axis = figures.spread_bars(draws, "error", log_scale=False).axes[0]
    assert [patch.get_width() for patch in axis.patches] == [2.0, 5.0, 9.0, 7.0]
    ends = axis.containers[0].get_children()[0].get_segments()[0]
    assert ends[:, 0].tolist() == [1.0, 3.0]
    first, second = axis.patches[0], axis.patches[2]
    assert first.get_y() > second.get_y() and [t.get_text() for t in axis.get_yticklabels()] == [
        "a",
        "b",
    ]


def test_dots_stand_at_their_values_with_their_spread():
    table = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}, index=["a", "b"])
    spread = {"y": (pd.Series([2.5, 3.0]), pd.Series([3.0, 6.0]))}
    axis = figures.dots(table, "share", spread).axes[0]
    plain, wide = axis.containers
    assert plain[0].get_xydata().tolist() == [[1.0, 0.0], [2.0, 1.0]] and not plain[2]
    assert [s[:, 0].tolist() for s in wide[2][0].get_segments()] == [[2.5, 3.0], [3.0, 6.0]]
    assert axis.yaxis_inverted() and axis.get_xlabel() == "share"


def test_halving_round_maps_show_their_tables_on_one_scale():
    table = pd.DataFrame([[1.0, 10.0], [100.0, 0.1]], index=["a", "b"], columns=[5, 9])
    left, right, _ = figures.heat_map({"one": table, "ten": table * 10}, "error").axes
    assert (right.images[0].get_array() == table.to_numpy() * 10).all()
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.1, 1000.0)
    assert [t.get_text() for t in left.get_yticklabels()] == ["a", "b"]
    assert left.get_title() == "one"


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


def test_a_family_has_one_mark_and_a_name_one_colour():
    names = ["a: x", "b: x", "a: y", "hand"]
    rows = pd.DataFrame({"candidate": names, "size": range(4), "error": range(4)})
    axis = figures.trade_offs(rows, {"size": "MB"}, {"error": "E"}).axes[0]
    look = {c.get_label(): (c[0].get_marker(), c[0].get_color()) for c in axis.containers}
    assert look["a: x"][0] == look["a: y"][0] != look["b: x"][0]
    assert look["a: x"][1] == look["b: x"][1] != look["a: y"][1]
    assert look["hand"][0] == "o"


def test_doses_draw_a_panel_a_fault_and_a_line_a_score():
    rows = pd.DataFrame(
        [
            {"fault": fault, "dose": dose, "fd": dose + seed, "clip": 1 - dose}
            for fault in ("blur", "jpeg", "hue")
            for dose in (0, 2)
            for seed in (0, 1)
        ]
    )
    figure = figures.doses(rows, ["fd", "clip"], columns=2)
    shown = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["blur", "jpeg", "hue"]
    assert shown[0].lines[0].get_ydata().tolist() == [0.5, 2.5]
    assert [text.get_text() for text in shown[0].get_xticklabels()] == ["0", "2"]


def test_a_forest_has_a_line_a_comparison_and_a_panel_a_measure():
    """Its marks lie at the differences, filled where these are significant among all."""
    rows = [
        ("ahead", "new", "old", "accuracy", 0.3, 0.2, 0.4, 0.01, "holds"),
        ("ahead", "new", "old", "fd", 2.0, -1.0, 5.0, 0.9, "open"),
        ("ahead", "newer", "old", "accuracy", -0.1, -0.2, -0.0, 0.08, "refuted"),
    ]
    names = ["claim", "candidate", "baseline", "measure", "mean", "low", "high", "adjusted"]
    table = pd.DataFrame(rows, columns=[*names, "outcome"])
    figure = figures.forest(table, lambda measure: measure == "accuracy", {"fd": "distance"})
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["accuracy", "distance"]
    assert left.get_xlabel().startswith("better") and right.get_xlabel().endswith("better")
    marks = [bar.lines[0] for bar in left.containers]
    assert [mark.get_xdata()[0] for mark in marks] == [0.3, -0.1]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, True]
    (low, high) = left.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((0.2, 0.4))
    texts = [text.get_text() for text in left.get_yticklabels()]
    assert "".join(texts).count("ahead") == 1 and len(texts) == 2
