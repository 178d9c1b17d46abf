"""calibrate-ranges: measure every tensor's range on data, holding one segment at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import non_finite_weights
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.hadamard import is_scaled_hadamard
from qnpu.compiler.op_traits import (
    FIXED_RANGES,
    Linear,
    as_linear,
    is_float,
    is_layout_copy,
    is_standard,
    layout_inputs,
    normalized_inputs,
)
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.quant_types import Encoding, PerChannel, QuantSpec
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.compiler.rotated_weights import rotated_weights
from qnpu.compiler.rules import NonFiniteActivation
from qnpu.compiler.topology import as_feature_linear, input_axis
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.observer import Observer, RangeMethod, channel_range
from qnpu.runtime_check.segments import SEGMENT_BYTES, SegmentRunner
from qnpu.runtime_check.session import Feeds

Weights = NDArray[np.float64]


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
        before = len(compilation.encodings)
        _encode_constants(compilation, self.method)
        _encode_fixed(compilation)
        model = compilation.model
        batches = [turn_caches(model, feeds) for feeds in self.data.feeds(model.graph.inputs)]
        self._encode_measured(compilation, batches)
        return len(compilation.encodings) - before

    def _encode_measured(self, compilation: Compilation, batches: Sequence[Feeds]) -> None:
        plan, table = compilation.bit_plan, compilation.encodings
        graph = compilation.graph
        wanted = {
            name_of(value)
            for node in graph
            for value in node.outputs
            if name_of(value) in plan and name_of(value) not in table and not is_layout_copy(value)
        }
        make = self._observers(compilation)
        for value in graph.inputs:
            if name_of(value) in plan:
                _encode_input(name_of(value), make(name_of(value)), batches, compilation)
        observers: dict[str, Observer] = {}
        runner = SegmentRunner(compilation.model, batches, self.segment_bytes)
        total = len(runner.segments) * len(batches)
        for done, step in enumerate(runner.stream(wanted), start=1):
            for name, array in step.values.items():
                if name not in observers:
                    observers[name] = make(name)
                observers[name].look(array)
            if step.last:  # no later segment sees these tensors again
                for name, observer in observers.items():
                    _encode(name, observer, compilation)
                observers.clear()
            self.progress("calibrate", done / total)
        self.progress("calibrate", 1.0)

    def _observers(self, compilation: Compilation) -> Callable[[str], Observer]:
        """What makes the observer of a value."""
        graph = compilation.graph
        normalized = {name_of(v) for node in graph for v in normalized_inputs(node)}
        rotated = _rotated_inputs(compilation.model)
        searches = self.method is RangeMethod.SEARCH
        weights = _feature_weights(graph) if searches else {}

        def make(name: str) -> Observer:
            return Observer(self.method, name in normalized, name in rotated, weights.get(name))

        return make


def _encode_input(
    name: str, observer: Observer, batches: Sequence[Feeds], compilation: Compilation
) -> None:
    for feeds in batches:
        observer.look(feeds[name])
    _encode(name, observer, compilation)


def _rotated_inputs(model: ir.Model) -> set[str]:
    """Names of rotated inputs of linears, and of what layout operators copy them from."""
    marked = rotated_weights(model)
    pending = [
        linear.activation
        for node in model.graph
        if (linear := as_linear(node)) is not None and marked.takes_rotated(linear)
    ]
    names: set[str] = set()
    while pending:
        value = pending.pop()
        names.add(name_of(value))
        producer = value.producer()
        pending += layout_inputs(producer) if producer is not None else []
    return names


def _feature_weights(graph: ir.Graph) -> dict[str, Weights]:
    """What an error of each feature weighs in the results, of values that linears alone take.

    Returns:
        Value name → Σ_n W_jn² over all linears y = x·W that take it, divided by its mean.
    """
    found: dict[str, Weights] = {}
    for value in {linear.activation for node in graph if (linear := as_feature_linear(node))}:
        linears = [as_feature_linear(user) for user in value.consumers()]
        if value.is_graph_output() or any(linear is None for linear in linears):
            continue
        total = sum(_row_energy(linear) for linear in linears if linear is not None)
        if isinstance(total, np.ndarray) and total.mean() > 0:
            found[name_of(value)] = total / total.mean()
    return found


def _row_energy(linear: Linear) -> Weights:
    """Σ_n W_jn² for each input feature j, shape (features,)."""
    array = constant_array(linear.weight)
    if array is None:
        raise ValueError(f"initializer {linear.weight.name} has no data")
    rows = np.moveaxis(array, input_axis(linear), 0).reshape(array.shape[input_axis(linear)], -1)
    energy: Weights = np.einsum("jn,jn->j", rows, rows, dtype=np.float64)
    return energy


def _encode(name: str, observer: Observer, compilation: Compilation) -> None:
    if not observer.finite:
        raise DiagnosticError(NonFiniteActivation(name).at(value=name))
    spec = compilation.bit_plan[name]
    compilation.encodings[name] = Encoding.from_range(spec, *observer.value_range(spec))


def _encode_constants(compilation: Compilation, method: RangeMethod) -> None:
    """Weights per channel, other constants per tensor; 32-bit biases wait for their inputs."""
    plan, table = compilation.bit_plan, compilation.encodings
    faults = non_finite_weights(compilation.graph)
    if faults:
        raise DiagnosticError(faults)
    marked = rotated_weights(compilation.model)
    merged = {
        name_of(linear.weight)
        for node in compilation.graph
        if (linear := as_linear(node)) is not None and marked.is_merged(linear)
    }
    for name, value in compilation.graph.initializers.items():
        array = constant_array(value)
        if name not in plan or name in table or array is None or not is_float(value):
            continue
        spec = plan[name]
        if spec.bits < 32:
            table[name] = _encode_constant(array, spec, method, rotated=name in merged)


def _encode_constant(
    array: np.ndarray, spec: QuantSpec, method: RangeMethod, *, rotated: bool
) -> Encoding:
    if isinstance(spec.granularity, PerChannel):
        low, high = channel_range(array, spec, spec.granularity.axis, method, rotated=rotated)
        return Encoding.from_range(spec, low, high)
    if array.size == 0:
        return Encoding.from_range(spec, 0.0, 0.0)
    if spec.symmetric and spec.signed and is_scaled_hadamard(array):
        scale = np.abs(array.flat[0]).astype(np.float32)  # codes ±1, exactly
        return Encoding(spec, np.asarray(scale), np.asarray(0, np.int32))
    return Encoding.from_range(spec, float(array.min()), float(array.max()))


def _encode_fixed(compilation: Compilation) -> None:
    plan, table = compilation.bit_plan, compilation.encodings
    for node in compilation.graph:
        if node.op_type in FIXED_RANGES and is_standard(node):
            name = name_of(node.outputs[0])
            if name in plan and name not in table:
                table[name] = fixed_encoding(plan[name], *FIXED_RANGES[node.op_type])


def fixed_encoding(spec: QuantSpec, low: float, high: float) -> Encoding:
    """Encoding of a range that the operator guarantees: power-of-two scale, zero on a code."""
    bits = spec.bits if not spec.signed or low < 0 else spec.bits - 1
    scale = np.float32((high - low) / 2**bits)
    zero = 2 ** (spec.bits - 1) if low < 0 and not spec.signed else 0
    return Encoding(spec, np.asarray(scale, np.float32), np.asarray(zero, np.int32))
