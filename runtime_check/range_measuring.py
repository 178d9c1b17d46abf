"""Fills a table of encodings: constants from themselves, activations from what they are on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.block_scales import encode_blocks
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import non_finite_weights
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.hadamard import is_scaled_hadamard
from qnpu.compiler.op_traits import (
    FIXED_RANGES,
    Linear,
    as_linear,
    encoding_groups,
    is_float,
    is_layout_copy,
    is_standard,
    layout_inputs,
    normalized_inputs,
)
from qnpu.compiler.pass_base import Compilation, ProgressCallback
from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel, QuantSpec
from qnpu.compiler.rotated_weights import rotated_weights
from qnpu.compiler.rules import NonFiniteActivation
from qnpu.compiler.topology import as_feature_linear, input_axis
from qnpu.runtime_check.observer import Observer, RangeMethod, channel_range
from qnpu.runtime_check.segments import Segment, SegmentRun
from qnpu.runtime_check.session import Feeds

Weights = NDArray[np.float64]


class Runner(Protocol):
    """Streams a graph's values, segment by segment."""

    segments: list[Segment]

    def stream(self, wanted: set[str]) -> Iterator[SegmentRun]: ...


def encode_missing(
    compilation: Compilation,
    batches: Sequence[Feeds],
    method: RangeMethod,
    runner: Runner,
    progress: ProgressCallback,
    label: str,
) -> list[str]:
    """Gives an encoding to all that the plan names and the table lacks.

    Args:
        compilation: its table is filled; the graph is not changed.
        batches: what graph inputs hold.
        method: how ranges are taken.
        runner: of the same batches.
        progress: called with fraction done.
        label: step name for progress.

    Returns:
        Names of what was encoded.

    Raises:
        DiagnosticError: QN107 a weight, QN304 an activation is NaN or infinite.
    """
    before = set(compilation.encodings)
    encode_constants(compilation, method)
    _encode_fixed(compilation)
    plan, table, graph = compilation.bit_plan, compilation.encodings, compilation.graph
    wanted = {
        name_of(value)
        for node in graph
        for value in node.outputs
        if name_of(value) in plan and name_of(value) not in table and not is_layout_copy(value)
    }
    make = observer_maker(compilation, method)
    silent: list[str] = []
    for value in graph.inputs:
        name = name_of(value)
        if name in plan and name not in table:
            if any(feeds[name].any() for feeds in batches):
                _encode_input(name, make(name), batches, compilation)
            else:
                silent.append(name)
    observers: dict[str, Observer] = {}
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
        progress(label, done / total)
    _encode_silent(silent, compilation)
    progress(label, 1.0)
    return [name for name in table if name not in before]


def observer_maker(compilation: Compilation, method: RangeMethod) -> Callable[[str], Observer]:
    """What makes the observer of a value, by its name."""
    graph = compilation.graph
    normalized = {name_of(v) for node in graph for v in normalized_inputs(node)}
    rotated = _rotated_inputs(compilation.model)
    weights = _feature_weights(graph) if method is RangeMethod.SEARCH else {}

    def make(name: str) -> Observer:
        return Observer(method, name in normalized, name in rotated, weights.get(name))

    return make


def _encode_input(
    name: str, observer: Observer, batches: Sequence[Feeds], compilation: Compilation
) -> None:
    for feeds in batches:
        observer.look(feeds[name])
    _encode(name, observer, compilation)


def _encode_silent(names: list[str], compilation: Compilation) -> None:
    """Inputs that are zero in all data: as what layout operators join them to, if anything.

    Zeros say nothing of a range, and one made up for them would be unified with a measured one.
    """
    table, remaining = compilation.encodings, dict.fromkeys(names)
    for group in encoding_groups(compilation.graph) if names else []:
        members = [name_of(value) for value in group]
        known = next((table[name] for name in members if name in table), None)
        for name in members:
            if name in remaining and known is not None:
                table[name] = known
                del remaining[name]
    for name in remaining:
        table[name] = Encoding.from_range(compilation.bit_plan[name], 0.0, 0.0)


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
    spec = compilation.bit_plan[name]
    compilation.encodings[name] = encoding_of(name, observer, spec)


def encoding_of(name: str, observer: Observer, spec: QuantSpec) -> Encoding:
    """The encoding of what was observed.

    Raises:
        DiagnosticError: QN304 it was NaN or infinite.
    """
    if not observer.finite:
        raise DiagnosticError(NonFiniteActivation(name).at(value=name))
    return Encoding.from_range(spec, *observer.value_range(spec))


def encode_constants(compilation: Compilation, method: RangeMethod) -> None:
    """Encodes constants that are not: weights per channel, others per tensor.

    32-bit biases wait for their inputs.

    Raises:
        DiagnosticError: QN107 a weight is NaN or infinite.
    """
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
    if isinstance(spec.granularity, PerBlock):
        return _encode_blocks(array, spec, spec.granularity, method, rotated=rotated)
    if isinstance(spec.granularity, PerChannel):
        low, high = channel_range(array, spec, spec.granularity.axis, method, rotated=rotated)
        return Encoding.from_range(spec, low, high)
    if array.size == 0:
        return Encoding.from_range(spec, 0.0, 0.0)
    if spec.symmetric and spec.signed and is_scaled_hadamard(array):
        scale = np.abs(array.flat[0]).astype(np.float32)  # codes ±1, exactly
        return Encoding(spec, np.asarray(scale), np.asarray(0, np.int32))
    return Encoding.from_range(spec, float(array.min()), float(array.max()))


def _encode_blocks(
    array: np.ndarray, spec: QuantSpec, blocks: PerBlock, method: RangeMethod, *, rotated: bool
) -> Encoding:
    """Each block's range as a channel's would be taken, then whole block scales."""
    rows = np.moveaxis(array, blocks.axis, 1)  # (channels, features)
    of_blocks = rows.reshape(-1, blocks.size)
    _, high = channel_range(of_blocks, spec, 0, method, rotated=rotated)
    scales = (high / np.float32(spec.q_max)).reshape(len(rows), -1)
    return encode_blocks(array, spec, np.moveaxis(scales, 1, blocks.axis))


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
