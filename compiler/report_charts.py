"""Charts of a report that are not of a search: SQNR, losses, histograms, learning, parity.

They are drawn small enough for a telephone. A caller saves them (``chart_style.inline_svg``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from qnpu.compiler.chart_style import BLUE, GREEN, GREY, GRID, POINTS_PER_INCH, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.6, 3.0
_ROW_HEIGHT = 0.75
_MOST_TICKS = 12
_FAR_APART = 20.0
_CLEAR_OF_ZERO = 8.0
_LSB = ("0", "1", "2", "3", "4", "more")


@dataclass(frozen=True, slots=True)
class LayerRange:
    """SQNR of a layer's tensors, dB; of those whose error is not zero.

    Attributes:
        label: of the layer.
        lowest, median, highest: dB.
        worst: name of the tensor with the lowest.
        tensors: how many.
    """

    label: str
    lowest: float
    median: float
    highest: float
    worst: str
    tensors: int


@dataclass(frozen=True, slots=True)
class Series:
    """Values by place; None where there is none.

    Attributes:
        label: in the legend.
        values: one for each place.
    """

    label: str
    values: Sequence[float | None]


def sqnr_figure(layers: Sequence[LayerRange]) -> Figure:
    """A bar from lowest to highest SQNR for each layer, with marks at the lowest and the median."""
    figure, axes = _small()
    places = range(len(layers))
    lowest = [layer.lowest for layer in layers]
    axes.vlines(places, lowest, [layer.highest for layer in layers], color=GREY, linewidth=2)
    medians = [layer.median for layer in layers]
    axes.plot(places, medians, "o", color=BLUE, markersize=5, label="median")
    axes.plot(places, lowest, "v", color=VERMILION, markersize=6, label="lowest")
    _name_places(axes, [layer.label for layer in layers])
    axes.set_xlabel("layer")
    axes.set_ylabel("SQNR, dB")
    _legend(axes)
    return figure


def series_figure(
    labels: Sequence[str], series: Sequence[Series], what: str, along: str, *, joined: bool = True
) -> Figure:
    """Up to three series over named places, the first in front.

    The axis is logarithmic where values are far apart.

    Args:
        labels: of the places.
        series: of as many values.
        what: label of the axis of values.
        along: label of the axis of places.
        joined: by lines.
    """
    figure, axes = _small()
    styles = ((VERMILION, "v", "--"), (BLUE, "o", "-"), (GREEN, "s", ":"))
    for order, one, (colour, marker, line) in zip(count(3, -1), series, styles, strict=False):
        axes.plot(
            range(len(labels)),
            [math.nan if value is None else value for value in one.values],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=line if joined else "",
            label=one.label,
            zorder=order,
        )
    _scale_values(axes, [value for one in series for value in one.values if value is not None])
    _name_places(axes, labels)
    axes.set_xlabel(along)
    axes.set_ylabel(what)
    _legend(axes)
    return figure


def curve_figure(steps: Sequence[float], losses: Sequence[float], what: str) -> Figure:
    """A loss over steps."""
    figure, axes = _small()
    axes.plot(steps, losses, color=BLUE, marker="o", markersize=4, linewidth=1.5)
    _scale_values(axes, losses)
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(color=GRID, linewidth=0.6)
    return figure


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], marked: str, what: str
) -> Figure:
    """Many curves in one chart, one of them in front.

    Args:
        curves: name → steps and values.
        marked: name of the one in front.
        what: label of the axis of values.
    """
    figure, axes = _small()
    label: str | None = "each of the others"
    for name, points in curves.items():
        if name != marked:
            axes.plot(*zip(*points, strict=True), color=GREY, linewidth=0.8, label=label)
            label = None
    steps, values = zip(*curves[marked], strict=True)
    axes.plot(steps, values, color=VERMILION, marker="o", markersize=4, label=marked)
    _scale_values(axes, [value for points in curves.values() for _, value in points])
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(color=GRID, linewidth=0.6)
    _legend(axes)
    return figure


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Histogram of a tensor before and after rotation; see ``TensorHistogram``.

    Attributes:
        edges: of the bins, ascending, symmetric about zero.
        before, after: share of all elements in each bin.
        low, high: ends of the encoding's range, real.
        step: real units per LSB; 0 where there is no encoding.
    """

    edges: Sequence[float]
    before: Sequence[float]
    after: Sequence[float]
    low: float
    high: float
    step: float


def histogram_figure(shape: TensorShape) -> Figure:
    """Shares of elements by value, both axes logarithmic; the range of codes drawn as lines."""
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415

    figure, axes = _small()
    nearest, farthest = min(edge for edge in shape.edges if edge > 0), shape.edges[-1]
    axes.set_xscale("symlog", linthresh=nearest, linscale=0.3)
    axes.set_xlim(-farthest, farthest)
    least = min(share for share in (*shape.before, *shape.after) if share > 0) / 2
    axes.set_yscale("log")
    axes.set_ylim(least, 1)
    axes.stairs(shape.after, shape.edges, baseline=least, fill=True, color=BLUE, alpha=0.35)
    axes.stairs(shape.after, shape.edges, baseline=least, color=BLUE, linewidth=1.5, label="after")
    axes.stairs(
        shape.before,
        shape.edges,
        baseline=least,
        color=VERMILION,
        linewidth=1.5,
        linestyle="--",
        label="before",
    )
    if shape.step > 0:
        half = shape.step / 2
        axes.axvspan(-half, half, color=GREY, alpha=0.25, linewidth=0, label="rounds to zero")
        for end, label in ((shape.low, "range of codes"), (shape.high, None)):
            axes.axvline(end, color=GREEN, linewidth=2, label=label)
    # None so near to zero that its number would cover that of zero.
    first = math.ceil(math.log10(nearest * _CLEAR_OF_ZERO))
    powers = range(first, math.floor(math.log10(farthest)) + 1)
    apart = max(math.ceil(len(powers) / 3), 1)
    ticks = [10.0**power for power in reversed(powers)][::apart]
    axes.xaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0.0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain)
    axes.set_xlabel("value")
    axes.set_ylabel("share of elements")
    _legend(axes)
    return figure


def lsb_figure(kinds: Mapping[str, Sequence[int]]) -> Figure:
    """A row of bars for each kind of operator: how many codes are so many LSB off.

    Args:
        kinds: name → how many codes are 0, 1, 2, 3, 4, and more LSB off.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import NullLocator  # noqa: PLC0415

    size = (_WIDTH, 0.5 + _ROW_HEIGHT * len(kinds))
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH, layout="constrained")
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    most = max((codes for counts in kinds.values() for codes in counts), default=1)
    for axes, (name, counts) in zip(rows, kinds.items(), strict=True):
        axes.bar(range(len(_LSB)), counts, color=[BLUE, *[VERMILION] * 5], width=0.7)
        axes.set_yscale("log")
        axes.set_ylim(0.5, max(most, 1) * 30.0)
        axes.yaxis.set_major_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        for place, codes in enumerate(counts):
            axes.text(place, max(codes, 0.5) * 1.3, f"{codes:,}", ha="center", va="bottom")
    rows[-1].set_xticks(range(len(_LSB)), _LSB)
    rows[-1].set_xlabel("LSB off")
    return figure


def _small() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=POINTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _name_places(axes: Axes, labels: Sequence[str]) -> None:
    """Ticks at places, not all of many; the last, which often is the head, always."""
    last = len(labels) - 1
    every = math.ceil(len(labels) / _MOST_TICKS)
    shown = [place for place in range(0, len(labels), every) if place + every <= last]
    shown.append(last)
    axes.set_xticks(shown, [labels[place] for place in shown])
    axes.set_xlim(-0.5, last + 0.5)
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def _scale_values(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where values are above zero and far apart."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    axes.yaxis.set_major_formatter(_plain)
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not (low > 0 and high / low > _FAR_APART):
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain)


def _legend(axes: Axes) -> None:
    entries = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=min(len(entries), 2),
        frameon=False,
        borderaxespad=0,
    )


def _plain(value: float, _position: float | None) -> str:
    """A tick's number. Matplotlib's own formatters set powers of ten as mathematics."""
    return f"{value:g}"
