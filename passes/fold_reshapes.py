"""fold-reshapes: what only renames dimensions is done once, by one Reshape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_RENAMES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class FoldReshapes(Pass):
    """Puts one Reshape in the place of several, and of a Transpose that leaves elements in order.

    Before → after, x of one token, shape (1, 1, 576)::

        Reshape(x, [1, 1, 9, 64]) → Transpose<perm = [0, 2, 1, 3]>     Reshape(x, [1, 9, 1, 64])

    Meant for integer graphs of one token, whose operators take hardly longer than it takes to start
    them.

    Must not fire on a Transpose that moves a dimension above one past another, where a shape is
    not known, or where what lies between is read elsewhere or handed out.
    """

    name: ClassVar[str] = "fold-reshapes"
    consumes: ClassVar[Stage] = Stage.INTEGER
    produces: ClassVar[Stage] = Stage.INTEGER

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            value, shape = node.inputs[0] if node.inputs else None, _target(node)
            source = _source(value)
            turned = node.op_type == "Transpose"
            if value is None or shape is None or (source is value and not turned):
                continue
            result = node.outputs[0]
            sizes = editor.number(np.array(shape, np.int64))
            name = f"{name_of(result)}_at_once"
            made = editor.move("Reshape", [source, sizes], name, shape, before=node)
            editor.take_over(result, made)
            count += 1
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


def _target(node: ir.Node) -> tuple[int, ...] | None:
    """The shape that an operator gives elements whose order it keeps; None of any other."""
    if not is_standard(node) or node.op_type not in (*_RENAMES, "Transpose"):
        return None
    shape = static_shape(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if shape is None:
        return None
    if node.op_type == "Transpose":
        perm = list(node.attributes.get_ints("perm", list(range(len(shape)))[::-1]))
        moved = [axis for axis in perm if shape[axis] != 1]
        return tuple(shape[axis] for axis in perm) if moved == sorted(moved) else None
    return static_shape(node.outputs[0])


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is before operators that keep the order of elements and that it alone needs."""
    while value is not None:
        node = value.producer()
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if node is None or not alone or node.inputs[0] is None or _target(node) is None:
            return value
        value = node.inputs[0]
    return value
