"""What of a decoder may have bits of its own: linears by their input, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qnpu.compiler.cost_model import LinearShape, ModelShape
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.op_traits import (
    Linear,
    as_linear,
    is_dynamic_matmul,
    is_float,
    layout_inputs,
    normalized_inputs,
)
from qnpu.compiler.roles import (
    activations,
    computed_by,
    is_down_projection,
    is_online_rotation,
    joins_residual,
    makes_scores,
)
from qnpu.compiler.rotated_weights import rotated_weights
from qnpu.compiler.rules import NoDecoder
from qnpu.compiler.topology import DecoderTopology, as_feature_linear, discover
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.segments import Segment

KEYS, VALUES, HEAD = "keys", "values", "head"
_MATRIX = 2


@dataclass(frozen=True, slots=True, eq=False)
class LinearItem:
    """A linear whose weight may have few bits or more.

    Attributes:
        linear: a MatMul or Gemm over the last axis.
        shape: for the cost model; its name is the weight's.
    """

    linear: Linear
    shape: LinearShape

    @property
    def narrow_result(self) -> ir.Value | None:
        """The result, if it has as many bits as the input; None where it keeps its own."""
        return None if self.shape.wide_output else self.linear.node.outputs[0]


@dataclass(frozen=True, slots=True, eq=False)
class LinearGroup:
    """Linears that take one value, which so has as many bits for all.

    Attributes:
        source: what they take.
        linears: in graph order.
        layer: from 0; the head's is behind the last.
        rotated: a rotation has spread the outliers of ``source``.
    """

    source: ir.Value
    linears: tuple[LinearItem, ...]
    layer: int
    rotated: bool

    @property
    def name(self) -> str:
        """Of the source."""
        return name_of(self.source)


@dataclass(frozen=True, slots=True, eq=False)
class CacheItem:
    """Keys or values, as the product of two activations takes them.

    Attributes:
        node: that MatMul.
        layer: from 0.
        role: ``keys`` or ``values``.
    """

    node: ir.Node
    layer: int
    role: str

    @property
    def name(self) -> str:
        """Of the node."""
        return name_of(self.node)

    @property
    def operand(self) -> ir.Value:
        """What holds them."""
        value = self.node.inputs[1]
        if value is None:
            raise ValueError(f"{self.name} has one operand")
        return value


@dataclass(frozen=True, slots=True, eq=False)
class BitItems:
    """All of a decoder.

    Attributes:
        groups: in graph order.
        caches: in graph order.
        shape: for the cost model.
    """

    groups: tuple[LinearGroup, ...]
    caches: tuple[CacheItem, ...]
    shape: ModelShape


def find_items(model: ir.Model) -> BitItems:
    """As ``items_of``, of a graph that has to be a decoder.

    Raises:
        DiagnosticError: QN541 it is none whose attention is understood.
    """
    items = items_of(model)
    if items is None:
        raise DiagnosticError(NoDecoder().at())
    return items


def items_of(model: ir.Model) -> BitItems | None:
    """What of a canonical float graph may have bits of its own.

    Online rotations, and linears over anything but the last axis, are left out: they have what
    their role says. A weight that several linears take is listed with the first.

    Returns:
        None for a graph that is no decoder whose attention is understood.
    """
    topology = discover(model.graph)
    if topology is None or not topology.value_paths:
        return None
    blocks = cut_blocks(model.graph)
    groups = tuple(_groups(model, blocks))
    caches = tuple(
        CacheItem(node, max(index - 1, 0), KEYS if makes_scores(node) else VALUES)
        for index, block in enumerate(blocks)
        for node in block.nodes
        if is_dynamic_matmul(node)
    )
    return BitItems(groups, caches, _shape(topology, groups))


def _groups(model: ir.Model, blocks: list[Segment]) -> Iterator[LinearGroup]:
    rotated = rotated_weights(model)
    weights: set[str] = set()
    for index, block in enumerate(blocks):
        by_source: dict[ir.Value, list[Linear]] = {}
        for node in block.nodes:
            linear = as_feature_linear(node)
            if linear is None or is_online_rotation(linear) or name_of(linear.weight) in weights:
                continue
            if len(linear.weight.shape or ()) != _MATRIX or linear.activation.producer() is None:
                continue
            weights.add(name_of(linear.weight))
            by_source.setdefault(linear.activation, []).append(linear)
        for source, linears in by_source.items():
            items = tuple(LinearItem(linear, _linear_shape(linear, linears)) for linear in linears)
            takes_rotated = all(rotated.takes_rotated(linear) for linear in linears)
            yield LinearGroup(source, items, max(index - 1, 0), takes_rotated)


def _linear_shape(linear: Linear, beside: list[Linear]) -> LinearShape:
    shape = static_shape(linear.weight) or ()
    channels = shape[linear.channel_axis]
    role = linear_role(linear)
    if role == "gate" and len(beside) == 1:  # no other half that it is multiplied by
        role = "up"
    wide = joins_residual(linear.node.outputs[0]) or role == HEAD
    return LinearShape(name_of(linear.weight), prod(shape) // channels, channels, role, wide)


def linear_role(linear: Linear) -> str:
    """``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down`` or ``head``, by its neighbours.

    A joint projection has all letters of what it makes, ``qkv``. An input of a feed-forward part is
    ``gate`` where an activation function takes it, else ``up``.
    """
    if is_down_projection(linear):
        return "down"
    source = computed_by(linear.activation)
    if source is not None and is_dynamic_matmul(source):
        return "o"
    reached = set(_reached(linear.node.outputs[0]))
    letters = "".join(letter for letter in "qkv" if letter in reached)
    if letters:
        return letters
    if "linear" not in reached:
        return HEAD
    return "gate" if "function" in reached else "up"


def _reached(value: ir.Value) -> Iterator[str]:
    """What lies behind a value, up to the next product."""
    for node in value.consumers():
        linear = as_linear(node)
        if is_dynamic_matmul(node):
            for index, operand in enumerate(node.inputs):
                if operand is value:
                    yield ("qk" if makes_scores(node) else "pv")[index]
        elif linear is not None and is_online_rotation(linear):
            yield from _reached(node.outputs[0])
        elif linear is not None:
            yield "linear"
        elif normalized_inputs(node) and activations(node) == 1:
            yield from _reached(node.outputs[0])  # Qwen 3, Gemma 3: norms of queries and keys
        else:
            if node.op_type not in _MOVES and not layout_inputs(node):
                yield "function"
            for output in node.outputs:
                if is_float(output):
                    yield from _reached(output)


_MOVES = ("Add", "Cast", "Identity", "Mul", "Neg", "Slice", "Split")


def _shape(topology: DecoderTopology, groups: tuple[LinearGroup, ...]) -> ModelShape:
    path = topology.value_paths[0]
    shapes = [item.shape for group in groups for item in group.linears]
    names = {shape.name for shape in shapes}
    tables = [source for source in topology.stream.sources if source.node.op_type == "Gather"]
    taken = static_shape(path.output.weight) or (1, 1)
    inner = [shape.features for shape in shapes if shape.role == "down"]
    return ModelShape(
        linears=tuple(shapes),
        layers=len(topology.value_paths) + len(topology.value_blockers),
        heads=prod(taken) // taken[path.output.channel_axis] // path.head_dim,
        kv_heads=(path.columns[1] - path.columns[0]) // path.head_dim,
        head_dim=path.head_dim,
        hidden=topology.stream.width,
        intermediate=max(inner, default=topology.stream.width),
        embedding=sum(
            prod(static_shape(source.weight) or ())
            for source in tables
            if name_of(source.weight) not in names
        ),
    )
