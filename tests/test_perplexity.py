"""Perplexity against a direct formula, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.runtime_check.perplexity import measure_perplexity, next_token_loss
from qnpu.runtime_check.session import open_session
from tests.conftest import normal, parse

VOCABULARY = 7


def direct(
    logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]], ids: list[int]
) -> list[float]:
    rows = logits.astype(np.float64)
    p = np.exp(rows - rows.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return [-float(np.log(p[i, ids[i + 1]])) for i in range(len(ids) - 1)]


def test_loss_of_each_next_token() -> None:
    logits, ids = normal(5, VOCABULARY, scale=3.0), [0, 6, 3, 3, 1]
    loss = next_token_loss(logits, np.array(ids))
    np.testing.assert_allclose(loss, direct(logits, ids), rtol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0], [0, 1e4], [0, 0]], np.float32)
    np.testing.assert_allclose(next_token_loss(logits, np.array([0, 0, 0])), [0, 1e4], atol=1e-9)


def language_model(bias: str = "0, 0, 0, 0, 0, 0, 0") -> str:
    table = ", ".join(str(x) for x in normal(VOCABULARY * VOCABULARY, scale=2.0))
    return f"""
        g (int64[1, S] input_ids) => (float[1, S, {VOCABULARY}] logits)
        <float[{VOCABULARY}, {VOCABULARY}] t = {{{table}}}, float[{VOCABULARY}] b = {{{bias}}}>
        {{ r = Gather(t, input_ids)  logits = Add(r, b) }}
    """


def test_windows_are_weighted_by_their_tokens() -> None:
    table = normal(VOCABULARY * VOCABULARY, scale=2.0).reshape(VOCABULARY, VOCABULARY)
    windows = [[0, 1, 2, 3], [6, 5]]
    session = open_session(parse(language_model()))
    seen: list[tuple[str, float]] = []
    result = measure_perplexity(
        session,
        [{"input_ids": np.array([ids])} for ids in windows],
        progress=lambda step, part: seen.append((step, part)),
        label="float",
    )
    losses = [direct(table[ids], ids) for ids in windows]
    assert result.nll == pytest.approx([np.mean(loss) for loss in losses], rel=1e-6)
    assert result.value == pytest.approx(np.exp(np.mean([*losses[0], *losses[1]])), rel=1e-6)
    assert (result.windows, result.tokens) == (2, 4)
    assert seen == [("float", 0.5), ("float", 1.0)]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    text = language_model().replace(
        ", ".join(str(x) for x in normal(49, scale=2.0)), "0, " * 48 + "0"
    )
    result = measure_perplexity(open_session(parse(text)), [{"input_ids": np.array([[1, 2, 3]])}])
    assert result.value == pytest.approx(VOCABULARY, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "ids"), [("logits", [[1, 7]]), ("logits", [1, 2]), ("scores", [[1, 2]])]
)
def test_what_does_not_run(name: str, ids: list[object]) -> None:
    session = open_session(parse(language_model()))
    with pytest.raises(DiagnosticError) as caught:
        measure_perplexity(session, [{"input_ids": np.array(ids)}], logits_name=name)
    assert caught.value.codes == ["QN116"]
