"""qnpu-compile --context and qnpu-run, as a user runs them on the built-in tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qnpu.compiler.cached_decoder import FILES
from qnpu.models.load import load_onnx
from qnpu.models.tokenizer import ByteTokenizer
from qnpu.runtime_check.generate import DECODE_NAME, PREFILL_NAME, CachedRunner, generate
from tests.commands import call

PROMPT = "A prompt of more than sixteen bytes"
OPTIONS = ("--seq-len", "16", "--calib-windows", "2", "--eval-windows", "2", "--quiet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model for 64 tokens in ``chat``."""
    folder = tmp_path_factory.mktemp("home")
    command = ("qnpu-compile", "tiny", *OPTIONS, "--scheme", "w8a8", "--context", "64")
    done = call(*command, "--out", "chat", "--json", folder=folder)
    assert done.exit_code == 0, done.stderr
    (folder / "stdout.json").write_text(done.stdout)
    return folder


def test_a_compile_with_a_context(home: Path) -> None:
    files = {path.name for path in (home / "chat").iterdir()}
    assert files == {
        *FILES,
        "tokenizer.json",
        "tokenizer_config.json",
        "report.html",
        "report.json",
    }
    said = json.loads((home / "stdout.json").read_text())
    assert set(said["outputs"]) == files - {"report.json"}
    found = said["perplexity"]
    assert found["integer"] == pytest.approx(found["qdq"], rel=0.01)
    report = json.loads((home / "chat" / "report.json").read_text())
    assert report["config"]["context"] == 64
    assert report["source_error"] <= 1e-5


def test_generation_is_greedy_and_the_same_each_time(home: Path) -> None:
    options = ("--tokens", "12", "--ignore-eos", "--json")
    done = call("qnpu-run", "chat", PROMPT, *options, folder=home)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    paths = home / "chat" / PREFILL_NAME, home / "chat" / DECODE_NAME
    runner = CachedRunner(load_onnx(paths[0]), load_onnx(paths[1]), paths)
    expected = generate(runner, ByteTokenizer().encode(PROMPT), 12).ids
    assert found["ids"] == expected
    assert found["prompt_tokens"] == len(PROMPT)
    assert not found["stopped"]
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    plain = call("qnpu-run", "chat", PROMPT, *options[:-1], folder=home)
    assert plain.exit_code == 0, plain.stderr
    assert plain.stdout.rstrip("\n") == found["text"].rstrip("\N{REPLACEMENT CHARACTER}")
    assert "tokens/s" in plain.stderr
    assert call("qnpu-run", "chat", PROMPT, *options[:-1], "-q", folder=home).stderr == ""


def test_names_of_the_hub_change_no_text(home: Path) -> None:
    command = ("qnpu-compile", "tiny", *OPTIONS, "--scheme", "w8a8", "--context", "64")
    done = call(*command, "--names", "ai-hub", "--out", "hub", "--json", folder=home)
    assert done.exit_code == 0, done.stderr
    said = [json.loads(text) for text in ((home / "stdout.json").read_text(), done.stdout)]
    assert said[0]["perplexity"] == said[1]["perplexity"]
    inputs = {value.name for value in load_onnx(home / "hub" / DECODE_NAME).graph.inputs}
    assert {"past_key_0_in", "past_value_1_in"} <= inputs
    assert "past_key_0_in" in (home / "hub" / "encodings.json").read_text()
    options = ("--tokens", "12", "--ignore-eos", "--json")
    texts = [call("qnpu-run", name, PROMPT, *options, folder=home) for name in ("chat", "hub")]
    assert texts[1].exit_code == 0, texts[1].stderr
    ids = [json.loads(done.stdout)["ids"] for done in texts]
    assert ids[0] == ids[1]
    done = call("qnpu-eval", f"hub/{PREFILL_NAME}", "--window", "16", "--windows", "2", folder=home)
    assert done.exit_code == 0, done.stderr


def test_the_prefill_graph_can_be_evaluated(home: Path) -> None:
    """Codes in and out become numbers again, and the mask stays an input."""
    values = []
    for name in ("prefill.qdq.onnx", "prefill.int.onnx"):
        options = ("--window", "16", "--windows", "2", "--json", "--quiet")
        done = call("qnpu-eval", f"chat/{name}", *options, folder=home)
        assert done.exit_code == 0, done.stderr
        values.append(json.loads(done.stdout)["perplexity"])
    said = json.loads((home / "stdout.json").read_text())["perplexity"]
    np.testing.assert_allclose(values, [said["qdq"], said["integer"]], rtol=1e-3)


def test_faults(home: Path) -> None:
    for code, *arguments in (
        ("QN102", "absent", PROMPT),
        ("QN503", "chat", ""),
        ("QN503", "chat", PROMPT * 2),
        ("QN102", "chat", PROMPT, "--tokenizer", "absent.json"),
    ):
        done = call("qnpu-run", *arguments, folder=home)
        assert (done.exit_code, done.codes) == (1, [code]), done.stderr
    assert call("qnpu-run", "chat", PROMPT, "--tokens", "0", folder=home).exit_code == 2
    (home / "bare").mkdir()
    for name in (PREFILL_NAME, DECODE_NAME, "weights.bin"):
        (home / "bare" / name).write_bytes((home / "chat" / name).read_bytes())
    assert call("qnpu-run", "bare", PROMPT, folder=home).codes == ["QN113"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--context", "16"), "QN503"),
        (("--context", "64", "--prefix", "auto"), "QN503"),
        (("--context", "64", "--emit", "float"), "QN503"),
        (("--names", "ai-hub"), "QN503"),
        (("--context", "64", "--names", "hub"), "QN503"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], code: str, tmp_path: Path
) -> None:
    done = call("qnpu-compile", "tiny", *OPTIONS, *options, folder=tmp_path)
    assert (done.exit_code, done.codes) == (1, [code])
    assert list(tmp_path.iterdir()) == []


def test_a_static_model_has_no_cache(tiny_file: Path, tmp_path: Path) -> None:
    done = call("qnpu-compile", tiny_file, *OPTIONS, "--context", "64", folder=tmp_path)
    assert done.exit_code == 1
    assert set(done.codes) == {"QN118"}
