"""tabulate-positions: sines and cosines of positions become rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import (
    GraphEditor,
    name_of,
    nodes_behind,
    static_shape,
    subgraph_proto,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.runtime_check.session import open_session, run

_POSITIONS = "position_ids"


@dataclass(frozen=True)
class TabulatePositions(Pass):
    """Reads rotary embeddings of given positions from constants.

    Before → after, n positions and N = ``positions``::

        position_ids [1, n] → Cast → MatMul(frequencies) → … → Cos [1, n, d]

        position_ids [1, n] → Gather(table [N, d], ·)        table[p] = Cos(…) at position p

    The table is what the nodes themselves give, so nothing is approximated. Its range is that of
    all N positions, whatever positions calibration sees; and no angle has to be quantized.

    Must not fire where positions are constants, where anything else goes into the angles, or on a
    result that is not one row per position.

    Attributes:
        positions: N; a position from N on has no row.
    """

    name: ClassVar[str] = "tabulate-positions"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    positions: int = 512

    def run(self, compilation: Compilation) -> int:
        graph, editor = compilation.graph, GraphEditor(compilation.graph)
        entry = next((v for v in graph.inputs if v.name == _POSITIONS), None)
        shape = static_shape(entry) if entry is not None else None
        if entry is None or shape is None or len(shape) != 2 or shape[0] != 1:
            return 0
        count = 0
        for node in list(graph):
            nodes = _behind(node, entry) if _is_turn(node, shape[1]) else None
            if nodes is None:
                continue
            position = {item: place for place, item in enumerate(graph)}
            nodes.sort(key=position.__getitem__)
            table = self._table(nodes, entry, node.outputs[0], compilation.model)
            name = name_of(node.outputs[0])
            constant = editor.constant(f"{name}_table", table)
            rows = editor.node(
                "Gather", [constant, entry], f"{name}_row", [*shape, table.shape[1]], before=node
            )
            editor.replace(node, rows)
            for item in reversed(nodes[:-1]):
                if not any(value.uses() or value.is_graph_output() for value in item.outputs):
                    graph.remove(item, safe=True)
            count += 1
        return count

    def _table(
        self, nodes: list[ir.Node], entry: ir.Value, result: ir.Value, model: ir.Model
    ) -> NDArray[np.float32]:
        """Rows of a result for positions 0 … N-1, shape (N, d)."""
        session = open_session(subgraph_proto(nodes, [entry], [result], model))
        shape = static_shape(entry) or (1, 1)
        rows: list[NDArray[np.float32]] = []
        for start in range(0, self.positions, shape[1]):
            positions = np.arange(start, start + shape[1]).reshape(shape)
            dtype = entry.dtype.numpy() if entry.dtype is not None else np.int64
            rows.append(run(session, None, {name_of(entry): positions.astype(dtype)})[0][0])
        return np.concatenate(rows)[: self.positions]


def _is_turn(node: ir.Node, count: int) -> bool:
    """A Cos or Sin of one row per position."""
    if not is_standard(node) or node.op_type not in ("Cos", "Sin"):
        return False
    shape = static_shape(node.outputs[0])
    return shape is not None and len(shape) == 3 and shape[:2] == (1, count)


def _behind(node: ir.Node, entry: ir.Value) -> list[ir.Node] | None:
    """A node and all before it, where one input and constants alone go into them."""
    found = nodes_behind(node.outputs[0])
    read = {value for item in found for value in item.inputs if value is not None}
    given = {value for value in read if value.producer() is None and not value.is_initializer()}
    return found if given == {entry} else None
