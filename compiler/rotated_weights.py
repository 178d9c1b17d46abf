"""Which weights a rotation was multiplied into, and on which side.

Passes that choose ranges or widths ask: what is rotated has no outlier channels. The mark lies in
the model's metadata, by name of initializer, so that it outlives whatever is put into the graph
between the linears.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from pydantic import TypeAdapter

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.marks import read_mark
from qnpu.compiler.op_traits import Linear
from qnpu.compiler.roles import is_rotated_online

MARK = "qnpu.rotated_weights"
_TABLE = TypeAdapter(dict[Literal["inputs", "outputs"], list[str]])


@dataclass(frozen=True, slots=True)
class RotatedWeights:
    """Names of initializers.

    Attributes:
        inputs: weights of linears that take a rotated activation (R1: q, k, v, gate, up, lm_head;
            R2: o).
        outputs: weights of linears that make one (R1: o, down; R2: v).
    """

    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()

    def takes_rotated(self, linear: Linear) -> bool:
        """True where a linear's input is rotated, within weights or online."""
        return name_of(linear.weight) in self.inputs or is_rotated_online(linear.activation)

    def is_merged(self, linear: Linear) -> bool:
        """True where a rotation was multiplied into a linear's weight."""
        return name_of(linear.weight) in self.outputs or self.takes_rotated(linear)


def mark_rotated_weights(
    model: ir.Model, *, inputs: Iterable[ir.Value] = (), outputs: Iterable[ir.Value] = ()
) -> None:
    """Notes weights, beside those noted before; nothing where there is none."""
    known = rotated_weights(model)
    table = {
        "inputs": sorted(known.inputs | {name_of(value) for value in inputs}),
        "outputs": sorted(known.outputs | {name_of(value) for value in outputs}),
    }
    if any(table.values()):
        model.metadata_props[MARK] = json.dumps(table)


def rotated_weights(model: ir.Model) -> RotatedWeights:
    """What was noted.

    Raises:
        DiagnosticError: QN119 it is nothing that was noted here.
    """
    table = read_mark(model, MARK, _TABLE) or {}
    return RotatedWeights(*(frozenset(table.get(side, ())) for side in ("inputs", "outputs")))
