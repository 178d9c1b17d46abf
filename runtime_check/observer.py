"""Statistics of a tensor gathered batch by batch, and the range a method derives from them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from qnpu.compiler.quant_types import QuantSpec
from qnpu.runtime_check.session import Array

_BINS = 2048
_SHRINK_STEPS = 80


class RangeMethod(enum.Enum):
    """How a range is taken from data (quantnpu.md §2).

    MIN_MAX: all values seen. PERCENTILE: without the outermost 0.001 % on each side. MEAN_3_SIGMA:
    LSQ+, |μ ± 3σ|. MSE: the clipped range with the least mean squared error, searched over 80
    shrink factors on a histogram.
    """

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MEAN_3_SIGMA = "mean-3-sigma"
    MSE = "mse"

    @property
    def needs_histogram(self) -> bool:
        """A second look at the data is needed, once its minimum and maximum are known."""
        return self in (RangeMethod.PERCENTILE, RangeMethod.MSE)


@dataclass(slots=True)
class Observer:
    """Streaming statistics of one tensor; holds no activations.

    Attributes:
        low: smallest value seen, real.
        high: largest value seen, real.
        count, total, total_square: of all elements, in float64.
        histogram: counts over 2,048 equal bins of [low, high], filled by ``look_again``.
    """

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    total: float = 0.0
    total_square: float = 0.0
    histogram: NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))

    def look(self, array: Array, method: RangeMethod) -> None:
        """Takes in one batch. NaN makes ``low`` and ``high`` NaN."""
        if array.size == 0:
            return
        tensor = torch.from_numpy(array)
        low, high = torch.aminmax(tensor)
        self.low = float(np.minimum(self.low, low.item()))
        self.high = float(np.maximum(self.high, high.item()))
        if method is RangeMethod.MEAN_3_SIGMA:
            self.count += array.size
            self.total += tensor.sum(dtype=torch.float64).item()
            self.total_square += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2

    def look_again(self, array: Array) -> None:
        """Takes the same batch into the histogram, after every batch was looked at once."""
        if array.size and self.high > self.low:
            tensor = torch.from_numpy(array)
            counts = torch.histc(tensor, _BINS, min=self.low, max=self.high)
            self.histogram += counts.to(torch.float64).numpy()

    @property
    def finite(self) -> bool:
        """No NaN or infinity was seen."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high)) or self.low == np.inf

    def value_range(self, method: RangeMethod, spec: QuantSpec) -> tuple[float, float]:
        """The range to encode, real. ``(0, 0)`` where nothing was seen."""
        if self.low > self.high:
            return 0.0, 0.0
        if method is RangeMethod.MEAN_3_SIGMA:
            mean = self.total / self.count
            sigma = np.sqrt(max(self.total_square / self.count - mean**2, 0.0))
            return max(self.low, mean - 3 * sigma), min(self.high, mean + 3 * sigma)
        if method.needs_histogram and self.high > self.low:
            if method is RangeMethod.PERCENTILE:
                return self._percentile(1e-5)
            return self._least_error(spec)
        return self.low, self.high

    def _edges(self) -> NDArray[np.float64]:
        return np.linspace(self.low, self.high, _BINS + 1)

    def _percentile(self, tail: float) -> tuple[float, float]:
        cumulative = np.cumsum(self.histogram) / self.histogram.sum()
        edges = self._edges()
        first = int(np.searchsorted(cumulative, tail, side="right"))
        last = int(np.searchsorted(cumulative, 1 - tail, side="left"))
        return float(edges[first]), float(edges[min(last, _BINS - 1) + 1])

    def _least_error(self, spec: QuantSpec) -> tuple[float, float]:
        """Clipping error from the histogram plus rounding error of one LSB, s²/12."""
        edges = self._edges()
        centres = (edges[:-1] + edges[1:]) / 2
        weight = self.histogram / self.histogram.sum()
        levels = spec.q_max - spec.q_min
        best, best_error = (self.low, self.high), np.inf
        for factor in np.linspace(1.0, 1.0 / _SHRINK_STEPS, _SHRINK_STEPS):
            low, high = min(self.low, 0.0) * factor, max(self.high, 0.0) * factor
            span = 2 * max(-low, high) if spec.symmetric else high - low
            clipped = np.maximum(np.maximum(low - centres, centres - high), 0.0)
            inside = weight[clipped == 0].sum()
            error = float((weight * clipped**2).sum() + inside * (span / levels) ** 2 / 12)
            if error < best_error:
                best, best_error = (low, high), error
        return best


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
