"""Cuts a float graph into blocks that are rounded and learned one after another: decoder layers."""

from __future__ import annotations

import onnx_ir as ir

from qnpu.compiler.op_traits import is_dynamic_matmul, is_float
from qnpu.compiler.topology import DecoderTopology, discover
from qnpu.runtime_check.segments import Segment, cut_segments, segments_of


def cut_blocks(graph: ir.Graph) -> list[Segment]:
    """A block for what comes before the first layer, one for each layer, one for the head.

    A layer begins where nothing but the residual stream crosses and an attention follows before
    the next such place; a feed-forward part belongs to the attention before it. What the stream has
    no part in (rotary tables, masks) is in the first block, wherever it stands in the graph.

    A graph that is no decoder, or whose stream is blocked from the start, is cut as calibration
    cuts it, by bytes.
    """
    topology = discover(graph)
    if topology is None or not topology.stream.values:
        return cut_segments(graph)
    nodes, first = _stream_last(graph, topology)
    halves = _cut_at_stream(nodes, first, topology)
    runs = [halves[0]]
    for half in halves[1:-1]:
        if any(is_dynamic_matmul(node) or node.op_type == "Attention" for node in half):
            runs.append(half)
        else:
            runs[-1] += half
    if len(halves) > 1:
        runs.append(halves[-1])
    return segments_of(runs)


def _stream_last(graph: ir.Graph, topology: DecoderTopology) -> tuple[list[ir.Node], int]:
    """Nodes in an order in which those that the stream reaches come last, and how many do not."""
    reached: set[ir.Node] = set()
    for value in topology.stream.values:
        producer = value.producer()
        if producer is not None:
            reached.add(producer)
    for node in graph:
        if any(v is not None and v.producer() in reached for v in node.inputs):
            reached.add(node)
    before = [node for node in graph if node not in reached]
    return [*before, *(node for node in graph if node in reached)], len(before)


def _cut_at_stream(
    nodes: list[ir.Node], first: int, topology: DecoderTopology
) -> list[list[ir.Node]]:
    """Cuts after each node behind which one value of the stream is all that is still needed."""
    stream = set(topology.stream.values)
    position = {node: index for index, node in enumerate(nodes)}
    alive: dict[ir.Value, int] = {}
    halves: list[list[ir.Node]] = [[]]
    for index, node in enumerate(nodes):
        halves[-1].append(node)
        if index < first:
            continue
        for value in node.outputs:
            uses = [position[user] for user in value.consumers() if user in position]
            if is_float(value) and uses:
                alive[value] = max(uses)
        alive = {value: last for value, last in alive.items() if last > index}
        if len(alive) == 1 and next(iter(alive)) in stream:
            halves.append([])
    return [half for half in halves if half]
