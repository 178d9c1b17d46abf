"""How far one set of numbers is from another: SQNR, cosine, LSB, KL divergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import is_float, is_layout_copy
from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.runtime_check.segments import SEGMENT_BYTES, SegmentRunner
from qnpu.runtime_check.session import Array, Feeds

_CHUNK = 2**15
_LEAST_DIFFERENCE = 1e-15  # whose square float32 still holds to seven digits


@dataclass(slots=True)
class _Sums:
    """Σ r², Σ o², Σ r·o, Σ (r - o)² and max |r - o| over two tensors."""

    reference: float = 0.0
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    worst: float = 0.0

    @classmethod
    def of(cls, reference: Array, other: Array) -> _Sums:
        """In chunks that stay in a core's cache: thirty times as fast as copies in float64.

        Products of float32 are summed within a chunk only, to about seven digits.
        """
        sums = cls()
        flat_reference, flat_other = reference.reshape(-1), other.reshape(-1)
        for start in range(0, flat_reference.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            sums._add(flat_reference[chunk], flat_other[chunk])
        return sums

    def _add(self, r: Array, o: Array) -> None:
        if r.dtype.itemsize < np.dtype(np.float32).itemsize:
            r, o = r.astype(np.float32), o.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            difference = r - o
            found = [float(a @ b) for a, b in ((r, r), (o, o), (r, o), (difference, difference))]
        worst = max(float(difference.max()), -float(difference.min()))
        tiny = 0.0 < worst < _LEAST_DIFFERENCE
        if r.dtype != np.float64 and (tiny or not np.isfinite(found).all()):
            self._add(r.astype(np.float64), o.astype(np.float64))  # squares beyond float32
            return
        self.reference += found[0]
        self.other += found[1]
        self.product += found[2]
        self.noise += found[3]
        self.worst = max(self.worst, worst)

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0.0:
            return float("inf")
        ratio = self.reference / self.noise
        return 10.0 * float(np.log10(ratio)) if ratio > 0 else float("-inf")

    @property
    def cosine(self) -> float:
        norms = float(np.sqrt(self.reference) * np.sqrt(self.other))
        return self.product / norms if norms > 0.0 else float(self.noise == 0.0)


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal-to-quantization-noise ratio, dB: 10·log10(Σ ref² / Σ (ref - other)²).

    Infinite where both are equal; -inf where only the reference is zero.
    """
    return _Sums.of(reference, other).sqnr_db


def cosine(reference: Array, other: Array) -> float:
    """Cosine of the angle between two tensors seen as vectors; 1 where both are zero."""
    return _Sums.of(reference, other).cosine


def lsb_difference(reference: Array, other: Array, scale: float) -> NDArray[np.int64]:
    """Difference of two dequantized tensors in LSB of ``scale``, rounded to whole codes."""
    steps = (other.astype(np.float64) - reference.astype(np.float64)) / scale
    return np.rint(steps).astype(np.int64)


def mean_kl(reference_logits: Array, other_logits: Array) -> float:
    """Mean KL(reference ‖ other) over rows, nats; logits of shape (rows, classes)."""
    log_p, log_q = log_softmax(reference_logits), log_softmax(other_logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One tensor of the float graph against its dequantized twin.

    Attributes:
        name: value name in the float graph.
        sqnr_db: see ``sqnr_db``.
        cosine: see ``cosine``.
        max_abs_error: real units.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_abs_error: float


def compare_graphs(
    float_model: ir.Model,
    qdq_model: ir.Model,
    feeds: Feeds,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    progress: ProgressCallback = no_progress,
) -> list[TensorComparison]:
    """Runs both graphs on one batch, in step, and compares every computed tensor.

    Both are streamed by segments; a tensor is dropped once its twin has come. Layout copies are
    left out: they hold the elements of tensors that are compared.

    Args:
        float_model: the graph that encodings were made for.
        qdq_model: the same after insert-qdq.
        feeds: one batch.
        segment_bytes: activations per segment.
        progress: called with fraction done.

    Returns:
        Comparisons in graph order.
    """
    twins = _twins(float_model, qdq_model)
    names = {twin: name for name, twin in twins.items()}
    waiting: dict[str, Array] = {}
    results: dict[str, TensorComparison] = {}
    streams = [
        _values(float_model, feeds, set(twins), segment_bytes),
        _values(qdq_model, feeds, set(names), segment_bytes),
    ]
    arrived = [0, 0]
    finished = [False, False]
    while not all(finished):
        side = int(finished[0] or (not finished[1] and arrived[1] < arrived[0]))
        item = next(streams[side], None)
        if item is None:
            finished[side] = True
            continue
        name = item[0] if side == 0 else names[item[0]]
        arrived[side] += 1
        if name not in waiting:
            waiting[name] = item[1]
            continue
        first = waiting.pop(name)
        reference, other = (item[1], first) if side == 0 else (first, item[1])
        results[name] = _compare(name, reference, other)
        progress("compare", len(results) / len(twins))
    return [results[name] for name in twins if name in results]


def _twins(float_model: ir.Model, qdq_model: ir.Model) -> dict[str, str]:
    """Float value name → name of its dequantized twin."""
    produced = {v.name for node in qdq_model.graph for v in node.outputs}
    outputs = {v.name for v in qdq_model.graph.outputs}
    twins: dict[str, str] = {}
    for node in float_model.graph:
        for value in node.outputs:
            name = name_of(value)
            if not is_float(value) or is_layout_copy(value):
                continue
            twin = name if name in outputs else f"{name}_dequantized"
            if twin in produced:
                twins[name] = twin
    return twins


def _values(
    model: ir.Model, feeds: Feeds, wanted: set[str], segment_bytes: int
) -> Iterator[tuple[str, Array]]:
    for step in SegmentRunner(model, [feeds], segment_bytes).stream(wanted):
        yield from step.values.items()


def _compare(name: str, reference: Array, other: Array) -> TensorComparison:
    sums = _Sums.of(reference, other)
    return TensorComparison(name, sums.sqnr_db, sums.cosine, sums.worst)
