"""What a check says of a whole model."""

from __future__ import annotations

import pytest

from qnpu.compiler.model_check import check_model
from qnpu.compiler.target import Verdict, load_target
from tests.conftest import parse

FLOAT = "g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }"
QDQ = """
    g (float[2, 4] x) => (float[2, 4] y)
    <float s = {0.5}, uint8 z = {128}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        p = Relu(xd)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""
BARE = QDQ.replace("pq = Quant", "r = Relu(p) pq = Quant").replace("Linear(p, ", "Linear(r, ")
INTEGERS = "g (uint8[2, 8] a, int8[8, 4] b) => (int32[2, 4] y) { y = MatMulInteger(a, b) }"
QLINEAR = """
    g (uint8[2, 8] a, int8[8, 4] b) => (uint8[2, 4] y)
    <float s = {0.5}, uint8 z = {128}, int8 w = {0}>
    { y = QLinearMatMul(a, s, z, b, s, w, s, z) }
"""


@pytest.mark.parametrize(
    ("text", "form", "verdict"),
    [
        (QDQ, "qdq", Verdict.INT),
        (BARE, "qdq", Verdict.FLOAT),
        (INTEGERS, "integer", Verdict.REJECT),
        (QLINEAR, "qlinear", Verdict.INT),
    ],
)
def test_forms(text: str, form: str, verdict: Verdict) -> None:
    check = check_model(parse(text), load_target("qnn-htp-v75"))
    assert check.form == form
    assert check.report is not None
    assert check.report.verdict is verdict


def test_a_float_graph() -> None:
    check = check_model(parse(FLOAT), load_target("qnn-htp-v75"))
    assert check.form == "float"
    assert check.report is None
    assert [d.code for d in check.diagnostics] == ["QN525"]


def test_a_target_without_rules_judges_no_node() -> None:
    for text in (FLOAT, QDQ):
        check = check_model(parse(text), load_target("onnxruntime"))
        assert check.report is None
        assert check.diagnostics == []


def test_islands_take_the_place_of_missing_encodings() -> None:
    general = check_model(parse(BARE), load_target("onnxruntime"))
    assert [d.code for d in general.diagnostics] == ["QN303"]
    on_target = check_model(parse(BARE), load_target("qnn-htp-v75"))
    assert [d.code for d in on_target.diagnostics] == ["QN520", "QN520"]


def test_faults_of_the_graph_come_first() -> None:
    dynamic = QDQ.replace("float[2, 4] x", "float[N, 4] x")
    check = check_model(parse(dynamic), load_target("qnn-htp-v75"))
    assert check.diagnostics[0].code == "QN101"
