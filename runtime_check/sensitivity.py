"""How much of a tensor a few bits lose, and which tensors lose most: Eq. 4 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

import numpy as np
import onnx_ir as ir

from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.runtime_check.observer import Observer, RangeMethod
from qnpu.runtime_check.range_measuring import encoding_of
from qnpu.runtime_check.segments import SEGMENT_BYTES, SegmentRunner
from qnpu.runtime_check.session import Array, Feeds

_LEAST_MAGNITUDE = 1e-8
_STEP = "measure sensitivity"


def relative_errors(
    model: ir.Model,
    batches: Sequence[Feeds],
    specs: Mapping[str, QuantSpec],
    *,
    segment_bytes: int = SEGMENT_BYTES,
    progress: ProgressCallback = no_progress,
) -> dict[str, float]:
    """Relative error of each tensor at Max-Min, mean over its elements (quantnpu.md §1).

    ratio = mean_i |x̂_i - x_i| / (|x_i| + 1e-8), over all batches. It is next to 1 where massive
    outliers make nearly all elements round to zero. The graph runs twice, for the extremes and for
    the ratio, a segment at a time; no activations are kept.

    Args:
        model: float, typed, topologically sorted.
        batches: one feed dictionary per batch.
        specs: values that nodes make, and what to encode them to.
        segment_bytes: activations per segment.
        progress: called with fraction done.

    Returns:
        Name → ratio, in the order of ``specs``; 0 for a tensor without elements.

    Raises:
        DiagnosticError: QN304 where a tensor holds NaN or infinity.
    """
    observers = {name: Observer(RangeMethod.MIN_MAX) for name in specs}
    runner = SegmentRunner(model, batches, segment_bytes)
    steps = 2 * max(len(runner.segments) * len(batches), 1)
    done = 0
    for step in runner.stream(set(specs)):
        for name, array in step.values.items():
            observers[name].look(array)
        done += 1
        progress(_STEP, done / steps)
    encodings = {name: encoding_of(name, observers[name], spec) for name, spec in specs.items()}
    sums = dict.fromkeys(specs, 0.0)
    counts = dict.fromkeys(specs, 0)
    for step in SegmentRunner(model, batches, segment_bytes).stream(set(specs)):
        for name, array in step.values.items():
            sums[name] += _error_sum(array, encodings[name])
            counts[name] += array.size
        done += 1
        progress(_STEP, done / steps)
    progress(_STEP, 1.0)
    return {name: sums[name] / max(counts[name], 1) for name in specs}


def _error_sum(array: Array, encoding: Encoding) -> float:
    restored = encoding.dequantize(encoding.quantize(array))
    errors = np.abs(restored - array) / (np.abs(array) + np.float32(_LEAST_MAGNITUDE))
    return float(errors.sum(dtype=np.float64))


def most_sensitive(ratios: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The names with the greatest ratios, greatest first; of equal ones the earlier.

    Args:
        ratios: name → ratio.
        share: of all names, 0 to 1; half a name counts as one.
    """
    count = floor(share * len(ratios) + 0.5)
    return tuple(sorted(ratios, key=lambda name: -ratios[name])[:count])
