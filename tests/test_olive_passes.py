"""olive_passes: a recipe by Olive's own command, options, and the package configuration."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import is_quantized
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.pipeline import compile_model
from qnpu.compiler.recipes import read_recipe
from qnpu.models.load import load_onnx
from qnpu.runtime_check.compare import sqnr_db
from tests.commands import call
from tests.conftest import run_model
from tests.decoders import some_tokens
from tests.test_layers import FILES, imports

MODULE = "qnpu.compiler.olive_passes"
PACKAGE = FILES[MODULE].with_name("olive_package.json")
OPTIONS: dict[str, Any] = {"seq_len": 16, "calib_windows": 2, "tokenizer": "tokenizer.json"}


@pytest.fixture(scope="module")
def ours() -> ModuleType:
    """The module, where Olive is installed."""
    pytest.importorskip("olive", reason="olive-ai is not installed")
    return importlib.import_module(MODULE)


@pytest.fixture
def home(tiny_file: Path, tmp_path: Path) -> Path:
    """A folder with the tiny model and its tokenizer."""
    return Path(shutil.copytree(tiny_file.parent, tmp_path / "home"))


def made(ours: ModuleType, kind: str, options: dict[str, Any]) -> Any:
    """A pass as Olive makes it of a recipe."""
    from olive.passes.olive_pass import create_pass_from_dict  # noqa: PLC0415

    return create_pass_from_dict(getattr(ours, kind), options, disable_search=True)


def test_nothing_else_needs_olive() -> None:
    for name, path in FILES.items():
        if name != MODULE:
            found = set(imports(path, everywhere=True))
            assert MODULE not in found
            assert not {item.split(".")[0] for item in found} & {"olive"}


def test_the_shipped_file_names_every_pass() -> None:
    tree = ast.parse(FILES[MODULE].read_text("utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    passes = json.loads(PACKAGE.read_text("utf-8"))["passes"]
    assert {name: entry["module_path"] for name, entry in passes.items()} == {
        name: f"{MODULE}.{name}" for name in classes
    }


@pytest.mark.slow
def test_a_recipe(ours: ModuleType, home: Path) -> None:
    """Olive's optimizer, single passes and a compile, one after the other."""
    with (home / "package.json").open("w") as file:
        command = [sys.executable, "-m", MODULE]
        subprocess.run(command, stdout=file, check=True, cwd=home, env=os.environ | {"CI": "1"})
    rotation = ["canonicalize", "fuse-normalization", "fold-norm-scale", "fuse-rotation[seed=3]"]
    chosen = OPTIONS | {"target": "qnn-htp-v75"}
    compiling = {"type": "QnpuCompile", "rotate": False, **chosen}
    recipe = {
        "input_model": {"type": "OnnxModel", "model_path": "model.onnx"},
        "passes": {
            "optimize": {"type": "OnnxPeepholeOptimizer"},
            "rotate": {"type": "QnpuPass", "passes": rotation},
            "compile": compiling | {"emit": ["encodings-1.0.0"]},
        },
        "output_dir": "out/model.qdq.onnx",
        "cache_dir": "cache",
    }
    (home / "recipe.json").write_text(json.dumps(recipe))
    command = ["olive", "run", "--config", "recipe.json", "--package-config", "package.json"]
    done = call(*command, "--disable_telemetry", folder=home, CI="1", OLIVE_DISABLE_TELEMETRY="1")
    assert done.exit_code == 0, done.stderr
    model = load_onnx(home / "out" / "model.qdq.onnx")
    assert is_quantized(model.graph)
    config = CompileConfig(**chosen | {"tokenizer": str(home / "tokenizer.json"), "seed": 3})
    expected = compile_model(load_onnx(home / "model.onnx"), config)
    feeds = some_tokens(model)
    # Measured: equal, bit for bit.
    assert sqnr_db(run_model(expected.model, feeds)[0], run_model(model, feeds)[0]) > 60
    handler = json.loads((home / "out" / "model_config.json").read_text())["config"]
    files = {Path(path).name for path in handler["model_attributes"]["additional_files"]}
    usual = {"encodings.json", "bit_plan.json", "report.json", "report.html", "HANDOFF.md"}
    assert files == usual | {"model.1.0.0.encodings"}
    assert all((home / "out" / name).is_file() for name in files)
    report = json.loads((home / "out" / "report.json").read_text())
    assert report["config"]["target"] == "qnn-htp-v75"
    assert report["rewrites"]["freeze-shapes"] == 0


def test_a_compile_is_that_of_the_command_line(
    ours: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.model import ONNXModelHandler  # noqa: PLC0415

    monkeypatch.chdir(home)
    compiling = made(ours, "QnpuCompile", {"scheme": "w8a8", "down_bits": 8, **OPTIONS})
    model = ONNXModelHandler(str(home / "model.onnx"), model_attributes={"origin": "a test"})
    handler = compiling.run(model, str(home / "olive"))
    assert Path(handler.model_path) == home / "olive" / "model.qdq.onnx"
    assert handler.model_attributes["origin"] == "a test"
    options = ("--scheme", "w8a8", "--down-bits", "8", "--seq-len", "16", "--calib-windows", "2")
    command = ("qnpu-compile", "model.onnx", *options, "--eval-windows", "0", "--quiet")
    done = call(*command, "--out", "ours", folder=home)
    assert done.exit_code == 0, done.stderr
    for name in ("model.qdq.onnx", "encodings.json", "bit_plan.json"):
        assert (home / "olive" / name).read_bytes() == (home / "ours" / name).read_bytes()


def test_single_passes(ours: ModuleType, home: Path) -> None:
    from olive.model import ONNXModelHandler  # noqa: PLC0415

    passes = ["qnpu.passes.canonicalize:Canonicalize", "fuse-normalization"]
    fusing = made(ours, "QnpuPass", {"passes": passes, "save_as_external_data": True})
    handler = fusing.run(ONNXModelHandler(str(home / "model.onnx")), str(home / "out"))
    model = load_onnx(handler.model_path)
    assert "RMSNormalization" in {node.op_type for node in model.graph}
    feeds = some_tokens(load_onnx(home / "model.onnx"))
    expected = run_model(load_onnx(home / "model.onnx"), feeds)[0]
    assert sqnr_db(expected, run_model(model, feeds)[0]) > 100
    assert [name_of(value) for value in model.graph.outputs] == ["logits"]


def test_options_are_those_of_a_compile(ours: ModuleType) -> None:
    given = {"scheme": "w4a8", "online": ["r3"], "freeze_dims": {"batch": 1}, "learn_steps": 3}
    options = made(ours, "QnpuCompile", given).config.model_dump()
    expected = CompileConfig(scheme="w4a8", online=("r3",), freeze_dims={"batch": 1}, learn_steps=3)
    assert ours.compile_config(options) == expected
    absent = {"eval_text", "eval_windows", "exporter", "context", "names"}
    assert set(options) == (set(expected.to_json()) - absent) | {"recipe"}


def test_a_recipe_of_ours_and_options_that_win(ours: ModuleType) -> None:
    options = made(ours, "QnpuCompile", {"recipe": "paper", "learn": "none", "scheme": "w4a4"})
    expected = CompileConfig(**(read_recipe("paper") | {"learn": "none", "scheme": "w4a4"}))
    assert ours.compile_config(options.config.model_dump()) == expected


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        ("QnpuCompile", {"sceme": "w8a8"}, "QN503"),
        ("QnpuCompile", {"context": 64}, "QN503"),
        ("QnpuCompile", {"recipe": "none-such"}, "QN503"),
        ("QnpuCompile", {"scheme": "w9a9"}, "QN501"),
        ("QnpuPass", {"passes": ["none-such"]}, "QN542"),
        ("QnpuPass", {"passes": ["canonicalize"], "pass": ""}, "QN503"),
        ("QnpuPass", {"passes": ["unify-encodings"]}, "QN542"),
        ("QnpuPass", {"passes": ["insert-qdq"]}, "QN542"),
        ("QnpuPass", {"passes": ["fold-reshapes"]}, "QN542"),
        ("QnpuPass", {"passes": ["fuse-rotation[sede=1]"]}, "QN542"),
    ],
)
def test_faults_have_codes(
    kind: str, options: dict[str, Any], code: str, ours: ModuleType, home: Path
) -> None:
    from olive.model import ONNXModelHandler  # noqa: PLC0415

    with pytest.raises(DiagnosticError) as caught:
        model = ONNXModelHandler(str(home / "model.onnx"))
        made(ours, kind, options).run(model, str(home / "out"))
    assert caught.value.codes == [code]


def test_the_package_configuration_keeps_olives_own(ours: ModuleType) -> None:
    from olive.package_config import OlivePackageConfig  # noqa: PLC0415

    merged = OlivePackageConfig.model_validate(ours.package_config())
    own = OlivePackageConfig.load_default_config()
    assert set(merged.passes) == set(own.passes) | {"qnpucompile", "qnpupass"}
    assert merged.extra_dependencies == own.extra_dependencies
    assert merged.import_pass_module("QnpuCompile") is ours.QnpuCompile
