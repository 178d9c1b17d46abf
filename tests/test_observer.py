"""Ranges from data: each method against NumPy on all values at once, or against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.runtime_check.observer import (
    Observer,
    RangeMethod,
    channel_range,
    gaussian_range,
    mean_range,
)
from tests.conftest import Array, normal

U8 = QuantSpec(8, False, False)
S8 = QuantSpec(8, True, True)
U4 = QuantSpec(4, False, False)
S4 = QuantSpec(4, True, True)
U16 = QuantSpec(16, False, False)
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


def scale(x: Array, spec: QuantSpec, method: RangeMethod, *, rotated: bool = False) -> float:
    observer = Observer(method, rotated=rotated)
    observer.look(x)
    return float(Encoding.from_range(spec, *observer.value_range(spec)).scale)


# per name: max(|μ - 3σ|, |μ + 3σ|) of the distribution; t of ν degrees has σ² = ν / (ν - 2)
CLOSED = {
    "gaussian": (normal(400_000), 3.0),
    "wide gaussian": (normal(400_000, scale=2.5), 7.5),
    "student t, 5 degrees": (
        np.random.default_rng(4).standard_t(5, 400_000).astype(np.float32),
        3 * np.sqrt(5 / 3),
    ),
    "shifted": (normal(400_000) + np.float32(5), 8.0),
    "shifted down": (normal(400_000) - np.float32(5), 8.0),
    "uniform": (
        np.random.default_rng(7).uniform(-1, 1, 400_000).astype(np.float32),
        np.sqrt(3),
    ),
}
CODES = [S4, U4, QuantSpec(4, True, False), QuantSpec(8, False, True), S8, U8, U16]


@pytest.mark.parametrize("spec", CODES, ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_the_mean_of_lsq_plus(name: str, spec: QuantSpec) -> None:
    """s = max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1) about zero: 1 % for what σ of a sample may be off."""
    x, reach = CLOSED[name]
    assert scale(x, spec, RangeMethod.MEAN_3_SIGMA) == pytest.approx(
        reach / 2 ** (spec.bits - 1), rel=1e-2
    )
    moments = x.mean(dtype=np.float64), x.std(dtype=np.float64)
    exact = max(abs(moments[0] - 3 * moments[1]), moments[0] + 3 * moments[1])
    assert scale(x, spec, RangeMethod.MEAN_3_SIGMA) == pytest.approx(
        exact / 2 ** (spec.bits - 1), rel=1e-6
    )
    encoding = Encoding.from_range(spec, *mean_range(*moments, spec))
    assert int(encoding.zero_point) == (0 if spec.signed else 2 ** (spec.bits - 1))


@pytest.mark.parametrize("spec", [U4, U8, U16], ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_max_min(name: str, spec: QuantSpec) -> None:
    """s = (max - min) / (2^b - 1), zero included."""
    x = CLOSED[name][0].astype(np.float64)
    span = max(x.max(), 0.0) - min(x.min(), 0.0)
    found = scale(CLOSED[name][0], spec, RangeMethod.MIN_MAX)
    assert found == pytest.approx(span / (2**spec.bits - 1), rel=1e-6)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize(
    ("method", "rotated", "bits", "mean"),
    [
        (RangeMethod.TABLE, True, 4, True),
        (RangeMethod.TABLE, True, 8, False),
        (RangeMethod.TABLE, True, 16, False),
        (RangeMethod.TABLE, False, 4, False),
        (RangeMethod.TABLE, False, 8, False),
        (RangeMethod.PAPER, True, 4, True),
        (RangeMethod.PAPER, True, 8, True),
        (RangeMethod.PAPER, True, 16, True),
        (RangeMethod.PAPER, False, 8, False),
        (RangeMethod.PAPER, False, 16, False),
        (RangeMethod.MEAN_3_SIGMA, False, 8, True),
    ],
)
def test_rules_by_rotation_and_width(
    name: str, method: RangeMethod, rotated: bool, bits: int, mean: bool
) -> None:
    x, spec = CLOSED[name][0], QuantSpec(bits, False, False)
    expected = RangeMethod.MEAN_3_SIGMA if mean else RangeMethod.MIN_MAX
    assert scale(x, spec, method, rotated=rotated) == scale(x, spec, expected)
    row = x[None, :1000]
    weight = QuantSpec(bits, True, True)
    found = channel_range(row, weight, 0, method, rotated=rotated)
    np.testing.assert_array_equal(found, channel_range(row, weight, 0, expected))


@pytest.mark.parametrize(("bits", "reach"), [(4, 2.70), (8, 3.95)])
@pytest.mark.parametrize("mean", [0.0, 5.0, -5.0])
def test_the_best_range_of_a_gaussian(bits: int, reach: float, mean: float) -> None:
    """k_b·σ about μ, half a step past the outermost codes (quantnpu.md §2)."""
    spec = QuantSpec(bits, False, False)
    low, high = gaussian_range(mean, 2.0, spec)
    half_step = (high - low) / (2**bits - 1) / 2
    assert high + half_step == pytest.approx(mean + 2 * reach, rel=1e-9)
    assert low - half_step == pytest.approx(mean - 2 * reach, rel=1e-9)
    low, high = gaussian_range(mean, 2.0, QuantSpec(bits, True, True))
    assert low == -high
    assert high == pytest.approx(abs(mean) + 2 * reach * (1 - 2.0**-bits), rel=1e-9)


@pytest.mark.parametrize("spec", [S4, U4, S8, U8], ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_search_is_no_worse_than_any_rule(name: str, spec: QuantSpec) -> None:
    """On the data itself; 7 % for rounding taken as uniform, which the uniform one is worst at."""
    x = CLOSED[name][0][:50_000]
    observer = observe(RangeMethod.SEARCH, x)
    found = error(x, spec, *observer.value_range(spec))
    moments = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
    rules = [(float(x.min()), float(x.max()))]
    rules += [(float(a), float(b)) for a, b in [mean_range(*moments, spec)]]
    rules += [(float(a), float(b)) for a, b in [gaussian_range(*moments, spec)]]
    rules += [observe(RangeMethod.MSE, x).value_range(spec)]
    assert found <= 1.07 * min(error(x, spec, *rule) for rule in rules)


def test_search_meets_the_best_of_a_gaussian_closer_than_a_grid() -> None:
    """Where no grid point is near, k_b·σ is taken: one value at 20σ moves the whole grid."""
    x = np.concatenate([normal(1_000_000), [20.4]]).astype(np.float32)
    low, high = observe(RangeMethod.SEARCH, x).value_range(U4)
    assert high + (high - low) / 30 == pytest.approx(2.70, rel=0.02)


def weighted(x: Array, weights: Array | None) -> Observer:
    observer = Observer(RangeMethod.SEARCH, feature_weights=weights)
    observer.look(x)
    return observer


def test_search_heeds_what_an_error_weighs_in_the_output() -> None:
    """A wide feature that the linear takes no notice of costs the others nothing."""
    x = normal(4000, 8, seed=5)
    x[:, 0] *= 30
    weight = normal(8, 16, seed=6)
    weight[0] *= 1e-3
    energy = (weight.astype(np.float64) ** 2).sum(axis=1)

    def output_error(observer: Observer) -> float:
        encoding = Encoding.from_range(U8, *observer.value_range(U8))
        lost = (encoding.dequantize(encoding.quantize(x)) - x) @ weight
        return float((lost.astype(np.float64) ** 2).sum())

    assert output_error(weighted(x, energy)) < 0.1 * output_error(weighted(x, None))


def test_equal_weights_change_nothing() -> None:
    x = normal(400, 8)
    plain, even = weighted(x, None), weighted(x, np.ones(8))
    np.testing.assert_array_equal(plain.histogram, even.histogram)
    parts = Observer(RangeMethod.SEARCH, True, feature_weights=np.arange(8.0))
    for part in np.split(x, 4):
        parts.look(part)
    assert parts.histogram.sum() == pytest.approx(400 * 28, rel=1e-12)


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
    if method in (RangeMethod.MEAN_3_SIGMA, RangeMethod.SEARCH):
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
    if method is RangeMethod.MEAN_3_SIGMA:  # about zero, whatever there is
        assert (low, high) == pytest.approx((-3.0, 3.0 * 127 / 128), rel=1e-6)
        return
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


@pytest.mark.parametrize(
    "method", [m for m in RangeMethod if m not in (RangeMethod.MSE, RangeMethod.SEARCH)]
)
def test_other_methods_take_no_notice_of_the_norm(method: RangeMethod) -> None:
    x = with_massive_token(1000)
    assert observe(method, x, normalized=True).value_range(U8) == observe(method, x).value_range(U8)


def test_a_silent_median_is_no_yardstick() -> None:
    x = np.zeros((8, 4), np.float32)
    x[0] = 1
    relative = observe(RangeMethod.MSE, x, normalized=True)
    np.testing.assert_array_equal(relative.histogram, observe(RangeMethod.MSE, x).histogram)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", list(RangeMethod))
def test_channels_of_a_weight(axis: int, method: RangeMethod) -> None:
    weights = normal(4, 5, 6)
    low, high = channel_range(weights, S4, axis, method, rotated=True)
    np.testing.assert_array_equal(low, -high)
    assert low.dtype == np.float32
    assert high.shape == (weights.shape[axis],)
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    for row, reach in zip(rows, high, strict=True):
        peak = float(np.abs(row).max())
        mean, sigma = row.mean(dtype=np.float64), row.std(dtype=np.float64)
        lsq_plus = max(abs(mean - 3 * sigma), abs(mean + 3 * sigma)) / 8 * 7
        if method in (RangeMethod.MSE, RangeMethod.SEARCH):
            tried = list(peak * np.arange(1.0, 0.41, -0.02))
            if method is RangeMethod.SEARCH:
                tried += [lsq_plus, abs(mean) + 2.70 * sigma * 15 / 16]
            errors = [error(row, S4, -end, end) for end in tried]
            assert error(row, S4, -float(reach), float(reach)) <= min(errors) * (1 + 1e-5)
            assert min(abs(float(reach) - end) for end in tried) <= 1e-6 * peak
        elif method in (RangeMethod.MIN_MAX, RangeMethod.PERCENTILE):
            assert reach == pytest.approx(peak, rel=1e-7)
        else:
            assert reach == pytest.approx(lsq_plus, rel=1e-6)


def test_wide_weights_are_searched_only_where_asked() -> None:
    """200 weights lie halfway between two codes of the widest range."""
    row = np.array([[1.0, *[0.5] * 200]], np.float32)
    _, usual = channel_range(row, S8, 0, RangeMethod.MSE)
    _, searched = channel_range(row, S8, 0, RangeMethod.SEARCH)
    assert usual.tolist() == [1.0]
    assert error(row[0], S8, -float(searched[0]), float(searched[0])) < error(row[0], S8, -1, 1)


@pytest.mark.parametrize("method", list(RangeMethod))
def test_a_dead_channel(method: RangeMethod) -> None:
    low, high = channel_range(np.zeros((2, 3), np.float32), S4, 0, method, rotated=True)
    assert (low.tolist(), high.tolist()) == ([0, 0], [0, 0])
