"""Time and memory of a compile as a model grows: Llamas with random weights, made without torch.

    python -m bench.scaling                          # narrow, 2 to 32 layers, and a plot
    python -m bench.scaling --shape 1b               # as large as Llama 3.2 1B, 5 GB of weights
    python -m bench.scaling --shape 1b --layers 2,4  # as wide, but short

Compiles to W8A16 with 2 windows of 128 random tokens, no evaluation. Random weights cost what
trained ones of the same shape do. What was measured is kept in bench/results and not measured
again. Run nothing else meanwhile; the files of a model, twice its size, go to the system's folder
for temporary files.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import helper
from rich.console import Console
from rich.table import Table

from bench.measured import RESULTS, kept, run_command
from qnpu.compiler.chart_style import BLUE, GREY, VERMILION, drawing, save_svg
from qnpu.compiler.console import command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS, WINDOWS = 128, 2
PLOT = Path(__file__).with_name("scaling.svg")

_SPREAD = 0.02  # standard deviation of weights, as Llamas are initialized
_NORM_SPREAD = 0.1
_OPSET, _IR_VERSION = 23, 11
_CHUNK = 2**22  # weights drawn and written at once
_ROPE_BASE = 5e5
_EPSILON = 1e-5
_MASKED = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        ffn: width within an MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        tied: the head's weight is the embedding.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def float_bytes(self) -> int:
        """Of all float32 weights; an embedding that is the head's weight too counts once."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * queries + 2 * keys + 3 * self.ffn + 2)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return 4 * (self.layers * layer + embeddings + self.hidden)


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "narrow": Shape(32, 256, 1024, 8, 2, 32, 4096, tied=False),
}
"""``1b`` is Llama 3.2 1B."""

LAYERS = {"1b": "16", "narrow": "2,4,8,16,32"}


def write_llama(path: Path, shape: Shape, tokens: int = TOKENS, seed: int = 0) -> None:
    """Writes a Llama with random weights, in the form that torch's exporter gives one.

    Weights are drawn a few MB at a time and go to ``<name>.data`` beside the file.

    Args:
        path: of the ONNX file.
        shape: of the model.
        tokens: of a run; the graph is static.
        seed: of the weights.
    """
    with path.with_name(f"{path.name}.data").open("wb") as data:
        writer = _Writer(data, np.random.default_rng(seed))
        proto = writer.model(shape, tokens)
    path.write_bytes(proto.SerializeToString())


@dataclass(slots=True)
class _Writer:
    """A graph in the making, whose weights are on disk already.

    Attributes:
        data: file of the weights.
        rng: draws them.
        nodes: in order.
        initializers: weights refer to the file.
    """

    data: IO[bytes]
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def model(self, shape: Shape, tokens: int) -> onnx.ModelProto:
        """The whole model; its weights are written on the way."""
        embedding = self._weight("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
        self._constants(shape, tokens)
        stream = self._node("Gather", embedding, "input_ids", axis=0)
        for layer in range(shape.layers):
            stream = self._layer(stream, f"model.layers.{layer}", shape)
        normed = self._norm(stream, "model.norm", shape.hidden)
        if shape.tied:
            head = self._node("Transpose", embedding, perm=[1, 0])
        else:
            head = self._weight("lm_head.weight", shape.hidden, shape.vocabulary)
        self.nodes.append(helper.make_node("MatMul", [normed, head], ["logits"], "lm_head"))
        size = [1, tokens, shape.vocabulary]
        graph = helper.make_graph(
            self.nodes,
            "llama",
            [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, tokens])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, size)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def _constants(self, shape: Shape, tokens: int) -> None:
        """What all layers share: angles, mask, scale, shapes, bounds of slices."""
        half, heads = shape.head_dim // 2, (shape.kv_heads, shape.heads // shape.kv_heads)
        speeds = _ROPE_BASE ** (-np.arange(half) / half)
        angles = np.tile(np.outer(np.arange(tokens), speeds), 2)[None, None]
        self._array("cos", np.cos(angles).astype(np.float32))
        self._array("sin", np.sin(angles).astype(np.float32))
        mask = np.triu(np.full((tokens, tokens), _MASKED, np.float32), 1)
        self._array("mask", mask[None, None])
        self._array("scale", np.array(shape.head_dim**-0.5, np.float32))
        for name, numbers in {
            "to_heads": [1, tokens, -1, shape.head_dim],
            "to_groups": [1, *heads, tokens, shape.head_dim],
            "from_groups": [1, shape.heads, tokens, shape.head_dim],
            "from_heads": [1, tokens, shape.heads * shape.head_dim],
            "zero": [0],
            "one": [1],
            "two": [2],
            "three": [3],
            "half": [half],
            "whole": [shape.head_dim],
        }.items():
            self._array(name, np.array(numbers, np.int64))

    def _layer(self, stream: str, name: str, shape: Shape) -> str:
        normed = self._norm(stream, f"{name}.input_layernorm", shape.hidden)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        query, key, value = (
            self._heads(self._linear(normed, f"{name}.self_attn.{part}", shape.hidden, width))
            for part, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
        )
        key, value = (self._repeated(part) for part in (self._turned(key), value))
        scores = self._node("MatMul", self._turned(query), self._swapped(key, 0, 1, 3, 2))
        masked = self._node("Add", self._node("Mul", scores, "scale"), "mask")
        mixed = self._node("MatMul", self._node("Softmax", masked, axis=-1), value)
        joined = self._node("Reshape", self._swapped(mixed, 0, 2, 1, 3), "from_heads")
        attended = self._linear(joined, f"{name}.self_attn.o_proj", queries, shape.hidden)
        stream = self._node("Add", stream, attended)
        normed = self._norm(stream, f"{name}.post_attention_layernorm", shape.hidden)
        gate, up = (
            self._linear(normed, f"{name}.mlp.{part}", shape.hidden, shape.ffn)
            for part in ("gate_proj", "up_proj")
        )
        gate = self._node("Mul", gate, self._node("Sigmoid", gate))
        product = self._node("Mul", gate, up)
        down = self._linear(product, f"{name}.mlp.down_proj", shape.ffn, shape.hidden)
        return self._node("Add", stream, down)

    def _norm(self, stream: str, name: str, width: int) -> str:
        gain = self.rng.normal(1.0, _NORM_SPREAD, width).astype(np.float32)
        self._array(f"{name}.weight", gain)
        inputs = (stream, f"{name}.weight")
        return self._node("RMSNormalization", *inputs, axis=-1, epsilon=_EPSILON)

    def _linear(self, value: str, name: str, width: int, features: int) -> str:
        return self._node("MatMul", value, self._weight(f"{name}.weight", width, features))

    def _heads(self, value: str) -> str:
        return self._swapped(self._node("Reshape", value, "to_heads"), 0, 2, 1, 3)

    def _turned(self, value: str) -> str:
        """RoPE, as rotated halves."""
        first = self._node("Slice", value, "zero", "half", "three", "one")
        second = self._node("Slice", value, "half", "whole", "three", "one")
        halves = self._node("Concat", self._node("Neg", second), first, axis=-1)
        along, across = self._node("Mul", value, "cos"), self._node("Mul", halves, "sin")
        return self._node("Add", along, across)

    def _repeated(self, value: str) -> str:
        """Each key or value head for all query heads that read it."""
        single = self._node("Unsqueeze", value, "two")
        return self._node("Reshape", self._node("Expand", single, "to_groups"), "from_groups")

    def _swapped(self, value: str, *order: int) -> str:
        return self._node("Transpose", value, perm=list(order))

    def _node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def _array(self, name: str, array: NDArray[Any]) -> None:
        self.initializers.append(onnx.numpy_helper.from_array(array, name))

    def _weight(self, name: str, *dims: int) -> str:
        """Draws a weight and writes it; the graph holds its place alone."""
        proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims)
        proto.data_location = onnx.TensorProto.EXTERNAL
        size = math.prod(dims)
        location = {"location": Path(self.data.name).name, "offset": self.data.tell()}
        for key, value in (location | {"length": 4 * size}).items():
            proto.external_data.add(key=key, value=str(value))
        for start in range(0, size, _CHUNK):
            part = self.rng.standard_normal(min(_CHUNK, size - start), np.float32)
            part *= np.float32(_SPREAD)
            self.data.write(part.tobytes())
        self.initializers.append(proto)
        return name


@dataclass(frozen=True, slots=True)
class Cost:
    """What one compile took.

    Attributes:
        layers: of the model.
        float_bytes: of its float32 weights.
        output_bytes: of all files written.
        seconds: step → wall time: ``load``, ``compile``, ``check``, ``total``.
        cpu: seconds of all cores together, which other work on the machine changes less.
        passes: pass → wall time.
        peak: RSS, bytes.
    """

    layers: int
    float_bytes: int
    output_bytes: int
    seconds: dict[str, float]
    cpu: float
    passes: dict[str, float]
    peak: int


def measure(shape: Shape, folder: Path | None, results: Path) -> Cost:
    """Writes a model, compiles it, takes both away again; or what was measured of it before.

    Args:
        shape: of the model.
        folder: for files of the model and of the compile; None: the system's for such.
        results: where measurements are kept.
    """
    options = ["--scheme", "w8a16", "--seq-len", str(TOKENS), "--eval-windows", "0"]

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            model, tokens = Path(inside, "model.onnx"), Path(inside, "tokens.npz")
            write_llama(model, shape)
            ids = np.random.default_rng(0).integers(shape.vocabulary, size=(WINDOWS, TOKENS))
            np.savez(tokens, input_ids=ids)
            before = _cpu_seconds()
            words = ["qnpu-compile", str(model), *options, "--calib", str(tokens)]
            done = run_command([*words, "--out", f"{inside}/out", "--json", "--quiet"])
        return {
            "output_bytes": sum(entry["bytes"] for entry in done["outputs"].values()),
            "seconds": done["seconds"],
            "cpu": _cpu_seconds() - before,
            "passes": done["passes"],
            "peak": done["peak_rss_bytes"],
        }

    on = {"model": "llama", "windows": WINDOWS, "tokens": TOKENS, **asdict(shape)}
    found = kept(results, options, on, work)
    fields = ("output_bytes", "seconds", "cpu", "passes", "peak")
    return Cost(shape.layers, shape.float_bytes, **{name: found[name] for name in fields})


def _cpu_seconds() -> float:
    """Of all processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def per_layer(costs: Sequence[Cost], amounts: Sequence[float]) -> Iterator[tuple[int, float]]:
    """What each layer beyond those of the first model added to a cost.

    Args:
        costs: of models of rising depth.
        amounts: of each of them, such as seconds.

    Yields:
        Layers, and (cost(n) - cost(first)) / (n - first).
    """
    for cost, amount in list(zip(costs, amounts, strict=True))[1:]:
        yield cost.layers, (amount - amounts[0]) / (cost.layers - costs[0].layers)


def draw(costs: Sequence[Cost], path: Path, title: str) -> None:
    """Plots CPU time and peak RSS by layers, and what a layer adds to each."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (takes a second)

    seconds = [cost.cpu for cost in costs]
    memory = [cost.peak / 2**20 for cost in costs]
    with drawing():
        figure = Figure(figsize=(8, 6), layout="constrained")
        figure.suptitle(title)
        first, second, third, fourth = figure.subplots(2, 2).flat
        _line(first, costs, seconds, "CPU time, s", BLUE)
        _line(second, costs, memory, "peak RSS, MiB", VERMILION)
        weights = [cost.float_bytes / 2**20 for cost in costs]
        layers = [cost.layers for cost in costs]
        second.plot(layers, weights, "--", color=GREY, label="float32 weights")
        second.legend(frameon=False)
        for axes, amounts, unit, colour in (
            (third, seconds, "s", BLUE),
            (fourth, memory, "MiB", VERMILION),
        ):
            added = list(per_layer(costs, amounts))
            axes.plot([n for n, _ in added], [a for _, a in added], "o-", color=colour)
            axes.set(ylabel=f"each added layer, {unit}", xlabel="layers", ylim=(0, None))
            axes.set_xticks(layers)
        save_svg(figure, path, title, "Cost of a compile by the number of decoder layers.")


def _line(
    axes: Axes, costs: Sequence[Cost], amounts: Sequence[float], label: str, colour: str
) -> None:
    layers = [cost.layers for cost in costs]
    axes.plot(layers, amounts, "o-", color=colour)
    axes.set(ylabel=label, ylim=(0, None))
    axes.set_xticks(layers)


def _print(console: Console, name: str, costs: Sequence[Cost]) -> None:
    title = f"{name}, W8A16, {WINDOWS} windows of {TOKENS} tokens; MB, seconds"
    table = Table(title=title, title_justify="left")
    headings = ("layers", "float", "written", "compile", "check", "total", "CPU", "RSS", "÷ float")
    for heading in headings:
        table.add_column(heading, justify="right")
    for cost in costs:
        steps = [f"{cost.seconds[step]:.0f}" for step in ("compile", "check", "total")]
        sizes = [f"{size / 1e6:.0f}" for size in (cost.float_bytes, cost.output_bytes)]
        peak = [f"{cost.peak / 1e6:.0f}", f"{cost.peak / cost.float_bytes:.2f}"]
        table.add_row(str(cost.layers), *sizes, *steps, f"{cost.cpu:.0f}", *peak)
    console.print(table)
    passes = max(costs, key=lambda cost: cost.layers).passes
    table = Table(title="seconds by pass, of the deepest", title_justify="left")
    table.add_column("pass")
    table.add_column("s", justify="right")
    for step, seconds in sorted(passes.items(), key=lambda item: -item[1]):
        if seconds >= 0.01 * sum(passes.values()):
            table.add_row(step, f"{seconds:.1f}")
    console.print(table)


def _print_slopes(console: Console, costs: Sequence[Cost]) -> None:
    for what, amounts, unit in (
        ("wall time", [cost.seconds["total"] for cost in costs], "s"),
        ("CPU time", [cost.cpu for cost in costs], "s"),
        ("peak RSS", [cost.peak / 2**20 for cost in costs], "MiB"),
    ):
        added = list(per_layer(costs, amounts))
        first = costs[0].layers
        text = ", ".join(f"{amount:.2f} ({first} → {layers})" for layers, amount in added)
        console.print(f"{what}, each added layer, {unit}: {text}")


def main(
    shape: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "narrow",
    layers: Annotated[str, typer.Option(help="Of the models, a,b for two. Default: all.")] = "",
    plot: Annotated[Path, typer.Option(help="Where the plot of several models goes.")] = PLOT,
    results: Annotated[Path, typer.Option(help="Where measurements are kept.")] = RESULTS,
    folder: Annotated[
        Path | None, typer.Option(help="For files of models. Default: the system's for such.")
    ] = None,
) -> None:
    """Measure one model or several, print a table; of several, draw a plot."""
    console = Console(soft_wrap=True)
    depths = [int(word) for word in (layers or LAYERS[shape]).split(",")]
    shapes = [dataclasses.replace(SHAPES[shape], layers=depth) for depth in depths]
    costs = [measure(item, folder, results) for item in shapes]
    _print(console, shape, costs)
    if len(costs) > 1:
        _print_slopes(console, costs)
        draw(costs, plot, f"qnpu-compile, {shape} Llama, W8A16, {WINDOWS} x {TOKENS} tokens")
        console.print(f"plot: {plot}", highlight=False)


if __name__ == "__main__":
    typer.run(command(main))
