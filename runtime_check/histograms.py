"""Histograms of linears' inputs in the float graph and in the rotated one, with their encodings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.bit_items import HEAD, LinearGroup, items_of
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.quant_types import Encoding
from qnpu.runtime_check.segments import SEGMENT_BYTES, SegmentRunner
from qnpu.runtime_check.session import Array, Feeds

# Bins end at ±2^(k/2): a half octave wide, the same for all values of a float32.
_PER_OCTAVE = 2
_POWERS = np.arange(-126 * _PER_OCTAVE, 128 * _PER_OCTAVE + 1)
_MAGNITUDES = np.exp2(_POWERS / _PER_OCTAVE)
_OCTAVES_SHOWN = 16


@dataclass(frozen=True, slots=True)
class LinearInput:
    """A tensor that linears take, in two forms of a graph.

    Attributes:
        layer: from 0; the head's is behind the last.
        role: of the first linear that takes it, as in ``TensorBits``.
        before: its name in the one graph.
        after: its name in the other.
    """

    layer: int
    role: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """What was seen of a tensor.

    Attributes:
        counts: elements in each bin.
        low: smallest value, real.
        high: largest value, real.
    """

    counts: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TensorHistogram:
    """A tensor before and after rotation.

    Attributes:
        name: in the graph after.
        layer, role: see ``LinearInput``.
        edges: of the bins, ascending, real; one more than there are bins. They are symmetric about
            zero and, but for the middle bin, a half octave wide.
        before, after: what was seen; elements that are not finite are left out.
        bits: of the encoding; 0 where the tensor has none.
        range_low, range_high: real values that the outermost codes stand for.
        step: real units per LSB.
    """

    name: str
    layer: int
    role: str
    edges: tuple[float, ...]
    before: Distribution
    after: Distribution
    bits: int
    range_low: float
    range_high: float
    step: float

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as in report.json."""
        return asdict(self)


def linear_inputs(before: ir.Model, after: ir.Model) -> list[LinearInput]:
    """Inputs of linears of the first, the middle and the last layer, and of the head.

    Inputs are matched by a weight that takes them, for a rotation online makes a tensor with
    another name. A head whose weight was the embedding has one of its own after rotation, so heads
    are matched as such.

    Args:
        before: canonical float graph.
        after: the same with rotations.

    Returns:
        In graph order; none for a graph that is no decoder that is understood.
    """
    items = items_of(before), items_of(after)
    if items[0] is None or items[1] is None:
        return []
    first, second = items[0].groups, items[1].groups
    takers = {item.shape.name: group for group in first for item in group.linears}
    heads = [group for group in first if _role(group) == HEAD]
    last = max((group.layer for group in first if _role(group) != HEAD), default=0)
    found: dict[str, LinearInput] = {}
    for group in second:
        same = [takers[item.shape.name] for item in group.linears if item.shape.name in takers]
        source = next(iter(same or (heads if _role(group) == HEAD else [])), None)
        if source is not None and (source in heads or source.layer in {0, last // 2, last}):
            place = LinearInput(source.layer, _role(source), source.name, group.name)
            found.setdefault(source.name, place)
    return list(found.values())


def _role(group: LinearGroup) -> str:
    return group.linears[0].shape.role


def tensor_histograms(
    before: ir.Model,
    after: ir.Model,
    batches_before: Sequence[Feeds],
    batches_after: Sequence[Feeds],
    encodings: EncodingTable,
    inputs: Sequence[LinearInput],
    segment_bytes: int = SEGMENT_BYTES,
) -> list[TensorHistogram]:
    """Counts the elements of some tensors in both graphs, on the same data.

    Both graphs are streamed by segments; of each tensor only counts are kept.

    Args:
        before: canonical float graph.
        after: the same with rotations.
        batches_before: for the first graph.
        batches_after: the same for the second one, whose caches may be rotated.
        encodings: by names of ``after``.
        inputs: what to look at, see ``linear_inputs``.
        segment_bytes: activations per segment.

    Returns:
        In the order of ``inputs``; without those that no element was seen of.
    """
    first = _counted(before, batches_before, {item.before for item in inputs}, segment_bytes)
    second = _counted(after, batches_after, {item.after for item in inputs}, segment_bytes)
    known = {name: encodings[name] for name in encodings}
    return [
        _histogram(item, first[item.before], second[item.after], known.get(item.after))
        for item in inputs
        if first[item.before].any and second[item.after].any
    ]


@dataclass(slots=True)
class _Counts:
    """Running counts of one tensor.

    Attributes:
        negative, positive: elements by magnitude: at least 2^(k/2), below 2^((k+1)/2).
        near_zero: of a magnitude below all of these.
        low, high: extremes.
    """

    negative: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_POWERS.size, np.int64))
    positive: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_POWERS.size, np.int64))
    near_zero: int = 0
    low: float = np.inf
    high: float = -np.inf

    @property
    def any(self) -> bool:
        """An element was seen."""
        return self.low <= self.high

    def look(self, array: Array) -> None:
        values = array.reshape(-1)
        values = values[np.isfinite(values)]
        if not values.size:
            return
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        # A place of -1 is below the first magnitude: nearer to zero than any.
        places = np.searchsorted(_MAGNITUDES, np.abs(values), side="right") - 1
        self.near_zero += int(np.count_nonzero(places < 0))
        self.negative += _count(places[(values < 0) & (places >= 0)])
        self.positive += _count(places[(values > 0) & (places >= 0)])

    def within(self, first: int, last: int) -> Distribution:
        """Counts by bins: what is below place ``first`` is one bin about zero."""
        middle = self.near_zero + int(self.negative[:first].sum() + self.positive[:first].sum())
        left, right = self.negative[first : last + 1][::-1], self.positive[first : last + 1]
        counts = (*left.tolist(), middle, *right.tolist())
        return Distribution(counts, self.low, self.high)


def _count(places: NDArray[np.intp]) -> NDArray[np.int64]:
    return np.bincount(places, minlength=_POWERS.size).astype(np.int64)


def _counted(
    model: ir.Model, batches: Sequence[Feeds], names: Iterable[str], segment_bytes: int
) -> dict[str, _Counts]:
    counts = {name: _Counts() for name in names}
    for step in SegmentRunner(model, batches, segment_bytes).stream(set(counts)):
        for name, array in step.values.items():
            counts[name].look(array)
    return counts


def _histogram(
    item: LinearInput, before: _Counts, after: _Counts, encoding: Encoding | None
) -> TensorHistogram:
    peak = max(abs(end) for counts in (before, after) for end in (counts.low, counts.high))
    last = max(int(np.searchsorted(_MAGNITUDES, peak, side="right")) - 1, 0)
    first = max(last + 1 - _OCTAVES_SHOWN * _PER_OCTAVE, 0)
    ends = _MAGNITUDES[first : last + 1].tolist()
    ends.append(float(np.exp2((_POWERS[last] + 1) / _PER_OCTAVE)))
    edges = (*(-end for end in reversed(ends)), *ends)
    return TensorHistogram(
        name=item.after,
        layer=item.layer,
        role=item.role,
        edges=edges,
        before=before.within(first, last),
        after=after.within(first, last),
        bits=encoding.spec.bits if encoding is not None else 0,
        range_low=float(encoding.low.min()) if encoding is not None else 0.0,
        range_high=float(encoding.high.max()) if encoding is not None else 0.0,
        step=float(encoding.scale.max()) if encoding is not None else 0.0,
    )
