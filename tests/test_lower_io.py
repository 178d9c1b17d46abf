"""lower-io: golden graphs, what it leaves alone, the way back, and whole compiles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.integer_io import integer_io, io_encodings, with_real_io
from qnpu.compiler.pipeline import CompileResult, check_result, compile_model
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.feeds import ArraySamples
from qnpu.runtime_check.htp import HtpCompiler, HtpVerdict, is_available
from tests.conftest import apply, assert_keeps, assert_rewrites, normal, parse, run_model
from tests.decoders import JOINED, PAST, toy

CONSTANTS = "float s = {0.5}, uint8 z = {3}, float t = {0.25}, int16 o = {0}"
REAL = f"""
    g (float[1, 4] x) => (float[1, 4] y)
    <{CONSTANTS}>
    {{
        x_codes = QuantizeLinear(x, s, z)
        x_real = DequantizeLinear(x_codes, s, z)
        h = Relu(x_real)
        h_codes = QuantizeLinear(h, t, o)
        y = DequantizeLinear(h_codes, t, o)
    }}
"""


def graph(body: str, outputs: str = "float[1, 4] y", inputs: str = "float[1, 4] x") -> str:
    return f"g ({inputs}) => ({outputs}) <{CONSTANTS}> {{ {body} }}"


def test_form() -> None:
    after = f"""
        g (uint8[1, 4] x) => (int16[1, 4] y)
        <{CONSTANTS}>
        {{ x_real = DequantizeLinear(x, s, z)  h = Relu(x_real)  y = QuantizeLinear(h, t, o) }}
    """
    model = assert_rewrites(LowerIo(), REAL, after, 2)
    found = integer_io(model)
    assert {
        n: (str(e.spec.dtype), float(e.scale), int(e.zero_point)) for n, e in found.items()
    } == {
        "x": ("UINT8", 0.5, 3),
        "y": ("INT16", 0.25, 0),
    }


def test_codes_are_those_of_before() -> None:
    model, x = parse(REAL), normal(1, 4, scale=30)
    (expected,) = run_model(model, {"x": x})
    apply(LowerIo(), model)
    encodings = integer_io(model)
    (codes,) = run_model(model, {"x": encodings["x"].quantize(x)})
    assert codes.dtype == np.int16
    np.testing.assert_array_equal(encodings["y"].dequantize(codes), expected)


def test_the_way_back() -> None:
    model, x = parse(REAL), normal(1, 4, scale=30)
    assert with_real_io(model) is model
    (expected,) = run_model(model, {"x": x})
    before = io_encodings(model)
    apply(LowerIo(), model)
    real = with_real_io(model)
    assert [v.dtype for v in (*real.graph.inputs, *real.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert not integer_io(real)
    assert model.graph.inputs[0].dtype is ir.DataType.UINT8  # the other one stays
    np.testing.assert_array_equal(run_model(real, {"x": x})[0], expected)
    for found in (io_encodings(model), io_encodings(real)):
        assert list(found) == ["x", "y"]
        assert all(found[name].same_as(before[name]) for name in found)


def test_an_output_that_is_read_inside_and_one_whose_codes_are_out_already() -> None:
    text = graph(
        """
        c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)
        h = Relu(a)  codes = QuantizeLinear(h, s, z)  y = DequantizeLinear(codes, s, z)
        k = Neg(y)  d = QuantizeLinear(k, s, z)  w = DequantizeLinear(d, s, z)
        """,
        "float[1, 4] y, uint8[1, 4] codes, float[1, 4] w",
    )
    model, x = parse(text), normal(1, 4, scale=30)
    expected = run_model(model, {"x": x})
    assert apply(LowerIo(), model) == 3
    assert [name_of(value) for value in model.graph.outputs] == ["y", "codes", "w"]
    found = run_model(model, {"x": integer_io(model)["x"].quantize(x)})
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], expected[1])
    for real, again in zip(expected, run_model(with_real_io(model), {"x": x}), strict=True):
        np.testing.assert_array_equal(again, real)


def test_an_input_handed_through() -> None:
    text = graph("c = QuantizeLinear(x, s, z)  y = DequantizeLinear(c, s, z)")
    model, x = parse(text), normal(1, 4, scale=30)
    (expected,) = run_model(model, {"x": x})
    assert apply(LowerIo(), model) == 2
    assert [node.op_type for node in model.graph] == ["Identity"]
    np.testing.assert_array_equal(run_model(with_real_io(model), {"x": x})[0], expected)


@pytest.mark.parametrize(
    "text",
    [
        graph("y = Relu(x)"),
        # read in two ways
        graph("c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)  y = Add(a, x)"),
        graph(
            """
            c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)
            d = QuantizeLinear(x, t, o)  b = DequantizeLinear(d, t, o)  y = Add(a, b)
            """
        ),
        # several scales
        """
        g (float[1, 2] x) => (float[1, 2] y) <float[2] s = {1, 2}, uint8[2] z = {3, 4}>
        { c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)  y = Relu(a) }
        """,
        # a constant
        "g (uint8[1] x) => (uint8[1] i, float[1] y) <uint8[1] c = {7}, float s = {2}, "
        "uint8 z = {1}> { i = Identity(x)  y = DequantizeLinear(c, s, z) }",
        # less than a byte
        "g (float[2] x) => (float[2] y) <float s = {1}, uint4 z = {8}> "
        "{ c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)  y = Relu(a) }",
        # codes already
        graph("a = DequantizeLinear(x, s, z)  y = Relu(a)", inputs="uint8[1, 4] x"),
    ],
)
def test_must_not_fire(text: str) -> None:
    assert_keeps(LowerIo(), text)


SAMPLES = ArraySamples({
    "ids": np.random.default_rng(1).integers(0, 5, (3, 3)),
    "past": normal(3, 3, 4, seed=5),
})  # fmt: skip


@lru_cache
def compiled(*, integer: bool) -> CompileResult:
    """A decoder of one layer with a cache of values, three tokens in and six out."""
    model = toy(*JOINED, inputs=PAST, outputs=", float[1, 6, 4] vc")
    config = CompileConfig(scheme="w8a16", target="qnn-htp-v75", integer_io=integer)
    return compile_model(model, config, SAMPLES)


def test_a_decoder_in_integers_gives_what_the_real_one_does() -> None:
    real, whole = compiled(integer=False), compiled(integer=True)
    assert whole.rewrites["lower-io"] == 3
    types = {
        name_of(v): str(v.dtype) for v in (*whole.model.graph.inputs, *whole.model.graph.outputs)
    }
    assert types == {"ids": "INT64", "past": "UINT8", "logits": "UINT16", "vc": "UINT8"}
    feeds = SAMPLES.feeds(real.model.graph.inputs)[0]
    encodings = integer_io(whole.model)
    codes = feeds | {"past": encodings["past"].quantize(feeds["past"])}
    expected, found = run_model(real.model, feeds), run_model(whole.model, codes)
    for name, reference, actual in zip(("logits", "vc"), expected, found, strict=True):
        np.testing.assert_array_equal(encodings[name].dequantize(actual), reference)


def test_checks_measure_the_same() -> None:
    feeds = SAMPLES.feeds(compiled(integer=False).float_model.graph.inputs)[0]
    real, whole = (check_result(compiled(integer=kind), feeds, []) for kind in (False, True))
    assert real == whole
    assert "logits" in {tensor.name for tensor in whole.tensors}


@pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
def test_the_real_compiler_sees_no_float_at_all() -> None:
    """Not even at the borders, where Quantize and Dequantize of real inputs would stand."""
    with HtpCompiler() as compiler:
        real, whole = (compiler.compile(compiled(integer=k).model, "v75") for k in (False, True))
    borders = [
        {op.kind for op in graph.ops} & {"Quantize", "Dequantize"} for graph in (real, whole)
    ]
    assert borders == [{"Quantize", "Dequantize"}, set()]
    assert whole.verdict is HtpVerdict.INT
    assert not any(tensor.is_float for op in whole.ops for tensor in (*op.inputs, *op.outputs))
