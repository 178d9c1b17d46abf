"""Relative error of a tensor at few bits: against NumPy, streamed or at once."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import QuantSpec
from qnpu.runtime_check.sensitivity import most_sensitive, relative_errors
from tests.conftest import Array, normal, parse

U8 = QuantSpec(8, False, False)
S8 = QuantSpec(8, True, True)

# b is x itself, c holds one sign alone, d is an outlier's home
NETWORK = """
    g (float[16, 16] x) => (float[16, 16] d)
    { b = Neg(x)  c = Abs(b)  d = Exp(c) }
"""


def ratio(x: Array, bits: int = 8) -> float:
    """Eq. 4 as written, asymmetric Max-Min, float64."""
    x = x.astype(np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    restored = (codes - zero) * scale
    return float(np.mean(np.abs(restored - x) / (np.abs(x) + 1e-8)))


def measured(x: Array, spec: QuantSpec = U8, limit: int = 2**20) -> float:
    shape = ", ".join(map(str, x.shape))
    model = parse(f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Identity(x) }}")
    return relative_errors(model, [{"x": x}], {"y": spec}, segment_bytes=limit)["y"]


@pytest.mark.parametrize("spec", [U8, S8])
def test_a_gaussian_loses_little(spec: QuantSpec) -> None:
    """0.0444 asymmetric, 0.0451 symmetric; the design says about 0.045."""
    assert measured(normal(400, 500), spec) == pytest.approx(0.045, abs=0.002)


@pytest.mark.parametrize(("outlier", "least", "most"), [(30, 0.12, 0.3), (3000, 0.99, 1.0)])
def test_a_massive_outlier_takes_all_from_the_others(
    outlier: float, least: float, most: float
) -> None:
    x = normal(400, 500)
    x[0, 0] = outlier
    assert least < measured(x) <= most


@pytest.mark.parametrize("factor", [0.1, 1.0, 1e4])
def test_the_ratio_has_no_unit(factor: float) -> None:
    x = normal(40, 50)
    assert measured(x * np.float32(factor)) == pytest.approx(ratio(x), rel=1e-3)


@pytest.mark.parametrize("limit", [1, 2**20])
def test_streamed_equals_all_at_once(limit: int) -> None:
    """Rounded and summed in another order, so not to the last bit."""
    x = normal(5, 16, 16, seed=1)
    x[3, 2, 1] = 20
    batches = [{"x": run} for run in x]
    found = relative_errors(parse(NETWORK), batches, {"d": U8, "b": U8}, segment_bytes=limit)
    assert list(found) == ["d", "b"]
    assert found["b"] == pytest.approx(ratio(-x), rel=1e-5)
    assert found["d"] == pytest.approx(ratio(np.exp(np.abs(x))), rel=1e-5)


def test_wider_codes_lose_less() -> None:
    x = normal(16, 16)
    model, batches = parse(NETWORK), [{"x": x}]
    by_bits = [
        relative_errors(model, batches, {"b": QuantSpec(bits, False, False)})["b"]
        for bits in (4, 8, 16)
    ]
    assert by_bits[0] > 4 * by_bits[1] > 16 * by_bits[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite(bad: float) -> None:
    x = normal(16, 16)
    x[0, 0] = bad
    with pytest.raises(DiagnosticError) as caught:
        relative_errors(parse(NETWORK), [{"x": x}], {"b": U8})
    assert caught.value.codes == ["QN304"]


def test_progress_ends_at_one() -> None:
    parts: list[float] = []
    batches = [{"x": normal(16, 16, seed=i)} for i in range(2)]
    relative_errors(
        parse(NETWORK), batches, {"b": U8}, segment_bytes=1, progress=lambda _, p: parts.append(p)
    )
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


RATIOS = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.9}


@pytest.mark.parametrize(
    ("share", "names"),
    [(0.0, ""), (0.12, ""), (0.125, "b"), (0.25, "b"), (0.5, "bd"), (0.75, "bdc"), (1.0, "bdca")],
)
def test_the_most_sensitive(share: float, names: str) -> None:
    assert most_sensitive(RATIOS, share) == tuple(names)


@pytest.mark.parametrize(("share", "count"), [(0.1, 3), (0.05, 2), (0.04, 1), (0.01, 0), (1, 30)])
def test_a_share_of_thirty_layers(share: float, count: int) -> None:
    ratios = {str(i): float(i) for i in range(30)}
    assert most_sensitive(ratios, share) == tuple(str(29 - i) for i in range(count))
