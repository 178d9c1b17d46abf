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
    """Spells out RotaryEmbedding-23 for 4-D input with one row of its tables per token.

    Before → after, x of shape (B, H, S, D), tables of shape (1, S, D/2)::

        RotaryEmbedding(x, cos, sin)

        x1, x2 = Split(x)
        Concat(x1·cos - x2·sin, x2·cos + x1·sin)

    Interleaved, where x1 and x2 lie side by side, x is first seen as (B, H, S·D/2, 2).
    Dimensions past ``rotary_embedding_dim`` pass through unchanged. Tables that are computed, from
    positions that are fed, are reshaped as the graph runs.

    Must not fire on a 3-D input, tables that position ids index, computed tables that are wider
    than they need be, or where one is computed and one is not. Source: ONNX RotaryEmbedding-23; HTP
    runs the operator in float.
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
    if shape is None or len(shape) != 4:
        return 0
    cos_array, sin_array = constant_array(cos), constant_array(sin)
    pairs = bool(node.attributes.get_int("interleaved", 0))
    rotated = node.attributes.get_int("rotary_embedding_dim", 0) or shape[-1]
    build = NodeBuilder(graph, node)
    if cos_array is not None and sin_array is not None:
        cos_row = _table(graph, cos, cos_array, rotated // 2, pairs, tables)
        sin_row = _table(graph, sin, sin_array, rotated // 2, pairs, tables)
    elif all(_is_computed(table, (shape[0], shape[2], rotated // 2)) for table in (cos, sin)):
        cos_row = _row(build, cos, pairs, tables)
        sin_row = _row(build, sin, pairs, tables)
    else:
        return 0
    turn = turn_pairs if pairs else turn_halves
    build.replace(turn(build, source, shape, rotated, cos_row, sin_row))
    return 1


def _is_computed(value: ir.Value, shape: tuple[int, int, int]) -> bool:
    return constant_array(value) is None and static_shape(value) == shape


def _row(build: NodeBuilder, value: ir.Value, pairs: bool, tables: Tables) -> ir.Value:
    """As ``_table``, of a table that is computed."""
    batch, tokens, half = static_shape(value) or (1, 1, 1)
    key = (name_of(value), half, pairs)
    if key not in tables:
        label = f"row_of_{name_of(value)}"
        shape = (batch, 1, tokens * half, 1) if pairs else (batch, 1, tokens, half)
        tables[key] = build.add("Reshape", [value, build.integers(f"{label}_shape", *shape)], label)
    return tables[key]


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
