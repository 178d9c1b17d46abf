"""Ranges from data: each method against NumPy on all values at once, or against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.runtime_check.observer import Observer, RangeMethod, channel_range
from tests.conftest import Array, normal

U8 = QuantSpec(8, False, False)
S8 = QuantSpec(8, True, True)
BIN = 2.0**-8  # half the relative width of a bfloat16 bin


def heavy(count: int = 200_000) -> Array:
    noise = np.random.default_rng(1).standard_t(3, count)
    return noise.astype(np.float32)


DATA = {
    "gaussian": normal(200_000),
    "heavy-tailed": heavy(),
    "shifted": normal(200_000, seed=2) + np.float32(5),
    "negative": -np.abs(heavy()),
    "constant": np.full(1000, 0.7, np.float32),
    "zero": np.zeros(1000, np.float32),
    "tiny and huge": np.concatenate(
        [normal(1000) * np.float32(1e-30), normal(9) * np.float32(1e30)]
    ),
}


def observe(method: RangeMethod, *batches: Array, normalized: bool = False) -> Observer:
    observer = Observer(method, normalized)
    for batch in batches:
        observer.look(batch)
    return observer


def error(x: Array, spec: QuantSpec, low: float, high: float) -> float:
    encoding = Encoding.from_range(spec, low, high)
    restored = encoding.dequantize(encoding.quantize(x)).astype(np.float64)
    return float(((restored - x) ** 2).mean())


@pytest.mark.parametrize("name", DATA)
def test_min_max(name: str) -> None:
    x = DATA[name]
    assert observe(RangeMethod.MIN_MAX, x).value_range(U8) == (x.min(), x.max())


@pytest.mark.parametrize("name", [name for name in DATA if name != "tiny and huge"])
def test_percentile(name: str) -> None:
    """Within one bin of the exact quantile."""
    x = DATA[name]
    low, high = observe(RangeMethod.PERCENTILE, x).value_range(U8)
    exact = np.sort(x)
    cut = int(len(x) * 1e-5)
    assert low == pytest.approx(exact[cut], rel=2 * BIN)
    assert high == pytest.approx(exact[-1 - cut], rel=2 * BIN)


@pytest.mark.parametrize("name", DATA)
def test_mean_and_three_sigma(name: str) -> None:
    x = DATA[name].astype(np.float64)
    low, high = observe(RangeMethod.MEAN_3_SIGMA, DATA[name]).value_range(U8)
    tolerance = 1e-6 * float(np.abs(x).max())
    assert low == pytest.approx(max(x.min(), x.mean() - 3 * x.std()), abs=tolerance)
    assert high == pytest.approx(min(x.max(), x.mean() + 3 * x.std()), abs=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["gaussian", "heavy-tailed", "shifted", "negative"])
def test_least_error(name: str, symmetric: bool, bits: int) -> None:
    """Within 10 % of the least error that a search of both ends on the data itself finds.

    The method tries ends 7 % apart, and takes rounding errors as uniform.
    """
    x = DATA[name][:10_000]
    spec = QuantSpec(bits, symmetric, symmetric)
    found = error(x, spec, *observe(RangeMethod.MSE, x).value_range(spec))
    shrink = np.concatenate([np.arange(0.04, 0.3, 0.02), np.arange(0.3, 1.01, 0.05)])
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    reach = max(-low, high)
    pairs = (
        [(-s * reach, s * reach) for s in shrink]
        if symmetric
        else [(s * low, t * high) for s in shrink for t in shrink]
    )
    assert found <= 1.1 * min(error(x, spec, *pair) for pair in pairs)


@pytest.mark.parametrize(("bits", "reach"), [(4, 2.68), (8, 3.94)])
def test_the_known_optimum_of_a_gaussian(bits: int, reach: float) -> None:
    """Max (1960): 16 levels Δ = 0.335 apart, 256 levels 0.0308 apart; reach = levels · Δ / 2.

    That is half a step past the outermost code, 2.70σ and 3.95σ in rounder numbers. Ends are tried
    7 % apart, so the best is met within 5 %.
    """
    spec = QuantSpec(bits, False, False)
    low, high = observe(RangeMethod.MSE, normal(1_000_000)).value_range(spec)
    half_step = (high - low) / (spec.q_max - spec.q_min) / 2
    assert high + half_step == pytest.approx(reach, rel=0.05)
    assert low - half_step == pytest.approx(-reach, rel=0.05)


def test_outliers_are_clipped_at_few_bits_and_kept_at_many() -> None:
    x = np.concatenate([normal(100_000), [100.0]]).astype(np.float32)
    _, at_four = observe(RangeMethod.MSE, x).value_range(QuantSpec(4, False, False))
    _, at_sixteen = observe(RangeMethod.MSE, x).value_range(QuantSpec(16, False, False))
    assert at_four < 4
    assert at_sixteen > 90


@pytest.mark.parametrize("method", list(RangeMethod))
@pytest.mark.parametrize("name", DATA)
def test_batches_add_up(name: str, method: RangeMethod) -> None:
    """Counts add exactly; sums in float64 do so but for their rounding."""
    x = DATA[name]
    whole = observe(method, x).value_range(U8)
    parts = observe(method, *np.array_split(x, 7)).value_range(U8)
    if method is RangeMethod.MEAN_3_SIGMA:
        assert parts == pytest.approx(whole, rel=1e-9, abs=1e-12)
    else:
        assert parts == whole


@pytest.mark.parametrize("method", list(RangeMethod))
def test_nothing_seen(method: RangeMethod) -> None:
    observer = observe(method, np.zeros((0, 4), np.float32))
    assert observer.finite
    assert observer.value_range(U8) == (0.0, 0.0)


@pytest.mark.parametrize("method", list(RangeMethod))
def test_scalars(method: RangeMethod) -> None:
    low, high = observe(method, np.asarray(3.0, np.float32)).value_range(U8)
    assert high == pytest.approx(3.0, rel=1e-6)
    assert low in (0.0, pytest.approx(3.0, rel=1e-6))


@pytest.mark.parametrize("method", list(RangeMethod))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_not_finite(method: RangeMethod, bad: float, alone: bool) -> None:
    x = np.full(4, bad, np.float32) if alone else np.array([1, bad, 2], np.float32)
    assert not observe(method, x).finite
    assert not observe(method, np.ones(3, np.float32), x, np.ones(3, np.float32)).finite


TOKENS = normal(64, 32, seed=3)


def with_massive_token(factor: float) -> Array:
    x = TOKENS.copy()
    x[0] *= factor
    return x


@pytest.mark.parametrize("factor", [1e4, 3e4])
def test_a_massive_token_costs_the_others_less_where_a_norm_divides_it_out(factor: float) -> None:
    spec = QuantSpec(16, False, False)
    x = with_massive_token(factor)
    plain = observe(RangeMethod.MSE, x).value_range(spec)
    relative = observe(RangeMethod.MSE, x, normalized=True).value_range(spec)
    assert relative[1] < plain[1]
    assert error(x[1:], spec, *relative) < 0.9 * error(x[1:], spec, *plain)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_tokens_of_ordinary_energy_count_as_they_are(factor: float) -> None:
    """Below 16 times the median energy nothing is weighted: the histogram is the same."""
    x = with_massive_token(factor)
    plain, relative = observe(RangeMethod.MSE, x), observe(RangeMethod.MSE, x, normalized=True)
    np.testing.assert_array_equal(plain.histogram, relative.histogram)


@pytest.mark.parametrize(("factor", "weight"), [(8.0, 4.0**-3), (100.0, 4.0**-6)])
def test_weight_of_a_massive_token(factor: float, weight: float) -> None:
    """4^-k where the energy is 4^k … 4^(k+1) of the median."""
    x = np.ones((5, 4), np.float32)
    x[0] *= factor
    histogram = observe(RangeMethod.MSE, x, normalized=True).histogram
    assert sorted(histogram[histogram > 0]) == pytest.approx([4 * weight, 16.0], rel=1e-12)


@pytest.mark.parametrize("method", [m for m in RangeMethod if m is not RangeMethod.MSE])
def test_other_methods_take_no_notice_of_the_norm(method: RangeMethod) -> None:
    x = with_massive_token(1000)
    assert observe(method, x, normalized=True).value_range(U8) == observe(method, x).value_range(U8)


def test_a_silent_median_is_no_yardstick() -> None:
    x = np.zeros((8, 4), np.float32)
    x[0] = 1
    relative = observe(RangeMethod.MSE, x, normalized=True)
    np.testing.assert_array_equal(relative.histogram, observe(RangeMethod.MSE, x).histogram)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("search", [True, False])
def test_channels_of_a_weight(axis: int, search: bool) -> None:
    weights = normal(4, 5, 6)
    spec = QuantSpec(4, True, True)
    low, high = channel_range(weights, spec, axis, search=search)
    np.testing.assert_array_equal(low, -high)
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    for row, reach in zip(rows, high, strict=True):
        peak = float(np.abs(row).max())
        if not search:
            assert reach == pytest.approx(peak, rel=1e-7)
            continue
        errors = [error(row, spec, -peak * f, peak * f) for f in np.arange(1.0, 0.41, -0.02)]
        assert error(row, spec, -float(reach), float(reach)) <= min(errors) * (1 + 1e-5)
        assert 0.41 * peak < reach <= peak


def test_a_dead_channel() -> None:
    low, high = channel_range(np.zeros((2, 3), np.float32), S8, 0, search=True)
    assert (low.tolist(), high.tolist()) == ([0, 0], [0, 0])
