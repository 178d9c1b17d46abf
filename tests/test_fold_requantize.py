"""fold-requantize: forms, exact numbers from fractions, what has no integer form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.passes.fold_requantize import FoldRequantize
from tests.conftest import apply, parse
from tests.integer_cells import KINDS, cell, folded, operators, rounded, scale, whole
from tests.integer_nodes import U8, U16, codes


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


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize(
    ("scales", "function"),
    [((2**-9, 13 * 2**-8, 2**-4), "IntAddShort"), ((0.3, 0.4, 0.5), "IntAdd")],
)
def test_sums_on_a_grid_are_made_in_32_bits(
    operator: str, scales: tuple[float, ...], function: str
) -> None:
    model = parse(f"""
        g (uint16[5, 40] a, uint16[40] b) => (uint16[5, 40] y)
        <float sa = {{{scales[0]}}}, uint16 za = {{100}}, float sb = {{{scales[1]}}},
         uint16 zb = {{50000}}, float sy = {{{scales[2]}}}, uint16 zy = {{30000}}>
        {{ ra = DequantizeLinear(a, sa, za) rb = DequantizeLinear(b, sb, zb)
           h = {operator}(ra, rb) y = QuantizeLinear(h, sy, zy) }}
    """)
    a, b = codes(U16, 5, 40), codes(U16, 40, seed=1)
    found = folded(model, a=a, b=b)
    assert operators(model)[0].removesuffix("Fine") == function
    one, other, to = (Fraction(float(np.float32(s))) for s in scales)
    unit = Fraction(1, (one / to).denominator * (other / to).denominator)
    factors = [int(one / to / unit), int(other / to / unit) * (1 if operator == "Add" else -1)]
    sums = whole(a, 100) * factors[0] + whole(b, 50000) * factors[1]
    np.testing.assert_array_equal(found, rounded(sums, unit, 30000, U16))


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
