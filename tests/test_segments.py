"""Running a graph in segments: the same bits as whole, holding only what crosses a cut."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, register_tensor, static_shape
from qnpu.compiler.stored_tensors import stored_tensor
from qnpu.runtime_check.segments import SegmentRunner, cut_segments
from qnpu.runtime_check.session import Feeds, open_session
from tests.conftest import Array, normal, parse, run_model

# x is needed at both ends, b twice and late; c and d die at once. 64 bytes each, but s (16) and t.
GRAPH = """
    g (float[4, 4] x) => (float[4, 4] y, float[4, 4] b)
    <float[4, 4] w = {1, 0, 2, 0, 0, 1, 0, 2, 3, 0, 1, 0, 0, 3, 0, 1}, int64[2] halves = {2, 2}>
    {
        a = MatMul(x, w)
        b = Relu(a)
        c = Neg(b)
        d = Exp(c)
        s, t = Split<axis: int = 1>(d, halves)
        e = Concat<axis: int = 1>(t, s)
        f = Add(e, b)
        y = Sub(f, x)
    }
"""
NAMES = {"a", "b", "c", "d", "s", "t", "e", "f", "y"}
LIMITS = [0, 1, 64, 100, 128, 200, 300, 2**20]


def whole(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    every = model.clone()
    every.graph.outputs.clear()
    every.graph.outputs.extend(v for node in every.graph for v in node.outputs)
    names = [v.name or "" for v in every.graph.outputs]
    return dict(zip(names, run_model(every, feeds), strict=True))


@pytest.mark.parametrize("limit", LIMITS)
def test_every_value_equals_a_run_of_the_whole(limit: int) -> None:
    model = parse(GRAPH)
    batches = [{"x": normal(4, 4, seed=i)} for i in range(3)]
    expected = [whole(model, feeds) for feeds in batches]
    seen: set[tuple[int, str]] = set()
    for step in SegmentRunner(model, batches, limit).stream(NAMES):
        for name, array in step.values.items():
            np.testing.assert_array_equal(array, expected[step.batch][name])
            assert (step.batch, name) not in seen
            seen.add((step.batch, name))
        assert step.last == (step.batch == 2)
    assert seen == {(batch, name) for batch in range(3) for name in NAMES}


@pytest.mark.parametrize("limit", LIMITS)
def test_codes_of_less_than_a_byte_do_not_cross(limit: int) -> None:
    """Two reads of them, the second one late: what lies between stays in one segment."""
    model = parse(
        """
        g (float[4, 4] x) => (float[4, 4] y)
        <float s = {0.25}, uint4 z = {7}>
        {
            a = Neg(x)
            q = QuantizeLinear(a, s, z)
            b = DequantizeLinear(q, s, z)
            c = Exp(b)
            d = Neg(c)
            e = DequantizeLinear(q, s, z)
            f = Add(d, e)
            y = Neg(f)
        }
        """
    )
    feeds = {"x": normal(4, 4)}
    found: dict[str, Array] = {}
    runner = SegmentRunner(model, [feeds], limit)
    for step in runner.stream({"b", "e", "y"}):
        found |= step.values
    assert set(found) == {"b", "e", "y"}
    np.testing.assert_array_equal(found["y"], run_model(model, feeds)[0])
    np.testing.assert_array_equal(found["b"], found["e"])
    assert len(runner.segments) > 1 or limit > 400


@pytest.mark.parametrize("limit", LIMITS)
def test_segments_fit_the_limit_and_cover_the_graph(limit: int) -> None:
    graph = parse(GRAPH).graph
    segments = cut_segments(graph, limit)
    assert [node for segment in segments for node in segment.nodes] == list(graph)
    for segment in segments:
        size = sum(4 * prod(static_shape(v) or ()) for node in segment.nodes for v in node.outputs)
        assert size <= limit or len(segment.nodes) == 1


def test_what_crosses_the_cuts() -> None:
    segments = cut_segments(parse(GRAPH).graph, 128)
    taken = [[v.name for v in segment.takes] for segment in segments]
    handed = [[v.name for v in segment.hands_on] for segment in segments]
    assert [[n.outputs[0].name for n in s.nodes] for s in segments] == [
        ["a", "b"],
        ["c", "d"],
        ["s", "e"],
        ["f", "y"],
    ]
    assert taken == [["x"], ["b"], ["d"], ["e", "b", "x"]]
    assert handed == [["b"], ["d"], ["e"], []]


@pytest.mark.parametrize("limit", LIMITS)
def test_only_what_crosses_is_held(limit: int) -> None:
    """After a segment each batch holds just what later segments take."""
    model = parse(GRAPH)
    runner = SegmentRunner(model, [{"x": normal(4, 4)}, {"x": normal(4, 4)}], limit)
    held: list[set[str]] = []
    drop = runner._drop_dead

    def dropped(index: int) -> None:
        drop(index)
        held.extend(set(feeds) for feeds in runner._crossing)
        needed = {v.name or "" for s in runner.segments[index + 1 :] for v in s.takes}
        assert all(set(feeds) <= needed for feeds in runner._crossing)

    runner._drop_dead = dropped  # type: ignore[method-assign]
    for _ in runner.stream({"y"}):
        pass
    assert held[-1] == set()
    assert max(len(names) for names in held) <= 4  # x, b, s, t


def test_the_callers_feeds_are_left_alone() -> None:
    feeds = {"x": normal(4, 4)}
    for _ in SegmentRunner(parse(GRAPH), [feeds], 64).stream(set()):
        pass
    assert set(feeds) == {"x"}


def test_a_segment_that_nobody_wants_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(GRAPH)
    opened: list[object] = []

    def counted(*args: Any) -> Any:
        opened.append(args)
        return open_session(*args)

    monkeypatch.setattr("qnpu.runtime_check.segments.open_session", counted)
    list(SegmentRunner(model, [{"x": normal(4, 4)}], 128).stream({"b"}))
    assert len(opened) == 3  # the last one hands nothing on
    opened.clear()
    list(SegmentRunner(model, [{"x": normal(4, 4)}], 2**20).stream(set()))
    assert not opened


def test_a_graph_that_does_not_run() -> None:
    model = parse(
        """
        g (float[1, 4] x) => (float[1, 3] y)
        <float[5, 3] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
        { y = MatMul(x, w) }
        """
    )
    with pytest.raises(DiagnosticError) as caught:
        list(SegmentRunner(model, [{"x": normal(1, 4)}]).stream({"y"}))
    assert caught.value.codes == ["QN116"]


def test_four_bit_constants_cross_into_a_segment() -> None:
    """As raw bytes, two elements each."""
    model = parse("g (float[3] x) => (float[3] y) <float s = {0.5}> { d = Neg(x)  y = Mul(d, s) }")
    codes = np.array([-8, 7, 3]).astype(ml_dtypes.int4)
    tensor = ir.tensor(codes, dtype=ir.DataType.INT4, name="q")
    value = register_tensor(model.graph, tensor)
    node = ir.node("DequantizeLinear", [value, model.graph.initializers["s"]])
    node.outputs[0].name = "w"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([3])
    model.graph.insert_before(next(iter(model.graph)), node)
    (product,) = (user for user in model.graph if user.op_type == "Mul")
    product.replace_input_with(1, node.outputs[0])
    ones = np.ones(3, np.float32)
    steps = list(SegmentRunner(model, [{"x": ones}], limit=1).stream({"y"}))
    assert [segment.takes for segment in cut_segments(model.graph, 1)][1] == (product.inputs[0],)
    assert steps[-1].values["y"].tolist() == [4.0, -3.5, -1.5]


def test_a_large_tensor_is_not_cut_off_from_its_use() -> None:
    """20 MB made and used up at once: a segment past its limit rather than a cut between."""
    model = parse(
        """
        g (float[1, 4] x) => (float[1, 1] y)
        <int64[2] wide = {1250000, 4}, int64[2] axes = {0, 1}>
        { a = Neg(x)  b = Expand(a, wide)  c = Neg(b)  y = ReduceMax(c, axes) }
        """
    )
    common.ShapeInferencePass()(model)
    segments = cut_segments(model.graph, 2**24)
    taken = {name_of(value) for segment in segments for value in segment.takes}
    assert {"b", "c"}.isdisjoint(taken)
    assert len(segments) > 1


@pytest.mark.parametrize("shape", ["", "[1, 4]"])
def test_weights_fit_a_limit_of_their_own(shape: str) -> None:
    """As decoded, and in a graph that does not tell the shapes of its values."""
    model = parse(
        f"""
        g (float[1, 4] x) => (float{shape} y)
        <float[4, 4] w = {{1, 0, 2, 0, 0, 1, 0, 2, 3, 0, 1, 0, 0, 3, 0, 1}}, float s = {{0.5}},
         int8[4, 4] v = {{1, 0, 2, 0, 0, 1, 0, 2, 3, 0, 1, 0, 0, 3, 0, 1}}>
        {{
            a = MatMul(x, w)
            b = MatMul(a, w)
            f = DequantizeLinear(v, s)
            c = MatMul(b, f)
            d = MatMul(c, f)
            y = Neg(d)
        }}
        """
    )
    if not shape:
        for node in model.graph:
            for value in node.outputs:
                if node.op_type != "DequantizeLinear":
                    value.shape = None

    def cut(weight_limit: int) -> list[list[str | None]]:
        segments = cut_segments(model.graph, 2**20, weight_limit)
        return [[node.outputs[0].name for node in segment.nodes] for segment in segments]

    assert cut(256) == [["f", "a", "b", "c", "d", "y"]]
    assert cut(128) == [["a", "b"], ["f", "c", "d", "y"]]
    assert cut(63) == [["a"], ["b"], ["f", "c"], ["f", "d"], ["y"]]


def test_a_value_of_unknown_type_does_not_cross() -> None:
    model = parse(GRAPH)
    for value in (v for node in model.graph for v in node.outputs if v.name in ("a", "c", "d")):
        value.type = None
    x = normal(4, 4)
    runner = SegmentRunner(model, [{"x": x}], 1)
    found = {name: a for step in runner.stream({"y", "b"}) for name, a in step.values.items()}
    taken = {name_of(value) for segment in runner.segments for value in segment.takes}
    assert len(runner.segments) > 2
    assert taken.isdisjoint({"a", "c", "d"})
    for name, array in whole(parse(GRAPH), {"x": x}).items():
        if name in found:
            np.testing.assert_array_equal(found[name], array)


def test_large_weights_of_any_layout() -> None:
    model = parse(
        """
        g (float[2, 600] x, float[600, 700] w, float[700, 500] v) => (float[2, 500] y)
        { a = MatMul(x, w)  y = MatMul(a, v) }
        """
    )
    arrays = {"w": normal(600, 700), "v": normal(500, 700).T}
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = stored_tensor(arrays[value.name or ""], name=value.name)
        model.graph.register_initializer(value)
    x = normal(2, 600)
    (step,) = SegmentRunner(model, [{"x": x}]).stream({"y"})
    np.testing.assert_allclose(step.values["y"], x @ arrays["w"] @ arrays["v"], atol=1e-2)
