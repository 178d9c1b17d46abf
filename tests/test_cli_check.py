"""qnpu-check on a target and with the oracle, as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler import cli_check
from qnpu.runtime_check import htp
from qnpu.runtime_check.htp import HtpError, is_available
from tests.commands import call
from tests.conftest import parse
from tests.test_model_check import BARE, FLOAT, QDQ

needs_htp = pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
V75 = ("--target", "qnn-htp-v75")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, text in (("qdq", QDQ), ("bare", BARE), ("float", FLOAT)):
        ir.save(parse(text), tmp_path / f"{name}.onnx")
    return tmp_path


def test_a_graph_that_the_target_takes(home: Path) -> None:
    done = call("qnpu-check", "qdq.onnx", *V75, folder=home)
    assert done.exit_code == 0, done.stderr
    assert "nodes on qnn-htp-v75" in done.stdout
    assert "0 errors" in done.stdout


def test_faults_on_a_target_are_all_listed(home: Path) -> None:
    done = call("qnpu-check", "bare.onnx", *V75, "--json", folder=home)
    assert done.exit_code == 1
    assert done.codes == ["QN520", "QN520"]
    result = json.loads(done.stdout)
    assert result["verdict"] == "float"
    assert result["layers"] == {"-": {"float": 2}}
    assert [d["location"]["value"] for d in result["diagnostics"]] == ["p", "r"]
    assert call("qnpu-check", "bare.onnx", folder=home).codes == ["QN303"]
    assert call("qnpu-check", "float.onnx", *V75, folder=home).codes == ["QN525"]


@pytest.mark.parametrize(
    "options",
    [
        ("--run",),
        (*V75, "--run"),
        (*V75, "--feeds", "x.npz"),
        ("--oracle", "htp"),
        ("--target", "generic-int8", "--oracle", "htp"),
    ],
)
def test_options_without_effect(home: Path, options: tuple[str, ...]) -> None:
    done = call("qnpu-check", "qdq.onnx", *options, folder=home)
    assert done.exit_code == 1
    assert done.codes == ["QN503"]


def test_an_unknown_target(home: Path) -> None:
    done = call("qnpu-check", "qdq.onnx", "--target", "nokia-3310", folder=home)
    assert (done.exit_code, done.codes) == (1, ["QN502"])


@needs_htp
def test_the_oracle_and_its_emulator(home: Path) -> None:
    np.savez(home / "x.npz", x=np.ones((2, 4), np.float32))
    options = (*V75, "--oracle", "htp", "--run", "--feeds", "x.npz", "--json")
    done = call("qnpu-check", "qdq.onnx", *options, folder=home)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["oracle"]["verdict"] == "int"
    assert [(d["name"], d["largest"]) for d in result["emulator"]] == [("y", 0)]
    done = call("qnpu-check", "bare.onnx", *V75, "--oracle", "htp", folder=home)
    assert set(done.codes) == {"QN520", "QN531"}


@needs_htp
def test_feeds_that_are_not_there(home: Path) -> None:
    options = (*V75, "--oracle", "htp", "--run", "--feeds", "absent.npz")
    done = call("qnpu-check", "qdq.onnx", *options, folder=home)
    assert (done.exit_code, done.codes) == (1, ["QN102"])


class DeadCompiler:
    """Fails at every job, as a vendor's program may."""

    def __enter__(self) -> DeadCompiler:
        raise HtpError("the HTP compiler died with exit code -11")

    def __exit__(self, *error: object) -> None: ...


def check(*arguments: str) -> int:
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as caught:
        cli_check.check_app(list(arguments), standalone_mode=True)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_an_oracle_that_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(htp, "is_available", lambda: True)
    monkeypatch.setattr(cli_check, "HtpCompiler", DeadCompiler)
    assert check(str(home / "qdq.onnx"), *V75, "--oracle", "htp") == 1
    assert "error[QN533]" in capsys.readouterr().err


def test_an_oracle_that_is_not_installed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(htp, "is_available", lambda: False)
    assert check(str(home / "qdq.onnx"), *V75, "--oracle", "htp") == 1
    printed = capsys.readouterr().err
    assert "error[QN114]" in printed
    assert "run: pip install 'qnpu[qnn]'" in printed
