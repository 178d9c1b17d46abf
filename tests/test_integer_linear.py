"""integer_linear: products of codes on ONNX Runtime against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.integer_math import round_half_up
from qnpu.passes.fold_requantize import FoldRequantize
from tests.conftest import apply, parse
from tests.integer_cells import (
    KINDS,
    cell,
    folded,
    linear,
    operators,
    rounded,
    scale,
    whole,
    with_constant,
)
from tests.integer_nodes import U16, codes


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


def test_large_results_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model, _, _ = linear("uint16", "int8", gemm=True)
    model, _, _ = linear("uint16", "int8", gemm=True)
    a = codes(U16, 5, 30)
    expected = folded(whole_model, a=a)
    monkeypatch.setattr("qnpu.compiler.integer_linear._BLOCK", 12)  # 30 results: three parts
    found = folded(model, a=a)
    assert operators(model)[-1] == "Concat"
    assert operators(model).count("MatMulInteger") == 6
    np.testing.assert_array_equal(found, expected)
