"""Finds a decoder in a graph by its structure, never by names.

The residual stream is found first: every value that the embedding reaches by additions alone.
What writes to it (sources) and what reads from it (norms and the linears behind them) are then
known, and so are the attention value paths, each from the linear that makes V to the one that takes
the heads. Passes that rotate or learn work on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qnpu.compiler.graph_edit import (
    add_initializer,
    constant_array,
    last_dimension,
    like,
    name_of,
    static_shape,
    unique_initializer_name,
)
from qnpu.compiler.op_traits import (
    Linear,
    as_linear,
    is_dynamic_matmul,
    is_float,
    is_standard,
    layout_inputs,
    normalized_inputs,
)

_MOVES = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")


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
        layer: attentions before this one in the graph, understood or not.
        caches: graph inputs and outputs that hold V, earlier tokens' or all.
    """

    matmul: ir.Node
    value: Linear
    columns: tuple[int, int]
    output: Linear
    head_dim: int
    layer: int
    caches: tuple[ir.Value, ...]


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
    """The decoder in a canonical float graph.

    Of several tables that are looked up, the one that most norms and linears read starts the
    stream: the others may hold positions or rotary angles.

    A graph that takes embeddings as an input has no such table: its stream is empty and blocked.

    Returns:
        None where there are neither norms and linears behind such a table nor attention.
    """
    streams = [_discover_stream(graph, node) for node in graph if _is_embedding(node)]
    stream = max(streams, key=lambda found: len(found.sinks), default=_no_stream(graph))
    paths: list[ValuePath] = []
    blockers: list[Blocker] = []
    for node in graph:
        if node.op_type == "Attention" and is_standard(node):
            blockers.append(Blocker("the attention is one fused operator", name_of(node)))
        elif is_dynamic_matmul(node) and _from_softmax(node.inputs[0]):
            path = _value_path(node, layer=len(paths) + len(blockers))
            if isinstance(path, Blocker):
                blockers.append(path)
            else:
                paths.append(path)
    found = stream.sinks or paths or blockers
    return DecoderTopology(stream, paths, blockers) if found else None


def linears_behind(value: ir.Value) -> list[Linear] | None:
    """Linears that take a value, looking through reshapes that keep the last axis.

    Returns:
        None where anything else takes it too, or it leaves the graph.
    """
    if value.is_graph_output():
        return None
    found: list[Linear] = []
    for user in value.consumers():
        linear = as_feature_linear(user)
        if linear is not None:
            found.append(linear)
        elif keeps_features(user):
            behind = linears_behind(user.outputs[0])
            if behind is None:
                return None
            found += behind
        else:
            return None
    return found


def as_feature_linear(node: ir.Node) -> Linear | None:
    """A linear from the last axis of its activation to the last axis of its result.

    Not so a MatMul or Gemm with the weight first, a Gemm that transposes its activation, a Conv.
    """
    linear = as_linear(node)
    if linear is None or node.op_type not in ("MatMul", "Gemm"):
        return None
    if linear.activation is not node.inputs[0] or node.attributes.get_int("transA", 0) != 0:
        return None
    return linear


def as_feature_norm(node: ir.Node) -> ir.Value | None:
    """What a norm over the last axis alone normalizes; None for any other node."""
    source = next(iter(normalized_inputs(node)), None)
    if source is None or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    last = (-1,) if source.shape is None else (-1, len(source.shape) - 1)
    return source if node.attributes.get_int("axis", -1) in last else None


def gains_on(stream: ResidualStream) -> list[Blocker]:
    """Norms that a rotation of the stream would not pass: not RMS, or with a gain of their own."""
    found: list[Blocker] = []
    for sink in stream.sinks:
        if sink.norm is None:
            continue
        gain = constant_array(sink.norm.inputs[1])
        if sink.norm.op_type != "RMSNormalization":
            found.append(Blocker("a LayerNorm subtracts the mean", name_of(sink.norm)))
        elif gain is None or not bool((gain == 1).all()):
            found.append(Blocker("a norm has a gain that was not folded", name_of(sink.norm)))
    return found


def is_tied(linear: Linear) -> bool:
    """The weight is also the table of one embedding, and that is all."""
    users = [node for node, _ in linear.weight.uses()]
    return (
        len(users) == 2
        and linear.node in users
        and any(_is_embedding(node) for node in users)
        and not linear.weight.is_graph_output()
    )


def untie(graph: ir.Graph, linear: Linear) -> Linear:
    """Gives a tied linear a weight of its own, of the same data; any other is returned as it is."""
    data = linear.weight.const_value
    if data is None or not is_tied(linear):
        return linear
    name = unique_initializer_name(graph, f"{name_of(linear.weight)}_untied")
    weight = like(linear.weight, name)
    weight.const_value = data
    graph.register_initializer(weight)
    linear.node.replace_input_with(list(linear.node.inputs).index(linear.weight), weight)
    return replace(linear, weight=weight)


def own_biases(graph: ir.Graph) -> int:
    """Gives each linear a bias of its own where several share one, as all-zero ones often do.

    Returns:
        How many biases were copied.
    """
    count = 0
    for node in graph:
        linear = as_linear(node)
        bias = linear.bias if linear is not None else None
        data = constant_array(bias)
        if bias is None or data is None or len(bias.uses()) == 1 or bias.is_graph_input():
            continue
        copy = add_initializer(graph, f"{name_of(node)}_bias", data)
        node.replace_input_with(2, copy)
        count += 1
    return count


def has_foreign_bias(linear: Linear) -> bool:
    """It adds something else than a constant of one number per output feature."""
    has_third = len(linear.node.inputs) > 2 and linear.node.inputs[2] is not None
    return has_third and linear.bias is None


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


def keeps_features(node: ir.Node) -> bool:
    """Reshape, Identity, a choice of rows: each row of the last axis left is whole."""
    if not is_standard(node):
        return False
    plain = node.op_type in ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
    if not plain and not _selects_rows(node):
        return False
    width = last_dimension(node.inputs[0])
    return width is not None and width == last_dimension(node.outputs[0])


def _selects_rows(node: ir.Node) -> bool:
    """A Slice or Gather of an activation that leaves its last axis alone: the last token, say."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.is_initializer() or source.shape is None:
        return False
    last = len(source.shape) - 1
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) not in (-1, last)
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
    return node.op_type == "Slice" and axes is not None and not {-1, last} & set(axes.tolist())


def scaled_source(node: ir.Node) -> ir.Value | None:
    """What a Mul or Div multiplies or divides by a constant scalar; None for any other node."""
    if node.op_type not in ("Mul", "Div") or not is_standard(node):
        return None
    first, second = node.inputs
    if _is_scalar(second):
        return first
    return second if node.op_type == "Mul" and _is_scalar(first) else None


def _is_scalar(value: ir.Value | None) -> bool:
    array = constant_array(value)
    return value is not None and value.is_initializer() and array is not None and array.size == 1


def _passed_on(node: ir.Node) -> ir.Value | None:
    """The value whose features come through, all times one number, or None."""
    return node.inputs[0] if keeps_features(node) else scaled_source(node)


class _StreamSearch:
    """Grows the stream from the embedding until nothing new is reached."""

    def __init__(self, graph: ir.Graph, width: int) -> None:
        self.stream = ResidualStream(width)
        self._graph = graph
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

    def finish(self) -> ResidualStream:
        """Puts what was found in graph order."""
        order = {node: index for index, node in enumerate(self._graph)}
        sinks = dict(self._sinks)
        sinks |= {node: StreamSink(None, (linear,)) for node, linear in self._direct.items()}
        self.stream.sources = [self._sources[n] for n in sorted(self._sources, key=order.get)]  # type: ignore[arg-type]
        self.stream.sinks = [sinks[n] for n in sorted(sinks, key=order.get)]  # type: ignore[arg-type]
        self.stream.values = [v for node in order for v in node.outputs if v in self._seen]
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
        linear = as_feature_linear(node)
        passed = _passed_on(node)
        if _is_embedding(node) and node.inputs[0] is not None:
            self._sources[node] = StreamSource(node, node.inputs[0], 1, None)
        elif linear is not None:
            if has_foreign_bias(linear):
                self._block("a linear's bias is not one number per feature", name_of(node))
            axis = linear.channel_axis
            self._sources[node] = StreamSource(node, linear.weight, axis, linear.bias)
        elif node.op_type == "Add" and is_standard(node):
            for operand in node.inputs:
                self._add_operand(node, operand)
        elif passed is not None:
            self._reach(passed)
        elif normalized_inputs(node):
            self._block("a norm writes to the stream (post-norm)", name_of(node))
        else:
            self._block(f"`{node.op_type}` writes to the stream", name_of(node))

    def _add_operand(self, node: ir.Node, operand: ir.Value | None) -> None:
        if operand is None:
            return
        if not operand.is_initializer():
            if last_dimension(operand) == self.stream.width:
                self._reach(operand)
            else:
                self._block("an addend of another width", name_of(node))
        elif last_dimension(operand) == self.stream.width:
            axis = len(operand.shape or ()) - 1
            self._sources[node] = StreamSource(node, operand, axis, None)
        else:
            self._block("a constant of another width is added", name_of(node))

    def _look_ahead(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self._block("the stream is a graph output", name_of(value))
        for user in value.consumers():
            if user.graph is not self._graph:
                self._block("a subgraph reads the stream", name_of(user))
            elif user.op_type == "Add" and is_standard(user):
                self._reach(user.outputs[0])
            elif normalized_inputs(user) == [value]:
                behind = linears_behind(user.outputs[0])
                if as_feature_norm(user) is None:
                    self._block("a norm is not over the last axis alone", name_of(user))
                elif not behind:
                    self._block("a norm's result goes elsewhere than to linears", name_of(user))
                else:
                    self._sinks[user] = StreamSink(user, tuple(behind))
            elif (linear := as_feature_linear(user)) is not None:
                self._direct[user] = linear
            elif _passed_on(user) is value:
                self._reach(user.outputs[0])
            else:
                self._block(f"`{user.op_type}` reads the stream", name_of(user))


def _discover_stream(graph: ir.Graph, embedding: ir.Node) -> ResidualStream:
    search = _StreamSearch(graph, last_dimension(embedding.inputs[0]) or 0)
    search.grow(embedding.outputs[0])
    stream = search.finish()
    stream.blockers += _shared_weights(stream)
    return stream


def _no_stream(graph: ir.Graph) -> ResidualStream:
    where = next((name_of(value) for value in graph.inputs if is_float(value)), "")
    return ResidualStream(0, blockers=[Blocker("no embedding is looked up in this graph", where)])


def _shared_weights(stream: ResidualStream) -> list[Blocker]:
    """A weight that anything but its one role uses cannot be changed for that role.

    A linear tied to the embedding is no such case: ``untie`` parts them.
    """
    linears = [linear for sink in stream.sinks for linear in sink.linears]
    values = dict.fromkeys(v for s in stream.sources for v in (s.weight, s.bias) if v is not None)
    values |= dict.fromkeys(linear.weight for linear in linears)
    tied = {linear.weight for linear in linears if is_tied(linear)}
    return [
        Blocker("a weight is used in two roles", name_of(value))
        for value in values
        if value not in tied and not has_one_role(value)
    ]


def has_one_role(value: ir.Value) -> bool:
    """One node takes it, once, and no one outside the graph sees or sets it."""
    return _has_one_use(value) and not value.is_graph_input()


def _has_one_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _from_softmax(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    while node is not None and (node.op_type in ("Identity", "Cast") or layout_inputs(node)):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node is not None and node.op_type == "Softmax"


def _value_path(matmul: ir.Node, layer: int) -> ValuePath | Blocker:
    where = name_of(matmul)
    head_dim = last_dimension(matmul.outputs[0])
    value = matmul.inputs[1]
    if head_dim is None or value is None:
        return Blocker("the width of a head is not static", where)
    made = _back_to_linear(value, head_dim)
    if made is None:
        return Blocker(
            "V is not made by a linear through reshapes alone, or is read elsewhere too", where
        )
    taken = _ahead_to_linear(matmul.outputs[0], head_dim)
    if taken is None:
        return Blocker("the heads do not go to one linear through reshapes alone", where)
    linear, columns, caches = made
    if has_foreign_bias(linear):
        return Blocker("a linear's bias is not one number per feature", name_of(linear.node))
    for weight in (linear.weight, linear.bias, taken.weight):
        if weight is not None and not has_one_role(weight):
            return Blocker("a weight is used in two roles", name_of(weight))
    return ValuePath(matmul, linear, columns, taken, head_dim, layer, tuple(caches))


def _back_to_linear(
    value: ir.Value, head_dim: int
) -> tuple[Linear, tuple[int, int], list[ir.Value]] | None:
    """The linear behind V, V's columns of its output, and the caches on the way."""
    caches: list[ir.Value] = []
    while True:
        node = value.producer()
        # V must serve this attention alone, or another reader would see it rotated.
        if node is None or len(value.uses()) > 1:
            return None
        if value.is_graph_output():
            caches.append(value)
        if node.op_type in ("Slice", "Split"):
            behind = _behind_slice(node, value, head_dim)
            return None if behind is None else (*behind, caches)
        linear = as_feature_linear(node)
        if linear is not None:
            width = last_dimension(value) or 0
            return None if width % head_dim else (linear, (0, width), caches)
        if node.op_type == "Concat":
            joined = _past_and_new(node, head_dim)
            if joined is None:
                return None
            past, value = joined
            caches.append(past)
        elif not _keeps_heads(node, head_dim) or node.inputs[0] is None:
            return None
        else:
            value = node.inputs[0]


def _past_and_new(node: ir.Node, head_dim: int) -> tuple[ir.Value, ir.Value] | None:
    """What a Concat along the tokens joins: a graph input of its own, and V of the new tokens."""
    first, second = node.inputs if len(node.inputs) == 2 else (None, None)
    if first is None or second is None or first.shape is None or not is_standard(node):
        return None
    past, new = (first, second) if first.is_graph_input() else (second, first)
    rank, width = len(first.shape), last_dimension(past)
    own = past.is_graph_input() and not past.is_initializer() and _has_one_use(past)
    along_features = node.attributes.get_int("axis", 0) in (-1, rank - 1)
    return (past, new) if own and width and not width % head_dim and not along_features else None


def _behind_slice(
    cut: ir.Node, value: ir.Value, head_dim: int
) -> tuple[Linear, tuple[int, int]] | None:
    """The fused linear that a Slice or Split takes V of, where all others read other columns."""
    columns, whole = _columns_taken(cut, value), cut.inputs[0]
    if columns is None or whole is None or (columns[1] - columns[0]) % head_dim:
        return None
    parts = [(output, user) for user in whole.consumers() for output in user.outputs]
    if any(_overlaps(columns, _columns_taken(u, v)) for v, u in parts if v is not value):
        return None
    while not whole.is_graph_output():
        node = whole.producer()
        linear = as_feature_linear(node) if node is not None else None
        if linear is not None:
            return linear, columns
        if node is None or not keeps_features(node) or node.inputs[0] is None:
            return None
        whole = node.inputs[0]
        if len(whole.uses()) > 1:
            return None
    return None


def _overlaps(columns: tuple[int, int], other: tuple[int, int] | None) -> bool:
    return other is None or (other[0] < columns[1] and columns[0] < other[1])


def _columns_taken(node: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    """Which part of the last axis a Split output or Slice is; None for another axis or a step."""
    source, result = node.inputs[0], last_dimension(value)
    width = last_dimension(source)
    if source is None or source.shape is None or width is None or result is None:
        return None
    last, first = (-1, len(source.shape) - 1), None
    if node.op_type == "Split" and is_standard(node):
        if node.attributes.get_int("axis", 0) in last:
            widths = [last_dimension(output) or 0 for output in node.outputs]
            first = sum(widths[: list(node.outputs).index(value)])
    elif node.op_type == "Slice" and is_standard(node):
        first = _slice_start(node, width, last)
    return None if first is None else (first, first + result)


def _slice_start(node: ir.Node, width: int, last: tuple[int, int]) -> int | None:
    """First column of a Slice along the last axis alone, by steps of one."""
    starts, axes, steps = (
        constant_array(node.inputs[index]) if index < len(node.inputs) else None
        for index in (1, 3, 4)
    )
    if starts is None or axes is None or starts.size != 1 or int(axes.item()) not in last:
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or steps.item() != 1):
        return None
    start = int(starts.item())
    return min(max(start + width if start < 0 else start, 0), width)


def _keeps_heads(node: ir.Node, head_dim: int) -> bool:
    """A layout operator that moves whole heads: the last axis stays, splits or joins them."""
    if node.op_type not in _MOVES or not is_standard(node):
        return False
    source, result = last_dimension(node.inputs[0]), last_dimension(node.outputs[0])
    if not source or not result or source % head_dim or result % head_dim:
        return False
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", ())
        return bool(order) and order[-1] == len(order) - 1
    return True


def _ahead_to_linear(value: ir.Value, head_dim: int) -> Linear | None:
    while True:
        users = list(value.consumers())
        if len(users) != 1 or value.is_graph_output():
            return None
        linear = as_feature_linear(users[0])
        if linear is not None:
            return linear
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
        for cache in path.caches:
            yield "cache of values", name_of(cache), str(static_shape(cache))
    for blocker in (*stream.blockers, *topology.value_blockers):
        yield "blocked", blocker.where, blocker.reason
