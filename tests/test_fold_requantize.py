"""fold-requantize: forms, exact numbers from fractions, what has no integer form."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.integer_math import round_half_up
from qnpu.compiler.quant_types import QuantSpec
from qnpu.passes.fold_requantize import FoldRequantize
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import S8, U8, U16, codes

KINDS = {"uint8": U8, "int8": S8, "uint16": U16}
SCALES = {"a": 0.013, "b": 0.0071, "y": 0.05}
Numbers = np.ndarray[Any, Any]


def cell(
    body: str, kinds: dict[str, str], shapes: dict[str, str], zeros: dict[str, int]
) -> ir.Model:
    """Codes ``a`` and ``b`` behind DequantizeLinear → body, which makes ``h`` → codes ``y``."""
    inputs = ", ".join(f"{kinds[n]}[{shapes[n]}] {n}" for n in "ab" if n in kinds)
    constants = ", ".join(
        f"float s{n} = {{{SCALES[n]}}}, {kinds[n]} z{n} = {{{zeros[n]}}}" for n in kinds
    )
    reals = "\n".join(f"r{n} = DequantizeLinear({n}, s{n}, z{n})" for n in "ab" if n in kinds)
    return parse(f"""
        g ({inputs}) => ({kinds["y"]}[{shapes["y"]}] y)
        <{constants}>
        {{ {reals} h = {body} y = QuantizeLinear(h, sy, zy) }}
    """)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def folded(model: ir.Model, **feeds: Array) -> Array:
    """What the integer graph gives; nothing is left to fold."""
    assert apply(FoldRequantize(), model) > 0
    assert apply(FoldRequantize(), model) == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(model))
    found: Array = run_model(model, feeds)[0]
    return found


def whole(given: Array, zero: int) -> Numbers:
    """Codes less their zero point, as Python's integers."""
    return given.astype(object) - zero


def rounded(sums: Numbers, ratio: Fraction, zero: int, spec: QuantSpec) -> Numbers:
    """⌊sum · ratio + 1/2⌋ + zero, clipped."""
    flat = [round_half_up(Fraction(int(n)) * ratio) + zero for n in np.asarray(sums).reshape(-1)]
    return np.asarray(np.clip(flat, spec.q_min, spec.q_max)).reshape(np.shape(sums))


def scale(name: str) -> Fraction:
    return Fraction(float(np.float32(SCALES[name])))


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("kinds", [("uint16", "uint16"), ("uint8", "uint16"), ("int8", "uint8")])
def test_sums(operator: str, kinds: tuple[str, str]) -> None:
    named = {"a": kinds[0], "b": kinds[1], "y": "uint16"}
    zeros = {"a": 100, "b": 77, "y": 30000}
    model = cell(f"{operator}(ra, rb)", named, {"a": "5, 40", "b": "40", "y": "5, 40"}, zeros)
    a, b = codes(KINDS[kinds[0]], 5, 40), codes(KINDS[kinds[1]], 40, seed=1)
    found = folded(model, a=a, b=b)
    assert operators(model)[0].startswith("IntAdd")
    sign = 1 if operator == "Add" else -1
    denominator = (scale("a") / scale("y")).denominator * (scale("b") / scale("y")).denominator
    one, other = (int(scale(n) / scale("y") * denominator) for n in "ab")
    sums = whole(a, 100) * one + sign * whole(b, 77) * other
    np.testing.assert_array_equal(found, rounded(sums, Fraction(1, denominator), 30000, U16))


@pytest.mark.parametrize("kinds", [("uint16", "uint16"), ("uint8", "uint16"), ("int8", "uint8")])
def test_products(kinds: tuple[str, str]) -> None:
    named, zeros = {"a": kinds[0], "b": kinds[1], "y": "uint16"}, {"a": 100, "b": 77, "y": 30000}
    model = cell("Mul(ra, rb)", named, {"a": "5, 40", "b": "40", "y": "5, 40"}, zeros)
    a, b = codes(KINDS[kinds[0]], 5, 40), codes(KINDS[kinds[1]], 40, seed=1)
    found = folded(model, a=a, b=b).astype(int)
    assert operators(model) == ["IntMul"]
    ratio = scale("a") * scale("b") / scale("y")
    expected = rounded(whole(a, 100) * whole(b, 77), ratio, 30000, U16)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.98


@pytest.mark.parametrize(("operator", "power"), [("Mul", 1), ("Div", -1)])
def test_by_one_number(operator: str, power: int) -> None:
    model = parse(f"""
        g (uint16[5, 40] a) => (uint16[5, 40] y)
        <float sa = {{0.013}}, uint16 za = {{3000}}, float sy = {{0.05}}, uint16 zy = {{20000}},
         uint8 c = {{200}}, float sc = {{0.03}}, uint8 zc = {{10}}>
        {{ ra = DequantizeLinear(a, sa, za) rc = DequantizeLinear(c, sc, zc)
           h = {operator}(ra, rc) y = QuantizeLinear(h, sy, zy) }}
    """)
    a = codes(U16, 5, 40)
    found = folded(model, a=a)
    assert operators(model) == ["IntLookup"]
    factor = (Fraction(float(np.float32(0.03))) * 190) ** power
    expected = rounded(whole(a, 3000), scale("a") / scale("y") * factor, 20000, U16)
    np.testing.assert_array_equal(found, expected)


def test_negated() -> None:
    named, zeros = {"a": "uint16", "y": "uint16"}, {"a": 3000, "y": 20000}
    model = cell("Neg(ra)", named, {"a": "5, 40", "y": "5, 40"}, zeros)
    a = codes(U16, 5, 40)
    found = folded(model, a=a)
    np.testing.assert_array_equal(
        found, rounded(-whole(a, 3000), scale("a") / scale("y"), 20000, U16)
    )


def test_a_pair_that_changes_an_encoding() -> None:
    model = parse("""
        g (uint16[5, 40] a) => (uint8[5, 40] y)
        <float sa = {0.013}, uint16 za = {3000}, float sy = {0.05}, uint8 zy = {200}>
        { ra = DequantizeLinear(a, sa, za) y = QuantizeLinear(ra, sy, zy) }
    """)
    a = codes(U16, 5, 40)
    found = folded(model, a=a)
    np.testing.assert_array_equal(found, rounded(whole(a, 3000), scale("a") / scale("y"), 200, U8))


@pytest.mark.parametrize("result", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("a", "b"), [("uint8", "uint8"), ("uint16", "uint8"), ("uint8", "uint16"), ("int8", "uint8")]
)
def test_products_of_two_activations(a: str, b: str, result: str) -> None:
    named, zeros = {"a": a, "b": b, "y": result}, {"a": 100, "b": 77, "y": 90}
    shapes = {"a": "2, 5, 30", "b": "2, 30, 7", "y": "2, 5, 7"}
    model = cell("MatMul(ra, rb)", named, shapes, zeros)
    first, second = codes(KINDS[a], 2, 5, 30), codes(KINDS[b], 2, 30, 7, seed=1)
    found = folded(model, a=first, b=second)
    assert operators(model).count("MatMulInteger") == 1 + ("uint16" in (a, b))
    sums = whole(first, 100) @ whole(second, 77)
    ratio = scale("a") * scale("b") / scale("y")
    np.testing.assert_array_equal(found, rounded(sums, ratio, 90, KINDS[result]))


def with_constant(model: ir.Model, name: str, array: Array, dtype: ir.DataType) -> None:
    """Makes an input a constant: the text format holds neither 4-bit codes nor large ones."""
    value = next(v for v in model.graph.inputs if v.name == name)
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    model.graph.register_initializer(value)


def linear(kind: str, weight: str, *, gemm: bool = False) -> tuple[ir.Model, Numbers, Numbers]:
    """A linear with a constant weight, its codes and its scales; with a bias as Gemm."""
    low, high = (-7, 8) if weight == "int4" else (-127, 128)
    numbers = np.random.default_rng(3).integers(low, high, (30, 6))
    stored = numbers.T if gemm else numbers
    shape = ", ".join(map(str, stored.shape))
    scales = np.linspace(0.001, 0.02, 6).astype(np.float32)
    steps = np.float32(0.013) * scales
    zeros = ",".join(["0"] * 6)
    body = "h = MatMul(ra, rw)"
    if gemm:
        body = "rc = DequantizeLinear<axis = 0>(c, sc, zc) h = Gemm<transB = 1>(ra, rw, rc)"
    model = parse(f"""
        g ({kind}[5, 30] a, {weight}[{shape}] w, {weight}[6] zw) => (uint16[5, 6] y)
        <float[6] sw = {{{",".join(repr(float(s)) for s in scales)}}},
         int32[6] c = {{5, -4000, 300, 0, 77, -1}}, int32[6] zc = {{{zeros}}},
         float[6] sc = {{{",".join(repr(float(s)) for s in steps)}}},
         float sa = {{0.013}}, {kind} za = {{100}}, float sy = {{0.05}}, uint16 zy = {{30000}}>
        {{ ra = DequantizeLinear(a, sa, za)
           rw = DequantizeLinear<axis = {0 if gemm else 1}>(w, sw, zw) {body}
           y = QuantizeLinear(h, sy, zy) }}
    """)
    dtype = ir.DataType[weight.upper()]
    with_constant(model, "w", stored, dtype)
    with_constant(model, "zw", np.zeros(6), dtype)
    return model, numbers, scales


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("gemm", [False, True])
def test_linears(kind: str, weight: str, gemm: bool) -> None:
    model, numbers, scales = linear(kind, weight, gemm=gemm)
    a = codes(KINDS[kind], 5, 30)
    found = folded(model, a=a)
    sums = whole(a, 100) @ numbers.astype(object)
    if gemm:
        sums = sums + np.array([5, -4000, 300, 0, 77, -1], object)
    for channel, step in enumerate(scales):
        ratio = scale("a") * Fraction(float(step)) / scale("y")
        expected = rounded(sums[:, channel], ratio, 30000, U16)
        np.testing.assert_array_equal(found[:, channel], expected)


def test_four_bit_weights_stay_packed() -> None:
    model, _, _ = linear("uint8", "int4")
    apply(FoldRequantize(), model)
    assert model.graph.initializers["w"].dtype is ir.DataType.INT4
    assert operators(model)[:2] == ["Cast", "MatMulInteger"]


def test_features_are_cut_where_sums_could_leave_int32() -> None:
    """70,000 weights of 127 times 255 are 2.3e9."""
    features = 70_000
    model = parse(f"""
        g (uint8[1, {features}] a, int8[{features}, 1] w) => (uint16[1, 1] y)
        <float[1] sw = {{1.0}}, int8[1] zw = {{0}}, float sa = {{1.0}},
         uint8 za = {{0}}, float sy = {{40000.0}}, uint16 zy = {{0}}>
        {{ ra = DequantizeLinear(a, sa, za) rw = DequantizeLinear<axis = 1>(w, sw, zw)
           h = MatMul(ra, rw) y = QuantizeLinear(h, sy, zy) }}
    """)
    with_constant(model, "w", np.full((features, 1), 127), ir.DataType.INT8)
    found = folded(model, a=np.full((1, features), 255, np.uint8))
    assert operators(model).count("MatMulInteger") == 2
    assert int(found[0, 0]) == round_half_up(Fraction(features * 127 * 255, 40000))


def test_layout_operators_move_codes() -> None:
    model = parse("""
        g (uint16[2, 6] a) => (uint16[3, 4] y)
        <float s = {0.5}, uint16 z = {9}, int64[2] n = {3, 4}>
        { ra = DequantizeLinear(a, s, z) h = Reshape(ra, n) y = QuantizeLinear(h, s, z) }
    """)
    a = codes(U16, 2, 6)
    np.testing.assert_array_equal(folded(model, a=a), a.reshape(3, 4))
    assert operators(model) == ["Reshape"]


def test_a_choice_is_made_of_codes() -> None:
    model = parse("""
        g (bool[2, 6] k, uint16[2, 6] a) => (uint16[2, 6] y)
        <float sa = {0.013}, uint16 za = {3000}, float sy = {0.05}, uint16 zy = {200},
         uint8 c = {7}, float sc = {0.3}, uint8 zc = {0}>
        { ra = DequantizeLinear(a, sa, za) rc = DequantizeLinear(c, sc, zc)
          h = Where(k, ra, rc) y = QuantizeLinear(h, sy, zy) }
    """)
    a, k = codes(U16, 2, 6), np.arange(12).reshape(2, 6) % 3 == 0
    found = folded(model, a=a, k=k)
    chosen = rounded(whole(a, 3000), scale("a") / scale("y"), 200, U16)
    np.testing.assert_array_equal(found, np.where(k, chosen, 242))


@pytest.mark.parametrize(
    "body",
    [
        "h = Foo(ra) y = QuantizeLinear(h, s, z)",
        "h = Add(ra, ra) y = Identity(h)",  # read as a float
        "h = MatMul(ra, ra) y = QuantizeLinear(h, s, z)",  # two operands of 16 bits
        "h = Reshape(ra, n) y = QuantizeLinear(h, t, z)",  # a layout operator that rescales
    ],
)
def test_what_has_no_integer_form_is_told(body: str) -> None:
    kind = "float" if "Identity" in body else "uint16"
    model = parse(f"""
        g (uint16[4, 4] a) => ({kind}[4, 4] y)
        <float s = {{0.1}}, float t = {{0.2}}, uint16 z = {{0}}, int64[2] n = {{4, 4}}>
        {{ ra = DequantizeLinear(a, s, z) {body} }}
    """)
    with pytest.raises(DiagnosticError) as error:
        apply(FoldRequantize(), model)
    assert {diagnostic.code for diagnostic in error.value.diagnostics} == {"QN401"}


def test_large_results_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model, _, _ = linear("uint16", "int8", gemm=True)
    model, _, _ = linear("uint16", "int8", gemm=True)
    a = codes(U16, 5, 30)
    expected = folded(whole_model, a=a)
    monkeypatch.setattr("qnpu.passes.fold_requantize._BLOCK", 12)  # 30 results: three parts
    found = folded(model, a=a)
    assert operators(model)[-1] == "Concat"
    assert operators(model).count("MatMulInteger") == 6
    np.testing.assert_array_equal(found, expected)
