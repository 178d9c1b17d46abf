"""bit_choices: a plan is read as it was written, and every fault of an edited one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnpu.compiler.bit_choices import BitChoices, LinearBits, read_plan
from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError

CHOICES = BitChoices({"w": LinearBits(4, 16), "v": LinearBits(8, 8)}, {"scores": 8, "mix": 16})


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "bit_plan.json"
    plan = BitPlan("w4a8", choices=CHOICES).to_json() | changes
    path.write_text(json.dumps(plan), "utf-8")
    return path


def test_read_as_written(tmp_path: Path) -> None:
    assert read_plan(written(tmp_path)) == ("w4a8", CHOICES)
    assert read_plan(written(tmp_path, tensors=None, more=1)) == ("w4a8", CHOICES)


def test_blocks_as_a_plan_writes_them(tmp_path: Path) -> None:
    choices = BitChoices({"w": LinearBits(4, 16, 32), "v": LinearBits(4, 8, 128)})
    linears = choices.to_json()["linears"]
    assert linears == {"w": {"weight": "4b32", "input": 16}, "v": {"weight": "4b128", "input": 8}}
    assert read_plan(written(tmp_path, linears=linears, caches={}))[1] == choices


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "json"}, "`format` is 'json'"),
        ({"version": 1}, "`version`"),
        ({"scheme": 8}, "`scheme`"),
        (
            {"linears": {"w": {"weight": 5, "input": 8}}},
            "`linears.w.weight` is 5, not one of 4,",
        ),
        ({"linears": {"w": {"weight": 4, "input": 2}}}, "`linears.w.input` is 2"),
        ({"linears": {"w": {"weight": 4}}}, "`linears.w.input`: Field required"),
        ({"linears": {"w": {"weight": "4", "input": 8}}}, "`linears.w.weight` is '4'"),
        ({"linears": {"w": {"weight": "4b20", "input": 8}}}, "`linears.w.weight` is '4b20'"),
        ({"linears": {"w": {"weight": "8b32", "input": 8}}}, "`linears.w.weight` is '8b32'"),
        ({"linears": {"w": {"weight": 4.0, "input": 8}}}, "`linears.w.weight"),
        ({"linears": {"w": {"weight": 4, "input": 8, "output": 8}}}, "`linears.w.output`"),
        ({"linears": []}, "`linears`"),
        ({"caches": {"scores": 4}}, "`caches.scores` is 4, not one of 8, 16"),
    ],
)
def test_faults(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_plan(written(tmp_path, **changes))
    assert caught.value.codes == ["QN540"]
    assert told in str(caught.value)
    assert "bit_plan.json" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"1", b"[" * 100_000, b'{"format": NaN}']
)
def test_files_that_are_no_plan(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bit_plan.json"
    path.write_bytes(content)
    with pytest.raises(DiagnosticError) as caught:
        read_plan(path)
    assert caught.value.codes == ["QN540"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_plan(tmp_path / "bit_plan.json")
    assert caught.value.codes == ["QN102"]


def test_a_plan_is_of_the_scheme_that_is_asked_for(tmp_path: Path) -> None:
    plan = str(written(tmp_path))
    assert CompileConfig(scheme="w4a8", plan=plan).bit_choices == CHOICES
    assert CompileConfig(scheme="w4a8").bit_choices is None
    with pytest.raises(DiagnosticError) as caught:
        _ = CompileConfig(scheme="w8a8", plan=plan).bit_choices
    assert caught.value.codes == ["QN503"]
    with pytest.raises(DiagnosticError) as caught:
        CompileConfig(scheme="w4a8", plan=plan, down_bits=8)
    assert caught.value.codes == ["QN503"]
