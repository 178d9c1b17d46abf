"""Checks of a graph: each fault with its place, and silence on a sound one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_checks import (
    check_graph,
    control_flow,
    dynamic_dimensions,
    is_quantized,
    missing_encodings,
    non_finite_weights,
    unknown_operators,
    unsupported_float_types,
)
from tests.conftest import parse


def test_dynamic_dimensions_by_name_or_place() -> None:
    model = parse("g (float[N, 4] x, float[2, M] z) => (float[2, 4] y) { y = MatMul(z, x) }")
    model.graph.inputs[1].shape = ir.Shape([2, None])
    found = dynamic_dimensions(model.graph)
    assert [(d.code, d.location.value) for d in found] == [("QN101", "x"), ("QN101", "z")]
    assert [getattr(d.rule, "dimension") for d in found] == ["N", "z:1"]  # noqa: B009


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1] x) => (float[1] y) { [n] y = Mystery(x) }",
        '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'
        "g (float[1] x) => (float[1] y) { [n] y = acme.Relu(x) }",
        # of a later opset than the graph's
        '<ir_version: 10, opset_import: ["" : 22]>'
        "g (float[1] x, float[1] s) => (float[1] y) { [n] y = RMSNormalization(x, s) }",
        # inside a branch
        """
        g (bool c, float[1] x) => (float[1] y) {
            y = If (c) <then_branch = t () => (float[1] a) { [n] a = Mystery(x) },
                        else_branch = e () => (float[1] b) { b = Neg(x) }>
        }
        """,
    ],
)
def test_unknown_operators(text: str) -> None:
    found = unknown_operators(parse(text))
    assert [(d.code, d.location.node) for d in found] == [("QN106", "n")]


@pytest.mark.parametrize(
    "text",
    [
        """
        <ir_version: 11, opset_import: ["" : 23, "mine" : 1]>
        g (float[2] x) => (float[2] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 23]>
        twice (a) => (b) { b = Add(a, a) }
        """,
        '<ir_version: 11, opset_import: ["ai.onnx" : 23]> g (float[1] x) => (float[1] y)'
        "{ y = ai.onnx.Relu(x) }",
        '<ir_version: 11, opset_import: ["" : 23, "ai.onnx.ml" : 3]>'
        "g (float[1] x) => (float[1] y) { y = ai.onnx.ml.Binarizer(x) }",
        '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
        "g (uint8[1] x, float s, uint8 z) => (uint8[1] y)"
        "{ y = com.microsoft.QLinearSigmoid(x, s, z, s, z) }",
    ],
)
def test_known_operators(text: str) -> None:
    assert unknown_operators(parse(text)) == []


def test_float_types() -> None:
    model = parse(
        """
        g (float16[1] h, float[1] f, double[1] d, int64[1] i) => (float16[1] y)
        <float16[1] w = {1}, float[1] v = {1}>
        { y = Add(h, w) }
        """
    )
    found = unsupported_float_types(model.graph)
    assert [d.location.value for d in found] == ["h", "d", "w", "y"]
    assert {d.code for d in found} == {"QN108"}


def test_control_flow() -> None:
    model = parse(
        """
        g (bool c, float[1] x) => (float[1] z) {
            [branch] y = If (c) <then_branch = t () => (float[1] a) { a = Relu(x) },
                                 else_branch = e () => (float[1] b) { b = Neg(x) }>
            z = Neg(y)
        }
        """
    )
    found = control_flow(model.graph)
    assert [(d.code, d.location.node) for d in found] == [("QN109", "branch")]


def test_weights_that_are_not_finite() -> None:
    model = parse(
        """
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {inf, 1, nan, -inf}, float[2] v = {1, 2}, int64[1] i = {1}>
        { h = MatMul(x, w)  y = Add(h, v) }
        """
    )
    found = non_finite_weights(model.graph)
    assert [(d.code, d.location.value) for d in found] == [("QN107", "w")]
    assert "3" in found[0].rule.message()


QDQ = """
    g (float[1] x) => (float[1] y)
    <float s = {0.5}, uint8 z = {3}, uint8[1] wq = {7}>
    {
        xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(wq, s, z)
        h = Mul(xd, wd)
        hq = QuantizeLinear(h, s, z)  y = DequantizeLinear(hq, s, z)
    }
"""


def test_a_complete_qdq_graph() -> None:
    model = parse(QDQ)
    assert is_quantized(model.graph)
    assert check_graph(model) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Mul(xd, wd)", "Mul(x, wd)", ["x"]),
        ("y = DequantizeLinear(hq, s, z)", "hd = DequantizeLinear(hq, s, z)  y = Neg(hd)", ["y"]),
        ("h = Mul(xd, wd)", "n = Neg(xd)  h = Mul(n, wd)", ["n"]),
        ("uint8[1] wq = {7}", "uint8[1] wq = {7}, float[1] c = {1}", []),  # a constant out of use
    ],
)
def test_missing_encodings(old: str, new: str, found: list[str]) -> None:
    faults = missing_encodings(parse(QDQ.replace(old, new)).graph)
    assert [d.location.value for d in faults] == found
    assert {d.code for d in faults} <= {"QN303"}


def test_a_float_graph_needs_no_encodings() -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    assert not is_quantized(model.graph)
    assert check_graph(model) == []


def test_everything_is_reported_at_once() -> None:
    model = parse(
        """
        g (float[N] x, float16[1] h) => (float[N] y) <float[1] w = {inf}>
        { a = Mystery(x)  y = Add(a, w) }
        """
    )
    assert [d.code for d in check_graph(model)] == ["QN101", "QN106", "QN108", "QN107"]


def test_large_weights_are_read_once() -> None:
    """A weight is not converted: float64 copies of a large model would not fit."""
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    big = ir.tensor(np.zeros((1000, 1000), np.float32), name="w")
    value = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), const_value=big)
    model.graph.register_initializer(value)
    assert non_finite_weights(model.graph) == []
