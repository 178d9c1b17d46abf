"""raise-sums: what the residual stream's sums would add to be codes again is left to who reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_functions import DOMAIN, named_inputs
from qnpu.compiler.marks import RAISED, raised
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_ADD = "IntAddShort"
_NORM = "IntRMSNormShort"
_CODES = 1 << 16
_ROOM = 1 << 30  # of a product: two of them and an offset stay in int32


@dataclass(frozen=True)
class RaiseSums(Pass):
    """Takes the offset out of sums that are int32 and divide nothing.

    Before → after, of codes a and b, zero points z::

        s = clip(a + b + o, 0, 65535)       s' = clip(a + b, -o, 65535 - o), which is s - o
        qnpu.IntRMSNormShort(s, zero)       qnpu.IntRMSNormShort(s', zero - o)
        clip(s + c + p, 0, 65535)           clip(s' + c, -o - p, 65535 - o - p)

    One operator less for each sum. A sum that is rounded has an offset anyway, and takes back by it
    what its operands have been raised by. Results are marked with what they are above their codes.

    Must not fire on sums of fewer bits, or where a reader's products could leave int32.
    """

    name: ClassVar[str] = "raise-sums"
    consumes: ClassVar[Stage] = Stage.INTEGER
    produces: ClassVar[Stage] = Stage.INTEGER

    def run(self, compilation: Compilation) -> int:
        model, count = compilation.model, 0
        editor = IntegerEditor(model)
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        if any(RAISED in node.outputs[0].metadata_props for node in nodes):
            return 0
        for node in nodes:
            if node.op_type == _NORM and raised(node.inputs[0]):
                zero = _number(node, "zero", model) + raised(node.inputs[0])
                _set(node, model, editor, zero=zero)
            elif node.op_type == _ADD:
                count += _raise(node, model, editor)
        return count


def _raise(node: ir.Node, model: ir.Model, editor: IntegerEditor) -> int:
    """Takes the offset out of a sum, or what its operands are raised by into it."""
    numbers = {
        name: _number(node, name, model)
        for name in ("multiplier_a", "multiplier_b", "offset", "step", "low", "high")
    }
    one, other = (raised(value) for value in node.inputs[:2])
    offset = numbers["offset"] - numbers["multiplier_a"] * one - numbers["multiplier_b"] * other
    result = node.outputs[0]
    if numbers["step"] == 1 and offset and _can_be_raised(result, offset, model):
        _set(
            node,
            model,
            editor,
            offset=0,
            low=numbers["low"] - offset,
            high=numbers["high"] - offset,
        )
        result.metadata_props[RAISED] = str(-offset)
        return 1
    if offset != numbers["offset"]:
        _set(node, model, editor, offset=offset)
    return 0


def _can_be_raised(value: ir.Value, offset: int, model: ir.Model) -> bool:
    if value.dtype is not ir.DataType.INT32 or value.is_graph_output():
        return False
    for node, index in value.uses():
        factor = 1
        if node.op_type == _ADD:
            factor = _number(node, f"multiplier_{'ab'[index]}", model)
        if node.op_type not in (_ADD, _NORM) or factor * (abs(offset) + _CODES) >= _ROOM:
            return False
    return True


def _number(node: ir.Node, name: str, model: ir.Model) -> int:
    array = constant_array(named_inputs(node, model)[name])
    if array is None or array.size != 1:
        raise ValueError(f"{node.name} has no number `{name}`")
    return int(array.item())


def _set(node: ir.Node, model: ir.Model, editor: IntegerEditor, **numbers: int) -> None:
    names = list(named_inputs(node, model))
    for name, number in numbers.items():
        node.replace_input_with(names.index(name), editor.number(np.array(number, np.int32)))
