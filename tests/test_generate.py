"""Greedy generation from a folder of integer graphs: the tokens, where it stops, and how fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.cached_decoder import write_cached
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.integer_only import float_faults
from qnpu.compiler.pipeline import CheckResult
from qnpu.runtime_check.generate import (
    DECODE_NAME,
    PREFILL_NAME,
    CachedRunner,
    Generation,
    generate,
)
from tests.decoders import exported
from tests.test_cached_decoder import CHUNK, CONTEXT, TEXT, compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached")
    write_cached(path, compiled("llama"), CheckResult([], 0.0), {})
    return path


@pytest.fixture(scope="module")
def runner(folder: Path) -> CachedRunner:
    paths = folder / PREFILL_NAME, folder / DECODE_NAME
    prefill, decode = (ir.load(path) for path in paths)
    return CachedRunner(prefill, decode, paths)


def test_the_graphs_hold_no_float(folder: Path) -> None:
    for name in (PREFILL_NAME, DECODE_NAME):
        model = ir.load(folder / name)
        assert list(float_faults(model)) == []
        values = (*model.graph.inputs, *model.graph.outputs)
        caches = [value for value in values if (value.name or "").endswith(".key")]
        assert len(caches) == 4
        assert all(value.dtype is ir.DataType.UINT8 for value in caches)


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 20, 2 * CHUNK])
def test_greedy_tokens(length: int, runner: CachedRunner) -> None:
    """The same as reading the whole text anew for each token, by the prefill graph alone."""
    expected: list[int] = []
    for _ in range(6):
        runner.reset()
        expected.append(int(runner.read(TEXT[:length] + expected)[-1].argmax()))
    seen: list[int] = []
    found = generate(runner, TEXT[:length], 6, each=seen.append)
    assert found.ids == seen == expected
    assert found.prompt_tokens == length
    assert found.prefill_seconds > 0 and found.decode_seconds > 0


def test_a_text_read_in_two_goes(runner: CachedRunner) -> None:
    """What is left over behind other tokens is not filled up, so no room is lost."""
    whole = generate(runner, TEXT, 1).ids
    runner.reset()
    for part in (TEXT[:5], TEXT[5:16], TEXT[16:]):
        last = runner.read(part)[-1]
    assert [int(last.argmax())] == whole
    assert runner.length == len(TEXT)
    runner.read(TEXT[: CONTEXT - len(TEXT)])
    assert runner.length == CONTEXT


def test_where_it_stops(runner: CachedRunner) -> None:
    free = generate(runner, TEXT[:5], 12).ids
    assert len(free) == 12
    third = free.index(free[2])
    assert generate(runner, TEXT[:5], 12, stop={free[2]}).ids == free[: third + 1]
    full = generate(runner, TEXT, 99)
    assert len(full.ids) == CONTEXT - len(TEXT) + 1  # the last one is not read
    assert generate(runner, TEXT, 1).decode_rate == 0


def test_the_last_place_of_the_context(runner: CachedRunner) -> None:
    """All tokens count up to the end: the first one, too, though padding once stood before it."""
    text = (TEXT * 2)[:CONTEXT]
    runner.reset()
    whole = runner.read(text)
    runner.reset()
    first = runner.read(text[:5])
    rest = [runner.read([token]) for token in text[5:]]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), whole)
    runner.reset()
    other = runner.read([text[0] ^ 1, *text[1:]])
    assert (other[-1] != whole[-1]).any()


def test_prompts_that_do_not_fit(runner: CachedRunner) -> None:
    for prompt in ([], (TEXT * 2)[: CONTEXT + 1]):
        with pytest.raises(DiagnosticError) as caught:
            generate(runner, prompt, 4)
        assert caught.value.codes == ["QN503"]


def test_graphs_without_a_cache_of_codes() -> None:
    decoder = compiled("llama")
    for pair in (
        (decoder.integer_prefill, decoder.decode),
        (exported("llama", "optimum"), decoder.integer_decode),
    ):
        with pytest.raises(DiagnosticError) as caught:
            CachedRunner(*pair)
        assert caught.value.codes == ["QN118"]


def test_rates() -> None:
    found = Generation([1, 2, 3], prompt_tokens=10, prefill_seconds=2.0, decode_seconds=0.5)
    assert found.prefill_rate == 5
    assert found.decode_rate == 4
