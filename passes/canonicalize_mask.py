"""canonicalize-mask: an attention mask of minus infinity becomes a small constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qnpu.compiler.graph_edit import add_initializer, constant_array, name_of
from qnpu.compiler.op_traits import is_float, is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rules import MaskReplaced

# Masks are far below any score; real additive constants (position biases) are far above this.
_MASK_THRESHOLD = -1e4
_CARRIERS = frozenset(
    {"Add", "Mul", "Where", "Sub", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose"}
    | {"Slice", "Concat", "Gather", "Max", "Tile"}
)


@dataclass(frozen=True)
class CanonicalizeMask(Pass):
    """Raises every constant ≤ -1e4 on the way to a Softmax to ``mask_value``.

    Before → after::

        Softmax(Add(scores, [0, -3.4e38]))     → Softmax(Add(scores, [0, -50]))
        Softmax(Where(causal, scores, -inf))   → Softmax(Where(causal, scores, -50))

    The constant shares the score tensor's range: at -65504 and 16 bits one LSB is 1.0. At -50 a
    masked key still gets e^-50 of the weight of an equal score (quantnpu.md §5).

    Must not fire on a constant that no Softmax sees, or that is also used elsewhere: that use
    keeps the old constant.

    Attributes:
        mask_value: real, added to or put in place of a masked score.
    """

    name: ClassVar[str] = "canonicalize-mask"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    mask_value: float = -50.0

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        new_values: dict[ir.Value, ir.Value] = {}
        count = 0
        for node, index, value in _mask_uses(graph):
            if value not in new_values:
                array = constant_array(value)
                if array is None:
                    continue
                masked = array <= _MASK_THRESHOLD
                raised = np.where(masked, np.float32(self.mask_value), array)
                name = f"{value.name}_finite"
                new_values[value] = add_initializer(graph, name, raised.astype(np.float32))
                old = float(array.min())
                rule = MaskReplaced(old, self.mask_value)
                compilation.diagnostics.append(rule.at(value=name_of(value)))
            node.replace_input_with(index, new_values[value])
            count += 1
        for value in new_values:
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name_of(value)]
        return count


def _mask_uses(graph: ir.Graph) -> list[tuple[ir.Node, int, ir.Value]]:
    """Uses of mask constants in the expressions that lead to a Softmax's input."""
    found: list[tuple[ir.Node, int, ir.Value]] = []
    seen: set[ir.Node] = set()
    pending = [node.inputs[0] for node in graph if node.op_type == "Softmax" and is_standard(node)]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen or not is_standard(node) or node.op_type not in _CARRIERS:
            continue
        seen.add(node)
        for index, operand in enumerate(node.inputs):
            if operand is None or not is_float(operand):
                continue
            if operand.is_initializer():
                array = constant_array(operand)
                if array is not None and array.size and float(array.min()) <= _MASK_THRESHOLD:
                    found.append((node, index, operand))
            else:
                pending.append(operand)
    return found
