"""A prefill and a decode graph of one source, of tiny decoders: they agree, and share one file.

Bounds, in LSB of the 16-bit logits: the integer graphs give the same codes however a text is cut.
Q/DQ graphs sum floats in other orders: logits then differ by up to 5 (measured at w8a16). At w8a8
many exact results lie halfway between two codes (snap-scales), and floats round them either way:
logits then differ by up to 563, by 0.8 % of their spread on average (measured).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qnpu.compiler.cached_decoder import (
    FILES,
    GRAPHS,
    CachedDecoder,
    cache_names,
    compile_cached,
    tokenizer_writers,
    write_cached,
)
from qnpu.compiler.caches import present_name
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import static_shape
from qnpu.compiler.integer_io import io_encodings
from qnpu.compiler.integer_model import PARITY_NAME
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.pipeline import CheckResult, check_result
from qnpu.models.tokenizer import ByteTokenizer
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.generate import CachedRunner
from qnpu.runtime_check.session import Mode
from tests.conftest import Array
from tests.decoders import exported

CHUNK, CONTEXT = 8, 32
WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (3, CHUNK)))
TEXT = [int(token) for token in np.random.default_rng(3).integers(0, 257, 24)]
TABLES = {"llama": 2, "gpt2": 0, "gemma3": 4}  # of cosines and sines
ARCHITECTURES = tuple(TABLES)
QDQ_LSB = {"w8a16": 20, "w8a8": 1500}
FLIPPED_SHARE, FLIPPED_LSB = 0.1, 1500
QDQ_MEAN = {"w8a16": 0.001, "w8a8": 0.02}  # of the spread


@cache
def compiled(
    architecture: str, scheme: str = "w8a8", exporter: str = "optimum", names: str = "source"
) -> CachedDecoder:
    config = CompileConfig(scheme=scheme, seq_len=CHUNK, context=CONTEXT, names=names)
    return compile_cached(exported(architecture, exporter), config, WINDOWS)


def with_codes(model: ir.Model) -> ir.Model:
    """A Q/DQ graph that takes and gives codes."""
    copy = model.clone()
    LowerIo().run(Compilation(copy, stage=Stage.QDQ))
    return copy


def codes_of(model: ir.Model, name: str) -> Array:
    """An initializer's codes."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def cut(runner: CachedRunner, *lengths: int) -> Array:
    """Logits of the text, read in pieces; what is left is read token by token."""
    runner.reset()
    rest = len(TEXT) - sum(lengths)
    parts, start = [], 0
    for length in (*lengths, *[1] * rest):
        parts.append(runner.read(TEXT[start : start + length]))
        start += length
    return np.concatenate(parts).astype(np.int64)


@pytest.mark.parametrize("scheme", QDQ_LSB)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_gives_what_prefill_gives(architecture: str, scheme: str) -> None:
    decoder = compiled(architecture, scheme)
    runner = CachedRunner(
        with_codes(decoder.prefill.model), with_codes(decoder.decode), mode=Mode.REFERENCE
    )
    whole = cut(runner, len(TEXT))
    assert np.ptp(whole) > 40_000
    for lengths in ((CHUNK,), (13,), ()):
        difference = np.abs(cut(runner, *lengths) - whole)
        assert (difference.max(axis=-1) > QDQ_LSB[scheme]).mean() <= FLIPPED_SHARE, lengths
        assert difference.max() <= FLIPPED_LSB, lengths
        assert difference.mean() <= QDQ_MEAN[scheme] * whole.std(), lengths


@pytest.mark.parametrize("exporter", ["optimum", "cached"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integers_are_the_same_however_a_text_is_cut(architecture: str, exporter: str) -> None:
    decoder = compiled(architecture, exporter=exporter)
    assert decoder.prefill.rewrites["tabulate-positions"] == TABLES[architecture]
    runner = CachedRunner(decoder.integer_prefill, decoder.integer_decode)
    whole = cut(runner, len(TEXT))
    for lengths in ((CHUNK,), (13,), (), (5, 11)):
        np.testing.assert_array_equal(cut(runner, *lengths), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_has_one_encoding(architecture: str) -> None:
    decoder = compiled(architecture)
    tables = [io_encodings(model) for model in (decoder.prefill.model, decoder.decode)]
    names = list(cache_names(decoder.decode.graph))
    assert len(names) == 4
    for name in names:
        first = tables[0][name]
        assert first.spec.bits == 8
        others = [table[key] for table in tables for key in (name, present_name(name))]
        assert all(first.same_as(other) for other in others)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interfaces(architecture: str) -> None:
    decoder = compiled(architecture)
    for model, tokens in ((decoder.prefill.model, CHUNK), (decoder.decode, 1)):
        sizes = {v.name: static_shape(v) for v in (*model.graph.inputs, *model.graph.outputs)}
        heads = 4 if architecture == "gpt2" else 2
        assert sizes["input_ids"] == sizes["position_ids"] == (1, tokens)
        assert sizes["attention_mask"] == (1, CONTEXT)
        assert sizes["past_key_values.1.key"] == (1, heads, CONTEXT - tokens, 16)
        assert sizes["present.1.value"] == (1, heads, tokens, 16)
        assert sizes["logits"] == (1, tokens, 257)


@pytest.mark.parametrize("exporter", ["optimum", "cached"])
def test_names_of_the_hub(exporter: str) -> None:
    """Names alone change: the codes that come out are the same."""
    decoder = compiled("llama", exporter=exporter, names="ai-hub")
    pairs = (
        (decoder.prefill.model, decoder.integer_prefill),
        (decoder.decode, decoder.integer_decode),
    )
    for model in (item for pair in pairs for item in pair):
        names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        caches = {
            f"past_{k}_{i}_{e}" for k in ("key", "value") for i in "01" for e in ("in", "out")
        }
        assert names == caches | {"input_ids", "attention_mask", "position_ids", "logits"}
    assert decoder.prefill.encodings["past_key_0_in"].spec.bits == 8
    plain = compiled("llama", exporter=exporter)
    runners = [CachedRunner(d.integer_prefill, d.integer_decode) for d in (decoder, plain)]
    found, expected = (cut(runner, CHUNK) for runner in runners)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prefill_graph_is_the_source(architecture: str) -> None:
    """New entries, tabulated positions and rotated caches change nothing in float."""
    result = compiled(architecture).prefill
    feeds = WINDOWS.feeds(result.source_model.graph.inputs)
    checks = check_result(result, feeds[0], feeds)
    assert checks.source_error <= 1e-5
    found = {name: value.value for name, value in checks.perplexity.items()}
    assert found["qdq"] == pytest.approx(found["float"], rel=0.3)
    assert found["integer"] == pytest.approx(found["qdq"], rel=0.01)


@pytest.mark.parametrize(("scheme", "kind"), [("w8a16", "INT8"), ("w4a8", "INT4")])
def test_both_graphs_have_the_same_codes(scheme: str, kind: str) -> None:
    """At 4 bits they are chosen on data, which only the prefill graph sees."""
    decoder = compiled("llama", scheme)
    weights = {
        name
        for name, value in decoder.decode.graph.initializers.items()
        if value.dtype is ir.DataType[kind] and name.endswith("_quantized")
    }
    assert len(weights) >= 14
    for name in weights:
        one, other = (codes_of(m, name) for m in (decoder.prefill.model, decoder.decode))
        np.testing.assert_array_equal(one, other)


def test_files(tmp_path: Path) -> None:
    decoder, more = compiled("llama"), tokenizer_writers(ByteTokenizer())
    checks = CheckResult([], 0.0)
    report = write_cached(tmp_path, decoder, checks, {"command": ["test"]}, more)
    written = {path.name for path in tmp_path.iterdir()}
    files = {*FILES} - {PARITY_NAME}  # these checks hold no certificate
    assert written == files | {
        "tokenizer.json",
        "tokenizer_config.json",
        "report.html",
        "report.json",
    }
    assert json.loads((tmp_path / "report.json").read_text())["command"] == ["test"]
    assert set(report["outputs"]) == written - {"report.json"}  # type: ignore[call-overload]
    weights = (tmp_path / FILES[0]).stat().st_size
    linears = 64 * 257 * 2 + 64 * 257 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    tables = {
        value.const_value.tobytes()
        for graph in (decoder.integer_prefill.graph, decoder.integer_decode.graph)
        for value in graph.initializers.values()
        if value.const_value
        and value.const_value.size > 2**15
        and len(value.const_value.shape) == 1
    }
    shared = weights - linears - sum(map(len, tables))  # once, for all four graphs
    assert 0 <= shared <= 32 * 4096
    for name in GRAPHS:
        assert (tmp_path / name).stat().st_size < weights / 2
        onnx.checker.check_model(str(tmp_path / name))
    again = tmp_path / "again"
    write_cached(again, decoder, checks, {"command": ["test"]}, tokenizer_writers(None))
    assert all((tmp_path / n).read_bytes() == (again / n).read_bytes() for n in files)


def refused(code: str, change: str = "", **options: Any) -> str:
    """The message of the one fault of a compile."""
    model = exported("llama", "optimum")
    if change:
        (value,) = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name == change]
        value.name = f"{change}_renamed"
    config = CompileConfig(**({"seq_len": CHUNK, "context": CONTEXT} | options))
    with pytest.raises(DiagnosticError) as caught:
        compile_cached(model, config, WINDOWS)
    assert caught.value.codes == [code]
    return str(caught.value)


def test_what_a_cache_needs() -> None:
    assert "position_ids" in refused("QN118", "position_ids")
    assert "present.1.key" in refused("QN118", "present.1.key")
    assert "context" in refused("QN503", context=0)
    assert "freeze_dims" in refused("QN503", freeze_dims={"past_sequence_length": 5})
