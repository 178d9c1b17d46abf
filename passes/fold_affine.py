"""fold-affine: a scale and shift per channel after a convolution goes into its weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import (
    add_initializer,
    constant_array,
    like,
    name_of,
    replace_value,
    static_shape,
)
from qnpu.compiler.op_traits import as_linear, is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_FOLLOWERS = ("Add", "Sub", "Mul", "Div")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Folds BatchNormalization, and Mul, Div, Add, Sub by constants, into the convolution before.

    Before → after, W of shape (C, …), s, t and all parameters of the norm of shape (C,)::

        BatchNormalization(x, γ, β, μ, σ²) → Add(Mul(x, s), t)    s = γ / sqrt(σ² + ε), t = β - μ·s
        Add(Mul(Conv(x, W, b), s), t)      → Conv(x, W·s, b·s + t)

    Why: each tensor in between costs one more rounding, and a scale per output channel that is
    left outside makes one range for the whole convolution's output fit none of its channels.

    Must not fire where the convolution's result has another consumer or leaves the graph, where its
    weight or bias is shared, where the constant is neither a scalar nor one number per channel, or
    on a grouped ConvTranspose, whose weight has no axis of output channels. A norm without a
    convolution before it stays Mul and Add.
    Source: Jacob et al. 2018, §3.2.
    """

    name: ClassVar[str] = "fold-affine"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        count = sum(_split_norm(graph, node) for node in list(graph))
        for node in list(graph):
            while node.op_type in ("Conv", "ConvTranspose") and _fold_follower(graph, node):
                count += 1
        if count:
            common.RemoveUnusedNodesPass()(compilation.model)
        return count


def _split_norm(graph: ir.Graph, node: ir.Node) -> int:
    """BatchNormalization in inference → Mul and Add of one constant per channel."""
    if node.op_type != "BatchNormalization" or not is_standard(node) or len(node.outputs) > 1:
        return 0
    source, output = node.inputs[0], node.outputs[0]
    gain, bias, mean, variance = (constant_array(value) for value in node.inputs[1:5])
    shape = static_shape(output)
    if source is None or shape is None or node.attributes.get_int("training_mode", 0) != 0:
        return 0
    if gain is None or bias is None or mean is None or variance is None:
        return 0
    name = name_of(output)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    scale = gain / np.sqrt(variance.astype(np.float64) + epsilon)
    shift = bias - mean * scale
    row = (1, -1, *(1 for _ in shape[2:]))
    multiply = ir.node(
        "Mul",
        [source, add_initializer(graph, f"{name}_scale", _float32(scale.reshape(row)))],
        outputs=[like(output, f"{name}_scaled")],
        name=f"{name}_scale",
    )
    add = ir.node(
        "Add",
        [
            multiply.outputs[0],
            add_initializer(graph, f"{name}_shift", _float32(shift.reshape(row))),
        ],
        outputs=[like(output, f"{name}_shifted")],
        name=f"{name}_shift",
    )
    graph.insert_before(node, [multiply, add])
    replace_value(graph, output, add.outputs[0])
    graph.remove(node, safe=True)
    return 1


def _fold_follower(graph: ir.Graph, conv: ir.Node) -> bool:
    """Folds the one node that takes the convolution's result, if it is affine per channel."""
    linear = as_linear(conv)
    output = conv.outputs[0]
    users = list(output.uses())
    if linear is None or linear.weight is not conv.inputs[1] or len(users) != 1:
        return False
    if output.is_graph_output() or len(linear.weight.uses()) > 1:
        return False
    if conv.op_type == "ConvTranspose" and conv.attributes.get_int("group", 1) > 1:
        return False
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is not None and (bias is not linear.bias or len(bias.uses()) > 1):
        return False
    weight = constant_array(linear.weight)
    follower, index = users[0]
    affine = _affine(follower, index, output)
    if weight is None or affine is None:
        return False
    scale, shift = affine
    _set(linear.weight, weight * np.moveaxis(_column(scale, weight.ndim), 0, linear.channel_axis))
    old_bias = constant_array(bias)
    new_bias = shift if old_bias is None else old_bias * scale + shift
    if bias is not None:
        _set(bias, new_bias)
    elif new_bias.any():
        conv.resize_inputs(3)
        name = f"{name_of(output)}_bias"
        conv.replace_input_with(2, add_initializer(graph, name, _float32(new_bias)))
    replace_value(graph, follower.outputs[0], output)
    graph.remove(follower, safe=True)
    return True


def _affine(node: ir.Node, index: int, value: ir.Value) -> tuple[Array, Array] | None:
    """Scale and shift that a node applies to each channel of its operand ``index``, or None."""
    shape = static_shape(value)
    if node.op_type not in _FOLLOWERS or not is_standard(node) or shape is None:
        return None
    array = constant_array(node.inputs[1 - index])
    if array is None or array.ndim > len(shape):
        return None
    padded = array.reshape((1,) * (len(shape) - array.ndim) + array.shape).astype(np.float64)
    row = (1, padded.shape[1], *(1 for _ in shape[2:]))
    if padded.shape != row or padded.shape[1] not in (1, shape[1]):
        return None
    constant = np.broadcast_to(padded.ravel(), (shape[1],))
    one, zero = np.ones(shape[1]), np.zeros(shape[1])
    forms = {
        ("Add", 0): (one, constant),
        ("Add", 1): (one, constant),
        ("Sub", 0): (one, -constant),
        ("Sub", 1): (-one, constant),
        ("Mul", 0): (constant, zero),
        ("Mul", 1): (constant, zero),
    }
    if constant.all():
        forms["Div", 0] = (1.0 / constant, zero)
    return forms.get((node.op_type, index))


def _column(row: Array, rank: int) -> Array:
    return row.reshape(-1, *(1 for _ in range(rank - 1)))


def _set(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(_float32(array), name=value.name)


def _float32(array: Array) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, np.float32)
