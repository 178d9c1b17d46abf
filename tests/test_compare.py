"""Measures of difference, and two graphs compared tensor by tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.pass_base import Compilation
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.compare import (
    compare_graphs,
    cosine,
    log_softmax,
    lsb_difference,
    mean_kl,
    sqnr_db,
)
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import normal, parse


def test_sqnr() -> None:
    signal = np.array([3, 4], np.float32)
    assert sqnr_db(signal, signal + np.array([0.3, 0.4], np.float32)) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(signal * 0, signal) == -math.inf
    assert sqnr_db(signal * 0, signal * 0) == math.inf


def test_sqnr_of_a_quantizer() -> None:
    """6.02 dB per bit for a full-scale uniform signal."""
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    for bits in (4, 8, 12):
        step = 2.0 ** (1 - bits)
        rounded = (np.rint(x / step) * step).astype(np.float32)
        assert sqnr_db(x, rounded) == pytest.approx(6.0206 * bits, abs=0.1)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e19, 1e30, 1e38])
def test_sqnr_where_squares_leave_float32(size: float) -> None:
    signal = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    other = (signal + 0.001 * signal[::-1]).astype(np.float32)
    expected = sqnr_db(signal.astype(np.float64), other.astype(np.float64))
    assert expected == pytest.approx(60, abs=0.1)
    found = sqnr_db(signal * np.float32(size), other * np.float32(size))
    assert found == pytest.approx(expected, abs=1e-4)


def test_sqnr_of_half_precision() -> None:
    signal = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float16)
    assert sqnr_db(signal, signal * np.float16(0.5)) == pytest.approx(6.0206, abs=1e-3)


def test_cosine() -> None:
    x, y = np.array([1, 0], np.float32), np.array([0, 2], np.float32)
    assert cosine(x, x * 5) == pytest.approx(1, rel=1e-12)
    assert cosine(x, -x) == pytest.approx(-1, rel=1e-12)
    assert cosine(x, y) == 0
    assert cosine(x, x + y / 2) == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert (cosine(x * 0, x * 0), cosine(x * 0, x)) == (1, 0)


def test_steps_of_difference() -> None:
    reference = np.array([0, 0.5, -0.5, 100], np.float32)
    other = reference + np.array([0, 0.25, -0.5, 0.2501], np.float32)
    assert lsb_difference(reference, other, 0.25).tolist() == [0, 1, -2, 1]


def test_divergence() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]))
    assert mean_kl(p, p) == 0
    assert mean_kl(p, q) == pytest.approx(0.25 * math.log(2) / 2, rel=1e-12)
    assert mean_kl(p + 100, q - 3) == pytest.approx(mean_kl(p, q), rel=1e-12)  # logits shift freely


def test_log_softmax_of_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 0, 0]], np.float32))
    np.testing.assert_allclose(rows, [[0, -1e4, -1e4]], atol=1e-9)


NETWORK = """
    g (float[2, 4] x) => (float[4, 2] y, float[2, 2] h)
    <float[4, 2] w = {1, -8, 2, 7, -3, 6, 4, 5}, int64[2] shape = {4, 1}>
    {
        n = Neg(x)
        h = MatMul(n, w)
        flat = Reshape(h, shape)
        y = Concat<axis: int = 1>(flat, flat)
    }
"""


@pytest.mark.parametrize("limit", [1, 64, 2**20])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_every_computed_tensor_is_compared(limit: int, scheme: str) -> None:
    data = ArraySamples({"x": normal(4, 4)})
    compilation = Compilation(parse(NETWORK))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    CalibrateRanges(data).run(compilation)
    UnifyEncodings().run(compilation)
    before = compilation.model.clone()
    InsertQdq().run(compilation)
    (feeds, _) = data.feeds(compilation.graph.inputs)
    seen: list[float] = []
    results = compare_graphs(
        before,
        compilation.model,
        feeds,
        segment_bytes=limit,
        progress=lambda _, part: seen.append(part),
    )
    names = [result.name for result in results]
    assert names == (["n", "h"] if scheme == "w8a16" else ["n", "n_requantized", "h"])
    assert seen[-1] == 1.0
    step = {name: float(compilation.encodings[name].scale) for name in names}
    exact = results[0]
    # the input and n are each rounded once: at most a step and a half between them
    assert 0 < exact.max_abs_error <= 1.5 * step["n"]
    assert exact.sqnr_db > 80
    last = results[-1]
    assert last.cosine > 0.9999
    assert last.sqnr_db < exact.sqnr_db


def test_equal_graphs_have_no_difference() -> None:
    model = parse(NETWORK)
    results = compare_graphs(model, model, {"x": normal(2, 4)})
    assert [(r.name, r.sqnr_db, r.max_abs_error) for r in results] == [("h", math.inf, 0.0)]
