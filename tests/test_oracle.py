"""Answers of a vendor's compiler as diagnostics; the compiler itself is in test_htp.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.target import load_target
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.htp import HtpCompiler, HtpError, is_available
from qnpu.runtime_check.oracle import ask_htp, random_feeds, run_on_htp
from tests.conftest import parse
from tests.test_model_check import BARE, QDQ

needs_htp = pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
TARGET = load_target("qnn-htp-v75")


def save(text: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(parse(text), path)
    return path


@needs_htp
def test_an_integer_graph_has_no_faults(tmp_path: Path) -> None:
    with HtpCompiler() as htp:
        answer = ask_htp(htp, save(QDQ, tmp_path), TARGET)
    assert answer.faults == []
    assert answer.to_json()["verdict"] == "int"


@needs_htp
def test_float_operations_and_refusals_are_faults(tmp_path: Path) -> None:
    refused = QDQ.replace("Relu(xd)", "Erf(xd)")
    with HtpCompiler() as htp:
        assert {f.code for f in ask_htp(htp, save(BARE, tmp_path), TARGET).faults} == {"QN531"}
        assert [f.code for f in ask_htp(htp, save(refused, tmp_path), TARGET).faults] == ["QN530"]


@needs_htp
@pytest.mark.parametrize("integer", [False, True])
def test_outputs_within_and_beyond_the_tolerance(integer: bool) -> None:
    """Sigmoid of u16 at an encoding that the compiler overrides is far off."""
    text = QDQ.replace("uint8 z = {128}", "uint16 z = {32768}").replace("Relu(xd)", "Sigmoid(xd)")
    text = text.replace("s = {0.5}", "s = {0.0001}, float t = {0.0001}, uint16 zt = {0}")
    text = text.replace("(p, s, z)", "(p, t, zt)").replace("(pq, s, z)", "(pq, t, zt)")
    model = parse(text)
    assert not integer or LowerIo()(model).modified
    strict = TARGET.model_copy(update={"tolerance_lsb": {"Sigmoid/u16": 0}})
    loose = TARGET.model_copy(update={"tolerance_lsb": {"Sigmoid/u16": 10**6}})
    unknown = TARGET.model_copy(update={"tolerance_lsb": {}})
    feeds = random_feeds(model.graph)
    with HtpCompiler() as htp:
        differences, faults = run_on_htp(htp, model, strict, feeds)
        assert [d.name for d in differences] == ["y"]
        assert differences[0].largest > 0
        assert [fault.code for fault in faults] == ["QN532"]
        assert run_on_htp(htp, model, loose, feeds)[1] == []
        assert run_on_htp(htp, model, unknown, feeds)[1] == []


def test_random_inputs() -> None:
    text = """
        g (float[100] x, int64[50] ids, float[7, 2] table, uint8[100] codes, bool[9] b,
           float[3] bare)
            => (float[50, 2] y, uint8[100] codes2, bool[9] b2, float[3] r, float[100] xd)
        <float s = {0.5}, uint8 z = {128}, float[5, 2] t = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            y = Gather(t, ids)
            codes2 = Identity(codes)
            b2 = Not(b)
            r = Relu(bare)
        }
    """
    feeds = random_feeds(parse(text).graph)
    assert feeds["ids"].min() == 0
    assert feeds["ids"].max() == 4
    assert -64 <= feeds["x"].min() < -32
    assert 32 < feeds["x"].max() <= 63.5
    assert feeds["codes"].max() > 128
    assert feeds["b"].dtype == np.bool_
    assert np.abs(feeds["bare"]).max() <= 1
    again = random_feeds(parse(text).graph)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)


def test_dynamic_inputs_have_no_numbers() -> None:
    with pytest.raises(HtpError):
        random_feeds(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }").graph)
