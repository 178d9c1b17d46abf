"""Runs a graph a segment at a time, so that only one segment's activations are ever held.

A segment is a run of nodes in topological order whose outputs fit a byte limit, about one decoder
layer, and whose weights fit another. All batches pass through a segment before the next one is
opened; between segments only the few values that cross the cut are kept. Peak memory is one
segment's weights and activations plus what crosses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import psutil

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import bytes_of, name_of, subgraph_proto
from qnpu.compiler.rules import GraphDoesNotRun
from qnpu.runtime_check.session import Array, Feeds, Mode, open_session, run

SEGMENT_BYTES = 64 * 2**20
WEIGHT_BYTES = 256 * 2**20
_CROSSING_BYTES = 16 * 2**20
_HALF, _MOST_LIMITS = 0.5, 8
_MOST_NODES = 1000


@dataclass(frozen=True, slots=True)
class Segment:
    """Some consecutive nodes.

    Attributes:
        nodes: in topological order.
        takes: values from earlier segments or graph inputs.
        hands_on: own values that later segments need.
    """

    nodes: tuple[ir.Node, ...]
    takes: tuple[ir.Value, ...]
    hands_on: tuple[ir.Value, ...]


@dataclass(frozen=True, slots=True)
class SegmentRun:
    """What one segment computes of one batch.

    Attributes:
        batch: index into the batches.
        last: no further batch follows in this segment.
        values: value name → array, of the wanted values.
    """

    batch: int
    last: bool
    values: dict[str, Array]


def cut_segments(
    graph: ir.Graph, limit: int = SEGMENT_BYTES, weight_limit: int = WEIGHT_BYTES
) -> list[Segment]:
    """Cuts a topologically sorted graph so that each segment's outputs fit ``limit`` bytes.

    A segment is full as well where its weights, as decoded, would not fit ``weight_limit`` bytes,
    or behind 1,000 nodes: statistics of each hold half a megabyte until its end.

    Between half full and full, the cut is where the fewest bytes cross: between decoder layers
    rather than within an attention. What crosses is held for all batches, so a segment goes past
    its limits, eightfold at most, rather than have more than 16 MiB cross (logits between MatMul,
    QuantizeLinear and DequantizeLinear). A single node may exceed them. Dimensions that are not
    static count as one. A weight is dequantized in every segment that uses it, rather than carried
    there as float. Codes of less than a byte never cross: NumPy cannot hold what ONNX Runtime makes
    of them. Nor does a value whose type the graph does not tell.
    """
    nodes = [node for node in graph if not _dequantizes_weight(node)]
    crossing = _crossing(nodes, bytes_of)
    uncuttable = _crossing(nodes, _cannot_cross)
    shares = [_shares(node, limit, weight_limit) for node in nodes]
    runs: list[list[ir.Node]] = []
    start = 0
    while start < len(nodes):
        held: tuple[float, ...] = (0.0, 0.0, 0.0)
        best = start
        for index in range(start, len(nodes)):
            held = tuple(map(sum, zip(held, shares[index], strict=True)))
            full = max(held)
            if index > start and full > (1 if crossing[best] <= _CROSSING_BYTES else _MOST_LIMITS):
                break
            if full <= _HALF or crossing[index] <= crossing[best]:
                best = index
        while uncuttable[best]:
            best += 1
        runs.append(nodes[start : best + 1])
        start = best + 1
    return segments_of(runs)


def _shares(node: ir.Node, limit: int, weight_limit: int) -> tuple[float, ...]:
    """How much of a segment a node fills: of its outputs, of its weights, of its nodes."""
    made = sum(map(bytes_of, node.outputs))
    weighed = sum(
        bytes_of(value) for value in node.inputs if value is not None and _is_fixed(value)
    )
    return made / max(limit, 1), weighed / max(weight_limit, 1), 1 / _MOST_NODES


def _is_fixed(value: ir.Value) -> bool:
    return value.is_initializer() or _dequantizes_weight(value.producer())


def segments_of(runs: Sequence[list[ir.Node]]) -> list[Segment]:
    """Segments of given runs of nodes, which together are in topological order."""
    segment_of = {node: index for index, run in enumerate(runs) for node in run}
    return [_segment(run, index, segment_of) for index, run in enumerate(runs)]


def _dequantizes_weight(node: ir.Node | None) -> bool:
    return (
        node is not None
        and node.op_type == "DequantizeLinear"
        and all(v is None or v.is_initializer() for v in node.inputs)
        and not node.outputs[0].is_graph_output()
    )


def _crossing(nodes: list[ir.Node], size: Callable[[ir.Value], int]) -> list[int]:
    """Total size of values made at or before each node and used after it."""
    position = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        for value in node.outputs:
            last = max((position[user] for user in value.consumers()), default=index)
            change[index] += size(value)
            change[last] -= size(value)
    return list(itertools.accumulate(change[:-1]))


def _segment(nodes: list[ir.Node], index: int, segment_of: dict[ir.Node, int]) -> Segment:
    takes: dict[ir.Value, None] = {}
    hands_on: dict[ir.Value, None] = {}
    weights: dict[ir.Node, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is not None and _dequantizes_weight(producer):
                weights[producer] = None
            elif producer is None or segment_of[producer] != index:
                takes[value] = None
        for value in node.outputs:
            if any(segment_of[user] > index for user in value.consumers()):
                hands_on[value] = None
    return Segment((*weights, *nodes), tuple(takes), tuple(hands_on))


def _cannot_cross(value: ir.Value) -> int:
    """1 where several codes share a byte, or where an input of its type cannot be made, else 0."""
    return int(value.dtype is None or value.dtype.bitwidth < 8)


def _check_memory(graph: ir.Graph) -> None:
    """A few bytes of graph can ask for terabytes; the system would end the process, or others."""
    free = psutil.virtual_memory().available
    for value in (value for node in graph for value in node.outputs):
        if bytes_of(value) > free:
            sizes = f"it takes {bytes_of(value) / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            reason = f"no memory for `{value.name}`: {sizes}"
            raise DiagnosticError(GraphDoesNotRun(reason).at(value=name_of(value)))


class SegmentRunner:
    """Streams the values of a graph, segment by segment.

    Args:
        model: typed, topologically sorted.
        batches: one feed dictionary per batch.
        limit: bytes of activations per segment.

    Raises:
        DiagnosticError: QN116 one value alone takes more memory than is free.
    """

    def __init__(
        self, model: ir.Model, batches: Sequence[Feeds], limit: int = SEGMENT_BYTES
    ) -> None:
        _check_memory(model.graph)
        self._model = model
        self._crossing: list[Feeds] = [dict(feeds) for feeds in batches]
        self.segments = cut_segments(model.graph, limit)

    def stream(self, wanted: set[str]) -> Iterator[SegmentRun]:
        """Runs every segment on every batch.

        Args:
            wanted: names of values to yield; others are computed and dropped.

        Raises:
            DiagnosticError: QN116 where ONNX Runtime refuses a segment.
        """
        for index, segment in enumerate(self.segments):
            outputs = {name_of(v): v for v in segment.hands_on}
            outputs |= {
                v.name: v for node in segment.nodes for v in node.outputs if v.name in wanted
            }
            if outputs:
                yield from self._run_segment(segment, outputs, wanted)
            self._drop_dead(index)

    def _run_segment(
        self, segment: Segment, outputs: dict[str, ir.Value], wanted: set[str]
    ) -> Iterator[SegmentRun]:
        weights: dict[str, ir.TensorProtocol] = {}
        taken_in, handed_out = segment.takes, list(outputs.values())
        proto = subgraph_proto(segment.nodes, taken_in, handed_out, self._model, weights)
        session = open_session(proto, Mode.REFERENCE, weights)
        del proto
        names = list(outputs)
        for batch, feeds in enumerate(self._crossing):
            taken = {name_of(v): feeds[name_of(v)] for v in segment.takes}
            values = dict(zip(names, run(session, names, taken), strict=True))
            for value in segment.hands_on:
                feeds[name_of(value)] = values[name_of(value)]
            last = batch == len(self._crossing) - 1
            if last:
                del session  # whoever looks at the values may open another meanwhile
            yield SegmentRun(batch, last, {n: a for n, a in values.items() if n in wanted})

    def _drop_dead(self, index: int) -> None:
        needed = {v.name for segment in self.segments[index + 1 :] for v in segment.takes}
        for feeds in self._crossing:
            for name in [name for name in feeds if name not in needed]:
                del feeds[name]
