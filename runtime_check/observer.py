"""Statistics of a tensor gathered batch by batch, and the range a method derives from them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.quant_types import FloatArray, QuantSpec
from qnpu.runtime_check.session import Array

_CODES = 2**16
_SUMMED = 2**16  # values at once: as float64 they stay in the cache
_TAIL = 1e-5
_LEAST_LEVEL = 2
# Factors by which each end of the range is shrunk: 1, 0.93, 0.87 … 0.01.
_SHRINK = 0.93 ** np.arange(64)
_CHANNEL_SHRINK = np.arange(1.0, 0.41, -0.02)
# At so many bits clipping the tails gains more than it loses: LSQ+ and clipped weights.
_FEW_BITS = 4
# Half the width, in σ, of all steps together that loses least of a Gaussian (Max 1960).
_GAUSSIAN_REACH = {4: 2.70, 8: 3.95}


class RangeMethod(enum.Enum):
    """How ranges are taken from data, of activations and of channels of weights (quantnpu.md §2).

    Three take the same rule everywhere. MIN_MAX: all values seen. PERCENTILE: without the outermost
    0.001 % on each side; weights as MIN_MAX. MEAN_3_SIGMA: the Mean of LSQ+, a scale of
    max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1) about zero.

    Two choose between MIN_MAX and MEAN_3_SIGMA, by whether a rotation has spread a tensor's
    outliers. TABLE: Mean where it has and b ≤ 4. PAPER: Mean where it has, at any b, as the paper's
    text says (its tables 5 and 6 say Max-Min at 8 bits).

    Two search for the least squared error, with what rounds taken as uniform within a step. MSE:
    both ends of an activation's range shrunk, each by its own factor; weights of 4 bits or fewer
    shrunk, wider ones as MIN_MAX. SEARCH: the same and Mean, Max-Min and the best range of a
    Gaussian besides, at any width; an element of a linear's input counts as much as its error
    weighs in the linear's output (see ``Observer.feature_weights``).
    """

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MEAN_3_SIGMA = "mean-3-sigma"
    MSE = "mse"
    TABLE = "table"
    PAPER = "paper"
    SEARCH = "search"

    def rule(self, bits: int, *, rotated: bool) -> RangeMethod:
        """What to do with one tensor: TABLE and PAPER become one of the others."""
        match self:
            case RangeMethod.TABLE:
                takes_mean = rotated and bits <= _FEW_BITS
            case RangeMethod.PAPER:
                takes_mean = rotated
            case _:
                return self
        return RangeMethod.MEAN_3_SIGMA if takes_mean else RangeMethod.MIN_MAX

    @property
    def needs_histogram(self) -> bool:
        """More than sums and extremes is needed."""
        return self in (RangeMethod.PERCENTILE, RangeMethod.MSE, RangeMethod.SEARCH)

    @property
    def needs_sums(self) -> bool:
        """Mean and standard deviation are needed."""
        return self not in (RangeMethod.MIN_MAX, RangeMethod.PERCENTILE, RangeMethod.MSE)


def mean_range(
    mean: FloatArray | float, sigma: FloatArray | float, spec: QuantSpec
) -> tuple[FloatArray, FloatArray]:
    """Where the codes end at the Mean scale of LSQ+, s = max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1).

    The zero point is the middle code, so that codes of b bits reach from -2^(b-1)·s, or a step
    less where they are symmetric, to (2^(b-1) - 1)·s.

    Args:
        mean: μ, real, of a tensor or of each channel.
        sigma: σ, same shape.
        spec: what to encode to.

    Returns:
        low and high, real, of the same shape.
    """
    reach = np.maximum(np.abs(np.subtract(mean, 3 * sigma)), np.abs(np.add(mean, 3 * sigma)))
    high = reach * (1 - 2.0 ** (1 - spec.bits))
    return (-high if spec.symmetric else -reach), high


def gaussian_range(
    mean: FloatArray | float, sigma: FloatArray | float, spec: QuantSpec
) -> tuple[FloatArray, FloatArray]:
    """Where the outermost codes lie if a Gaussian is to lose least: μ ± k_b·σ, half a step inwards.

    Args, returns: as ``mean_range``; of 4 or 8 bits.
    """
    reach = _GAUSSIAN_REACH[spec.bits] * np.asarray(sigma) * (1 - 2.0**-spec.bits)
    if spec.symmetric:
        reach = reach + np.abs(mean)
        return -reach, reach
    return mean - reach, mean + reach


@dataclass(slots=True)
class Observer:
    """Streaming statistics of one tensor; holds no activations.

    The histogram counts the upper 16 bits of each float32, that is its bfloat16: bins of 0.8 %
    relative width over the whole float range, so no second look at the data is needed and massive
    outliers cost the small values no resolution.

    Attributes:
        method: decides what is gathered.
        normalized_next: a norm takes the tensor. It divides each token's magnitude out, so a token
            of 16 times the median energy or more then counts in the squared error as if it had
            the median. (The first token of a sequence has a million times as much in SmolLM2; to
            hold it unclipped costs all others 1.6 % of perplexity at 16 bits.)
        rotated: a rotation has spread the tensor's outlier channels; for TABLE and PAPER.
        feature_weights: for SEARCH, shape (features,): what an element's error counts by its place
            on the last axis; None: all count alike. For the input of linears y = x·W it is
            d_j = Σ_n W_jn², so that Σ_j d_j·(x̂_j - x_j)² is the error of y, those of its terms
            taken as independent.
        low: smallest value seen, real.
        high: largest value seen, real.
        count, total, total_square: of all elements.
        histogram: weighted count of each bfloat16 code, 512 KiB; empty where none is needed.
    """

    method: RangeMethod
    normalized_next: bool = False
    rotated: bool = False
    feature_weights: NDArray[np.float64] | None = None
    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    total: float = 0.0
    total_square: float = 0.0
    histogram: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def look(self, array: Array) -> None:
        """Takes in one batch, float32. NaN makes ``low`` and ``high`` NaN."""
        if array.size == 0:
            return
        self.low = float(np.minimum(self.low, array.min()))
        self.high = float(np.maximum(self.high, array.max()))
        if self.method.needs_sums:
            self.count += array.size
            flat = array.reshape(-1)
            for start in range(0, flat.size, _SUMMED):
                part = flat[start : start + _SUMMED].astype(np.float64)
                self.total += float(part.sum())
                self.total_square += float(part @ part)
        if self.method.needs_histogram:
            if self.histogram.size == 0:
                self.histogram = np.zeros(_CODES)
            for rows, weight in self._weighted_rows(array):
                self.histogram += weight * self._counts(np.ascontiguousarray(rows))

    def _counts(self, array: Array) -> NDArray[np.float64]:
        """How much there is of each bfloat16 code."""
        codes = array.reshape(-1).view(np.uint16)[_UPPER_HALF::2]
        weights = self.feature_weights
        if weights is not None:
            weights = np.broadcast_to(weights, array.shape).reshape(-1)
        return np.bincount(codes, weights, minlength=_CODES).astype(np.float64)

    def _weighted_rows(self, array: Array) -> Iterator[tuple[Array, float]]:
        """The array in parts, with what an element of each counts in the error.

        Rows of a (…, tokens, features) tensor are told apart by energy e: 4^-k for those of
        4^k ≤ e / median < 4^(k+1), k ≥ 2.
        """
        searches = self.method in (RangeMethod.MSE, RangeMethod.SEARCH)
        if not searches or not self.normalized_next:
            yield array, 1.0
            return
        rows = array.reshape(-1, array.shape[-1])
        energy = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        median = float(np.median(energy))
        if not median > 0.0 or not np.isfinite(energy).all():
            yield array, 1.0
            return
        level = np.floor(np.log2(np.maximum(energy / median, 1.0)) / 2).astype(np.int64)
        level[level < _LEAST_LEVEL] = 0
        for k in np.unique(level):
            yield (rows[level == k] if k or level.any() else rows), float(4.0**-k)

    @property
    def finite(self) -> bool:
        """No NaN or infinity was seen."""
        nothing_seen = self.low > self.high
        return bool(np.isfinite(self.low) and np.isfinite(self.high)) or nothing_seen

    def value_range(self, spec: QuantSpec) -> tuple[float, float]:
        """The range to encode, real. ``(0, 0)`` where nothing was seen."""
        if self.low > self.high:
            return 0.0, 0.0
        match self.method.rule(spec.bits, rotated=self.rotated):
            case RangeMethod.MEAN_3_SIGMA:
                low, high = mean_range(*self._mean_and_sigma(), spec)
                return float(low), float(high)
            case RangeMethod.PERCENTILE:
                return self._percentile()
            case RangeMethod.MSE:
                return self._least_error(spec, [])
            case RangeMethod.SEARCH:
                return self._least_error(spec, _likely_ranges(*self._mean_and_sigma(), spec))
        return self.low, self.high

    def _mean_and_sigma(self) -> tuple[float, float]:
        mean = self.total / self.count
        variance = self.total_square / self.count - mean**2
        # Values that float32 tells apart differ by more than what rounding leaves of equal ones.
        return mean, float(np.sqrt(variance)) if variance > 2.0**-46 * mean**2 else 0.0

    def _sorted_bins(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Middle and count of each bin that is not empty, in ascending order."""
        codes = np.flatnonzero(self.histogram)
        bits = (codes.astype(np.uint32) << 16) | 0x8000
        bits[codes & 0x7FFF == 0] = 0  # zero itself, not the middle of its bin
        values = bits.view(np.float32).astype(np.float64)
        order = np.argsort(values, kind="stable")
        values = np.clip(values[order], self.low, self.high)
        return values, self.histogram[codes][order]

    def _percentile(self) -> tuple[float, float]:
        values, counts = self._sorted_bins()
        below = np.cumsum(counts) / counts.sum()
        first = int(np.searchsorted(below, _TAIL, side="right"))
        last = int(np.searchsorted(below, 1 - _TAIL, side="left"))
        return float(values[first]), float(values[min(last, len(values) - 1)])

    def _least_error(
        self, spec: QuantSpec, more: Sequence[tuple[FloatArray, FloatArray]]
    ) -> tuple[float, float]:
        """Searches both ends, and ``more`` ranges, for the least clipping and rounding error."""
        lows: FloatArray = min(self.low, 0.0) * _SHRINK
        highs: FloatArray = max(self.high, 0.0) * _SHRINK
        if spec.symmetric:
            reach = np.maximum(-lows, highs)
            lows, highs = -reach, reach
        else:  # every combination of a low and a high end
            lows, highs = np.repeat(lows, len(_SHRINK)), np.tile(highs, len(_SHRINK))
        lows = np.append(lows, [np.minimum(low, 0.0) for low, _ in more])
        highs = np.append(highs, [np.maximum(high, 0.0) for _, high in more])
        best = int(np.argmin(self._errors(spec, lows, highs)))
        return float(lows[best]), float(highs[best])

    def _errors(self, spec: QuantSpec, lows: FloatArray, highs: FloatArray) -> FloatArray:
        """Squared error of each range.

        Outside the range: (x - end)². Inside: s²/12, but x² where |x| < s/2, which rounds to zero.
        All sums come from running totals over the sorted bins.
        """
        values, counts = self._sorted_bins()
        sums = _RunningSums.of(values, counts)
        first = np.searchsorted(values, lows, side="left")
        last = np.searchsorted(values, highs, side="right")
        clipped = sums.squared_distance(np.zeros_like(first), first, lows)
        clipped = clipped + sums.squared_distance(last, np.full_like(last, len(values)), highs)
        levels = 2 * spec.q_max if spec.signed and spec.symmetric else spec.q_max - spec.q_min
        step = (highs - lows) / levels
        small_first = np.clip(np.searchsorted(values, -step / 2), first, last)
        small_last = np.clip(np.searchsorted(values, step / 2), first, last)
        rounded = sums.count(first, last) - sums.count(small_first, small_last)
        error: FloatArray = clipped + rounded * step**2 / 12
        return error + sums.square(small_first, small_last)


def _likely_ranges(
    mean: FloatArray | float, sigma: FloatArray | float, spec: QuantSpec
) -> list[tuple[FloatArray, FloatArray]]:
    """What SEARCH tries beside shrunken ranges, the first of which is Max-Min."""
    ranges = [mean_range(mean, sigma, spec)]
    if spec.bits in _GAUSSIAN_REACH:
        ranges.append(gaussian_range(mean, sigma, spec))
    return ranges


# A float32 as two uint16: the half with sign and exponent comes second on little-endian machines.
_UPPER_HALF = int(np.little_endian)


@dataclass(frozen=True, slots=True)
class _RunningSums:
    """Σ n, Σ n·x and Σ n·x² over the first k bins, for every k."""

    n: NDArray[np.float64]
    nx: NDArray[np.float64]
    nxx: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64], counts: NDArray[np.float64]) -> _RunningSums:
        sums = [np.concatenate([[0.0], np.cumsum(counts * values**k)]) for k in range(3)]
        return cls(*sums)

    def count(self, first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.float64]:
        return self.n[last] - self.n[first]

    def square(self, first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.float64]:
        return self.nxx[last] - self.nxx[first]

    def squared_distance(
        self, first: NDArray[np.intp], last: NDArray[np.intp], end: FloatArray
    ) -> NDArray[np.float64]:
        """Σ n·(x - end)² over bins first … last - 1."""
        linear = self.nx[last] - self.nx[first]
        total = self.square(first, last) - 2 * end * linear + end**2 * self.count(first, last)
        return np.maximum(total, 0.0)


def channel_range(
    array: Array, spec: QuantSpec, axis: int, method: RangeMethod, *, rotated: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Symmetric range of each channel of a weight.

    Args:
        array: real weights, any rank.
        spec: signed symmetric.
        axis: channel axis.
        method: see ``RangeMethod``. Where it searches, it tries max |w| times 1.00, 0.98 … 0.42.
        rotated: a rotation was multiplied into the weight.

    Returns:
        low and high, real, shape ``(channels,)``.
    """
    rows = np.ascontiguousarray(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1)
    peak = np.abs(rows).max(axis=1).astype(np.float32)
    rule = method.rule(spec.bits, rotated=rotated)
    reach = peak
    if rule is RangeMethod.MEAN_3_SIGMA:
        reach = mean_range(*_mean_and_sigma(rows), spec)[1].astype(np.float32)
    elif rule is RangeMethod.SEARCH:
        likely = [high for _, high in _likely_ranges(*_mean_and_sigma(rows), spec)]
        reach = _least_reach(rows, spec, [*_shrunk(peak), *likely])
    elif rule is RangeMethod.MSE and spec.bits <= _FEW_BITS:
        reach = _least_reach(rows, spec, _shrunk(peak))
    return -reach, reach


def _mean_and_sigma(rows: Array) -> tuple[FloatArray, FloatArray]:
    return rows.mean(axis=1, dtype=np.float64), rows.std(axis=1, dtype=np.float64)


def _shrunk(peak: NDArray[np.float32]) -> list[FloatArray]:
    return [peak * np.float32(factor) for factor in _CHANNEL_SHRINK]


def _least_reach(
    rows: Array, spec: QuantSpec, reaches: Sequence[FloatArray]
) -> NDArray[np.float32]:
    """Of several reaches of each channel the one with the least squared error; of equals the first.

    Args:
        rows: shape (channels, weights).
        spec: signed symmetric.
        reaches: each of shape (channels,).
    """
    import torch  # noqa: PLC0415

    tensor = torch.from_numpy(rows)
    best = torch.zeros(len(rows))
    best_error = torch.full((len(rows),), torch.inf)
    for reach in (torch.from_numpy(item.astype(np.float32)) for item in reaches):
        scale = (torch.where(reach > 0, reach, 1.0) / spec.q_max)[:, None]
        codes = torch.clamp(torch.round(tensor / scale), spec.q_min, spec.q_max)
        error = ((codes * scale - tensor) ** 2).sum(dim=1)
        better = error < best_error
        best = torch.where(better, reach, best)
        best_error = torch.where(better, error, best_error)
    found: NDArray[np.float32] = best.numpy()
    return found
