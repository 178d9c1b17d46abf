"""Runs a float graph as its encodings say, a segment at a time, in torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.runtime_check.fake_quantize import fake_quantized
from qnpu.runtime_check.segments import Segment, SegmentRun, cut_segments
from qnpu.runtime_check.session import Feeds
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors


class QuantizedRunner:
    """Streams the values of a graph as ``SegmentRunner`` does, everything encoded quantized.

    What is yielded is not quantized itself, only what it was computed from. A segment's own values
    may be given encodings once its last batch is yielded: the next segment sees them quantized.

    Args:
        model: float, typed, topologically sorted.
        batches: one feed dictionary per batch.
        table: encodings; read as it stands at each segment.
        limit: bytes of activations per segment.
    """

    def __init__(
        self, model: ir.Model, batches: Sequence[Feeds], table: EncodingTable, limit: int
    ) -> None:
        self._crossing = [feed_tensors(feeds) for feeds in batches]
        self._table = table
        self.segments = cut_segments(model.graph, limit)

    def stream(self, wanted: set[str]) -> Iterator[SegmentRun]:
        """Runs every segment on every batch; see ``SegmentRunner.stream``."""
        for index, segment in enumerate(self.segments):
            own = {name_of(v) for node in segment.nodes for v in node.outputs} & wanted
            if own:
                yield from self._look(segment, own)
            later = self.segments[index + 1 :]
            if later:
                with torch.no_grad():
                    advance(segment, later, self._crossing, self._table)

    def _look(self, segment: Segment, wanted: set[str]) -> Iterator[SegmentRun]:
        executor, table = TorchExecutor(segment.nodes), self._table
        weights = quantized_constants(segment, table)
        seen: dict[str, Tensor] = {}

        def look(name: str, value: Tensor) -> Tensor:
            if name in wanted:
                seen[name] = value
            return fake_quantized(value, table[name]) if name in table else value

        for index, batch in enumerate(self._crossing):
            taken = {name_of(v): batch[name_of(v)] for v in segment.takes}
            with torch.no_grad():
                executor.run(taken, sorted(wanted), weights=weights, transform=look)
            last = index == len(self._crossing) - 1
            yield SegmentRun(index, last, {name: value.numpy() for name, value in seen.items()})
            seen.clear()


def advance(
    segment: Segment,
    later: Sequence[Segment],
    batches: Sequence[dict[str, Tensor]],
    table: EncodingTable,
) -> None:
    """Runs a segment, quantized, on all batches; only what later ones take is kept."""
    executor = TorchExecutor(segment.nodes)
    weights = quantized_constants(segment, table)
    wanted = [name_of(value) for value in segment.hands_on]
    needed = {name_of(value) for following in later for value in following.takes}

    def quantize(name: str, value: Tensor) -> Tensor:
        return fake_quantized(value, table[name]) if name in table else value

    for batch in batches:
        taken = {name_of(v): batch[name_of(v)] for v in segment.takes}
        batch.update(executor.run(taken, wanted, weights=weights, transform=quantize))
        for name in [name for name in batch if name not in needed]:
            del batch[name]


def quantized_constants(
    segment: Segment, table: EncodingTable, but: Collection[str] = ()
) -> dict[str, Tensor]:
    """Name → real value of the codes, of each encoded constant that a segment's nodes take.

    Those named in ``but`` are left out. Biases are left out: at 32 bits their error is nothing.
    """
    found: dict[str, Tensor] = {}
    for node in segment.nodes:
        for value in node.inputs:
            array = constant_array(value) if value is not None and value.is_initializer() else None
            if value is None or array is None or value.name in found or value.name in but:
                continue
            name = name_of(value)
            if name in table and table[name].spec.bits < 32:
                real = table[name].dequantize(table.quantize(name, array))
                found[name] = torch.from_numpy(np.asarray(real))
    return found
