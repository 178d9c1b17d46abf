"""Diagnostics about a target: each fires where it should and not beside it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import add_initializer
from qnpu.compiler.operands import operations
from qnpu.compiler.target import TargetProfile, load_target
from qnpu.compiler.target_check import check_target
from qnpu.compiler.target_faults import accumulator_bits, target_faults, weight_bytes
from tests.conftest import parse

HTP = "qnn-htp-v75"

LINEAR = """
    g (float[2, 4] x) => (float[2, 3] y)
    <float s = {0.5}, uint16 z = {32768}, float t = {0.25}, int8 zw = {0},
     int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12},
     int32[3] b = {1, 2, 3}, float u = {0.125}, int32 zb = {0}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(w, t, zw)
        bd = DequantizeLinear(b, u, zb)
        p = Gemm(xd, wd, bd)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""
UNARY = """
    g (float[2, 3, 4] x) => (float[2, 3, 4] y)
    <float s = {0.5}, uint16 z = {32768}, float t = {0.00390625}, uint8 zt = {0},
     float f = {0.0000152587890625}, uint16 zf = {0}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        p = Relu(xd)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""


def codes(text: str, target: str = HTP) -> list[str]:
    model = parse(text)
    return [fault.code for fault in target_faults(model, check_target(model, load_target(target)))]


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


Change = tuple[str, str]
S16_WEIGHT: list[Change] = [("int8[4, 3] w", "int16[4, 3] w"), ("int8 zw", "int16 zw")]
U16_WEIGHT: list[Change] = [("int8[4, 3] w", "uint16[4, 3] w"), ("int8 zw", "uint16 zw")]
S16_INPUT: list[Change] = [("uint16 z =", "int16 z ="), ("32768", "0")]
BLOCKED: list[Change] = [
    ("float t = {0.25}", "float[2, 3] t = {1, 1, 1, 1, 1, 1}"),
    ("int8 zw = {0}", "int8[2, 3] zw = {0, 0, 0, 0, 0, 0}"),
    ("Linear(w, t, zw)", "Linear<axis: int = 0, block_size: int = 2>(w, t, zw)"),
    ("bd = DequantizeLinear(b, u, zb)", ""),
    ("wd, bd", "wd"),
]
U8_RESULT: list[Change] = [("(p, s, z)", "(p, t, zt)"), ("(pq, s, z)", "(pq, t, zt)")]
FORCED_RESULT: list[Change] = [("(p, s, z)", "(p, f, zf)"), ("(pq, s, z)", "(pq, f, zf)")]
OTHER_SCALE: Change = ("(p, s, z)", "(p, f, z)")
RANK_5: Change = ("float[2, 3, 4]", "float[1, 1, 2, 3, 4]")
RANK_6: Change = ("float[2, 3, 4]", "float[1, 1, 1, 2, 3, 4]")
BARE: list[Change] = [("pq = Quant", "r = Relu(p) pq = Quant"), ("Linear(p, ", "Linear(r, ")]


def node(text: str) -> Change:
    """Another node in place of the Relu."""
    return "Relu(xd)", text


MOVE = node("Transpose<perm: ints = [0, 1, 2]>(xd)")


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        (LINEAR, [], []),
        (UNARY, [], []),
        (UNARY, [node("Erf(xd)")], ["QN510"]),
        (UNARY, [node("RotaryEmbedding(xd, xd, xd)")], ["QN510"]),
        (LINEAR, S16_WEIGHT, []),
        (LINEAR, [*U16_WEIGHT, *S16_INPUT], ["QN511"]),
        (LINEAR, BLOCKED, ["QN512"]),
        (UNARY, U8_RESULT, ["QN513"]),
        (UNARY, [node("Softmax<axis: int = 1>(xd)")], []),
        (UNARY, [node("LpNormalization<p: int = 1>(xd)")], ["QN514"]),
        (UNARY, [node("LpNormalization<p: int = 2>(xd)")], []),
        (UNARY, [RANK_6], ["QN515"]),
        (UNARY, [RANK_5], []),
        (UNARY, [RANK_5, node("Tanh(xd)")], ["QN515"]),
        (UNARY, [MOVE], []),
        (UNARY, [MOVE, OTHER_SCALE], ["QN516"]),
        (UNARY, [node("Sigmoid(xd)")], ["QN517"]),
        (UNARY, [node("Sigmoid(xd)"), *FORCED_RESULT], []),
        (LINEAR, [("float u = {0.125}", "float u = {0.25}")], ["QN518"]),
        (UNARY, BARE, ["QN520", "QN520"]),
        (UNARY, [node("Det(xd)")], ["QN523"]),
    ],
)
def test_faults_on_hexagon(text: str, changes: list[tuple[str, str]], expected: list[str]) -> None:
    assert codes(changed(text, *changes)) == expected


def test_where_and_what_is_said() -> None:
    model = parse(changed(UNARY, ("Relu(xd)", "Erf(xd)")))
    (fault,) = target_faults(model, check_target(model, load_target(HTP)))
    assert fault.location.value == "p"
    assert HTP in fault.rule.message()
    assert "Erf(u16) -> u16" in fault.rule.message()


def test_an_older_architecture_has_less() -> None:
    wide = changed(LINEAR, *S16_WEIGHT)
    assert codes(wide, "qnn-htp-v73") == []
    assert codes(wide, "qnn-htp-v69") == ["QN511"]


def test_opsets_and_forms() -> None:
    signed = changed(UNARY, ("uint16 z = {32768}", "int8 z = {0}"))
    strict = f'<ir_version: 10, opset_import: ["" : 19]>{signed}'
    assert codes(strict, "generic-int8") == []
    assert codes(strict.replace(": 19", ": 21"), "generic-int8") == ["QN522"]
    integers = """
        <ir_version: 10, opset_import: ["" : 19]>
        g (int8[2, 8] a, int8[8, 4] b) => (int32[2, 4] y) { y = MatMulInteger(a, b) }
    """
    assert codes(integers, "generic-int8") == ["QN524", "QN523"]
    assert codes(integers) == ["QN524", "QN510"]


def test_accumulators() -> None:
    """Σ|w| = 12 + 15 + 18 at most per column; |x - z| up to 32,768; a bias of up to 3."""
    (gemm,) = operations(parse(LINEAR).graph)
    worst = 3 + 6 + 9 + 12
    assert accumulator_bits(gemm) == pytest.approx(np.log2(worst * 32768 + 3 + 1) + 1)
    target = TargetProfile.model_validate(
        {
            "id": "narrow",
            "graph": {"accumulator_bits": 20},
            "rules": [{"ops": ["Gemm"], "verdict": "int"}],
        }
    )
    model = parse(LINEAR)
    assert [d.code for d in target_faults(model, check_target(model, target))] == ["QN519"]
    narrow = changed(LINEAR, ("uint16 z = {32768}", "uint8 z = {128}"))
    assert [d.code for d in target_faults(parse(narrow), check_target(parse(narrow), target))] == []


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (("Gemm(xd", "Gemm<transB: int = 0>(xd"), 3 + 6 + 9 + 12),
        (("int8 zw = {0}", "int8 zw = {1}"), 2 + 5 + 8 + 11),
    ],
)
def test_accumulators_of_other_forms(change: tuple[str, str], rows: int) -> None:
    (gemm,) = operations(parse(changed(LINEAR, change)).graph)
    assert accumulator_bits(gemm) == pytest.approx(np.log2(rows * 32768 + 4) + 1)


def test_a_model_that_is_too_large() -> None:
    """QN521, on a weight that takes no memory."""
    model = parse(UNARY)
    target = load_target(HTP)
    assert target.graph.file_bytes_max is not None
    huge = np.broadcast_to(np.int8(1), (1 << 16, 1 << 15))
    add_initializer(model.graph, "huge", huge[: 1 << 15])
    assert weight_bytes(model.graph) < target.graph.file_bytes_max
    assert target_faults(model, check_target(model, target)) == []
    add_initializer(model.graph, "huge", huge)
    assert [f.code for f in target_faults(model, check_target(model, target))] == ["QN521"]


def test_weights_of_four_bits_count_half() -> None:
    model = parse("g (float[1] x) => (float[1] x) {}")
    codes4 = ir.tensor(np.zeros((10, 10), np.int8), dtype=ir.DataType.INT8)
    before = weight_bytes(model.graph)
    add_initializer(model.graph, "bytes", codes4.numpy())
    assert weight_bytes(model.graph) - before == 100
