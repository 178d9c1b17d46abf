"""recalibrate-ranges: what was learned stays, the rest has the ranges of the quantized model."""

from __future__ import annotations

import numpy as np

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import is_layout_copy
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.learn_scales import LearnScales
from qnpu.passes.recalibrate_ranges import RECALIBRATED, RecalibrateRanges
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.quantized_run import QuantizedRunner
from qnpu.runtime_check.segments import SegmentRunner
from tests.learning import WINDOWS, numbers, rounded


def learned(steps: int = 4) -> Compilation:
    """A tiny decoder of which something is learned."""
    compilation = rounded()
    assert LearnScales(WINDOWS, steps=steps).run(compilation) > 0
    return compilation


def test_ranges_are_those_of_the_quantized_model() -> None:
    """With a node to a segment each range is seen behind everything quantized before it."""
    compilation = learned()
    table, model = compilation.encodings, compilation.model
    assert RecalibrateRanges(WINDOWS, RangeMethod.MIN_MAX, segment_bytes=1).run(compilation) > 0
    feeds = WINDOWS.feeds(model.graph.inputs)
    names = {name for name in table if table.is_learned(name, RECALIBRATED)}
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in QuantizedRunner(model, feeds, table, 1).stream(names):
        for name, array in step.values.items():
            low[name] = min(low[name], float(array.min()))
            high[name] = max(high[name], float(array.max()))
    for name in names:
        encoding = table[name]
        ends = encoding.dequantize(np.array([encoding.spec.q_min, encoding.spec.q_max]))
        lsb = float(encoding.scale)
        assert abs(ends[0] - low[name]) <= lsb, name
        assert abs(ends[1] - high[name]) <= lsb, name


def test_the_runner_sees_what_the_qdq_graph_computes() -> None:
    compilation = learned()
    other = Compilation(compilation.model.clone())
    other.encodings, other.stage = compilation.encodings, Stage.ENCODED
    feeds = WINDOWS.feeds(compilation.graph.inputs)[:2]
    names = {name_of(v) for n in compilation.graph for v in n.outputs if not is_layout_copy(v)}
    found = [
        (step.batch, name, array)
        for step in QuantizedRunner(compilation.model, feeds, compilation.encodings, 2**20).stream(
            names
        )
        for name, array in step.values.items()
    ]
    InsertQdq().run(other)
    expected = {
        (step.batch, name): array
        for step in SegmentRunner(other.model, feeds).stream(names)
        for name, array in step.values.items()
    }
    assert {(batch, name) for batch, name, _ in found} >= {(0, "logits"), (1, "logits")}
    for batch, name, array in found:
        if (batch, name) not in expected:
            continue  # a requantize point: a Q/DQ pair by now
        reference = expected[batch, name]
        peak = max(float(np.abs(reference).max()), 1e-6)
        # A value on the edge between two codes may fall to either side.
        assert np.mean(np.abs(array - reference) > 1e-3 * peak) <= 0.02, name


def test_what_was_learned_stays() -> None:
    compilation = learned()
    table = compilation.encodings
    before = numbers(compilation)
    kept = {n for n in table if table.is_learned(n) or n in compilation.graph.initializers}
    RecalibrateRanges(WINDOWS).run(compilation)
    after = numbers(compilation)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in kept)
    assert any(after[name] != before[name] for name in before)
    assert UnifyEncodings().run(compilation) >= 0


def test_must_not_fire() -> None:
    compilation = rounded()
    assert RecalibrateRanges(WINDOWS).run(compilation) == 0  # nothing was learned
    compilation = learned()
    assert RecalibrateRanges(WINDOWS).run(compilation) > 0
    before = numbers(compilation)
    assert RecalibrateRanges(WINDOWS).run(compilation) == 0
    assert numbers(compilation) == before
