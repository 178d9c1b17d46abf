"""marks: what is read of a model's metadata is what a pass wrote, or a coded diagnostic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from qnpu.compiler import integer_cpu, integer_io, prefix, rotated_caches, rotated_weights
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.prefix import Prefix, mark_prefix, prefix_of
from qnpu.compiler.rotated_caches import CacheRotation, mark_rotated
from qnpu.models.load import load_onnx
from qnpu.runtime_check.session import open_session
from tests.commands import call
from tests.conftest import parse

GRAPH = "g (float[4] x) => (float[4] y) { y = Erf(x) }"
READERS: dict[str, Callable[[ir.Model], object]] = {
    rotated_weights.MARK: rotated_weights.rotated_weights,
    rotated_caches.MARK: rotated_caches.rotated_caches,
    prefix.MARK: prefix_of,
    integer_io.MARK: integer_io.integer_io,
    integer_cpu.MARK: open_session,
}
FAULTS = [
    *((mark, text) for mark in READERS for text in ("", "none", "[1]", "{", '{"ids": 3}')),
    (rotated_weights.MARK, '{"inputs": "w"}'),
    (rotated_caches.MARK, '{"k": [64, -1]}'),
    (rotated_caches.MARK, '{"k": [0, 1]}'),
    (rotated_caches.MARK, '{"k": [1000000000, 1]}'),
    (
        prefix.MARK,
        '{"ids": [-1], "outliers_before": 1, "outliers_after": 0, "error": 0.0}',
    ),
    (integer_io.MARK, '{"x": ["FLOAT", 0.5, 0]}'),
    (integer_io.MARK, '{"x": ["UINT8", -0.5, 0]}'),
    (integer_io.MARK, '{"x": ["UINT8", NaN, 0]}'),
    (integer_io.MARK, '{"x": ["UINT8", 0.5, 0.5]}'),
]


@pytest.mark.parametrize(("mark", "text"), FAULTS)
def test_what_no_pass_has_written(mark: str, text: str) -> None:
    model = parse(GRAPH)
    READERS[mark](model)  # nothing is fine
    model.metadata_props[mark] = text
    with pytest.raises(DiagnosticError) as caught:
        READERS[mark](model)
    assert caught.value.codes == ["QN119"]
    assert mark in str(caught.value)


def test_what_a_pass_has_written() -> None:
    model = parse(GRAPH)
    noted = Prefix((1, 2), 7, 0, 1e-7)
    mark_prefix(model, noted)
    assert prefix_of(model) == noted
    caches = {"k": CacheRotation(64, 3)}
    mark_rotated(model, caches)
    assert rotated_caches.rotated_caches(model) == caches


def test_a_command_says_which(tiny_file: Path, tmp_path: Path) -> None:
    model = load_onnx(tiny_file)
    model.metadata_props[rotated_weights.MARK] = "{"
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    shutil.copy(tiny_file.parent / "tokenizer.json", tmp_path)
    done = call("qnpu-compile", "model.onnx", "--seq-len", "16", "--quiet", folder=tmp_path)
    assert done.exit_code == 1
    assert "error[QN119]" in done.stderr and rotated_weights.MARK in done.stderr
    assert not (tmp_path / "out").exists()
