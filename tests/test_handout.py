"""The float graph and encodings that say what a Q/DQ graph does: golden, exact, without gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encoding_formats import VERSIONS, export_encodings
from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.handout import Handout, make_handout
from qnpu.compiler.op_traits import float_values
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.pipeline import compile_model
from qnpu.compiler.printer import model_to_text
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.lower_io import LowerIo
from tests.conftest import normal, parse, run_model
from tests.decoders import JOINED, PAST, serialized, toy
from tests.qdq_cases import matmul_const
from tests.test_legalize_target import foreign_file, model_of
from tests.test_lower_io import REAL, SAMPLES, compiled

PAIRS = """
    g (float[1, 2] x) => (float[1, 2] y)
    <float a = {0.5}, uint8 za = {3}, float b = {0.25}, int16 zb = {0},
     int8[2, 2] w_quantized = {1, -2, 3, -128}, float[2] s = {0.5, 2}, int8[2] z = {0, 0},
     int32[2] c_quantized = {7, -7}, float[2] sc = {0.25, 1}, int32[2] zc = {0, 0}>
    {
        x_codes = QuantizeLinear(x, a, za)
        x_real = DequantizeLinear(x_codes, a, za)
        w = DequantizeLinear<axis: int = -1>(w_quantized, s, z)
        c = DequantizeLinear<axis: int = 0>(c_quantized, sc, zc)
        h = Gemm(x_real, w, c)
        h_codes = QuantizeLinear(h, a, za)
        h_real = DequantizeLinear(h_codes, a, za)
        k_quantized = QuantizeLinear(h_real, b, zb)
        k_real = DequantizeLinear(k_quantized, b, zb)
        m = Relu(k_real)
        m_codes = QuantizeLinear(m, b, zb)
        y = DequantizeLinear(m_codes, b, zb)
    }
"""


def inserted(handout: Handout) -> ir.Model:
    """The Q/DQ graph that a tool makes of the other form, as insert-qdq would."""
    model = handout.float_model.clone()
    compilation = Compilation(model, encodings=handout.encodings)
    InsertQdq().run(compilation)
    return model


def gaps(handout: Handout) -> set[str]:
    """Tensors with an encoding or in the float graph, but not both."""
    return {name_of(value) for value in float_values(handout.float_model.graph)} ^ set(
        handout.encodings
    )


def test_form() -> None:
    model = parse(PAIRS)
    before = serialized(model)
    handout = make_handout(model)
    assert serialized(model) == before
    assert handout.model is model
    after = """
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {0.5, -4, 1.5, -256}, float[2] c = {1.75, -7}>
        { h = Gemm(x, w, c)  k = Identity(h)  y = Relu(k) }
    """
    assert model_to_text(handout.float_model) == model_to_text(parse(after))
    table = handout.encodings
    assert {name: str(table[name].spec) for name in table} == {
        "x": "u8 asymmetric per-tensor",
        "w": "s8 symmetric per-channel(axis=1)",
        "c": "s32 symmetric per-channel(axis=0)",
        "h": "u8 asymmetric per-tensor",
        "k": "s16 symmetric per-tensor",
        "y": "s16 symmetric per-tensor",
    }
    assert (float(table["h"].scale), int(table["h"].zero_point)) == (0.5, 3)
    assert table["w"].scale.tolist() == [0.5, 2]


def test_the_same_without_pairs_is_the_same_graph() -> None:
    x = normal(1, 2, scale=20)
    handout = make_handout(parse(PAIRS))
    np.testing.assert_array_equal(
        run_model(inserted(handout), {"x": x})[0], run_model(handout.model, {"x": x})[0]
    )


def test_codes_in_and_out_become_real() -> None:
    real, whole = parse(REAL), parse(REAL)
    LowerIo()(whole)
    first, second = make_handout(real), make_handout(whole)
    assert model_to_text(first.float_model) == model_to_text(second.float_model)
    assert first.encodings.to_json() == second.encodings.to_json()
    assert set(first.encodings) == {"x", "y"}


def test_an_input_handed_through_keeps_both_names() -> None:
    model = parse("""
        g (float[2] x) => (float[2] y) <float s = {0.5}, uint8 z = {3}>
        { c = QuantizeLinear(x, s, z)  y = DequantizeLinear(c, s, z) }
    """)
    handout = make_handout(model)
    assert [node.op_type for node in handout.float_model.graph] == ["Identity"]
    assert set(handout.encodings) == {"x", "y"}
    assert handout.encodings["x"].same_as(handout.encodings["y"])


def test_one_weight_of_two_linears_stays_one() -> None:
    model = parse("""
        g (float[1, 2] x) => (float[1, 2] y)
        <int8[2, 2] w_quantized = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}, int8 z2 = {0},
         float t = {0.25}>
        {
            w = DequantizeLinear(w_quantized, s, z)
            v = DequantizeLinear(w_quantized, s, z2)
            u = DequantizeLinear(w_quantized, t, z)
            a = MatMul(x, w)  b = MatMul(a, v)  y = MatMul(b, u)
        }
    """)
    handout = make_handout(model)
    assert len(handout.float_model.graph.initializers) == 2
    x = normal(1, 2)
    expected, found = (run_model(m, {"x": x})[0] for m in (model, handout.float_model))
    np.testing.assert_array_equal(found, expected)


def test_a_constant_that_the_graph_quantizes_is_rounded() -> None:
    model = parse("""
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {1.1, -300, 3, 4.4}, float s = {0.5}, int8 z = {0}>
        {
            c = QuantizeLinear(w, s, z)  r = DequantizeLinear(c, s, z)  y = MatMul(x, r)
        }
    """)
    handout = make_handout(model)
    array = constant_array(handout.float_model.graph.initializers["w"])
    assert array is not None
    assert array.tolist() == [[1.0, -64.0], [3.0, 4.5]]
    source = constant_array(model.graph.initializers["w"])
    assert source is not None
    assert source[0, 1] == -300


BLOCKS = """
    g (float[1, 4] x) => (float[1, 2] y)
    <int8[4, 2] w_quantized = {1, 2, 3, 4, 5, 6, 7, 8}, float[2, 2] s = {1, 2, 3, 4},
     int8[2, 2] z = {0, 0, 0, 0}>
    {
        w = DequantizeLinear<axis: int = 0, block_size: int = 2>(w_quantized, s, z)
        y = MatMul(x, w)
    }
"""
BARE = "g (float[2] x) => (float[2] y) { y = Relu(x) }"


@pytest.mark.parametrize(("text", "missing"), [(BLOCKS, {"x", "w", "s", "y"}), (BARE, {"x", "y"})])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_no_encodings_file_can_say_is_a_fault(
    text: str, missing: set[str], version: str
) -> None:
    handout = make_handout(parse(text))
    with pytest.raises(DiagnosticError) as caught:
        export_encodings(handout.encodings, handout.float_model.graph, version)
    assert set(caught.value.codes) == {"QN303"}
    assert {item.location.value for item in caught.value.diagnostics} == missing


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a8"])
@pytest.mark.parametrize("target", ["onnxruntime", "qnn-htp-v75", "generic-int8"])
def test_a_compile_has_no_gaps_and_both_forms_agree(scheme: str, target: str) -> None:
    """What legalize-target widened, converted and spelt out is in the other form, bit for bit."""
    model = toy(*JOINED, inputs=PAST, outputs=", float[1, 6, 4] vc")
    result = compile_model(model, CompileConfig(scheme=scheme, target=target), SAMPLES)
    handout = make_handout(result.model)
    assert gaps(handout) == set()
    changed = set(handout.encodings) - set(result.encodings)
    assert bool(changed) == (scheme != "w8a16" and target == "qnn-htp-v75")
    feeds = SAMPLES.feeds(handout.float_model.graph.inputs)[0]
    expected, found = (run_model(m, feeds) for m in (handout.model, inserted(handout)))
    for reference, actual in zip(expected, found, strict=True):
        np.testing.assert_array_equal(actual, reference)


def test_without_legalization_the_encodings_are_those_of_the_compile() -> None:
    result = compiled(integer=True)
    table = make_handout(result.model).encodings
    assert set(table) == set(result.encodings)
    for name in table:
        assert np.array_equal(table[name].scale, result.encodings[name].scale)
        assert np.array_equal(table[name].zero_point, result.encodings[name].zero_point)
        assert table[name].spec.dtype is result.encodings[name].spec.dtype


def test_a_file_of_another_quantizer(tmp_path: Path) -> None:
    model = foreign_file(tmp_path)
    LegalizeTarget("qnn-htp-v75")(model)
    handout = make_handout(model)
    assert gaps(handout) == set()
    x = normal(1, 8, 16)
    expected, found = (run_model(m, {"x": x})[0] for m in (model, inserted(handout)))
    np.testing.assert_array_equal(found, expected)


def test_weights_in_blocks() -> None:
    """Each is what its codes stand for, and its encoding makes the same pairs of it again."""
    model = model_of(matmul_const("u16", "s4", "lpbq16", mkn=(4, 32, 8)))
    handout = make_handout(model)
    assert {node.op_type for node in handout.float_model.graph} == {"MatMul"}
    assert not gaps(handout)
    (weight,) = handout.float_model.graph.initializers
    encoding, real = handout.encodings[weight], handout.float_model.graph.initializers[weight]
    assert str(encoding.spec) == "s4 symmetric per-block(axis=0, size=16)"
    array = constant_array(real)
    assert array is not None
    np.testing.assert_array_equal(encoding.dequantize(encoding.quantize(array)), array)
    feeds = {name_of(v): normal(*static_shape(v) or ()) for v in handout.float_model.graph.inputs}
    before, after = run_model(model, feeds), run_model(inserted(handout), feeds)
    np.testing.assert_array_equal(before[0], after[0])
