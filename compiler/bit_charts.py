"""Charts of a search for bits, as SVG: its Pareto front, and a heat map of losses and bits.

Matplotlib takes about a second to import, so functions import what they need of it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qnpu.compiler.chart_style import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    POINTS_PER_INCH,
    VERMILION,
    drawing,
    save_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.path import Path as MplPath
    from matplotlib.transforms import Bbox

    from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, TensorBits

_NO_LOSS = "#c8c8c8"

Point = tuple[float, float]
Points = npt.NDArray[np.float64]
Colour = tuple[float, float, float, float]


# ------------------------------------------------------------------------------------------ front

_FRONT_SIZE = (8.0, 5.0)
_LABEL_SIZE = 8.0
_LINE_SPACING = 1.2
_FAR_ABOVE = 3.0
_EVEN_TICKS_UP_TO = 6.0
_CLEARANCE = 2.0
_DISTANCES = (7.0, 12.0, 20.0, 32.0, 44.0, 56.0, 68.0, 80.0)
_LEADER_FROM = 20.0
_DIRECTIONS = ((1, 1), (1, 0), (0, 1), (-1, 1), (1, -1), (-1, 0), (0, -1), (-1, -1), (0.5, 1))


@dataclass(frozen=True, slots=True)
class _Kind:
    """How plans of a kind are drawn; ``size`` in points, ``order`` from back to front."""

    legend: str
    marker: str
    size: float
    colour: str
    order: int


_KINDS = {
    "chosen": _Kind("chosen plan", "*", 15, VERMILION, 4),
    "others": _Kind("by simple rules", "s", 6, GREEN, 3),
    "front": _Kind("Pareto front", "o", 5, BLUE, 5),
}


@dataclass(frozen=True, slots=True)
class _Marker:
    """A plan as drawn.

    Attributes:
        kind: key of ``_KINDS``.
        gid: of its marker in the SVG; its label's has ``-label`` behind it.
        x: latency in the axis' unit.
        y: perplexity relative to the float one; just below the upper edge if it is off the chart.
        label: its name; if it is off the chart, a second line with the perplexity.
        to_scale: False if it is off the chart.
    """

    kind: str
    gid: str
    x: float
    y: float
    label: str
    to_scale: bool


def write_front(search: BitSearch, path: Path) -> None:
    """Draws modelled latency against measured perplexity of the front and the plans beside it.

    Perplexity is relative to the float one, on a logarithmic axis. A plan far worse than all of the
    front, or of no finite perplexity, is drawn at the upper edge, its value in its label.

    Args:
        search: whose plans to draw.
        path: of the SVG file. The same search gives the same bytes.
    """
    with drawing():
        save_svg(front_figure(search), path, front_title(search), front_description(search))


def front_description(search: BitSearch) -> str:
    """What the chart shows, in words."""
    ratio = search.chosen.perplexity / search.float_perplexity
    return (
        f"Modelled latency on {search.target} against measured perplexity:"
        f" {len(search.front)} plans of the front, {len(search.others)} by simple rules."
        f" The chosen one takes {search.chosen.seconds:.4g} s for {search.workload} tokens,"
        f" at {ratio:.4g} times the float perplexity."
    )


def front_title(search: BitSearch) -> str:
    """What the chart is called."""
    return f"Latency and perplexity by choice of bits: {search.target}"


def front_figure(search: BitSearch) -> Figure:
    """The chart; see ``write_front``."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_FRONT_SIZE, dpi=POINTS_PER_INCH)
    axes = figure.add_axes((0.1, 0.15, 0.85, 0.75))
    plans = {
        "chosen": [search.chosen],
        "others": list(search.others),
        "front": list(search.front),
    }
    unit, factor = _unit([plan.seconds for plan in chain(*plans.values())])
    low, high, ceiling = _perplexity_range(search)
    _set_perplexity_axis(axes, low, high)
    _set_latency_limits(axes, [plan.seconds * factor for plan in chain(*plans.values())])
    edge = high * (low / high) ** 0.05
    markers = [
        _marker(
            kind, index, (plan.seconds * factor, _ratio(plan, search)), plan.label, ceiling, edge
        )
        for kind, group in plans.items()
        for index, plan in enumerate(group)
    ]
    front = [marker for marker in markers if marker.kind == "front"]
    line = np.array([(item.x, item.y if item.to_scale else math.nan) for item in front])
    line = line.reshape(-1, 2)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.plot(line[:, 0], line[:, 1], color=BLUE, linewidth=1.5, gid="front", zorder=2)
    for marker in markers:
        _draw_marker(axes, marker)
    _draw_labels(axes, markers, line)
    axes.set_xlabel(f"latency in {unit}: modelled, {search.target}, {search.workload} tokens")
    axes.set_ylabel(f"perplexity relative to float ({search.float_perplexity:.4g}): measured")
    axes.set_title(f"{front_title(search)}\nbudget: {search.budget}", loc="left")
    _draw_legend(axes)
    return figure


def _ratio(plan: MeasuredPlan, search: BitSearch) -> float:
    return plan.perplexity / search.float_perplexity


def _unit(seconds: Sequence[float]) -> tuple[str, float]:
    """A unit that the longest time is at least one of, and how many make a second."""
    longest = max(seconds)
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    return next((unit for unit in units if longest * unit[1] >= 1), units[-1])


def _perplexity_range(search: BitSearch) -> tuple[float, float, float]:
    """Limits of the axis, and the most that is drawn to scale; relative to float."""
    reach = [_ratio(plan, search) for plan in (search.chosen, *search.front)]
    ceiling = _FAR_ABOVE * max(filter(math.isfinite, reach), default=1.0)
    ratios = reach + [_ratio(plan, search) for plan in search.others]
    shown = [1.0, *(ratio for ratio in ratios if _on_chart(ratio, ceiling))]
    low, high = min(shown), max(shown)
    padding = max(high / low, 1.02) ** 0.08
    above = padding if len(shown) == len(ratios) + 1 else padding**2.5
    return low / padding, high * above, ceiling


def _on_chart(ratio: float, ceiling: float) -> bool:
    return 0 < ratio <= ceiling


def _set_perplexity_axis(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    round_steps = MaxNLocator(8, steps=[1, 2, 5, 10])
    subs = (1, 2, 5) if high / low < 1000 else (1,)
    few = high / low < _EVEN_TICKS_UP_TO
    axes.yaxis.set_major_locator(round_steps if few else LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_plain)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _plain(value: float, _position: float | None) -> str:
    """A tick's number. Matplotlib's own formatters set powers of ten as mathematics."""
    return f"{value:g}"


def _set_latency_limits(axes: Axes, latencies: Sequence[float]) -> None:
    low, high = min(latencies), max(latencies)
    padding = 0.08 * (high - low or high or 1.0)
    axes.set_xlim(low - padding, high + padding)
    axes.xaxis.set_major_formatter(_plain)


def _marker(kind: str, index: int, spot: Point, label: str, ceiling: float, edge: float) -> _Marker:
    gid = f"{kind}-{index}"
    x, ratio = spot
    if _on_chart(ratio, ceiling):
        return _Marker(kind, gid, x, ratio, label, to_scale=True)
    value = f"{ratio:.3g}" if math.isfinite(ratio) else "not finite"
    return _Marker(kind, gid, x, edge, f"{label}\n↑ {value}", to_scale=False)


def _draw_marker(axes: Axes, marker: _Marker) -> None:
    kind = _KINDS[marker.kind]
    axes.plot(
        [marker.x],
        [marker.y],
        linestyle="",
        marker=kind.marker,
        markersize=kind.size,
        color=kind.colour,
        zorder=kind.order,
        gid=marker.gid,
    )


def _draw_legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    entries = [
        Line2D(
            [],
            [],
            linestyle="-" if name == "front" else "",
            marker=kind.marker,
            markersize=kind.size,
            color=kind.colour,
            label=kind.legend,
        )
        for name, kind in _KINDS.items()
    ]
    entries.append(Line2D([], [], linestyle="--", linewidth=1, color=GREY, label="float"))
    axes.legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=len(entries),
        frameon=False,
    )


def _draw_labels(axes: Axes, markers: Sequence[_Marker], line: Points) -> None:
    """Writes each label near its marker, clear of lines, markers and labels if there is room."""
    spots = axes.transData.transform([(marker.x, marker.y) for marker in markers])
    floor = axes.transData.transform([(x, 1.0) for x in axes.get_xlim()])
    lines = [_along(axes.transData.transform(line)), _along(floor)]
    room = _Room(np.concatenate([spots, *lines]), axes.bbox)
    for marker, spot in zip(markers, spots, strict=True):
        box = room.take(spot, _text_size(marker.label))
        leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 4}
        axes.annotate(
            marker.label,
            (marker.x, marker.y),
            (box.x0 - spot[0], box.y0 - spot[1]),
            textcoords="offset points",
            fontsize=_LABEL_SIZE,
            linespacing=_LINE_SPACING,
            va="bottom",
            gid=f"{marker.gid}-label",
            arrowprops=leader if _gap(spot, box) >= _LEADER_FROM else None,
            zorder=6,
        )


def _gap(spot: Points, box: Bbox) -> float:
    """From a marker's centre to its label, along the axis where it is wider."""
    return float(max(box.x0 - spot[0], spot[0] - box.x1, box.y0 - spot[1], spot[1] - box.y1))


def _along(line: Points) -> Points:
    """Points on a line, a few points (1/72 inch) apart; none where it has a gap."""
    steps = np.linspace(0, 1, 100)[:, None]
    dots = [start + steps * (end - start) for start, end in pairwise(line)]
    every = np.concatenate(dots) if dots else np.empty((0, 2))
    return every[np.isfinite(every).all(axis=1)]


def _text_size(text: str) -> Point:
    """Width and height, points."""
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415
    from matplotlib.textpath import text_to_path  # noqa: PLC0415

    font = FontProperties(size=_LABEL_SIZE)
    lines = text.split("\n")
    widths = [text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines]
    return max(widths), len(lines) * _LINE_SPACING * _LABEL_SIZE


class _Room:
    """Finds places for labels, one after the other; all in points."""

    def __init__(self, obstacles: Points, frame: Bbox) -> None:
        """Takes points not to cover, and what labels are to stay in."""
        self._obstacles = obstacles
        self._frame = frame
        self._boxes: list[Bbox] = []
        self._leaders: list[MplPath] = []

    def take(self, spot: Points, size: Point) -> Bbox:
        """The place that is in the way of least; of such places, the nearest to the marker."""
        from matplotlib.transforms import Bbox  # noqa: PLC0415

        width, height = size
        boxes = [
            Bbox.from_bounds(
                spot[0] + x * distance + (x - 1) * width / 2,
                spot[1] + y * distance + (y - 1) * height / 2,
                width,
                height,
            )
            for distance in _DISTANCES
            for x, y in _DIRECTIONS
        ]
        best = min(boxes, key=lambda box: self._cost(spot, box))  # the first of equals
        self._boxes.append(best)
        self._leaders.append(_leader(spot, best))
        return best

    def _cost(self, spot: Points, box: Bbox) -> float:
        wide = box.padded(_CLEARANCE)
        frame = self._frame
        inside = frame.x0 <= wide.x0 and wide.x1 <= frame.x1
        inside &= frame.y0 <= wide.y0 and wide.y1 <= frame.y1
        leader = _leader(spot, box)
        crossings = sum(
            leader.intersects_path(other) + other.intersects_bbox(wide) for other in self._leaders
        )
        overlaps = wide.count_overlaps(self._boxes)
        overlaps += sum(leader.intersects_bbox(other) for other in self._boxes)
        covered = int(wide.count_contains(self._obstacles))
        return 1000 * (not inside) + 100 * overlaps + 10 * crossings + covered


def _leader(spot: Points, box: Bbox) -> MplPath:
    """From the middle of a label to where its marker begins."""
    from matplotlib.path import Path as MplPath  # noqa: PLC0415

    middle = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])
    return MplPath([middle, spot + (middle - spot) * 0.1])


# --------------------------------------------------------------------------------------- heat map

_CELL = (0.5, 0.25)
_BAR = (4.0, 0.14)
_BAR_GAP = 0.25
_DECADES = 6
_LEAST = 1e-12  # nats per token; what is less is rounding
_HEAD_ROLES = {"head", "input of head"}


def write_heat_map(search: BitSearch, path: Path) -> None:
    """Draws a cell for each tensor: its sensitivity as colour, its bits as a number.

    Rows are layers. Columns are roles, as they first appear in the first layer, then those that
    only later layers have. Sensitivity is the loss at the fewest bits that were tried, on a
    logarithmic scale of six decades at most; what is less has the lowest colour, what is not finite
    is grey.

    Args:
        search: whose tensors to draw.
        path: of the SVG file. The same search gives the same bytes.
    """
    title = f"{heat_title(search.target)}\nbudget: {search.budget}"
    title += f"; sensitivity: {search.sensitivity}"
    with drawing():
        save_svg(
            heat_figure(search.tensors, title),
            path,
            heat_title(search.target),
            heat_description(search.tensors),
        )


def heat_title(target: str) -> str:
    """What the chart is called."""
    return f"Chosen bits and sensitivity of each tensor: {target}"


def heat_description(tensors: Sequence[TensorBits]) -> str:
    """What the chart shows, in words."""
    return (
        f"A table of {len(rows_of(tensors))} layers with the bits chosen for each of"
        f" {len(tensors)} tensors, coloured by what quantizing the tensor alone to the"
        " fewest bits costs."
    )


def heat_figure(tensors: Sequence[TensorBits], title: str) -> Figure:
    """The chart, see ``write_heat_map``; where no loss was measured, colour goes with bits."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = rows_of(tensors)
    columns = list(dict.fromkeys(chain(*rows.values())))
    # Sizes are in inches, so that cells look the same in any number; labels may lie outside, as
    # the file is cut to what is drawn.
    size = _CELL[0] * len(columns), _CELL[1] * len(rows)
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks(
        [index + 0.5 for index in range(len(columns))],
        columns,
        rotation=45,
        ha="left",
        rotation_mode="anchor",
    )
    axes.set_yticks([index + 0.5 for index in range(len(rows))], row_labels(rows))
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left", pad=10)
    losses = [tensor.worst for tensor in tensors]
    measured = any(tensor.losses for tensor in tensors)
    low, high = _decades(losses)
    scale = _scale(low, high) if measured else _bit_scale()
    for index, row in enumerate(rows.values()):
        for role, tensor in row.items():
            amount = tensor.worst if measured else tensor.bits
            _draw_cell(axes, columns.index(role), index, tensor, _shade(scale, amount))
    if measured:
        bar = _draw_colour_bar(figure, scale, any(loss < low for loss in losses))
        note = "" if all(map(math.isfinite, losses)) else "; grey: not finite"
        bar.set_label(f"loss at the fewest bits, nats per token{note}")
    return figure


def rows_of(tensors: Sequence[TensorBits]) -> dict[int, dict[str, TensorBits]]:
    """Layer → column → tensor; a role's second tensor in a layer has a column of its own."""
    rows: dict[int, dict[str, TensorBits]] = {}
    for tensor in tensors:
        row = rows.setdefault(tensor.layer, {})
        row[_column(tensor.role, row)] = tensor
    return dict(sorted(rows.items()))


def _column(role: str, taken: Container[str]) -> str:
    names = chain([role], (f"{role} {number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def row_labels(rows: Mapping[int, Mapping[str, TensorBits]]) -> list[str]:
    """Numbers of layers from 0, and ``head``."""
    return ["head" if _HEAD_ROLES.issuperset(row) else str(layer) for layer, row in rows.items()]


def _decades(losses: Sequence[float]) -> Point:
    """Ends of the scale: powers of ten, so that the bar has a number at both."""
    logs = [math.log10(loss) for loss in losses if _LEAST < loss < math.inf] or [0.0]
    high = math.ceil(max(logs))
    low = min(max(math.floor(min(logs)), high - _DECADES), high - 1)
    return 10.0**low, 10.0**high


def _scale(low: float, high: float) -> ScalarMappable:
    """Losses as colours."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    return ScalarMappable(LogNorm(low, high, clip=True), "viridis")


def _bit_scale() -> ScalarMappable:
    """Bits as colours, few of them bright: there most is lost."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    return ScalarMappable(LogNorm(4, 16, clip=True), "viridis_r")


def _shade(scale: ScalarMappable, amount: float) -> Colour:
    from matplotlib.colors import to_rgba  # noqa: PLC0415

    return to_rgba(tuple(scale.to_rgba(np.array(amount))) if math.isfinite(amount) else _NO_LOSS)


def _draw_cell(axes: Axes, column: int, row: int, tensor: TensorBits, shade: Colour) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    gid = f"{row}-{column}"
    cell = Rectangle(
        (column, row), 1, 1, facecolor=shade, edgecolor="white", linewidth=1, gid=f"cell-{gid}"
    )
    axes.add_patch(cell)
    axes.text(
        column + 0.5,
        row + 0.5,
        tensor.label,
        color=_readable_on(shade),
        ha="center",
        va="center_baseline",
        gid=f"bits-{gid}",
    )


def _readable_on(colour: Colour) -> str:
    """Black or white, whichever has the greater contrast (WCAG 2.2: 4.5 at least for either)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _draw_colour_bar(figure: Figure, scale: ScalarMappable, has_less: bool) -> Colorbar:
    """Draws it below a figure of cells only; with an arrow down where there are lesser losses."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    width, height = figure.get_size_inches()
    place = (0, -(_BAR_GAP + _BAR[1]) / height, _BAR[0] / width, _BAR[1] / height)
    bar = figure.colorbar(
        scale,
        cax=figure.add_axes(place),
        orientation="horizontal",
        extend="min" if has_less else "neither",
        ticks=LogLocator(),
        format=_plain,
    )
    bar.minorticks_off()
    bar.outline.set_visible(False)
    for solids in bar.ax.collections:
        # As shapes, not as an embedded bitmap; with edges, or viewers show gaps between them.
        solids.set_rasterized(False)
        solids.set_edgecolor("face")
    return bar
