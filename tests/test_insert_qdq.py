"""insert-qdq: what is written into the graph, to the last code."""

from __future__ import annotations

from textwrap import dedent

import numpy as np
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_checks import check_graph
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.operands import input_operand
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.qdq_edit import block_encoding_of
from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel, QuantSpec
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import Array, normal, parse, run_model


def encoding(spec: QuantSpec, scale: object, zero: object) -> Encoding:
    return Encoding(spec, np.asarray(scale, np.float32), np.asarray(zero, np.int32))


U8 = QuantSpec(8, False, False)
U16 = QuantSpec(16, False, False)
W4 = QuantSpec(4, True, True, PerChannel(1))
B32 = QuantSpec(32, True, True, PerChannel(0))


def inserted(text: str, table: dict[str, Encoding]) -> tuple[Compilation, int]:
    compilation = Compilation(parse(text), encodings=EncodingTable())
    for name, item in table.items():
        compilation.encodings[name] = item
    count = InsertQdq().run(compilation)
    compilation.stage = Stage.QDQ
    verify_stage(compilation)
    assert InsertQdq().run(compilation) == 0
    return compilation, count


def quantized(text: str, scheme: str = "w8a16", **data: Array) -> Compilation:
    compilation = Compilation(parse(text))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    CalibrateRanges(ArraySamples(data)).run(compilation)
    UnifyEncodings().run(compilation)
    InsertQdq().run(compilation)
    compilation.stage = Stage.QDQ
    verify_stage(compilation)
    return compilation


def test_golden() -> None:
    compilation, count = inserted(
        """
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {0.5, 1, -3.5, -7}, float[2] b = {1, -1}>
        { h = Gemm(x, w, b)  n = Identity(h)  y = Neg(n) }
        """,
        {
            "x": encoding(U16, 0.25, 7),
            "w": encoding(W4, [0.5, 1], [0, 0]),
            "b": encoding(B32, [0.125, 0.25], [0, 0]),
            "h": encoding(U16, 0.5, 9),
            "n": encoding(U8, 2, 128),
            "y": encoding(U16, 4, 0),
        },
    )
    assert count == 6
    assert model_to_text(compilation.model) == dedent(
        """\
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[1, 2] x) => (float[1, 2] y)
        <float x_scale = {0.25},
         uint16 x_zero_point = {7},
         int4[2, 2] w_quantized = {1, 1, -7, -7},
         float[2] w_scale = {0.5, 1.0},
         int4[2] w_zero_point = {0, 0},
         int32[2] b_quantized = {8, -4},
         float[2] b_scale = {0.125, 0.25},
         int32[2] b_zero_point = {0, 0},
         float h_scale = {0.5},
         uint16 h_zero_point = {9},
         float n_scale = {2.0},
         uint8 n_zero_point = {128},
         float y_scale = {4.0},
         uint16 y_zero_point = {0}>
        {
          x_quantized = QuantizeLinear(x, x_scale, x_zero_point)
          x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)
          w_dequantized = DequantizeLinear<axis: int = -1>(w_quantized, w_scale, w_zero_point)
          b_dequantized = DequantizeLinear<axis: int = -1>(b_quantized, b_scale, b_zero_point)
          h = Gemm(x_dequantized, w_dequantized, b_dequantized)
          h_quantized = QuantizeLinear(h, h_scale, h_zero_point)
          h_dequantized = DequantizeLinear(h_quantized, h_scale, h_zero_point)
          n_quantized = QuantizeLinear(h_dequantized, n_scale, n_zero_point)
          n_dequantized = DequantizeLinear(n_quantized, n_scale, n_zero_point)
          y_unquantized = Neg(n_dequantized)
          y_quantized = QuantizeLinear(y_unquantized, y_scale, y_zero_point)
          y = DequantizeLinear(y_quantized, y_scale, y_zero_point)
        }
        """
    )


def test_the_graph_computes_what_the_encodings_say() -> None:
    """Every edge through Encoding.quantize and dequantize by hand gives the same bits."""
    text = """
        g (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {0.5, 1, -3.5, -6.9}>
        { h = MatMul(x, w)  y = Neg(h) }
    """
    table = {
        "x": encoding(U16, 0.25, 700),
        "w": encoding(QuantSpec(8, True, True, PerChannel(1)), [0.03, 0.06], [0, 0]),
        "h": encoding(U8, 0.5, 128),
        "y": encoding(U16, 0.25, 512),
    }
    compilation, _ = inserted(text, table)
    x = normal(1, 2, scale=3.0)

    def rounded(name: str, real: Array) -> Array:
        return table[name].dequantize(table[name].quantize(real))

    weights = np.array([[0.5, 1], [-3.5, -6.9]], np.float32)
    expected = rounded("y", -rounded("h", rounded("x", x) @ rounded("w", weights)))
    np.testing.assert_array_equal(run_model(compilation.model, {"x": x})[0], expected)


def test_integers_are_left_alone() -> None:
    compilation, count = inserted(
        "g (int64[2] i) => (int64[2] y) <int64[2] c = {1, 2}> { y = Add(i, c) }", {}
    )
    assert count == 0
    assert [node.op_type for node in compilation.graph] == ["Add"]


def test_tensors_without_an_encoding_are_all_named() -> None:
    with pytest.raises(DiagnosticError) as caught:
        inserted(
            "g (float[2] x) => (float[2] y) { h = Neg(x)  y = Neg(h) }", {"h": encoding(U8, 1, 0)}
        )
    assert [(d.code, d.location.value) for d in caught.value.diagnostics] == [
        ("QN303", "x"),
        ("QN303", "y"),
    ]


def test_an_input_that_is_an_output_is_handed_through() -> None:
    compilation = quantized(
        "g (float[1, 2] x) => (float[1, 2] x, float[1, 2] y) { y = Relu(x) }", x=normal(1, 2)
    )
    assert [v.name for v in compilation.graph.inputs] == ["x"]
    assert [v.name for v in compilation.graph.outputs] == ["x", "y"]
    assert check_graph(compilation.model) == []
    x = normal(1, 2)
    same, _ = run_model(compilation.model, {"x": x})
    np.testing.assert_array_equal(same, x)


def test_a_constant_may_be_an_output_and_an_operand() -> None:
    compilation = quantized(
        """
        g (float[1, 2] x) => (float[1, 2] y, float[2] c) <float[2] c = {1, 0.3}>
        { y = Mul(x, c) }
        """,
        x=normal(1, 2),
    )
    assert [v.name for v in compilation.graph.outputs] == ["y", "c"]
    _, c = run_model(compilation.model, {"x": normal(1, 2)})
    np.testing.assert_array_equal(c, np.array([1, 0.3], np.float32))


def test_an_output_used_inside_keeps_its_name() -> None:
    compilation = quantized(
        "g (float[1, 2] x) => (float[1, 2] h, float[1, 2] y) { h = Relu(x)  y = Neg(h) }",
        x=normal(1, 2),
    )
    assert [v.name for v in compilation.graph.outputs] == ["h", "y"]
    h, y = run_model(compilation.model, {"x": normal(1, 2)})
    # y is 16-bit too: it differs from -h by half a step of each
    np.testing.assert_allclose(y, -h, atol=2 * float(compilation.encodings["y"].scale))


def test_a_weight_is_dequantized_right_before_its_first_use() -> None:
    compilation = quantized(
        """
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {1, 2, 3, 4}>
        { a = Relu(x)  b = MatMul(a, v)  c = MatMul(b, w)  d = Neg(c)  y = MatMul(d, w) }
        """,
        x=normal(1, 2),
    )
    order = [node.outputs[0].name for node in compilation.graph]
    assert order.index("w_dequantized") == order.index("c") - 1
    assert order.count("w_dequantized") == 1


def test_a_weight_in_blocks_has_its_scales_dequantized() -> None:
    text = """
        g (float[1, 4] x) => (float[1, 2] h)
        <float[4, 2] w = {0.5, 1, -3.5, -6.9, 2, 0.1, 7, -0.3}> { h = MatMul(x, w) }
    """
    weight = Encoding(
        QuantSpec(4, True, True, PerBlock(0, 2)),
        np.array([0.125, 0.25], np.float32),
        np.zeros(2, np.int32),
        np.array([[4, 4], [8, 1]], np.uint8),
    )
    table = {"x": encoding(U16, 0.25, 700), "w": weight, "h": encoding(U16, 0.5, 128)}
    compilation, _ = inserted(text, table)
    text = model_to_text(compilation.model)
    assert "<axis: int = 1>(w_block_scale, w_channel_scale, w_channel_zero_point)" in text
    assert "<axis: int = 0, block_size: int = 2>(w_quantized, w_block_scale_dequantized" in text
    zero = constant_array(compilation.graph.initializers["w_zero_point"])
    assert zero is not None
    assert zero.shape == (2, 2)
    (node,) = (n for n in compilation.graph if n.op_type == "MatMul")
    assert node.inputs[1] is not None
    operand = input_operand(node.inputs[1])
    assert operand.granularity == "lpbq"
    read = block_encoding_of(operand)
    assert read is not None
    assert read.same_as(weight)
    x = normal(1, 4, scale=3.0)
    weights = np.array([[0.5, 1], [-3.5, -6.9], [2, 0.1], [7, -0.3]], np.float32)
    rounded = {"x": table["x"].dequantize(table["x"].quantize(x))}
    real = rounded["x"] @ weight.dequantize(weight.quantize(weights))
    expected = table["h"].dequantize(table["h"].quantize(real))
    np.testing.assert_array_equal(run_model(compilation.model, {"x": x})[0], expected)
