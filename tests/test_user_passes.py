"""user_passes: a stranger's pass among ours, from a file, an installed package, and Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qnpu.compiler
from qnpu.compiler import CompileConfig, Stage, compile_model
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.pipeline import CompileResult, default_passes
from qnpu.compiler.user_passes import load_pass, load_passes
from qnpu.models.export import export_dynamo
from qnpu.models.load import load_tokenizer, load_torch, resolve
from qnpu.runtime_check.feeds import ArraySamples
from tests.commands import BIN, call
from tests.conftest import parse
from tests.markdown import blocks

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

from qnpu.compiler import Compilation, Pass, Stage


@dataclass(frozen=True)
class Wider(Pass):
    """Gives every weight more room."""

    name: ClassVar[str] = "wider"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    factor: float = 1.0

    def run(self, compilation: Compilation) -> int:
        table, count = compilation.encodings, 0
        for name in list(table):
            encoding = table[name]
            if encoding.scale.size > 1 and self.factor != 1:
                table[name] = type(encoding)(
                    encoding.spec, encoding.scale * self.factor, encoding.zero_point
                )
                count += 1
        return count


@dataclass(frozen=True)
class Elsewhere(Wider):
    produces: ClassVar[Stage] = Stage.QDQ


@dataclass(frozen=True)
class Late(Wider):
    consumes: ClassVar[Stage] = Stage.INTEGER
    produces: ClassVar[Stage] = Stage.INTEGER


class Refuses(Wider):
    def __init__(self) -> None:
        raise RuntimeError("not today")


number = 3
'''
GRAPH = """
    <ir_version: 8, opset_import: ["" : 20]>
    plain (float[1, 4] x) => (float[1, 2] y)
    <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { y = MatMul(x, w) }
"""
DATA = ArraySamples({"x": np.ones((2, 4), np.float32)})
README = Path(__file__).parent.parent / "README.md"
OURS = "qnpu.passes.canonicalize:Canonicalize"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module of passes; it is forgotten afterwards."""
    (tmp_path / "strangers_passes.py").write_text(MODULE)
    (tmp_path / "broken_passes.py").write_text("import no_such_module_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_passes", raising=False)
    return tmp_path


def test_it_runs_with_its_options_where_its_stage_is(folder: Path) -> None:
    config = CompileConfig(passes=("strangers_passes:Wider[factor=2.0]",))
    plain = compile_model(parse(GRAPH), CompileConfig(), DATA)
    found = compile_model(parse(GRAPH), config, DATA)
    scales = []
    for result in (plain, found):
        name = next(n for n in result.model.graph.initializers if n.startswith("w_scale"))
        scales.append(np.asarray(constant_array(result.model.graph.initializers[name])))
    np.testing.assert_allclose(scales[1], 2 * scales[0])
    assert found.rewrites["wider"] == 1
    names = [item.name for item in default_passes(config, DATA)]
    assert names[names.index("wider") + 1] == "unify-encodings"


def test_passes_of_one_stage_keep_their_order(folder: Path) -> None:
    by_stage = load_passes(["strangers_passes:Wider[factor=2.0]", "strangers_passes:Wider", OURS])
    assert [getattr(item, "factor", None) for item in by_stage[Stage.ENCODED]] == [2.0, 1.0]
    assert [item.name for item in by_stage[Stage.FLOAT]] == ["canonicalize"]
    assert not by_stage[Stage.QDQ]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "MODULE:CLASS"),
        ("a b", "MODULE:CLASS"),
        ("no-such-entry-point", "no installed package has an entry point"),
        ("no_such_module_anywhere:Pass", "ModuleNotFoundError"),
        ("broken_passes:Pass", "no_such_module_anywhere"),
        ("strangers_passes:Missing", "AttributeError"),
        ("strangers_passes:number", "no subclass"),
        ("strangers_passes:dataclass", "no subclass"),
        ("strangers_passes:Pass", "abstract"),
        ("strangers_passes:Wider[factor]", "TOML"),
        ("strangers_passes:Wider[size=1]", "size"),
        ("strangers_passes:Refuses", "not today"),
        ("strangers_passes:Elsewhere", "one stage"),
        ("strangers_passes:Late", "integer graphs"),
    ],
)
def test_what_is_no_pass(spec: str, reason: str, folder: Path) -> None:
    before = list(sys.path)
    with pytest.raises(DiagnosticError) as caught:
        load_pass(spec)
    assert caught.value.codes == ["QN542"]
    assert reason in caught.value.diagnostics[0].rule.message()
    assert sys.path == before


def blocks_of_the_front_page() -> list[str]:
    """Its Python."""
    return [block.text for block in blocks(README) if block.language == "python"]


def test_the_pass_of_the_front_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks_of_the_front_page() if "# my_passes.py" in block)
    (tmp_path / "my_passes.py").write_text(code)
    (spec,) = re.findall(r"--pass '(my_passes:[^']*)'", README.read_text("utf-8"))
    for passes, said in ((spec, "0 Gemm"), ("my_passes:CountLinears", "1 MatMul")):
        compile_model(parse(GRAPH), CompileConfig(passes=(passes,)), DATA)
        assert said in capsys.readouterr().out
    assert not ir.passes.Sequential(load_pass(spec))(parse(GRAPH)).modified


def test_the_compiler_from_python_as_on_the_front_page(tmp_path: Path) -> None:
    code = next(block for block in blocks_of_the_front_page() if "compile_model(load" in block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.onnx")
        export_dynamo(load_torch(resolve("tiny")), path, sequence_length=16)
        tokenizer = load_tokenizer(resolve("tiny"))
        assert tokenizer is not None
        tokenizer.save(Path(folder))
        code = code.replace('calib="my.txt"', "seq_len=16").replace("my-model/", folder)
        code = code.replace("model.onnx", str(path))
        found: dict[str, object] = {}
        exec(code, found)
    result = found["result"]
    assert isinstance(result, CompileResult)
    assert any(node.op_type == "DequantizeLinear" for node in result.model.graph)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        load_passes(["x:Y", "strangers_passes:Wider", "nothing"])
    assert caught.value.codes == ["QN542", "QN542"]


def test_on_the_command_line_and_from_a_file(folder: Path) -> None:
    done = call("qnpu-export", "tiny", "--seq-len", "16", "--out", "m.onnx", "-q", folder=folder)
    assert done.exit_code == 0
    command = ("qnpu-compile", "m.onnx", "--seq-len", "16", "--eval-windows", "0", "--quiet")
    given = ("--pass", "strangers_passes:Wider[factor=1.5]")
    assert call(*command, *given, "--out", "a", folder=folder).exit_code == 0
    (folder / "c.toml").write_text("passes = ['strangers_passes:Wider[factor=1.5]']\n")
    assert call(*command, "--config", "c.toml", "--out", "b", folder=folder).exit_code == 0
    report = json.loads((folder / "a" / "report.json").read_text())
    assert report["rewrites"]["wider"] > 0
    assert report["config"]["passes"] == ["strangers_passes:Wider[factor=1.5]"]
    same = [(folder / out / "encodings.json").read_bytes() for out in ("a", "b")]
    assert same[0] == same[1]
    fault = call(*command, "--pass", "strangers_passes:Late", "--out", "c", folder=folder)
    assert (fault.exit_code, fault.codes) == (1, ["QN542"])
    assert not (folder / "c").exists()


def test_from_an_installed_package(folder: Path) -> None:
    """Its entry point is found in another process, whose path holds the package."""
    site = folder / "site"
    info = site / "strangers-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "strangers_passes.py").rename(site / "strangers_passes.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qnpu.passes]\nwider = strangers_passes:Wider\n")
    code = "from qnpu.compiler.user_passes import load_pass; print(load_pass('wider[factor=3.0]'))"
    done = subprocess.run(
        [BIN / "python", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(site)},
        cwd=folder,
    )
    assert done.stdout.strip() == "Wider(factor=3.0)"


def test_the_interface_in_python() -> None:
    assert {name for name in qnpu.compiler.__all__ if getattr(qnpu.compiler, name)} == {
        *qnpu.compiler.__all__
    }
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qnpu.compiler.no_such_name


def test_data_are_found_by_the_configuration(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    found = compile_model(parse(GRAPH), CompileConfig(calib=str(tmp_path / "x.npz")))
    expected = compile_model(parse(GRAPH), CompileConfig(), DATA)
    assert found.bit_plan.specs == expected.bit_plan.specs
    names = [set(result.model.graph.initializers) for result in (found, expected)]
    assert names[0] == names[1]
