"""Charts of a report: marks where the numbers say, and scales that hold them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qnpu.compiler.chart_style import drawing
from qnpu.compiler.report_charts import (
    LayerRange,
    Series,
    TensorShape,
    curve_figure,
    curves_figure,
    histogram_figure,
    lsb_figure,
    series_figure,
    sqnr_figure,
)


def axes_of(figure: Figure) -> Axes:
    with drawing():
        figure.canvas.draw()
    (axes,) = figure.axes
    return axes


def lines(axes: Axes) -> dict[str, list[float]]:
    return {
        str(line.get_label()): np.asarray(line.get_ydata(), float).tolist() for line in axes.lines
    }


def shown(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_sqnr_marks() -> None:
    layers = [LayerRange(str(i), 10.0 + i, 20.0 + i, 40.0 + i, "t", 3) for i in range(3)]
    axes = axes_of(sqnr_figure(layers))
    found = lines(axes)
    assert found["lowest"] == [10.0, 11.0, 12.0] and found["median"] == [20.0, 21.0, 22.0]
    (bars,) = axes.collections
    assert [np.asarray(path.vertices).tolist() for path in bars.get_paths()] == [
        [[i, 10.0 + i], [i, 40.0 + i]] for i in range(3)
    ]


@pytest.mark.parametrize("number", [1, 2, 12, 13, 33, 100])
def test_the_last_of_many_layers_is_named(number: int) -> None:
    labels = [*map(str, range(number - 1)), "head"]
    series = [Series("a", [1.0] * number)]
    found = shown(axes_of(series_figure(labels, series, "loss", "layer")))
    assert found[-1] == "head" and len(found) <= 12
    assert number > 12 or found == labels


def test_scale_of_values() -> None:
    def scale(*values: float | None) -> str:
        labels = [str(i) for i in range(len(values))]
        return axes_of(series_figure(labels, [Series("a", values)], "y", "x")).get_yscale()

    assert scale(1.0, 1000.0) == "log"
    assert scale(1.0, 2.0) == scale(0.0, 1000.0) == scale(-1.0, 1000.0) == "linear"
    assert scale(None, None) == "linear"


def test_gaps_stay_gaps() -> None:
    axes = axes_of(series_figure(["0", "1", "2"], [Series("a", [1.0, None, 2.0])], "y", "x"))
    found = lines(axes)["a"]
    assert found[::2] == [1.0, 2.0] and math.isnan(found[1])


def test_a_curve() -> None:
    axes = axes_of(curve_figure([0, 10, 20], [3.0, 2.0, 1.5], "loss"))
    (line,) = axes.lines
    assert np.asarray(line.get_xydata()).tolist() == [[0, 3.0], [10, 2.0], [20, 1.5]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")


def test_one_curve_of_many_is_in_front() -> None:
    curves = {name: [(0, 1.0), (5, 1.0 / (i + 1))] for i, name in enumerate("abc")}
    axes = axes_of(curves_figure(curves, "b", "loss"))
    assert list(lines(axes).values()) == [[1.0, 1.0], [1.0, 1 / 3], [1.0, 0.5]]
    marked = next(line for line in axes.lines if line.get_label() == "b")
    assert [line.get_color() == marked.get_color() for line in axes.lines] == [False, False, True]


EDGES = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)


def shape(step: float = 0.5) -> TensorShape:
    before, after = [0.0, 0.25, 0.5, 0.25, 0.0], [0.125, 0.25, 0.25, 0.25, 0.125]
    return TensorShape(EDGES, before, after, -3.0, 3.5, step)


def test_histogram_draws_the_encoding() -> None:
    axes = axes_of(histogram_figure(shape()))
    assert [np.asarray(line.get_xdata())[0] for line in axes.lines] == [-3.0, 3.5]
    (band,) = [patch for patch in axes.patches if patch.get_label() == "rounds to zero"]
    x = band.get_extents().transformed(axes.transData.inverted())
    assert (x.x0, x.x1) == pytest.approx((-0.25, 0.25))
    assert axes.get_xlim() == (-4.0, 4.0)


def test_histogram_without_an_encoding() -> None:
    axes = axes_of(histogram_figure(shape(step=0.0)))
    assert not axes.lines
    assert {patch.get_label() for patch in axes.patches} >= {"before", "after"}


@pytest.mark.parametrize("peak", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_histogram_ticks_are_apart_and_around_zero(peak: float) -> None:
    ends = [peak * 2 ** (-place / 2) for place in range(32)]
    edges = [*(-end for end in ends), *reversed(ends)]
    shares = [1 / (len(edges) - 1)] * (len(edges) - 1)
    axes = axes_of(histogram_figure(TensorShape(edges, shares, shares, -peak, peak, 0.1 * peak)))
    labels = shown(axes)
    assert 3 <= len(labels) <= 9 and labels[len(labels) // 2] == "0"
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    boxes.sort(key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_lsb_bars() -> None:
    figure = lsb_figure({"linear": [1000, 0, 0, 0, 0, 0], "norm": [900, 90, 9, 1, 0, 0]})
    with drawing():
        figure.canvas.draw()
    first, second = figure.axes
    assert [bar.get_height() for bar in second.patches if isinstance(bar, Rectangle)] == [
        900, 90, 9, 1, 0, 0
    ]  # fmt: skip
    assert [text.get_text() for text in first.texts] == ["1,000", "0", "0", "0", "0", "0"]
    assert first.get_ylabel() == "linear" and first.get_ylim() == second.get_ylim()
