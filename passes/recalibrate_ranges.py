"""recalibrate-ranges: measure what was not learned once more, on the model as quantized by now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import FIXED_RANGES, is_layout_copy, is_standard
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.range_measuring import encode_missing
from qnpu.runtime_check.segments import SEGMENT_BYTES

RECALIBRATED = "recalibrated"


@dataclass(frozen=True)
class RecalibrateRanges(Pass):
    """Stage two (quantnpu.md §4): what was learned is frozen, the rest measured in graph order.

    The graph is not changed. Every activation that was not learned loses its encoding, and gets one
    by the ranges it has where constants and all that was learned are quantized, and so is each
    activation of an earlier segment (about a decoder layer) by its new encoding.

    Must not fire on a table in which nothing was learned, or that it has measured already.

    Attributes:
        data: what to run the graph on.
        method: how ranges are taken.
        segment_bytes: activations per segment.
        progress: called with fraction done.
    """

    name: ClassVar[str] = "recalibrate-ranges"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    data: FeedSource
    method: RangeMethod = RangeMethod.MIN_MAX
    segment_bytes: int = SEGMENT_BYTES
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        model, table = compilation.model, compilation.encodings
        if not any(table.is_learned(name) for name in table):
            return 0
        remaining = [name for name in _measured(compilation) if not table.is_learned(name)]
        if not remaining:
            return 0
        from qnpu.runtime_check.quantized_run import QuantizedRunner  # noqa: PLC0415  (torch)

        for name in remaining:
            table.forget(name)
        batches = [turn_caches(model, feeds) for feeds in self.data.feeds(model.graph.inputs)]
        runner = QuantizedRunner(model, batches, table, self.segment_bytes)
        found = encode_missing(
            compilation, batches, self.method, runner, self.progress, "recalibrate"
        )
        table.mark_learned(found, RECALIBRATED)
        return len(found)


def _measured(compilation: Compilation) -> list[str]:
    """Names of encoded activations that are measured: not copies, nor what an operator bounds."""
    graph, table = compilation.graph, compilation.encodings
    values = [*graph.inputs]
    for node in graph:
        if not (node.op_type in FIXED_RANGES and is_standard(node)):
            values += [value for value in node.outputs if not is_layout_copy(value)]
    return [name_of(value) for value in values if name_of(value) in table]
