"""Statistics of a tensor gathered batch by batch, and the range a method derives from them."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.quant_types import FloatArray, QuantSpec
from qnpu.runtime_check.session import Array

_CODES = 2**16
_TAIL = 1e-5
_LEAST_LEVEL = 2
# Factors by which each end of the range is shrunk: 1, 0.93, 0.87 … 0.01.
_SHRINK = 0.93 ** np.arange(64)


class RangeMethod(enum.Enum):
    """How a range is taken from data (quantnpu.md §2).

    MIN_MAX: all values seen. PERCENTILE: without the outermost 0.001 % on each side. MEAN_3_SIGMA:
    LSQ+, μ ± 3σ. MSE: both ends shrunk, each by its own factor, to the least mean squared error.
    """

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MEAN_3_SIGMA = "mean-3-sigma"
    MSE = "mse"

    @property
    def needs_histogram(self) -> bool:
        """More than sums and extremes is needed."""
        return self in (RangeMethod.PERCENTILE, RangeMethod.MSE)


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
        low: smallest value seen, real.
        high: largest value seen, real.
        count, total, total_square: of all elements.
        histogram: weighted count of each bfloat16 code, 512 KiB; empty where none is needed.
    """

    method: RangeMethod
    normalized_next: bool = False
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
        import torch  # noqa: PLC0415  (takes a second, which --help need not wait for)

        tensor = torch.from_numpy(array)
        low, high = torch.aminmax(tensor)
        self.low = float(np.minimum(self.low, low.item()))
        self.high = float(np.maximum(self.high, high.item()))
        if self.method is RangeMethod.MEAN_3_SIGMA:
            self.count += array.size
            self.total += tensor.sum(dtype=torch.float64).item()
            self.total_square += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        if self.method.needs_histogram:
            if self.histogram.size == 0:
                self.histogram = np.zeros(_CODES)
            for rows, weight in self._weighted_rows(array):
                upper_halves = np.ascontiguousarray(rows).reshape(-1).view(np.uint16)
                counts = np.bincount(upper_halves[_UPPER_HALF::2], minlength=_CODES)
                self.histogram += weight * counts

    def _weighted_rows(self, array: Array) -> Iterator[tuple[Array, float]]:
        """The array in parts, with what an element of each counts in the error.

        Rows of a (…, tokens, features) tensor are told apart by energy e: 4^-k for those of
        4^k ≤ e / median < 4^(k+1), k ≥ 2.
        """
        if self.method is not RangeMethod.MSE or not self.normalized_next:
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
        match self.method:
            case RangeMethod.MEAN_3_SIGMA:
                mean = self.total / self.count
                sigma = np.sqrt(max(self.total_square / self.count - mean**2, 0.0))
                return max(self.low, mean - 3 * sigma), min(self.high, mean + 3 * sigma)
            case RangeMethod.PERCENTILE:
                return self._percentile()
            case RangeMethod.MSE:
                return self._least_error(spec)
        return self.low, self.high

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

    def _least_error(self, spec: QuantSpec) -> tuple[float, float]:
        """Searches both ends for the least sum of clipping and rounding error.

        Outside the range: (x - end)². Inside: s²/12, but x² where |x| < s/2, which rounds to zero.
        All sums come from running totals over the sorted bins.
        """
        values, counts = self._sorted_bins()
        lows: FloatArray = min(self.low, 0.0) * _SHRINK
        highs: FloatArray = max(self.high, 0.0) * _SHRINK
        if spec.symmetric:
            reach = np.maximum(-lows, highs)
            lows, highs = -reach, reach
        sums = _RunningSums.of(values, counts)
        below = np.searchsorted(values, lows, side="left")
        above = np.searchsorted(values, highs, side="right")
        low_error = sums.squared_distance(np.zeros_like(below), below, lows)
        high_error = sums.squared_distance(above, np.full_like(above, len(values)), highs)
        low_index, high_index = _pairs(spec.symmetric)
        span = highs[high_index] - lows[low_index]
        step = span / (
            2 * spec.q_max if spec.signed and spec.symmetric else spec.q_max - spec.q_min
        )
        first, last = below[low_index], above[high_index]
        small_first = np.clip(np.searchsorted(values, -step / 2), first, last)
        small_last = np.clip(np.searchsorted(values, step / 2), first, last)
        rounded = sums.count(first, last) - sums.count(small_first, small_last)
        error = low_error[low_index] + high_error[high_index] + rounded * step**2 / 12
        error += sums.square(small_first, small_last)
        best = int(np.argmin(error))
        return float(lows[low_index[best]]), float(highs[high_index[best]])


# A float32 as two uint16: the half with sign and exponent comes second on little-endian machines.
_UPPER_HALF = int(np.little_endian)


def _pairs(symmetric: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the low and high ends to try together: equal ones, or every combination."""
    index = np.arange(len(_SHRINK))
    if symmetric:
        return index, index
    return np.repeat(index, len(index)), np.tile(index, len(index))


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
    array: Array, spec: QuantSpec, axis: int, *, search: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Symmetric range of each channel of a weight.

    Args:
        array: real weights, any rank.
        spec: signed symmetric.
        axis: channel axis.
        search: False: max |w|; True: the shrink factor, of 1.00, 0.98 … 0.42, with the least
            squared error of the channel.

    Returns:
        low and high, real, shape ``(channels,)``.
    """
    rows = np.ascontiguousarray(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1)
    peak = np.abs(rows).max(axis=1).astype(np.float32)
    if not search:
        return -peak, peak
    import torch  # noqa: PLC0415

    tensor = torch.from_numpy(rows)
    best = torch.ones(len(peak))
    best_error = torch.full((len(peak),), torch.inf)
    safe_peak = torch.from_numpy(np.where(peak > 0, peak, np.float32(1.0)))
    for factor in np.arange(1.0, 0.41, -0.02):
        scale = (safe_peak * float(factor) / spec.q_max)[:, None]
        codes = torch.clamp(torch.round(tensor / scale), spec.q_min, spec.q_max)
        error = ((codes * scale - tensor) ** 2).sum(dim=1)
        better = error < best_error
        best = torch.where(better, torch.tensor(float(factor)), best)
        best_error = torch.where(better, error, best_error)
    clipped = peak * best.numpy()
    return -clipped, clipped
