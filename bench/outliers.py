"""How far a model's activations stick out, before and after the rotations: max |x| / median |x|.

python bench/outliers.py                                    # SmolLM2-135M, the built-in text
python bench/outliers.py model.onnx --text wiki.test.raw --windows 8 --bos none --layers
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.inputs import export, text_windows
from qnpu.compiler.pass_base import Compilation, Pass, Stage, no_progress, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.topology import DecoderTopology, as_feature_linear, discover
from qnpu.models.load import load_onnx, load_tokenizer, resolve
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.segments import SegmentRunner

ROLES = ("q/k/v", "o", "gate/up", "down", "lm_head", "residual")


@dataclass(frozen=True)
class Ratio:
    """max |x| / median |x| of one tensor over all windows.

    Attributes:
        all: with position 0 of each window.
        rest: without.
    """

    all: float
    rest: float


Ratios = dict[str, list[Ratio]]
"""Role → one ratio per layer, in graph order."""


def main(
    model: Annotated[str, typer.Argument(help="As for qnpu-compile.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="Default: the built-in text.")] = "",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    bos: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the rotations.")] = 0,
    layers: Annotated[bool, typer.Option(help="Show every layer, not the worst alone.")] = False,
) -> None:
    """Measure, rotate, measure again, print one table."""
    console = Console(soft_wrap=True)
    config = CompileConfig(seq_len=seq_len, rotate=False)
    source = resolve(model)
    with TemporaryDirectory(prefix="qnpu-outliers-") as folder:
        path = Path(source.location)
        if source.kind != "onnx":
            path = Path(folder, f"{source.name}.onnx")
            export(source, path, config, no_progress)
        feeds, about = text_windows(
            text, "evaluation", load_tokenizer(source), seq_len, windows, bos
        )
        compilation = Compilation(load_onnx(path))
        _run([p for p in default_passes(config, feeds) if p.produces is Stage.FLOAT], compilation)
        before = _measure(compilation.model, feeds)
        _run([FoldNormScale(), FuseRotation(seed=seed)], compilation)
        after = _measure(compilation.model, feeds)
    for diagnostic in compilation.diagnostics:
        console.print(str(diagnostic), style="dim", markup=False, highlight=False)
    if layers:
        for role in ROLES:
            _print(console, role, {str(i): r for i, r in enumerate(_pairs(before, after, role))})
    worst = {role: _worst(list(_pairs(before, after, role))) for role in ROLES if before.get(role)}
    _print(console, f"{source.name}, worst layer", worst)
    console.print(f"max |x| / median |x| on {about}")


def _run(passes: list[Pass], compilation: Compilation) -> None:
    run_passes(passes, compilation, after_pass=lambda done: None)


def _sites(graph: ir.Graph, topology: DecoderTopology) -> Iterator[tuple[str, ir.Value]]:
    """Role and value of all that a decoder's linears read, and of its residual stream."""
    stream = topology.stream
    known = {linear.node for sink in stream.sinks for linear in sink.linears}
    known |= {path.output.node for path in topology.value_paths}
    values = {path.value.node for path in topology.value_paths}
    for sink in stream.sinks:
        nodes = {linear.node for linear in sink.linears}
        role = "q/k/v" if nodes & values else "lm_head" if sink is stream.sinks[-1] else "gate/up"
        yield role, sink.linears[0].activation
    for path in topology.value_paths:
        yield "o", path.output.activation
    for node in graph:
        linear = as_feature_linear(node)
        if linear is not None and node not in known:
            yield "down", linear.activation
    for value in stream.values:
        producer = value.producer()
        if producer is not None and producer.op_type in ("Add", "Gather"):
            yield "residual", value


def _measure(model: ir.Model, feeds: FeedSource) -> Ratios:
    topology = discover(model.graph)
    if topology is None:
        raise typer.BadParameter("no decoder was found in this graph")
    roles = {name_of(value): role for role, value in _sites(model.graph, topology)}
    held: dict[str, list[np.ndarray]] = defaultdict(list)
    ratios: dict[str, Ratio] = {}
    for step in SegmentRunner(model, feeds.feeds(model.graph.inputs)).stream(set(roles)):
        for name, array in step.values.items():
            held[name].append(np.abs(array).reshape(-1, array.shape[-1]))
            if step.last:
                rows = np.stack(held.pop(name))  # windows, tokens, features
                ratios[name] = Ratio(_ratio(rows), _ratio(rows[:, 1:]))
    order = {name_of(v): i for i, n in enumerate(model.graph) for v in n.outputs}
    result: Ratios = defaultdict(list)
    for name in sorted(ratios, key=order.__getitem__):
        result[roles[name]].append(ratios[name])
    return result


def _ratio(magnitudes: np.ndarray) -> float:
    return float(magnitudes.max() / np.median(magnitudes))


def _pairs(before: Ratios, after: Ratios, role: str) -> Iterator[tuple[Ratio, Ratio]]:
    yield from zip(before.get(role, []), after.get(role, []), strict=True)


def _worst(pairs: list[tuple[Ratio, Ratio]]) -> tuple[Ratio, Ratio]:
    """The largest of each column on its own."""
    columns = list(zip(*pairs, strict=True))
    first, second = (
        replace(column[0], all=max(r.all for r in column), rest=max(r.rest for r in column))
        for column in columns
    )
    return first, second


def _print(console: Console, title: str, rows: dict[str, tuple[Ratio, Ratio]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("input of")
    for heading in ("before", "after", "before, no token 0", "after, no token 0"):
        table.add_column(heading, justify="right")
    for label, (before, after) in rows.items():
        numbers = (before.all, after.all, before.rest, after.rest)
        table.add_row(label, *(f"{number:,.1f}" for number in numbers))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
