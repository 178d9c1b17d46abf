"""``--emit``: every kind of file, what it holds, and when it cannot be made."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.emit import EMISSIONS, check_emissions, emission, emission_writers
from qnpu.compiler.encoding_formats import read_encodings
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.handout import Handout, make_handout
from qnpu.compiler.op_traits import float_values
from qnpu.compiler.pipeline import CompileResult, compile_model
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.target import load_target
from qnpu.models.load import load_onnx
from qnpu.runtime_check import htp
from qnpu.runtime_check.feeds import ArraySamples
from qnpu.runtime_check.htp import HtpCompiler, HtpError, is_available
from tests.conftest import Array, normal, parse, run_model

SAMPLES = normal(4, 64, seed=2)
HTP = load_target("qnn-htp-v75")


@lru_cache
def compiled(scheme: str = "w4a16") -> CompileResult:
    """A linear with a bias and weights that clip at -7, and another, which is kept at 8 bits."""
    weights = normal(64, 4)
    weights[0] = -3.6
    model = parse(f"""
        g (float[1, 64] x) => (float[1, 2] z)
        <float[64, 4] w = {{{numbers(weights)}}}, float[4] b = {{{numbers(normal(4, seed=1))}}},
         float[4, 2] v = {{{numbers(normal(4, 2, seed=3))}}}>
        {{ h = Gemm(x, w, b)  y = MatMul(h, v)  z = Softmax(y) }}
    """)
    config = CompileConfig(scheme=scheme, target="qnn-htp-v75")
    return compile_model(model, config, ArraySamples({"x": SAMPLES}))


def numbers(array: Array) -> str:
    return ", ".join(f"{x:.9g}" for x in array.reshape(-1))


@lru_cache
def handout() -> Handout:
    return make_handout(compiled().model)


def written(name: str, folder: Path) -> Path:
    path = folder / emission(name).file
    emission_writers([name], handout(), HTP)[path.name](path)
    return path


def test_names_and_files_are_unique() -> None:
    assert len({item.name for item in EMISSIONS}) == len(EMISSIONS)
    assert len({item.file for item in EMISSIONS}) == len(EMISSIONS)


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_encodings(version: str, tmp_path: Path) -> None:
    document = json.loads(written(f"encodings-{version}", tmp_path).read_text("utf-8"))
    graph = load_onnx(written("float", tmp_path)).graph
    again = read_encodings(document, graph)
    assert set(again) == {name_of(value) for value in float_values(graph)}
    assert all(again[name].same_as(handout().encodings[name]) for name in again)


def test_weights_of_the_float_graph_are_their_codes(tmp_path: Path) -> None:
    """So that whoever rounds them again, to -8 even, gets what the Q/DQ graph holds."""
    result = compiled()
    handed = load_onnx(written("float", tmp_path))
    encoding = result.encodings["w"]
    before, after = (
        constant_array(model.graph.initializers["w"]) for model in (result.float_model, handed)
    )
    assert before is not None
    assert after is not None
    codes = constant_array(result.model.graph.initializers["w_quantized"])
    assert codes is not None
    assert np.array_equal(full_range_codes(after, encoding), codes.astype(int))
    assert not np.array_equal(full_range_codes(before, encoding), codes.astype(int))


def full_range_codes(weights: Array, encoding: Encoding) -> Array:
    return np.clip(np.rint(weights / encoding.scale), -8, 7).astype(int)


def test_the_float_graph_runs_and_is_float(tmp_path: Path) -> None:
    handed = load_onnx(written("float", tmp_path))
    assert {node.op_type for node in handed.graph} == {"Gemm", "MatMul", "Softmax"}
    x = SAMPLES[:1]
    (expected,) = run_model(compiled().model, {"x": x})
    (actual,) = run_model(handed, {"x": x})
    np.testing.assert_allclose(actual, expected, atol=2e-4)  # 16-bit activations between


@pytest.mark.parametrize(
    ("names", "target", "codes"),
    [
        (["encodings-1.0.0", "float"], "onnxruntime", []),
        (["onnx"], "qnn-htp-v75", ["QN503"]),
        ([""], "qnn-htp-v75", ["QN503"]),
        (["epcontext"], "onnxruntime", ["QN503"]),
        (["float", "dlc"], "onnxruntime", ["QN503"]),
    ],
)
def test_what_can_be_made(names: list[str], target: str, codes: list[str]) -> None:
    found: list[str] = []
    try:
        check_emissions(names, load_target(target))
    except DiagnosticError as error:
        found = error.codes
    assert found == codes


def test_the_vendors_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(htp, "is_available", lambda: False)
    check_emissions(["float"], HTP)
    with pytest.raises(DiagnosticError) as caught:
        check_emissions(["epcontext"], HTP)
    assert caught.value.codes == ["QN114"]


def test_a_graph_that_the_vendor_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HtpCompiler, model: ir.Model, arch: str, path: Path) -> None:
        raise HtpError("no such node")

    monkeypatch.setattr(HtpCompiler, "emit_dlc", refuse)
    with pytest.raises(DiagnosticError) as caught:
        written("dlc", tmp_path)
    assert caught.value.codes == ["QN590"]


@pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
def test_files_of_the_vendors_compiler(tmp_path: Path) -> None:
    context = load_onnx(written("epcontext", tmp_path))
    (node,) = context.graph
    assert node.op_type == "EPContext"
    assert (tmp_path / node.attributes["ep_cache_context"].as_string()).stat().st_size > 0
    assert written("dlc", tmp_path).stat().st_size > 0
