"""qnpu-compile of a file that another tool quantized: rewritten for a target, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.model_check import check_model
from qnpu.compiler.quantized_model import legalize_model
from qnpu.compiler.target import load_target
from qnpu.models.load import load_onnx
from qnpu.runtime_check.oracle import random_feeds
from tests.commands import Done, call, snapshot
from tests.conftest import normal, parse, run_model
from tests.test_legalize_target import foreign_file
from tests.test_lower_io import REAL

FILES = {"model.qdq.onnx", "encodings.json", "report.html", "report.json", "HANDOFF.md"}
LSB = 4
"""Of the outputs' u16 codes: two second operands rounded to symmetric codes, one sigmoid to finer
ones. 2 seen."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``qdq.onnx``, of onnxruntime's quantize_static at 16-bit activations."""
    path = tmp_path_factory.mktemp("foreign")
    foreign_file(path)
    return path


def compiled(folder: Path, *options: str, out: str) -> Done:
    return call("qnpu-compile", "qdq.onnx", *options, "--out", out, folder=folder)


def codes(folder: Path, file: str) -> list[str]:
    done = call("qnpu-check", file, "--target", "qnn-htp-v75", "--json", folder=folder)
    result: dict[str, Any] = json.loads(done.stdout)
    return [item["code"] for item in result["diagnostics"]]


def test_faults_before_and_none_after(folder: Path) -> None:
    done = compiled(folder, "--target", "qnn-htp-v75", "--json", out="out")
    assert done.exit_code == 0, done.stderr
    assert "[QN504]" in done.stderr
    assert codes(folder, "qdq.onnx") == ["QN517"] * 3
    assert codes(folder, "out/model.qdq.onnx") == []
    assert set(snapshot(folder / "out")) == FILES
    summary = json.loads(done.stdout)
    assert summary["legalized"] == {"second-operand": 2, "forced-encoding": 1}
    assert summary["verdicts"]["before"] == {"int": 4, "silent": 3}
    assert set(summary["verdicts"]["after"]) == {"int"}


def test_the_report_says_what_was_changed(folder: Path) -> None:
    compiled(folder, "--target", "qnn-htp-v75", "--quiet", out="reported")
    report = json.loads((folder / "reported" / "report.json").read_text("utf-8"))
    rewritten = {(item["node"], item["operator"], item["rewrite"]) for item in report["legalized"]}
    assert rewritten == {
        ("scores", "MatMul", "second-operand"),
        ("mixed", "MatMul", "second-operand"),
        ("gate", "Sigmoid", "forced-encoding"),
    }
    assert [item["code"] for item in report["diagnostics"]] == ["QN504"]
    assert report["input"]["sha256"] == snapshot(folder)["qdq.onnx"]
    assert "scheme" not in report["config"]
    (change,) = report["changes"]
    assert change["name"] == "y"
    assert 0 < change["max_lsb"] <= LSB
    page = (folder / "reported" / "HANDOFF.md").read_text("utf-8")
    assert "Attention mask" not in page


def test_the_outputs_stay(folder: Path) -> None:
    compiled(folder, "--target", "qnn-htp-v75", "--quiet", out="same")
    before, after = (load_onnx(folder / f) for f in ("qdq.onnx", "same/model.qdq.onnx"))
    (producer,) = (value.producer() for value in before.graph.outputs)
    assert producer is not None and producer.inputs[1] is not None
    assert producer.inputs[1].const_value is not None
    scale = float(producer.inputs[1].const_value.numpy())
    for seed in range(4):
        feeds = {"x": normal(1, 8, 16, seed=seed)}
        (old,), (new,) = run_model(before, feeds), run_model(after, feeds)
        assert np.abs(old - new).max() / scale <= LSB + 0.01


def test_further_files_of_a_foreign_graph(folder: Path) -> None:
    options = ["--emit", "encodings-1.0.0,float", "--integer-io", "--target", "qnn-htp-v75"]
    done = compiled(folder, *options, "--quiet", out="more")
    assert done.exit_code == 0, done.stderr
    assert set(snapshot(folder / "more")) == FILES | {"model.float.onnx", "model.1.0.0.encodings"}
    types = {str(v.dtype) for v in load_onnx(folder / "more" / "model.qdq.onnx").graph.inputs}
    assert types == {"UINT16"}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], "QN503"),  # a target without rules, so nothing to do
        (["--target", "qnn-htp-v75", "--scheme", "w8a8"], "QN503"),
        (["--target", "qnn-htp-v75", "--no-rotate"], "QN503"),
        (["--target", "qnn-htp-v75", "--freeze-dim", "nothing=3"], "QN503"),
        (["--target", "qnn-htp-v75", "--calib", "none.npz"], "QN102"),
    ],
)
def test_what_has_no_effect_or_fails_leaves_nothing(
    options: list[str], fault: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "qdq.onnx", tmp_path)
    before = snapshot(tmp_path)
    done = compiled(tmp_path, *options, out="out")
    assert (done.exit_code, done.codes) == (1, [fault])
    assert snapshot(tmp_path) == before


def test_an_option_of_the_file_of_options_has_no_effect_either(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "qdq.onnx", tmp_path)
    (tmp_path / "c.toml").write_text('target = "qnn-htp-v75"\nseed = 3\n')
    assert compiled(tmp_path, "--config", "c.toml", out="out").codes == ["QN503"]


def test_a_file_is_not_compiled_into_its_own_place(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "qdq.onnx", tmp_path / "model.qdq.onnx")
    done = call(
        "qnpu-compile", "model.qdq.onnx", "--target", "qnn-htp-v75", "--out", ".", folder=tmp_path
    )
    assert done.codes == ["QN902"]


def test_feeds_of_the_users(folder: Path) -> None:
    np.savez(folder / "data.npz", x=normal(3, 8, 16))
    options = ["--target", "qnn-htp-v75", "--calib", "data.npz", "--json"]
    done = compiled(folder, *options, out="fed")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["compared"] == "data.npz"


# ------------------------------------------------------------------------------- without a process


def legal(text: str, **options: Any) -> tuple[ir.Model, list[str]]:
    model = parse(text)
    result = legalize_model(model, CompileConfig(**options), random_feeds)
    assert result.model is model
    return model, [diagnostic.code for diagnostic in result.diagnostics]


def test_what_is_skipped_is_said() -> None:
    assert legal(REAL, target="qnn-htp-v75")[1] == ["QN504"]


def test_dynamic_dimensions_are_frozen_or_named() -> None:
    text = REAL.replace("float[1, 4]", "float[N, 4]")
    with pytest.raises(DiagnosticError) as caught:
        legal(text, target="qnn-htp-v75")
    assert caught.value.codes == ["QN101"]
    model, _ = legal(text, target="qnn-htp-v75", freeze_dims={"N": 3})
    assert list(model.graph.inputs[0].shape or ()) == [3, 4]


def test_integers_in_and_out_without_a_target() -> None:
    model, _ = legal(REAL, integer_io=True)
    assert {str(v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)} == {"UINT8", "INT16"}
    x = normal(1, 4, scale=30)
    (expected,), (found,) = (run_model(m, {"x": x}) for m in (parse(REAL), with_real_io(model)))
    np.testing.assert_array_equal(found, expected)


def test_a_graph_that_is_taken_stays() -> None:
    model, _ = legal(REAL.replace("int16 o = {0}", "uint8 o = {0}"), target="qnn-htp-v75")
    target = load_target("qnn-htp-v75")
    assert check_model(model, target).diagnostics == []
    result = legalize_model(model, CompileConfig(target="qnn-htp-v75"), random_feeds)
    assert (result.legalized, result.before) == ([], result.after)
    assert [(c.name, c.max_abs_error, c.max_lsb) for c in result.changes] == [("y", 0.0, 0)]
    assert [name_of(value) for value in model.graph.outputs] == ["y"]


def test_an_output_without_an_encoding_has_no_lsb() -> None:
    text = REAL.replace("(float[1, 4] y)", "(float[1, 4] y, float[1, 4] h)")
    result = legalize_model(parse(text), CompileConfig(target="qnn-htp-v75"), random_feeds)
    assert [(c.name, c.max_lsb is None) for c in result.changes] == [("y", False), ("h", True)]
