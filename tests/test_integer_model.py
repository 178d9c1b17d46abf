"""Whole decoders on integers alone: against the Q/DQ graph, and as the command writes them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import add_initializer, constant_array
from qnpu.compiler.integer_io import integer_io
from qnpu.compiler.integer_model import INTEGER_NAME, certify, lower_model
from qnpu.compiler.pipeline import compile_model
from qnpu.models.load import load_onnx
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.feeds import TokenWindows
from tests.commands import call
from tests.conftest import apply, run_model
from tests.decoders import LENGTH, exported, some_tokens

WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (2, LENGTH)))


@lru_cache(maxsize=32)
def quantized(architecture: str, scheme: str) -> ir.Model:
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, weights="nearest")
    return compile_model(exported(architecture), config, WINDOWS).model


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        *((a, s) for a in ARCHITECTURES for s in ("w8a8", "w8a16")),
        *(("llama", scheme) for scheme in ("w4a8", "w4a4")),
    ],
)
def test_logits_are_those_of_the_quantized_graph(architecture: str, scheme: str) -> None:
    """A tie that falls the other way in an 8-bit tensor moves all that follows a little."""
    model = quantized(architecture, scheme)
    integer = lower_model(model)
    feeds = some_tokens(model, seed=11)
    codes = run_model(integer, feeds)[0].astype(np.int64)
    same = model.clone()
    apply(LowerIo(), same)
    expected = run_model(same, feeds)[0].astype(np.int64)
    spread = expected.std()
    assert np.abs(codes - expected).mean() < (0.15 if scheme == "w4a4" else 0.05) * spread
    assert (codes.argmax(-1) == expected.argmax(-1)).mean() >= 0.85
    assert list(integer_io(integer)) == ["logits"]


def test_the_source_is_left_as_it_was() -> None:
    model = quantized("llama", "w8a8")
    before = [node.op_type for node in model.graph]
    lower_model(model)
    assert [node.op_type for node in model.graph] == before
    assert not model.functions


def test_four_bit_weights_stay_packed() -> None:
    integer = lower_model(quantized("llama", "w4a8"))
    kinds = [value.dtype for value in integer.graph.initializers.values()]
    assert kinds.count(ir.DataType.INT4) == 14  # seven linears in each of two layers


def test_the_command_writes_it_and_measures_it(tiny_file: Path, tmp_path: Path) -> None:
    options = (tiny_file, "--scheme", "w8a8", "--integer", "--seq-len", "16", "--quiet")
    done = call("qnpu-compile", *options, "--calib-windows", "2", "--out", "out", folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "out" / INTEGER_NAME
    onnx.checker.check_model(path)
    assert "perplexity, integer" in done.stdout
    assert "integer, linear" in done.stdout
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["passed"]
    assert {row["kind"] for row in parity["summary"]} >= {"linear", "add", "norm", "attention"}
    kinds = {node.domain for node in load_onnx(path).graph}
    assert kinds == {"", "qnpu"}
    values = {}
    for name in ("model.qdq.onnx", INTEGER_NAME):
        given = (f"out/{name}", "--tokenizer", tiny_file.parent, "--window", "16", "--json")
        evaluated = call("qnpu-eval", *given, folder=tmp_path)
        assert evaluated.exit_code == 0, evaluated.stderr
        values[name] = json.loads(evaluated.stdout)["perplexity"]
    # ties fall as floats are summed, and a model of random weights makes much of each
    assert values[INTEGER_NAME] == pytest.approx(values["model.qdq.onnx"], rel=0.02)


def test_a_file_that_is_quantized_already(tiny_file: Path, tmp_path: Path) -> None:
    options = (tiny_file, "--scheme", "w8a16", "--seq-len", "16", "--calib-windows", "2")
    first = call("qnpu-compile", *options, "--quiet", "--out", "out", folder=tmp_path)
    assert first.exit_code == 0, first.stderr
    again = ("out/model.qdq.onnx", "--integer", "--quiet", "--out", "integer")
    done = call("qnpu-compile", *again, folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "integer" / INTEGER_NAME).exists()
    assert json.loads((tmp_path / "integer" / "parity.json").read_text())["passed"]


def test_an_integer_graph_that_differs_is_told() -> None:
    """One multiplier is doubled."""
    model = quantized("llama", "w8a8")
    integer = lower_model(model)
    node = next(n for n in integer.graph if n.op_type == "IntRequantize")
    factor = constant_array(node.inputs[1])
    assert factor is not None
    node.replace_input_with(1, add_initializer(integer.graph, "spoilt", factor * np.uint64(2)))
    found: list[Diagnostic] = []
    certificate = certify(model, integer, some_tokens(model), found)
    assert not certificate.passed
    assert {diagnostic.code for diagnostic in found} == {"QN402"}
