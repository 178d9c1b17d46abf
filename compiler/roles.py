"""What a linear or a value is for, told from its neighbours and never from names."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qnpu.compiler.graph_edit import (
    constant_array,
    like,
    name_of,
    static_shape,
    unique_initializer_name,
)
from qnpu.compiler.hadamard import is_scaled_hadamard
from qnpu.compiler.op_traits import (
    Linear,
    as_linear,
    is_dynamic_matmul,
    is_float,
    is_parameter,
    is_standard,
    layout_inputs,
    normalized_inputs,
)

_MATRIX = 2  # dimensions
# What may lie between scores and softmax: scaling, soft-capping, masking.
_SCORE_OPS = ("Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Sub", "Tanh", "Where")


def is_requantize_point(node: ir.Node) -> bool:
    """An Identity of floats: the same tensor at another width."""
    return node.op_type == "Identity" and is_float(node.outputs[0])


def computing_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Computing nodes that take a value or a copy of it, and the input they take it as."""
    return [
        (node, index)
        for copy in copies(value)
        for node, index in copy.uses()
        if not layout_inputs(node) and not is_requantize_point(node)
    ]


def copies(value: ir.Value) -> Iterator[ir.Value]:
    """A value and what layout operators and requantize points make of it."""
    yield value
    for user in value.consumers():
        if layout_inputs(user) or is_requantize_point(user):
            for output in user.outputs:
                yield from copies(output)


def activations(node: ir.Node) -> int:
    """How many inputs are no constants."""
    return sum(v is not None and not v.is_initializer() for v in node.inputs)


def joins_residual(value: ir.Value) -> bool:
    """True where a value is added to an activation; a norm on the way (Gemma's) does not matter."""
    return any(
        (node.op_type == "Add" and activations(node) > 1)
        or (bool(normalized_inputs(node)) and index == 0 and joins_residual(node.outputs[0]))
        for node, index in computing_uses(value)
    )


def is_online_rotation(linear: Linear) -> bool:
    """A MatMul by a Hadamard matrix times one number, as insert-hadamard makes it."""
    if linear.node.op_type != "MatMul" or linear.activation is not linear.node.inputs[0]:
        return False
    shape = linear.weight.shape
    if shape is None or len(shape) != 2 or shape[0] != shape[1]:
        return False
    matrix = constant_array(linear.weight)
    return matrix is not None and is_scaled_hadamard(matrix)


def computed_by(value: ir.Value) -> ir.Node | None:
    """What computes a value, behind copies, requantize points and online rotations."""
    node = _behind_copies(value)
    while node is not None and _rotates_online(node):
        node = _behind_copies(node.inputs[0])
    return node


def is_rotated_online(value: ir.Value) -> bool:
    """True where an online rotation makes a value, with nothing but copies behind it."""
    node = _behind_copies(value)
    return node is not None and _rotates_online(node)


def _behind_copies(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that layout operators and requantize points then hand on."""
    node = value.producer() if value is not None else None
    while node is not None and (layout_inputs(node) or is_requantize_point(node)):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def _rotates_online(node: ir.Node) -> bool:
    linear = as_linear(node)
    return linear is not None and is_online_rotation(linear)


def is_down_projection(linear: Linear) -> bool:
    """Takes what an activation function made, and joins the residual stream.

    Told from an attention's output, which takes a MatMul's, and from lm_head, which takes a norm's.
    An online rotation may stand in front of it.
    """
    if linear.node.op_type not in ("MatMul", "Gemm"):
        return False
    node = computed_by(linear.activation)
    if node is None or as_linear(node) or is_dynamic_matmul(node) or normalized_inputs(node):
        return False
    return joins_residual(linear.node.outputs[0])


def gate_values(linear: Linear) -> Iterator[ir.Value]:
    """What lies between other linears and the product that a down projection takes: SiLU's parts.

    From the nearest on; not what it takes itself, which has bits of its own, nor sums of two.
    """
    node = computed_by(linear.activation)
    pending = [node] if node is not None else []
    seen = set(pending)
    while pending:
        for value in pending.pop().inputs:
            maker = _behind_copies(value)
            if maker is None or maker in seen or as_linear(maker) or normalized_inputs(maker):
                continue
            if is_dynamic_matmul(maker) or (maker.op_type == "Add" and activations(maker) > 1):
                continue
            yield maker.outputs[0]
            seen.add(maker)
            pending.append(maker)


def can_have_blocks(weight: ir.Value, size: int) -> bool:
    """Whether so many features of a weight can share a block scale: only a MatMul takes those."""
    shape = static_shape(weight) or ()
    multiplied = all(node.op_type == "MatMul" and index == 1 for node, index in weight.uses())
    return multiplied and len(shape) == _MATRIX and shape[0] % size == 0


def makes_scores(node: ir.Node) -> bool:
    """A MatMul of queries and keys: of two activations, a softmax behind it."""
    return is_dynamic_matmul(node) and _goes_to_softmax(node.outputs[0])


def _goes_to_softmax(value: ir.Value) -> bool:
    for user in value.consumers():
        if not is_standard(user):
            continue
        if user.op_type == "Softmax":
            return True
        passes = user.op_type in _SCORE_OPS or bool(layout_inputs(user))
        if passes and any(_goes_to_softmax(output) for output in user.outputs):
            return True
    return False


def separate_roles(graph: ir.Graph) -> int:
    """Gives an initializer one name per role: weight by channel axis, bias, anything else.

    The data is not copied.

    Returns:
        How many names were added.
    """
    linears = {node: linear for node in graph if (linear := as_linear(node)) is not None}
    roles: dict[ir.Value, dict[str, list[tuple[ir.Node, int]]]] = {}
    for value in list(graph.initializers.values()):
        if not is_float(value):
            continue
        for node, index in value.uses():
            linear = linears.get(node)
            role = "parameter" if is_parameter(node, index) else "other"
            if linear is not None and linear.weight is value:
                role = f"weight{linear.channel_axis}"
            elif linear is not None and linear.bias is value:
                # A bias's scale comes from its own linear, so two linears cannot share one.
                role = f"bias of {id(node)}"
            roles.setdefault(value, {}).setdefault(role, []).append((node, index))
    count = 0
    for value, uses_by_role in roles.items():
        for uses in list(uses_by_role.values())[1:]:
            _rename_uses(graph, value, uses)
            count += 1
    return count


def _rename_uses(graph: ir.Graph, value: ir.Value, uses: list[tuple[ir.Node, int]]) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    name = unique_initializer_name(graph, name_of(value))
    twin = like(value, name)
    twin.const_value = tensor
    graph.register_initializer(twin)
    for node, index in uses:
        node.replace_input_with(index, twin)
