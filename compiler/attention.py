"""Where attention happens in a canonical float graph: from the scores to what they mix."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qnpu.compiler.graph_edit import last_dimension, name_of, static_shape
from qnpu.compiler.op_traits import is_dynamic_matmul, is_standard, layout_inputs
from qnpu.compiler.roles import is_requantize_point, is_rotated_online, makes_scores
from qnpu.compiler.topology import Blocker

# From the scores on, each takes them as one input and hands them on element by element.
_POINTWISE = ("Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh", "Where")
# A further operand with a column for each key is a mask in these alone.
_MASKING = ("Add", "Sub", "Where")


@dataclass(frozen=True, slots=True)
class Attention:
    """Queries times keys, softmax, probabilities times values.

    Attributes:
        scores: the first MatMul; its second input holds keys, (…, D, T).
        between: nodes from the scores to the probabilities, in order; one is the Softmax.
        mix: the second MatMul; its second input holds values, (…, T, D).
        tokens: T, keys that each query sees or has masked.
    """

    scores: ir.Node
    between: tuple[ir.Node, ...]
    mix: ir.Node
    tokens: int

    @property
    def keys(self) -> ir.Value:
        """(…, D, T)"""
        return _second(self.scores)

    @property
    def values(self) -> ir.Value:
        """(…, T, D)"""
        return _second(self.mix)


@dataclass(frozen=True, slots=True)
class KeyPath:
    """How keys, one row per token, become what the scores take.

    Attributes:
        source: keys behind RoPE and before any online rotation.
        by_rows: True: (…, S, D); False: (…, D, S), the operand itself.
        nodes: from ``source`` to the operand, in order; none where ``source`` is that operand.
    """

    source: ir.Value
    by_rows: bool
    nodes: tuple[ir.Node, ...]


def find_attention(graph: ir.Graph) -> tuple[list[Attention], list[Blocker]]:
    """Every attention, in graph order, and those that are not understood."""
    found: list[Attention] = []
    blocked: list[Blocker] = []
    for node in graph:
        if node.op_type == "Attention" and is_standard(node):
            blocked.append(Blocker("an attention is one fused operator", name_of(node)))
        elif makes_scores(node):
            item = _follow(node)
            if isinstance(item, Blocker):
                blocked.append(item)
            else:
                found.append(item)
    return found, blocked


def key_path(attention: Attention) -> KeyPath:
    """The way of the keys from behind RoPE, where an online rotation (R3) lies on it."""
    operand = attention.keys
    width = (static_shape(operand) or (0, 0))[-2]
    value, behind, found = operand, [], KeyPath(operand, False, ())
    while is_rotated_online(value):
        node = value.producer()
        source = node.inputs[0] if node is not None else None
        if node is None or source is None:
            break
        behind.append(node)
        value = source
        if last_dimension(value) == width and not is_rotated_online(value):
            found = KeyPath(value, True, tuple(reversed(behind)))
    if behind and not found.nodes:  # a matrix of two factors: its rows are put together in front
        node = value.producer()
        source = node.inputs[0] if node is not None and layout_inputs(node) else None
        if node is not None and source is not None and last_dimension(source) == width:
            found = KeyPath(source, True, (node, *reversed(behind)))
    return found


def past_length(attention: Attention, new: int) -> int | None:
    """How many keys a cache brings in, in front of those of the new tokens.

    Args:
        attention: whose keys are looked at.
        new: tokens that the graph is given.

    Returns:
        0 where there is no cache; None where other keys than a graph input's make up the rest.
    """
    past = attention.tokens - new
    if past == 0:
        return 0
    value: ir.Value | None = attention.keys
    while value is not None:
        node = value.producer()
        if node is None or not (layout_inputs(node) or is_requantize_point(node)):
            return None
        first = node.inputs[0]
        if node.op_type == "Concat" and first is not None and first.is_graph_input():
            shape = static_shape(first) or ()
            axis = node.attributes.get_int("axis", 0)
            return past if len(node.inputs) == 2 and shape and shape[axis] == past else None
        value = first
    return None


def mask_operands(attention: Attention) -> list[tuple[ir.Node, int]]:
    """Inputs of the nodes between that have a column for each key."""
    found: list[tuple[ir.Node, int]] = []
    flow = attention.scores.outputs[0]
    for node in attention.between:
        found += [
            (node, index)
            for index, value in enumerate(node.inputs)
            if value is not None and value is not flow and last_dimension(value) == attention.tokens
        ]
        flow = node.outputs[0]
    return found


def _second(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    if value is None:
        raise ValueError(f"{name_of(node)} has no second input")
    return value


def _follow(scores: ir.Node) -> Attention | Blocker:
    """From the scores through masks and Softmax to the MatMul with the values."""
    where, tokens = name_of(scores), last_dimension(scores.outputs[0])
    if tokens is None or static_shape(_second(scores)) is None:
        return Blocker("the number of keys is not static", where)
    if tokens < 2:
        return Blocker("there is one key alone, so that masks cannot be told", where)
    between: list[ir.Node] = []
    value, normalized = scores.outputs[0], False
    while True:
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output():
            return Blocker("scores or probabilities are read elsewhere too", where)
        node, index = users[0]
        if normalized and is_dynamic_matmul(node) and index == 0:
            if static_shape(_second(node)) is None:
                return Blocker("the number of values is not static", where)
            return Attention(scores, tuple(between), node, tokens)
        reason = _why_not(node, index, value, tokens)
        if reason:
            return Blocker(reason, name_of(node))
        normalized |= node.op_type == "Softmax"
        between.append(node)
        value = node.outputs[0]


def _why_not(node: ir.Node, index: int, flow: ir.Value, tokens: int) -> str:
    """Half a sentence on why keys cannot be added in front of a node; empty where they can."""
    rank = len(flow.shape or ())
    if node.op_type == "Softmax" and is_standard(node):
        last = node.attributes.get_int("axis", -1) in (-1, rank - 1)
        return "" if last else "the softmax is not over the last axis"
    known = node.op_type in _POINTWISE or is_requantize_point(node)
    if not is_standard(node) or not known or (node.op_type == "Where" and index == 0):
        return f"`{node.op_type}` lies between scores and values"
    if last_dimension(node.outputs[0]) != tokens:
        return f"`{node.op_type}` changes the number of scores"
    others = [v for v in node.inputs if v is not None and v is not flow]
    wide = any(last_dimension(v) == tokens for v in others)
    if wide and (node.op_type not in _MASKING or (node.op_type == "Sub" and index == 1)):
        return f"`{node.op_type}` treats each key differently"
    return ""
