"""calibrate-ranges: measure every tensor's range on data, holding one segment at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.range_measuring import encode_missing
from qnpu.runtime_check.segments import SEGMENT_BYTES, SegmentRunner


@dataclass(frozen=True)
class CalibrateRanges(Pass):
    """Fills the encoding table: weights from themselves, activations from calibration data.

    The graph is not changed. Each segment (about a decoder layer) runs on all batches before the
    next one; only statistics stay. Layout copies are not measured: unify-encodings gives them the
    encoding of what they copy. Ranges known from the operator (Softmax, Sigmoid, Tanh) are not
    measured either: s = (high - low) / 2^b, so that the scale is a power of two. The matrix of an
    online rotation, ±s, has the scale s and codes ±1, without error.

    How a range is taken is ``method``'s; some tell tensors that a rotation has reached from others
    (quantnpu.md §2): inputs of q, k, v, o, gate, up and lm_head where R1 and R2 were fused, of down
    projections behind R4, and the weights that took the rotations up.

    Peak memory: the model's weights, one segment's activations of one batch, and the values that
    cross a segment border for all batches.

    Raises:
        DiagnosticError: QN107 a weight, QN304 an activation is NaN or infinite; QN301, QN305 the
            data do not fit the graph's inputs.

    Attributes:
        data: what to run the graph on.
        method: how ranges of activations and of channels of weights are taken.
        segment_bytes: activations per segment.
        progress: called with fraction done.
    """

    name: ClassVar[str] = "calibrate-ranges"
    consumes: ClassVar[Stage] = Stage.PLANNED
    produces: ClassVar[Stage] = Stage.ENCODED

    data: FeedSource
    method: RangeMethod = RangeMethod.MIN_MAX
    segment_bytes: int = SEGMENT_BYTES
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        batches = [turn_caches(model, feeds) for feeds in self.data.feeds(model.graph.inputs)]
        runner = SegmentRunner(model, batches, self.segment_bytes)
        return len(
            encode_missing(compilation, batches, self.method, runner, self.progress, "calibrate")
        )
