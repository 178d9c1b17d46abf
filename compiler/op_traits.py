"""What qnpu knows of each operator: does it move data, is it linear, is its range fixed."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

# Operators whose output holds only elements of their data inputs: all share one encoding, or an
# NPU compiler falls back to float (targets.md, "diff_enc"). None stands for every input.
_LAYOUT_DATA_INPUTS: dict[str, int | None] = {
    "Concat": None,
    "DepthToSpace": 1,
    "Expand": 1,
    "Flatten": 1,
    "Gather": 1,
    "GatherElements": 1,
    "GatherND": 1,
    "MaxPool": 1,
    "Reshape": 1,
    "Slice": 1,
    "SpaceToDepth": 1,
    "Split": 1,
    "Squeeze": 1,
    "Tile": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
}

# Inputs that say how a node works and hold no data: they stay float constants, as an attribute
# would. (A scale of 2 that is quantized to 2.00003 moves whole rows of pixels.)
_PARAMETER_INPUTS: dict[str, tuple[int, ...]] = {
    "Resize": (1, 2),
}

# Inputs by which an operator on codes requantizes: floats by its definition, and constants here.
_SCALE_INPUTS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "QLinearMatMul"): (1, 4, 6),
    ("com.microsoft", "QLinearMul"): (1, 4, 6),
    ("com.microsoft", "QLinearSigmoid"): (1, 3),
}

# Output range known from the function itself (real). With 2^b steps over [0, 1) the scale is a
# power of two, which is what NPUs force (targets.md, "forced encodings").
FIXED_RANGES: dict[str, tuple[float, float]] = {
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}

FLOAT_TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def is_float(value: ir.Value) -> bool:
    """True for a value of any floating-point type."""
    return value.dtype in FLOAT_TYPES


def is_standard(node: ir.Node) -> bool:
    """True for an operator of the default ONNX domain."""
    return node.domain in ("", "ai.onnx")


def layout_inputs(node: ir.Node) -> list[ir.Value]:
    """Float inputs whose elements the node's output is made of; empty for a computing node."""
    if not is_standard(node):
        return []
    if node.op_type == "Resize":
        copies = node.attributes.get_string("mode", "nearest") == "nearest"
        count: int | None = int(copies)
    else:
        count = _LAYOUT_DATA_INPUTS.get(node.op_type, 0)
    return [v for v in node.inputs[:count] if v is not None and is_float(v)]


def is_parameter(node: ir.Node, index: int) -> bool:
    """True for an input that says how the node works and is never quantized."""
    return is_standard(node) and index in _PARAMETER_INPUTS.get(node.op_type, ())


def is_quantized_operator(node: ir.Node) -> bool:
    """True for an operator of ONNX Runtime's own that takes and gives codes."""
    return node.domain == "com.microsoft" and node.op_type.startswith("QLinear")


def is_scale(value: ir.Value) -> bool:
    """True for a constant float that operators on codes take as a scale, and nothing else."""
    return (
        value.is_initializer()
        and not value.is_graph_output()
        and all(index in scale_inputs(node) for node, index in value.uses())
    )


def scale_inputs(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of an operator on codes are scales; of any other none."""
    return _SCALE_INPUTS.get(("" if is_standard(node) else node.domain, node.op_type), ())


@dataclass(frozen=True, slots=True)
class Linear:
    """A node that multiplies an activation by a constant weight.

    Attributes:
        node: MatMul, Gemm, Conv or ConvTranspose.
        activation: the other operand.
        weight: an initializer.
        channel_axis: axis of ``weight`` that indexes output channels.
        bias: an initializer of one element per output channel, or None.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    channel_axis: int
    bias: ir.Value | None


def as_linear(node: ir.Node) -> Linear | None:
    """The node seen as a linear, or None where it is none or its weight is not constant."""
    if not is_standard(node) or node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return None
    first, second, *rest = node.inputs
    if first is None or second is None or first.is_initializer() == second.is_initializer():
        return None
    activation, weight = (second, first) if first.is_initializer() else (first, second)
    if weight.shape is None or len(weight.shape) < 2 or not is_float(weight):
        return None
    axis = _channel_axis(node, weight is first, len(weight.shape))
    bias = rest[0] if rest else None
    if bias is not None and not (
        # of a Gemm that has its weight first a 1-D bias runs along the other axis
        (weight is second or node.op_type != "Gemm")
        and bias.is_initializer()
        and bias.shape is not None
        and list(bias.shape) == [weight.shape[axis]]
    ):
        bias = None
    return Linear(node, activation, weight, axis, bias)


def _channel_axis(node: ir.Node, weight_first: bool, rank: int) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            transposed = node.attributes.get_int("transA" if weight_first else "transB", 0)
            return int(weight_first) ^ int(not transposed)
        case _:
            return max(rank - 1 - int(weight_first), 0)


def is_dynamic_matmul(node: ir.Node) -> bool:
    """True for a MatMul of two activations, as in attention."""
    return (
        is_standard(node)
        and node.op_type == "MatMul"
        and not any(v is None or v.is_initializer() or not is_float(v) for v in node.inputs)
    )


def normalized_inputs(node: ir.Node) -> list[ir.Value]:
    """What a norm divides by its own magnitude; empty for any other node."""
    is_norm = is_standard(node) and node.op_type in ("RMSNormalization", "LayerNormalization")
    return [v for v in node.inputs[:1] if v is not None] if is_norm else []


def encoding_groups(graph: ir.Graph) -> list[list[ir.Value]]:
    """Float values that must share one encoding because layout operators tie them together.

    Returns:
        Groups in graph order, each in graph order, its computed members before the copies that
        layout operators make of them; a value that nothing ties stands alone.
    """
    parent: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        root = value
        while parent.setdefault(root, root) is not root:
            root = parent[root]
        while parent[value] is not root:
            parent[value], value = root, parent[value]
        return root

    for value in float_values(graph):
        find(value)
    for node in graph:
        tied = layout_inputs(node)
        if tied:
            tied += [v for v in node.outputs if is_float(v) and v.name]
        for value in tied[1:]:
            first, second = find(tied[0]), find(value)
            if first is not second:
                parent[second] = first
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in list(parent):
        groups.setdefault(find(value), []).append(value)
    return [sorted(group, key=is_layout_copy) for group in groups.values()]


def is_layout_copy(value: ir.Value) -> bool:
    """True for a value that a layout operator made of others."""
    producer = value.producer()
    return producer is not None and bool(layout_inputs(producer))


def float_values(graph: ir.Graph) -> list[ir.Value]:
    """Float graph inputs, then float initializers in use, then node outputs, in graph order.

    Without constants that are only parameters of nodes.
    """
    values = [v for v in graph.inputs if is_float(v)]
    values += [
        v
        for v in graph.initializers.values()
        if is_float(v) and any(not is_parameter(node, index) for node, index in v.uses())
    ]
    for node in graph:
        values += [v for v in node.outputs if is_float(v) and v.name]
    return values
