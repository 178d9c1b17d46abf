"""quantized_operators: codes that are said to be exact are those of ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler import quantized_operators
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_only import float_faults
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.quantized_operators import is_exact_sigmoid, product_ratio
from qnpu.compiler.quantized_results import CodedInput, CodedResult
from qnpu.passes.lower_nonlinear import LowerNonlinear
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import S8, U8, result

KINDS = {"uint8": U8, "int8": S8}
SCALES = np.random.default_rng(5).uniform(0.001, 0.2, (24, 3)).astype(np.float32)


def ends(spec: QuantSpec, scales: Array) -> tuple[CodedInput, CodedInput, CodedResult]:
    """Two operands and a result, with zero points that differ."""
    made = [
        result(spec, scale=float(scale), zero=spec.q_min + place)
        for scale, place in zip(scales, (100, 143, 120), strict=True)
    ]
    value = ir.Value(name="codes", type=ir.TensorType(spec.dtype))
    first, second = (CodedInput(value, encoding, False) for encoding in made[:2])
    return first, second, CodedResult(ir.node("QuantizeLinear", []), made[2], value)


def all_pairs(spec: QuantSpec) -> tuple[Array, Array]:
    codes = np.arange(spec.q_min, spec.q_max + 1).astype(spec.dtype.numpy())
    one, other = np.meshgrid(codes, codes, indexing="ij")
    return one.copy(), other.copy()


def gated(kind: str, scales: Array, sigmoid: str = "0.00390625") -> ir.Model:
    """silu(x)·w in codes of 8 bits, a rounding behind each operator."""
    low = KINDS[kind].q_min
    s, u, t = map(float, scales)
    return parse(f"""
        g ({kind}[256, 256] x, {kind}[256, 256] w) => ({kind}[256, 256] y)
        <float s = {{{s}}}, {kind} z = {{{low + 100}}}, float u = {{{u}}},
         {kind} zw = {{{low + 143}}}, float p = {{{sigmoid}}}, {kind} o = {{{low}}},
         float r = {{{s / 1.9}}}, {kind} n = {{{low + 9}}}, float t = {{{t}}},
         {kind} zy = {{{low + 120}}}>
        {{
            a = DequantizeLinear(x, s, z)
            h = Sigmoid(a)
            h_codes = QuantizeLinear(h, p, o)
            h_real = DequantizeLinear(h_codes, p, o)
            silu = Mul(a, h_real)
            silu_codes = QuantizeLinear(silu, r, n)
            silu_real = DequantizeLinear(silu_codes, r, n)
            b = DequantizeLinear(w, u, zw)
            product = Mul(silu_real, b)
            y = QuantizeLinear(product, t, zy)
        }}
    """)


def multiplied(
    first: CodedInput,
    second: CodedInput,
    given: CodedResult,
    ratio: np.float32,
    pairs: tuple[Array, Array],
) -> Array:
    """What ONNX Runtime's QLinearMul makes of all pairs of codes."""
    kind = "int8" if given.encoding.spec.signed else "uint8"
    model = parse(f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g ({kind}[256, 256] a, {kind}[256, 256] b) => ({kind}[256, 256] y)
        <float r = {{1.0}}, float one = {{1.0}}, {kind} za = {{{first.zero_point}}},
         {kind} zb = {{{second.zero_point}}}, {kind} zy = {{{given.zero_point}}}>
        {{ y = com.microsoft.QLinearMul(a, r, za, b, one, zb, one, zy) }}
    """)
    model.graph.initializers["r"].const_value = ir.tensor(np.array(ratio), name="r")
    found: Array = run_model(model, dict(zip("ab", pairs, strict=True)))[0]
    return found


def lowered(model: ir.Model, cpu: Cpu, kind: str) -> tuple[list[str], Array]:
    """Operators of the integer graph, and what it gives for all pairs of codes."""
    apply(LowerNonlinear(cpu), model)
    assert list(float_faults(model)) == []
    one, other = all_pairs(KINDS[kind])
    found: Array = run_model(model, {"x": one, "w": other})[0]
    return [node.op_type for node in model.graph], found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", SCALES[:8], ids=str)
def test_the_same_codes_as_from_a_table(kind: str, scales: Array) -> None:
    """SiLU and its product by ONNX Runtime's own operators: every pair, every rounding."""
    operators, found = lowered(gated(kind, scales), Cpu.VNNI, kind)
    known, expected = lowered(gated(kind, scales), Cpu.ANY, kind)
    assert known == ["IntLookupPair"]
    assert {"QLinearMul"} <= set(operators)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 20


def test_most_graphs_are_made_of_them_alone() -> None:
    found = [lowered(gated("uint8", scales), Cpu.VNNI, "uint8")[0] for scales in SCALES[:8]]
    alone = ["QLinearSigmoid", "QLinearMul", "QLinearMul"]
    assert found.count(alone) > 4


def test_a_sigmoid_near_halfway_stays_a_table() -> None:
    """Of 0 it is 0.5, which is 127.5 steps of 1/255."""
    operators, found = lowered(gated("uint8", SCALES[0], f"{1 / 255}"), Cpu.VNNI, "uint8")
    assert operators == ["IntLookup", "QLinearMul"]
    _, expected = lowered(gated("uint8", SCALES[0], f"{1 / 255}"), Cpu.ANY, "uint8")
    np.testing.assert_array_equal(found, expected)


def test_a_product_that_float32_rounds_stays_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ratios' float32 gives other codes; a neighbour of it nearly always gives the same."""
    monkeypatch.setattr(quantized_operators, "_ULPS", (0,))
    none = [scales for scales in SCALES if product_ratio(*ends(U8, scales)) is None]
    assert 0 < len(none) < len(SCALES) / 2
    monkeypatch.undo()
    mended = [scales for scales in none if product_ratio(*ends(U8, scales)) is not None]
    assert mended
    monkeypatch.setattr(quantized_operators, "_ULPS", ())
    operators, found = lowered(gated("uint8", SCALES[0]), Cpu.VNNI, "uint8")
    assert operators == ["IntLookupPair"]
    _, expected = lowered(gated("uint8", SCALES[0]), Cpu.ANY, "uint8")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("spec", KINDS.values(), ids=str)
def test_products_are_exact_where_a_ratio_is_found(spec: QuantSpec) -> None:
    one, other = all_pairs(spec)
    checked = 0
    for scales in SCALES:
        first, second, given = ends(spec, scales)
        ratio = product_ratio(first, second, given)
        if ratio is None:
            continue
        numbers = (one.astype(np.int64) - first.zero_point) * (
            other.astype(np.int64) - second.zero_point
        )
        exact = numbers * (first.scale * second.scale / given.scale) + given.zero_point
        found = multiplied(first, second, given, ratio, (one, other))
        clipped = np.clip(exact, spec.q_min, spec.q_max)
        assert np.abs(found - clipped).max() <= 0.5
        checked += 1
    assert checked > len(SCALES) * 0.7


def test_sigmoids_are_exact_where_none_is_near_halfway() -> None:
    def exact(scale: float, step: float) -> bool:
        first, _, given = ends(U8, np.array([scale, 1, step], np.float32))
        return is_exact_sigmoid(first, given)

    assert not exact(0.05, 0.5 / 0.5)  # 0.5 is half a step
    assert sum(exact(float(scale), 1 / 256) for scale in SCALES.reshape(-1)) > 0.8 * SCALES.size


@pytest.mark.parametrize("cpu", Cpu)
def test_wide_codes_are_left_to_functions(cpu: Cpu) -> None:
    model = parse("""
        g (uint8[4] x, uint16[4] w) => (uint8[4] y)
        <float s = {0.1}, uint8 z = {0}, float t = {0.1}, uint16 o = {0}>
        { a = DequantizeLinear(x, s, z) b = DequantizeLinear(w, t, o)
          product = Mul(a, b) y = QuantizeLinear(product, s, z) }
    """)
    assert apply(LowerNonlinear(cpu), model) == 0


def test_a_scale_that_something_else_takes_is_a_float() -> None:
    """A constant of QLinearMul's is none, unless anything else computes with it."""
    model = gated("uint8", SCALES[0])
    apply(LowerNonlinear(Cpu.VNNI), model)
    scale = next(node.inputs[1] for node in model.graph if node.op_type == "QLinearMul")
    assert scale is not None
    assert list(float_faults(model)) == []
    model.graph.append(ir.node("Cast", [scale], {"to": int(ir.DataType.UINT8)}))
    assert [name for _, _, name in float_faults(model)] == [scale.name]
