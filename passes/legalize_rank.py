"""Rewrites of legalize-target: fewer dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.operands import Operand, Operation, input_operand
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of, equal
from qnpu.compiler.target import OpRule

Shape = tuple[int, ...]

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_NORMS = frozenset({"RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization"})
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Atan", "Asin", "Ceil", "Clip", "Cos", "Div", "Elu", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Pow",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Swish",
    "Tanh",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Regrouping:
    """Adjacent dimensions that become one.

    Attributes:
        starts: first old dimension of each new one, in order, from 0.
        rank: number of old dimensions.
    """

    starts: tuple[int, ...]
    rank: int

    def apply(self, shape: Shape) -> Shape:
        """A shape with its dimensions merged; one of lower rank is seen with 1s in front."""
        whole = (1,) * (self.rank - len(shape)) + shape
        ends = (*self.starts[1:], self.rank)
        return tuple(int(np.prod(whole[a:b])) for a, b in zip(self.starts, ends, strict=True))

    def axis(self, old: int) -> int:
        """The new dimension that begins with an old one, which must begin one."""
        return self.starts.index(old % self.rank)


def regroup(
    shapes: list[Shape], limit: int, kept: frozenset[int] = frozenset()
) -> Regrouping | None:
    """Merges dimensions from the front until no more than ``limit`` are left.

    Two neighbours merge where each shape that is broadcast along one is so along the other; a
    dimension of 1 in all shapes merges with any.

    Args:
        shapes: of all operands and results; the longest gives the rank.
        limit: dimensions wanted.
        kept: dimensions that stay by themselves.

    Returns:
        None where they do not merge that far.
    """
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    full = tuple(max(sizes) for sizes in zip(*aligned, strict=True))
    broadcast = [_broadcast(aligned, full, axis) for axis in range(rank)]
    starts, last, surplus = [0], broadcast[0], rank - limit
    for axis in range(1, rank):
        alike = not last or not broadcast[axis] or last == broadcast[axis]
        if surplus > 0 and alike and not {axis, starts[-1]} & kept:
            last = last or broadcast[axis]
            surplus -= 1
        else:
            starts.append(axis)
            last = broadcast[axis]
    return Regrouping(tuple(starts), rank) if surplus <= 0 else None


def _broadcast(shapes: list[Shape], full: Shape, axis: int) -> tuple[bool, ...]:
    """Which shapes are broadcast along an axis; empty where all are 1."""
    return () if full[axis] == 1 else tuple(shape[axis] == 1 for shape in shapes)


def transposed(shape: Shape, order: Shape) -> tuple[Shape, Shape]:
    """A transposition with the fewest dimensions: what moves together is one.

    Args:
        shape: of the input.
        order: input dimension of each output dimension.

    Returns:
        The shape to give the input, and the order of its dimensions.
    """
    large = [axis for axis in order if shape[axis] != 1]
    place = {axis: index for index, axis in enumerate(sorted(large))}
    runs: list[list[int]] = []
    for axis in large:
        if runs and place[axis] == place[runs[-1][-1]] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    inputs = sorted(runs)
    new = tuple(int(np.prod([shape[axis] for axis in run])) for run in inputs)
    return new or (1,), tuple(inputs.index(run) for run in runs) or (0,)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Operand → its new shape, the new shape of the result, and attributes that change."""

    inputs: dict[int, Shape]
    output: Shape
    attributes: dict[str, Any]


def reduce_rank(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Computes on fewer dimensions.

    Before → after, shapes for a limit of 4::

        Add(x: (2, 3, 4, 5, 6), y: (5, 6))
        Reshape(Add(Reshape(x): (6, 4, 5, 6), Reshape(y): (1, 1, 5, 6)))

    Elementwise operators, Softmax and norms over their axis, Transpose (what moves together is one
    dimension) and MatMul (its leading dimensions). Reshapes have the encoding of what they reshape,
    so the numbers stay the same. Of two operators in a row that only change the shape, with too
    many dimensions between them, the second reads what the first does.

    Must not fire on other operators, dimensions that do not merge, or operands without one scale.
    """
    if rule.rank_above is None or len(operation.outputs) != 1:
        return False
    if operation.op_type in _VIEWS:
        return _skip_view(editor, operation, rule.rank_above)
    plan = _plan(operation, rule.rank_above)
    result = encoding_of(operation.outputs[0])
    old = operation.outputs[0].shape
    if plan is None or result is None or old is None:
        return False
    node, name = operation.node, name_of(operation.node) or name_of(operation.outputs[0].value)
    inputs = list(node.inputs)
    for index, shape in plan.inputs.items():
        operand = operation.inputs[index]
        encoding = encoding_of(operand) if operand is not None else None
        if operand is None or encoding is None:
            return False
        if operand.shape != shape:
            label = f"{name}_in{index}"
            inputs[index] = editor.reshape(operand.value, shape, encoding, label, node)
    kept = {key: a.value for key, a in node.attributes.items() if isinstance(a, ir.Attr)}
    value = editor.node(
        node.op_type,
        inputs,
        f"{name}_merged",
        plan.output,
        before=node,
        domain=node.domain,
        **(kept | plan.attributes),
    )
    shape_value = editor.constant(f"{name}_shape", np.array(old, np.int64))
    reshaped = [editor.pair(value, result), shape_value]
    editor.replace(node, editor.node("Reshape", reshaped, f"{name}_result", old, before=node))
    return True


def _plan(operation: Operation, limit: int) -> _Plan | None:
    """How to merge dimensions; None where the operator is not known or they do not merge."""
    first = operation.inputs[0]
    output = operation.outputs[0].shape
    if first is None or first.shape is None or output is None:
        return None
    if operation.op_type in _ELEMENTWISE:
        return _plan_elementwise(operation, output, limit)
    if operation.op_type in _SOFTMAXES | _NORMS:
        return _plan_along_axis(operation, first.shape, limit)
    if operation.op_type == "Transpose":
        return _plan_transpose(operation, first.shape, limit)
    return _plan_matmul(operation, output, limit) if operation.op_type == "MatMul" else None


def _plan_transpose(operation: Operation, shape: Shape, limit: int) -> _Plan | None:
    default = list(range(len(shape)))[::-1]
    new, order = transposed(shape, tuple(operation.node.attributes.get_ints("perm", default)))
    if len(new) > limit:
        return None
    return _Plan({0: new}, tuple(new[axis] for axis in order), {"perm": list(order)})


def _plan_elementwise(operation: Operation, output: Shape, limit: int) -> _Plan | None:
    shapes = {i: o.shape for i, o in enumerate(operation.inputs) if o is not None and o.quantized}
    known = {index: shape for index, shape in shapes.items() if shape is not None}
    grouping = regroup([*known.values(), output], limit)
    if grouping is None or len(known) < len(shapes):
        return None
    # A scalar stays one.
    inputs = {index: grouping.apply(shape) for index, shape in known.items() if shape}
    return _Plan(inputs, grouping.apply(output), {})


def _plan_along_axis(operation: Operation, shape: Shape, limit: int) -> _Plan | None:
    """The axis stays; a norm's gain is 1-D, so its axis must be the last."""
    axis = operation.node.attributes.get_int("axis", -1) % len(shape)
    if operation.op_type in _NORMS and axis != len(shape) - 1:
        return None
    grouping = regroup([shape], limit, kept=frozenset({axis}))
    if grouping is None:
        return None
    new = grouping.apply(shape)
    return _Plan({0: new}, new, {"axis": grouping.axis(axis)})


def _plan_matmul(operation: Operation, output: Shape, limit: int) -> _Plan | None:
    shapes = [operand.shape for operand in operation.present]
    if len(shapes) != 2 or any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    known = [shape for shape in shapes if shape is not None]
    grouping = regroup([*(shape[:-2] for shape in known), output[:-2]], limit - 2)
    if grouping is None:
        return None
    # A matrix stays one.
    inputs = {
        index: grouping.apply(shape[:-2]) + shape[-2:]
        for index, shape in enumerate(known)
        if len(shape) > 2
    }
    return _Plan(inputs, grouping.apply(output[:-2]) + output[-2:], {})


def _skip_view(editor: QdqEditor, operation: Operation, limit: int) -> bool:
    """Reshape(Reshape(x)) becomes Reshape(x) where the dimensions between are too many."""
    between, shape = operation.inputs[0], operation.outputs[0].shape
    view = _view_before(between)
    if between is None or view is None or shape is None or (between.rank or 0) <= limit:
        return False
    source = view.inputs[0]
    encodings = [encoding_of(o) for o in (input_operand(source), between)] if source else []
    first, second = encodings if len(encodings) == 2 else (None, None)
    if first is None or second is None or not equal(first, second):
        return False
    node, name = operation.node, name_of(operation.node) or name_of(operation.outputs[0].value)
    target = editor.constant(f"{name}_shape", np.array(shape, np.int64))
    result = editor.node("Reshape", [source, target], f"{name}_whole", shape, before=node)
    editor.replace(node, result)
    return True


def _view_before(operand: Operand | None) -> ir.Node | None:
    """The operator that made an operand, where it only changes the shape."""
    quantize = operand.codes.producer() if operand is not None and operand.codes else None
    value = quantize.inputs[0] if quantize is not None and quantize.inputs else None
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in _VIEWS and is_standard(node) else None
