"""Finds a decoder in a graph by its structure, never by names.

The residual stream is found first: every value that the embedding reaches by additions alone.
What writes to it (sources) and what reads from it (norms and the linears behind them) are then
known, and so are the attention value paths, each from the linear that makes V to the one that takes
the heads. Passes that rotate or learn work on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.op_traits import (
    Linear,
    as_linear,
    is_dynamic_matmul,
    is_float,
    is_standard,
    layout_inputs,
    normalized_inputs,
)


@dataclass(frozen=True, slots=True)
class StreamSource:
    """What writes to the residual stream.

    Attributes:
        node: Gather of an embedding, a linear, or the Add of a constant.
        weight: initializer; its ``axis`` runs over the stream's features.
        axis: never negative.
        bias: initializer over the stream's features, or None.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    bias: ir.Value | None


@dataclass(frozen=True, slots=True)
class StreamSink:
    """What reads the residual stream.

    Attributes:
        norm: RMSNormalization or LayerNormalization; None where linears read directly.
        linears: all that take the norm's result.
    """

    norm: ir.Node | None
    linears: tuple[Linear, ...]


@dataclass(frozen=True, slots=True)
class Blocker:
    """Why a rotation cannot be fused.

    Attributes:
        reason: half a sentence.
        where: the node or value concerned.
    """

    reason: str
    where: str


@dataclass(slots=True)
class ResidualStream:
    """The stream and its borders.

    Attributes:
        width: features per token.
        values: on the stream.
        sources: in graph order.
        sinks: in graph order.
        blockers: what stands in the way of rotating it; empty where nothing does.
    """

    width: int
    values: list[ir.Value] = field(default_factory=list)
    sources: list[StreamSource] = field(default_factory=list)
    sinks: list[StreamSink] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ValuePath:
    """From the linear that makes V to the linear that takes the heads.

    Attributes:
        matmul: probabilities x V.
        value: linear whose output columns ``columns`` are V.
        columns: first and last + 1.
        output: linear that takes the concatenated heads.
        head_dim: width of one head.
    """

    matmul: ir.Node
    value: Linear
    columns: tuple[int, int]
    output: Linear
    head_dim: int


@dataclass(slots=True)
class DecoderTopology:
    """A decoder as found in a graph.

    Attributes:
        stream: the residual stream.
        value_paths: one per attention, in graph order.
        value_blockers: attentions whose path was not understood.
    """

    stream: ResidualStream
    value_paths: list[ValuePath]
    value_blockers: list[Blocker]


def discover(graph: ir.Graph) -> DecoderTopology | None:
    """The decoder in a canonical float graph, or None where no embedding feeds a norm or linear."""
    embedding = next((node for node in graph if _is_embedding(node)), None)
    if embedding is None:
        return None
    stream = _discover_stream(graph, embedding)
    paths: list[ValuePath] = []
    blockers: list[Blocker] = []
    for node in graph:
        if is_dynamic_matmul(node) and _from_softmax(node.inputs[0]):
            path = _value_path(node)
            if isinstance(path, Blocker):
                blockers.append(path)
            else:
                paths.append(path)
    return DecoderTopology(stream, paths, blockers)


def linears_behind(value: ir.Value) -> list[Linear] | None:
    """Linears that take a value, looking through reshapes that keep the last axis.

    Returns:
        None where anything else takes it too, or it leaves the graph.
    """
    if value.is_graph_output():
        return None
    found: list[Linear] = []
    for user in value.consumers():
        linear = as_linear(user)
        if linear is not None:
            if linear.activation is not value or linear.channel_axis == input_axis(linear):
                return None
            found.append(linear)
        elif _keeps_features(user):
            behind = linears_behind(user.outputs[0])
            if behind is None:
                return None
            found += behind
        else:
            return None
    return found


def input_axis(linear: Linear) -> int:
    """The axis of a linear's weight that its input features run over."""
    rank = len(linear.weight.shape or ())
    return next(axis for axis in reversed(range(rank)) if axis != linear.channel_axis)


def _is_embedding(node: ir.Node) -> bool:
    """Gather of rows from a 2-D float table by computed or given ids."""
    if node.op_type != "Gather" or not is_standard(node) or node.inputs[0] is None:
        return False
    table = node.inputs[0]
    return (
        table.is_initializer()
        and is_float(table)
        and len(table.shape or ()) == 2
        and node.attributes.get_int("axis", 0) == 0
    )


def _keeps_features(node: ir.Node) -> bool:
    """Reshape, Identity or the like that keeps every row of the last axis whole."""
    if node.op_type not in ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return False
    source = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
    result = static_shape(node.outputs[0])
    return bool(source and result and source[-1] == result[-1])


def _scalar_operand(node: ir.Node) -> bool:
    return any(
        v is not None
        and v.is_initializer()
        and v.const_value is not None
        and v.const_value.size == 1
        for v in node.inputs
    )


class _StreamSearch:
    """Grows the stream from the embedding until nothing new is reached."""

    def __init__(self, width: int) -> None:
        self.stream = ResidualStream(width)
        self._seen: set[ir.Value] = set()
        self._pending: list[ir.Value] = []
        self._blocked: dict[tuple[str, str], None] = {}
        self._sources: dict[ir.Node, StreamSource] = {}
        self._sinks: dict[ir.Node, StreamSink] = {}
        self._direct: dict[ir.Node, Linear] = {}

    def grow(self, first: ir.Value) -> None:
        self._reach(first)
        while self._pending:
            value = self._pending.pop()
            self._look_back(value)
            self._look_ahead(value)

    def finish(self, graph: ir.Graph) -> ResidualStream:
        """Puts what was found in graph order."""
        order = {node: index for index, node in enumerate(graph)}
        sinks = dict(self._sinks)
        sinks |= {node: StreamSink(None, (linear,)) for node, linear in self._direct.items()}
        self.stream.sources = [self._sources[n] for n in sorted(self._sources, key=order.get)]  # type: ignore[arg-type]
        self.stream.sinks = [sinks[n] for n in sorted(sinks, key=order.get)]  # type: ignore[arg-type]
        self.stream.values = [v for node in graph for v in node.outputs if v in self._seen]
        self.stream.blockers = [Blocker(reason, where) for reason, where in self._blocked]
        return self.stream

    def _reach(self, value: ir.Value) -> None:
        if value not in self._seen:
            self._seen.add(value)
            self._pending.append(value)

    def _block(self, reason: str, where: str) -> None:
        self._blocked[reason, where] = None

    def _look_back(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            self._block("the stream is a graph input", name_of(value))
            return
        linear = as_linear(node)
        if _is_embedding(node) and node.inputs[0] is not None:
            self._sources[node] = StreamSource(node, node.inputs[0], 1, None)
        elif linear is not None:
            if _bias_is_foreign(linear):
                self._block("a linear's bias is not one number per feature", name_of(node))
            axis = linear.channel_axis
            self._sources[node] = StreamSource(node, linear.weight, axis, linear.bias)
        elif node.op_type == "Add" and is_standard(node):
            for operand in node.inputs:
                self._add_operand(node, operand)
        elif (node.op_type in ("Mul", "Div") and _scalar_operand(node)) or _keeps_features(node):
            for operand in node.inputs:
                if operand is not None and is_float(operand) and not operand.is_initializer():
                    self._reach(operand)
        elif normalized_inputs(node):
            self._block("a norm writes to the stream (post-norm)", name_of(node))
        else:
            self._block(f"`{node.op_type}` writes to the stream", name_of(node))

    def _add_operand(self, node: ir.Node, operand: ir.Value | None) -> None:
        if operand is None:
            return
        if not operand.is_initializer():
            if (static_shape(operand) or (0,))[-1] == self.stream.width:
                self._reach(operand)
            else:
                self._block("an addend of another width", name_of(node))
        elif (static_shape(operand) or (0,))[-1] == self.stream.width:
            axis = len(operand.shape or ()) - 1
            self._sources[node] = StreamSource(node, operand, axis, None)
        else:
            self._block("a constant of another width is added", name_of(node))

    def _look_ahead(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self._block("the stream is a graph output", name_of(value))
        for user in value.consumers():
            if user.op_type == "Add" and is_standard(user):
                self._reach(user.outputs[0])
            elif normalized_inputs(user) == [value]:
                behind = linears_behind(user.outputs[0])
                if not behind:
                    self._block("a norm's result goes elsewhere than to linears", name_of(user))
                else:
                    self._sinks[user] = StreamSink(user, tuple(behind))
            elif as_linear(user) is not None:
                linear = as_linear(user)
                if linear is not None:
                    self._direct[user] = linear
            elif (user.op_type in ("Mul", "Div") and _scalar_operand(user)) or _keeps_features(
                user
            ):
                self._reach(user.outputs[0])
            else:
                self._block(f"`{user.op_type}` reads the stream", name_of(user))


def _bias_is_foreign(linear: Linear) -> bool:
    has_third = len(linear.node.inputs) > 2 and linear.node.inputs[2] is not None
    return has_third and linear.bias is None


def _discover_stream(graph: ir.Graph, embedding: ir.Node) -> ResidualStream:
    table = static_shape(embedding.inputs[0]) if embedding.inputs[0] is not None else None
    search = _StreamSearch((table or (0,))[-1])
    search.grow(embedding.outputs[0])
    stream = search.finish(graph)
    stream.blockers += _shared_weights(stream)
    return stream


def _shared_weights(stream: ResidualStream) -> list[Blocker]:
    """A weight that anything but its one role uses cannot be changed for that role."""
    allowed: dict[ir.Value, set[ir.Node]] = {}
    for source in stream.sources:
        for value in (source.weight, source.bias):
            if value is not None:
                allowed.setdefault(value, set()).add(source.node)
    for sink in stream.sinks:
        for linear in sink.linears:
            allowed.setdefault(linear.weight, set()).add(linear.node)
    return [
        Blocker("a weight is used in two roles", name_of(value))
        for value in allowed
        if len(list(value.uses())) > 1 or value.is_graph_output()
    ]


def _from_softmax(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    while node is not None and (node.op_type in ("Identity", "Cast") or layout_inputs(node)):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node is not None and node.op_type == "Softmax"


def _value_path(matmul: ir.Node) -> ValuePath | Blocker:
    where = name_of(matmul)
    heads = static_shape(matmul.outputs[0])
    value = matmul.inputs[1]
    if heads is None or value is None:
        return Blocker("shapes are not static", where)
    head_dim = heads[-1]
    made = _back_to_linear(value, head_dim)
    if made is None:
        return Blocker("V is not made by a linear through reshapes alone", where)
    taken = _ahead_to_linear(matmul.outputs[0], head_dim)
    if taken is None:
        return Blocker("the heads do not go to one linear through reshapes alone", where)
    linear, columns = made
    for weight in (linear.weight, linear.bias, taken.weight):
        if weight is not None and len(list(weight.uses())) > 1:
            return Blocker("a weight is used in two roles", name_of(weight))
    return ValuePath(matmul, linear, columns, taken, head_dim)


def _back_to_linear(value: ir.Value, head_dim: int) -> tuple[Linear, tuple[int, int]] | None:
    """The linear behind V and V's columns of its output."""
    columns: tuple[int, int] | None = None
    while True:
        node = value.producer()
        # V must serve this attention alone, or another reader would see it rotated.
        if node is None or value.is_graph_output() or len(list(value.uses())) > 1:
            return None
        linear = as_linear(node)
        if linear is not None:
            width = (static_shape(value) or (0,))[-1]
            columns = columns or (0, width)
            return None if (columns[1] - columns[0]) % head_dim else (linear, columns)
        if node.op_type in ("Slice", "Split") and columns is None:
            columns = _columns_taken(node, value)
            if columns is None:
                return None
        elif not _keeps_heads(node, head_dim):
            return None
        source = node.inputs[0]
        if source is None:
            return None
        if node.op_type in ("Slice", "Split"):
            return _behind_slice(source, columns, head_dim)
        value = source


def _behind_slice(
    value: ir.Value, columns: tuple[int, int] | None, head_dim: int
) -> tuple[Linear, tuple[int, int]] | None:
    """The fused linear that a slice takes V's columns of; other slices may read it too."""
    node = value.producer()
    while node is not None and _keeps_features(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    linear = as_linear(node) if node is not None else None
    if linear is None or columns is None or (columns[1] - columns[0]) % head_dim:
        return None
    return linear, columns


def _columns_taken(node: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    """Which part of the last axis a Split output or Slice is; None for another axis or a step."""
    source = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
    result = static_shape(value)
    if source is None or result is None or source[:-1] != result[:-1]:
        return None
    if node.op_type == "Split":
        widths = [(static_shape(output) or (0,))[-1] for output in node.outputs]
        first = sum(widths[: list(node.outputs).index(value)])
        return first, first + result[-1]
    starts, steps = constant_array(node.inputs[1]), None
    if len(node.inputs) > 4:
        steps = constant_array(node.inputs[4])
    if starts is None or starts.size != 1 or (steps is not None and bool((steps != 1).any())):
        return None
    first = int(starts.reshape(())) % source[-1]
    return first, first + result[-1]


def _keeps_heads(node: ir.Node, head_dim: int) -> bool:
    """A layout operator that moves whole heads: the last axis stays, splits or joins them."""
    if node.op_type == "Identity":
        return True
    if not layout_inputs(node) or node.op_type in ("Concat", "Gather", "Slice", "Split"):
        return False
    source = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
    result = static_shape(node.outputs[0])
    if not source or not result or source[-1] % head_dim or result[-1] % head_dim:
        return False
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", ())
        return bool(order) and order[-1] == len(source) - 1
    return True


def _ahead_to_linear(value: ir.Value, head_dim: int) -> Linear | None:
    while True:
        users = list(value.consumers())
        if len(users) != 1 or value.is_graph_output():
            return None
        linear = as_linear(users[0])
        if linear is not None:
            return linear if linear.activation is value else None
        if not _keeps_heads(users[0], head_dim):
            return None
        value = users[0].outputs[0]


def describe(topology: DecoderTopology) -> Iterator[tuple[str, str, str]]:
    """Rows of (role, node, shape of its weight), for ``--explain-topology``."""
    stream = topology.stream
    for source in stream.sources:
        yield "stream source", name_of(source.node), str(static_shape(source.weight))
    for sink in stream.sinks:
        label = name_of(sink.norm) if sink.norm is not None else "no norm"
        for linear in sink.linears:
            shape = str(static_shape(linear.weight))
            yield f"stream sink behind {label}", name_of(linear.node), shape
    for path in topology.value_paths:
        first, last = path.columns
        shape = str(static_shape(path.value.weight))
        yield f"value, columns {first}:{last}", name_of(path.value.node), shape
        shape = str(static_shape(path.output.weight))
        yield f"heads of {path.head_dim}", name_of(path.output.node), shape
    for blocker in (*stream.blockers, *topology.value_blockers):
        yield "blocked", blocker.where, blocker.reason
