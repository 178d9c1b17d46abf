"""Helpers that several tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.pass_base import Compilation, Pass
from qnpu.compiler.printer import model_to_text
from qnpu.runtime_check.session import Feeds, Mode, open_session
from qnpu.runtime_check.session import run as run_session
from tests.commands import call

Array = NDArray[Any]

HEADER = '<ir_version: 11, opset_import: ["" : 23]>\n'
SHARED = Path(__file__).parents[2] / "shared"
EXPORTS = "QNPU_TEST_EXPORTS"
"""Environment variable: the folder of exported models that all processes of a test run share."""


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of exports, before other processes start and take over the environment."""
    if not hasattr(config, "workerinput"):
        folder = os.environ[EXPORTS] = tempfile.mkdtemp(prefix="qnpu-exports-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def parse(text: str) -> ir.Model:
    """A model from ONNX text, with shapes inferred; the header may be left out."""
    text = dedent(text).strip()
    model = ir.from_onnx_text(text if text.startswith("<ir_version") else HEADER + text)
    common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    return model


def apply(transform: Pass, model: ir.Model) -> int:
    """Runs one pass on a bare model and returns its count."""
    return transform.run(Compilation(model))


def assert_rewrites(transform: Pass, before: str, after: str, count: int) -> ir.Model:
    """The pass turns one text into the other, says so, and leaves its own result alone."""
    model = parse(before)
    assert apply(transform, model) == count
    text = model_to_text(model)
    assert text == model_to_text(parse(after))
    assert apply(transform, model) == 0
    assert model_to_text(model) == text
    return model


def assert_keeps(transform: Pass, text: str) -> None:
    """The pass must not fire."""
    model = parse(text)
    before = model_to_text(model)
    assert apply(transform, model) == 0
    assert model_to_text(model) == before


def run_model(model: ir.Model, feeds: Feeds, mode: Mode = Mode.REFERENCE) -> list[Array]:
    """All outputs of a model on ONNX Runtime."""
    return run_session(open_session(model, mode), None, feeds)


def relative_error(actual: Array, expected: Array) -> float:
    """max |Δ| over max |expected|."""
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / np.abs(expected.astype(np.float64)).max())


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Seeded N(0, scale²) numbers, float32."""
    noise = np.random.default_rng(seed).normal(0.0, scale, shape)
    return noise.astype(np.float32)


def shared_file(name: str) -> Path:
    """A large local file, or a skip where this checkout comes without it."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in tiny model as an ONNX file of 16 tokens, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    options = ("--seq-len", "16", "--out", "model.onnx", "--quiet")
    done = call("qnpu-export", "tiny", *options, folder=folder)
    assert done.exit_code == 0, done.stderr
    return folder / "model.onnx"
