"""decompose-rotary: RotaryEmbedding becomes multiplications that every NPU has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import (
    NodeBuilder,
    add_initializer,
    constant_array,
    name_of,
    static_shape,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rotary import turn_halves, turn_pairs

Tables = dict[tuple[str, int, bool], ir.Value]
"""A table made ready, by its name, its width, and whether it is for pairs side by side."""


@dataclass(frozen=True)
class DecomposeRotary(Pass):
    """Spells out RotaryEmbedding-23 for 4-D input with constant tables.

    Before → after, x of shape (B, H, S, D), tables of shape (1, S, D/2)::

        RotaryEmbedding(x, cos, sin)

        x1, x2 = Split(x)
        Concat(x1·cos - x2·sin, x2·cos + x1·sin)

    Interleaved, where x1 and x2 lie side by side, x is first seen as (B, H, S·D/2, 2).
    Dimensions past ``rotary_embedding_dim`` pass through unchanged.

    Must not fire on a 3-D input, or tables that are computed or indexed by position ids at run
    time. Source: ONNX RotaryEmbedding-23; HTP runs the operator in float.
    """

    name: ClassVar[str] = "decompose-rotary"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        tables: Tables = {}
        count = sum(_decompose(graph, node, tables) for node in list(graph))
        if count:
            common.ShapeInferencePass(strict_mode=False, check_type=False)(compilation.model)
        return count


def _decompose(graph: ir.Graph, node: ir.Node, tables: Tables) -> int:
    if node.op_type != "RotaryEmbedding" or not is_standard(node):
        return 0
    source, cos, sin, *positions = node.inputs
    if source is None or cos is None or sin is None or any(p is not None for p in positions):
        return 0
    shape = static_shape(source)
    cos_array, sin_array = constant_array(cos), constant_array(sin)
    if shape is None or len(shape) != 4 or cos_array is None or sin_array is None:
        return 0
    pairs = bool(node.attributes.get_int("interleaved", 0))
    rotated = node.attributes.get_int("rotary_embedding_dim", 0) or shape[-1]
    cos_row = _table(graph, cos, cos_array, rotated // 2, pairs, tables)
    sin_row = _table(graph, sin, sin_array, rotated // 2, pairs, tables)
    build = NodeBuilder(graph, node)
    turn = turn_pairs if pairs else turn_halves
    build.replace(turn(build, source, shape, rotated, cos_row, sin_row))
    return 1


def _table(
    graph: ir.Graph,
    value: ir.Value,
    array: NDArray[np.generic],
    half: int,
    pairs: bool,
    tables: Tables,
) -> ir.Value:
    """The table with a head axis, (1, 1, S, half), or (1, 1, S·half, 1); one copy for all nodes."""
    key = (name_of(value), half, pairs)
    if key not in tables:
        row = array[:, None, :, :half]
        if pairs:
            row = row.reshape(len(array), 1, -1, 1)
        tables[key] = add_initializer(graph, f"{value.name}_row", row)
    return tables[key]
