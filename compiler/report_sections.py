"""Sections of a report page: each is drawn from its part of a report, or left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from markupsafe import Markup

from qnpu.compiler.bit_charts import (
    front_description,
    front_figure,
    front_title,
    heat_figure,
    row_labels,
    rows_of,
)
from qnpu.compiler.bit_items import HEAD
from qnpu.compiler.chart_style import inline_svg
from qnpu.compiler.layer_rows import BEFORE_LAYERS
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
from qnpu.compiler.report_parts import (
    LABEL_LENGTH,
    STATES,
    Chart,
    Report,
    Section,
    Table,
    bit_search,
    duration,
    finite,
    number,
    part,
    short,
    size,
    tensor_bits,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST = 15
_MODEL = "model"


def _bits(facts: Report) -> Section | None:
    tensors = tensor_bits(facts)
    if not tensors:
        return None
    rows = rows_of(tensors)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [
        (label, *(row[name].words if name in row else "" for name in columns))
        for label, row in zip(row_labels(rows), rows.values(), strict=True)
    ]
    losses = any(tensor.losses for tensor in tensors)
    coloured = (
        "what quantizing it alone to the fewest bits costs, in nats per token"
        if losses
        else "its bits"
    )
    title = "Bits of linears and caches"
    svg = _svg(
        partial(heat_figure, tensors, title),
        "chart-bits",
        title,
        f"A grid of {len(rows)} layers by {len(columns)} roles. Each cell has the bits of a tensor;"
        f" its colour is {coloured}.",
        cut=True,
    )
    caption = "A row for each layer. The number in a cell is a tensor's bits; "
    caption += f"colour shows {coloured}." if losses else "so is the colour."
    counts = Counter((tensor.bits, tensor.block) for tensor in tensors)
    text = "Tensors by bits: " + ", ".join(
        f"{count} of {bits} bits{f' in blocks of {block}' if block else ''}"
        for (bits, block), count in sorted(counts.items())
    )
    table = Table("Bits by layer and role", ("layer", *columns), cells)
    return Section("bits", "Bit plan", [f"{text}."], [Chart(svg, caption, table, wide=True)])


def _sensitivity(facts: Report) -> Section | None:
    charts = [chart for chart in (_loss_chart(facts), _promotion_chart(facts)) if chart is not None]
    if not charts:
        return None
    text = "What is lost where a tensor alone is quantized, before bits were chosen."
    return Section("sensitivity", "Sensitivity", [text], charts)


def _loss_chart(facts: Report) -> Chart | None:
    tensors = [tensor for tensor in tensor_bits(facts) if tensor.losses]
    if not tensors:
        return None
    rows = rows_of(tensors)
    labels = row_labels(rows)
    fewest = [sum(tensor.worst for tensor in row.values()) for row in rows.values()]
    chosen = [sum(tensor.loss for tensor in row.values()) for row in rows.values()]
    series = [
        Series("at the fewest bits", list(map(finite, fewest))),
        Series("at the chosen bits", list(map(finite, chosen))),
    ]
    what = "loss, nats per token"
    svg = _svg(
        partial(series_figure, labels, series, what, "layer"),
        "chart-losses",
        "Loss of each layer's tensors",
        f"Sums of the losses of single tensors over {len(labels)} layers, {what}.",
    )
    table = Table(
        f"Sum of losses of a layer's tensors, {what.split(', ')[1]}",
        ("layer", "fewest bits", "chosen bits"),
        [
            (label, number(most), number(least))
            for label, most, least in zip(labels, fewest, chosen, strict=True)
        ],
    )
    caption = "Sum over a layer's linears and caches, each quantized alone."
    return Chart(svg, caption, table)


def _promotion_chart(facts: Report) -> Chart | None:
    ratios = part(facts, "sensitivities")
    if not ratios:
        return None
    promoted = set(facts.get("promoted") or [])
    labels = [str(place) for place in range(len(ratios))]
    values = [finite(value) for value in ratios.values()]
    kept = [value if name in promoted else None for name, value in zip(ratios, values, strict=True)]
    series = [Series("more bits", kept), Series("all", values)]
    svg = _svg(
        partial(series_figure, labels, series, "relative error", "down projection", joined=False),
        "chart-promotion",
        "Relative error of down projections' inputs at few bits",
        f"{len(ratios)} tensors, {len(promoted)} of them with more bits.",
    )
    table = Table(
        "Inputs of down projections",
        ("tensor", "relative error", "more bits"),
        [
            (short(name), number(value), "yes" if name in promoted else "no")
            for name, value in ratios.items()
        ],
    )
    return Chart(svg, "Error at few bits of each down projection's input, in graph order.", table)


def _errors(facts: Report) -> Section | None:
    tensors = facts.get("tensors") or []
    if not tensors:
        return None
    layers = _layer_ranges(facts, tensors)
    noisy = [tensor for tensor in tensors if tensor["sqnr_db"] is not None]
    text = [
        f"{len(tensors)} tensors of the float graph were compared with the quantized graph's on"
        " one batch. Errors of earlier tensors are in those of later ones."
    ]
    if len(noisy) < len(tensors):
        text.append(f"SQNR is not finite for {len(tensors) - len(noisy)} of them.")
    if not layers:
        text.append("Which layer a tensor is of is not known for this graph.")
    charts = [_sqnr_chart(layers)] if layers else []
    tables = [_worst_table(facts, noisy)] if noisy else []
    return Section("errors", "Error by layer", text, charts, tables)


def _sqnr_chart(layers: Sequence[LayerRange]) -> Chart:
    low = min(layers, key=lambda layer: layer.lowest)
    svg = _svg(
        partial(sqnr_figure, layers),
        "chart-sqnr",
        "SQNR of tensors by layer",
        f"Lowest, median and highest signal-to-quantization-noise ratio in {len(layers)} parts"
        f" of the graph. The lowest of all is {number(low.lowest)} dB, in {low.label}.",
    )
    rows = [
        (
            layer.label,
            short(layer.worst),
            str(layer.tensors),
            *(number(value, 3) for value in (layer.lowest, layer.median, layer.highest)),
        )
        for layer in layers
    ]
    columns = ("layer", "tensor with the lowest", "tensors", "lowest", "median", "highest")
    caption = "From the lowest to the highest SQNR of a layer's tensors; more is better."
    return Chart(svg, caption, Table("SQNR by layer, dB", columns, rows, words=2))


def _worst_table(facts: Report, tensors: Sequence[Report]) -> Table:
    labels = _layer_labels(facts)
    worst = sorted(tensors, key=lambda tensor: float(tensor["sqnr_db"]))[:_WORST]
    rows = [
        (
            short(tensor["name"]),
            labels.get(tensor.get("layer"), "unknown"),
            number(tensor["sqnr_db"], 3),
            number(tensor["cosine"], 6),
            number(tensor["max_abs_error"], 3),
        )
        for tensor in worst
    ]
    columns = ("tensor", "layer", "SQNR, dB", "cosine", "max |error|")
    return Table(f"Lowest SQNR: {len(rows)} of {len(tensors)} tensors", columns, rows, words=2)


def _layer_ranges(facts: Report, tensors: Sequence[Report]) -> list[LayerRange]:
    labels = _layer_labels(facts)
    by_layer: dict[int, list[tuple[float, str]]] = {}
    for tensor in tensors:
        layer, ratio = tensor.get("layer"), tensor["sqnr_db"]
        if layer is not None and ratio is not None:
            by_layer.setdefault(layer, []).append((float(ratio), tensor["name"]))
    return [
        LayerRange(
            label=labels[layer],
            lowest=min(found)[0],
            median=median(ratio for ratio, _ in found),
            highest=max(found)[0],
            worst=min(found)[1],
            tensors=len(found),
        )
        for layer, found in sorted(by_layer.items())
    ]


def _layer_labels(facts: Report) -> dict[int | None, str]:
    """Layer → what it is called."""
    rows = rows_of(tensor_bits(facts))
    labels: dict[int | None, str] = {
        layer: str(layer)
        for tensor in facts.get("tensors") or []
        if (layer := tensor.get("layer")) is not None
    }
    labels |= dict(zip(rows, row_labels(rows), strict=True))
    return labels | {BEFORE_LAYERS: "start"}


def _histograms(facts: Report) -> Section | None:
    histograms = facts.get("histograms") or []
    charts = [_histogram_chart(facts, item, index) for index, item in enumerate(histograms)]
    if not charts:
        return None
    text = [
        "Inputs of linears on one batch, in the graph as it was loaded and after rotation. Both"
        " axes are logarithmic, so that few large values stay in sight; the middle bin holds what"
        " is nearer to zero than all others. Green lines are the ends of the encoding: what lies"
        " outside is clipped. What lies in the grey band rounds to zero.",
    ]
    config = part(facts, "config")
    if not (config.get("rotate", True) or config.get("online")):
        text.append("Nothing was rotated (--no-rotate).")
    return Section("histograms", "Histograms before and after rotation", text, charts)


def _histogram_chart(facts: Report, item: Report, index: int) -> Chart:
    before, after = item["before"], item["after"]
    first, second = [
        [count / max(sum(side["counts"]), 1) for count in side["counts"]]
        for side in (before, after)
    ]
    ends = item["range_low"], item["range_high"]
    shape = TensorShape(item["edges"], first, second, *ends, item["step"])
    role = short(item["role"], LABEL_LENGTH)
    layer = _layer_labels(facts).get(item["layer"], str(item["layer"]))
    where = role if role == HEAD else f"{role} in layer {layer}"
    values = (
        f"Values before {number(before['low'])} to {number(before['high'])},"
        f" after {number(after['low'])} to {number(after['high'])}."
    )
    codes = "No encoding."
    if item["bits"]:
        codes = f"Codes of {item['bits']} bits reach from {number(ends[0])} to {number(ends[1])}"
        codes += f" in steps of {number(item['step'], 3)}."
    svg = _svg(
        partial(histogram_figure, shape),
        f"chart-histogram-{index}",
        f"Histogram of the input of {where}",
        f"{values} {codes}",
    )
    bins = zip(item["edges"], item["edges"][1:], before["counts"], after["counts"], strict=False)
    rows = [
        (f"{number(low, 3)} to {number(high, 3)}", f"{one:,}", f"{other:,}")
        for low, high, one, other in bins
        if one or other
    ]
    table = Table(f"Elements by value, input of {where}", ("value", "before", "after"), rows)
    return Chart(svg, f"Input of {where}, {short(item['name'])}. {values} {codes}", table)


def _learning(facts: Report) -> Section | None:
    by_name: dict[str, list[tuple[int, float]]] = {}
    for point in facts.get("learning") or []:
        if point["loss"] is not None:
            by_name.setdefault(point["what"], []).append((point["step"], float(point["loss"])))
    if not by_name:
        return None
    model = by_name.pop(_MODEL, None)
    charts = [_model_chart(model)] if model else []
    if by_name:
        charts.append(_blocks_chart(by_name))
    curves = {
        short(name, LABEL_LENGTH): [(step, loss / points[0][1]) for step, loss in points]
        for name, points in by_name.items()
        if 0 < points[0][1] < math.inf
    }
    if curves:
        charts.append(_curves_chart(curves))
    return Section("learning", "Learning", [], charts)


def _model_chart(points: Sequence[tuple[int, float]]) -> Chart:
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    svg = _svg(
        partial(curve_figure, steps, losses, "loss"),
        "chart-learning",
        "Loss while learning: model",
        f"From {number(losses[0])} at step {steps[0]} to {number(losses[-1])} at step"
        f" {steps[-1]}; the least is {number(min(losses))}.",
    )
    rows = [(str(step), number(loss)) for step, loss in points]
    caption = "Loss of the model where it was measured."
    return Chart(svg, caption, Table("Loss: model", ("step", "loss"), rows))


def _blocks_chart(blocks: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    names = [short(name, LABEL_LENGTH) for name in blocks]
    first = [points[0][1] for points in blocks.values()]
    last = [min(loss for _, loss in points) for points in blocks.values()]
    labels = [name.rpartition(" ")[2] for name in names]
    svg = _svg(
        partial(
            series_figure,
            labels,
            [Series("before", first), Series("learned", last)],
            "loss",
            "block",
        ),
        "chart-blocks",
        "Loss of blocks before and after learning",
        f"{len(names)} blocks, learned one after another.",
    )
    rows = [
        (name, number(start), number(end), number(end / start) if start else "")
        for name, start, end in zip(names, first, last, strict=True)
    ]
    table = Table("Loss of blocks", ("block", "before", "learned", "learned / before"), rows)
    return Chart(svg, "Loss of each block before and after its steps.", table)


def _curves_chart(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    least_gain = max(curves, key=lambda name: min(loss for _, loss in curves[name]))
    gain = number(min(loss for _, loss in curves[least_gain]))
    svg = _svg(
        partial(curves_figure, curves, least_gain, "loss / loss at the start"),
        "chart-block-curves",
        "Loss of blocks while learning",
        f"{len(curves)} curves; that of {least_gain}, which gains least, falls to {gain}.",
    )
    steps = sorted({step for points in curves.values() for step, _ in points})
    columns = ("block", *(f"step {step}" for step in steps))
    by_step = {name: dict(points) for name, points in curves.items()}
    rows = [
        (name, *(number(found[step]) if step in found else "" for step in steps))
        for name, found in by_step.items()
    ]
    table = Table("Loss of blocks by step, relative to the start", columns, rows)
    caption = f"Loss of each block where it was measured; {least_gain} gains least."
    return Chart(svg, caption, table)


def _front(facts: Report) -> Section | None:
    search = bit_search(facts)
    if search is None:
        return None
    plans = (search.chosen, *search.front, *search.others)
    rows = [
        (
            plan.label,
            duration(plan.seconds),
            size(plan.bytes),
            number(plan.expected),
            number(plan.measured),
            number(plan.perplexity),
            number(plan.perplexity / search.float_perplexity),
        )
        for plan in plans
    ]
    columns = (
        "plan",
        "latency, modelled",
        "size, modelled",
        "expected loss",
        "measured loss",
        "perplexity",
        "times float",
    )
    svg = _svg(
        partial(front_figure, search),
        "chart-front",
        front_title(search),
        front_description(search),
        cut=True,
    )
    caption = "Plans that no faster one beats, the one that was chosen, and plans by simple rules."
    text = (
        f"Bits were chosen within {search.budget}, on losses by {search.sensitivity}."
        f" {len(search.trials)} plan{'s'[: len(search.trials) != 1]} tried; by the sum of losses"
        f" the first is {number(search.gap, 2)} from the best at most, proven."
    )
    table = Table("Plans; losses in nats per token", columns, rows)
    chart = Chart(svg, caption, table, wide=True)
    return Section("front", "Pareto front", [text], [chart])


def _parity(facts: Report) -> Section | None:
    kinds = facts.get("parity") or []
    if not kinds:
        return None
    rows = [
        (
            short(kind["kind"]),
            STATES["pass" if kind["passed"] else "fail"],
            str(kind["tensors"]),
            f"{kind['elements']:,}",
            number(1 - kind["equal"], 3),
            str(kind["max_lsb"]),
            f"{kind['ties']:,}",
            str(kind["max_lsb_rounded"]),
        )
        for kind in kinds
    ]
    columns = (
        "operators",
        "within limits",
        "tensors",
        "codes",
        "share off",
        "max LSB",
        "ties",
        "max LSB, as it is",
    )
    charts = []
    counts = {
        short(kind["kind"], LABEL_LENGTH): kind["histogram"]
        for kind in kinds
        if kind.get("histogram")
    }
    if counts:
        off = sum(sum(histogram[1:]) for histogram in counts.values())
        svg = _svg(
            partial(lsb_figure, counts),
            "chart-parity",
            "Codes by how far they are off, LSB",
            f"{len(counts)} kinds of operators; {off:,} codes are off in all.",
        )
        table = Table(
            "Codes by LSB off",
            ("operators", "0", "1", "2", "3", "4", "more"),
            [(name, *(f"{count:,}" for count in row)) for name, row in counts.items()],
        )
        charts.append(Chart(svg, "How many codes are so many LSB off.", table))
    text = [
        "Each node of the integer graph was run alone, on the codes of the quantized graph, and its"
        " codes compared. Where the exact result lies halfway between two codes both are right;"
        " such places are counted as ties.",
        "An integer function that rounds once, where the quantized graph rounds several times, is"
        " compared with the exact result rounded once. The last column compares it with the"
        " quantized graph as it is.",
    ]
    table = Table("Integer graph against the quantized one", columns, rows, words=2)
    return Section("parity", "Integer parity", text, charts, [table])


def _changes(facts: Report) -> Section | None:
    changes = facts.get("changes") or []
    verdicts = part(facts, "verdicts")
    if not changes and not verdicts:
        return None
    tables = []
    if verdicts:
        names = list(dict.fromkeys(name for counts in verdicts.values() for name in counts))
        rows = [
            (when, *(str(counts.get(name, 0)) for name in names))
            for when, counts in verdicts.items()
        ]
        tables.append(
            Table("Nodes by what the target makes of them", ("rewrite", *map(short, names)), rows)
        )
    if changes:
        rows = [
            (
                short(change["name"]),
                number(change["max_abs_error"], 3),
                *(
                    "no encoding" if change[key] is None else number(change[key], 3)
                    for key in ("max_lsb", "mean_lsb")
                ),
            )
            for change in changes
        ]
        columns = ("output", "max |error|", "max LSB", "mean LSB")
        tables.append(Table("What rewrites changed in outputs", columns, rows))
    return Section("changes", "On the target", [], [], tables)


SECTIONS = (
    _bits,
    _sensitivity,
    _errors,
    _histograms,
    _learning,
    _front,
    _parity,
    _changes,
)


def _svg(
    draw: Callable[[], Figure], key: str, title: str, description: str, *, cut: bool = False
) -> Markup:
    """Not to be escaped again: what goes in is escaped as XML is written."""
    return Markup(inline_svg(draw, key, title, description, cut=cut))
