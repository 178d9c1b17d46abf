"""decompose-rotary: RotaryEmbedding becomes multiplications that every NPU has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import (
    add_initializer,
    constant_array,
    name_of,
    replace_value,
    static_shape,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage


@dataclass(frozen=True)
class DecomposeRotary(Pass):
    """Spells out RotaryEmbedding-23 for 4-D input with constant tables.

    Before → after, x of shape (B, H, S, D), tables of shape (1, S, D/2)::

        RotaryEmbedding(x, cos, sin)

        x1, x2 = Split(x)
        Concat(x1·cos - x2·sin, x2·cos + x1·sin)

    Dimensions past ``rotary_embedding_dim`` pass through unchanged.

    Must not fire on an interleaved rotation, a 3-D input, or tables that are computed or indexed
    by position ids at run time. Source: ONNX RotaryEmbedding-23; HTP runs the operator in float.
    """

    name: ClassVar[str] = "decompose-rotary"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        tables: dict[tuple[str, int], ir.Value] = {}
        return sum(_decompose(graph, node, tables) for node in list(graph))


def _decompose(graph: ir.Graph, node: ir.Node, tables: dict[tuple[str, int], ir.Value]) -> int:
    if node.op_type != "RotaryEmbedding" or not is_standard(node):
        return 0
    source, cos, sin, *positions = node.inputs
    if source is None or cos is None or sin is None or any(p is not None for p in positions):
        return 0
    shape = static_shape(source)
    cos_array, sin_array = constant_array(cos), constant_array(sin)
    interleaved = node.attributes.get_int("interleaved", 0)
    if shape is None or len(shape) != 4 or interleaved or cos_array is None or sin_array is None:
        return 0
    width = shape[-1]
    rotated = node.attributes.get_int("rotary_embedding_dim", 0) or width
    half = rotated // 2
    cos_row = _table(graph, cos, cos_array, half, tables)
    sin_row = _table(graph, sin, sin_array, half, tables)

    build = _Builder(graph, node, source)
    sizes = [half, half] + ([width - rotated] if width > rotated else [])
    lengths = add_initializer(graph, f"{build.name}_split", np.array(sizes, np.int64))
    first, second, *rest = build.emit("Split", [source, lengths], sizes, {"axis": -1})
    products = [
        build.emit("Mul", [x, table], [half])[0]
        for x, table in ((first, cos_row), (second, sin_row), (second, cos_row), (first, sin_row))
    ]
    turned = build.emit("Sub", products[:2], [half])
    turned += build.emit("Add", products[2:], [half])
    (result,) = build.emit("Concat", [*turned, *rest], [width], {"axis": -1})
    graph.insert_before(node, build.nodes)
    replace_value(graph, node.outputs[0], result)
    graph.remove(node, safe=True)
    return 1


class _Builder:
    """Makes nodes whose outputs differ from the source only in their last dimension."""

    def __init__(self, graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
        self.nodes: list[ir.Node] = []
        self.name = node.outputs[0].name or "rotary"
        self._source = source
        self._lead = (static_shape(source) or ())[:-1]

    def emit(
        self,
        op_type: str,
        inputs: list[ir.Value],
        widths: list[int],
        attributes: dict[str, int] | None = None,
    ) -> list[ir.Value]:
        label = f"{self.name}_rotary_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes, num_outputs=len(widths), name=label)
        for index, (value, width) in enumerate(zip(node.outputs, widths, strict=True)):
            value.name = f"{label}_{index}"
            value.type = self._source.type
            value.shape = ir.Shape((*self._lead, width))
        self.nodes.append(node)
        return list(node.outputs)


def _table(
    graph: ir.Graph,
    value: ir.Value,
    array: NDArray[np.generic],
    half: int,
    tables: dict[tuple[str, int], ir.Value],
) -> ir.Value:
    """The table with a head axis, (1, 1, S, half); one copy for all nodes that use it."""
    key = (name_of(value), half)
    if key not in tables:
        tables[key] = add_initializer(graph, f"{value.name}_row", array[:, None, :, :half])
    return tables[key]
