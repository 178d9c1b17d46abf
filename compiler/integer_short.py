"""Requantization in int32, where ratios of scales are small whole numbers times 2^-k, or 1/D.

Of the former it is exact: M_i = m_i · 2^-k, and with f all that does not depend on data::

    y = clamp(⌊Σ_i a_i · M_i + f + 1/2⌋ + z)
      = clamp(((Σ_i a_i · m_i + ⌊f · 2^k⌋ + 2^(k-1)) >> k) + z)

as Σ a·m and 2^(k-1) are whole (of k = 0 nothing is rounded). A division by 2^k is a shift where no
sum is negative, so signed results are lifted; of unsigned ones, what is negative is cut towards 0,
and clamped to 0 either way (only sums beyond 32 bits are lifted there). The least and the greatest
number that each a can be prove that sums are within 32 bits.

Of a sum of whole numbers a and a ratio of 1/D no product is needed::

    y = clamp(⌊(a + f) / D + 1/2⌋ + z) = clamp(⌊(a + f + ⌊D/2⌋ + z·D) / D⌋)

Scales are float32, so M is not quite 1/D. Where D is odd, (a + f)/D is 1/2D at least from halfway
between two codes, and M gives the same codes as long as it is not farther off than that.

Float32 does the same as m·2^-k where products stay below 2^24: there it is exact as well
(QLinearMatMul).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.integer_math import round_half_up, stored_bits
from qnpu.compiler.quant_types import Encoding, QuantSpec

BYTE = QuantSpec(8, signed=False, symmetric=False)
"""Of either half of 16-bit codes."""
_WORD = 1 << 31
_FLOAT_WHOLE = 1 << 24  # up to here float32 holds every whole number
_FLOAT_SHIFT = 120  # m·2^-shift is a normal float32


@dataclass(frozen=True, slots=True)
class Term:
    """One summand.

    Attributes:
        ratios: M, one per channel, or one alone.
        low, high: the least and the greatest a there can be, as many or one alone.
    """

    ratios: Sequence[Fraction]
    low: Sequence[int]
    high: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class ShortPoint:
    """Ratios of scales as integers, without error.

    Attributes:
        multipliers: m, one array per term, int64, shape () or (channels,).
        step: 2^k or D, int64, shape () or (channels,).
        start: ⌊(f + 1/2) · step⌋, int64, shape () or (channels,).
        lift: added to results, LSB, where a sum must not be negative; it vanishes in the cast to
            codes.
        inside: whether no sum can be negative, and no result is ever clipped.
    """

    multipliers: tuple[NDArray[np.int64], ...]
    step: NDArray[np.int64]
    start: NDArray[np.int64]
    lift: int
    inside: bool


def short_point(
    terms: Sequence[Term], addends: Sequence[Fraction], zero_point: int, spec: QuantSpec
) -> ShortPoint | None:
    """Integers for ratios m·2^-k; None where one is none, or a sum may leave int32.

    Args:
        terms: what is added up.
        addends: f, LSB of the result, one per channel, or one alone.
        zero_point: z of the result.
        spec: of the result.
    """
    count = max(len(addends), *(len(term.ratios) for term in terms))
    behind = [_bits_behind(ratio) for term in terms for ratio in term.ratios]
    if min(behind) < 0:
        return None
    unit = 1 << max(behind)  # one for all channels
    factors = [[int(_at(t.ratios, c) * unit) for c in range(count)] for t in terms]
    starts = [floor(_at(addends, c) * unit + Fraction(unit, 2)) for c in range(count)]
    return _lifted(terms, factors, starts, [unit] * count, zero_point, spec)


def quotient_point(
    sums: Term, added: Sequence[Fraction], zero_point: int, spec: QuantSpec
) -> ShortPoint | None:
    """Integers for ratios 1/D; None where one is none, as of ``short_point``, or f not whole.

    Args:
        sums: whole numbers.
        added: f, LSB of those, one per channel, or one alone.
        zero_point: z of the result.
        spec: of the result.
    """
    count = max(len(added), len(sums.ratios), len(sums.low))
    reach = max(spec.q_max - zero_point, zero_point - spec.q_min)
    divisors: list[int] = []
    for c in range(count):
        ratio, f = _at(sums.ratios, c), _at(added, c)
        bound = max(abs(_at(sums.low, c) + f), abs(_at(sums.high, c) + f))
        divisors.append(max(1, round_half_up(1 / ratio)))
        if f.denominator > 1 or not _is_quotient(ratio, divisors[-1], bound, reach):
            return None
    starts = [int(_at(added, c)) + divisor // 2 for c, divisor in enumerate(divisors)]
    return _lifted([sums], [[1] * count], starts, divisors, zero_point, spec)


def _is_quotient(ratio: Fraction, divisor: int, bound: Fraction, reach: int) -> bool:
    """Whether a·ratio and a/divisor round alike, for |a| up to a bound or up to what is clipped."""
    error = abs(ratio - Fraction(1, divisor))
    last = min(bound, Fraction((reach + 1) * divisor))
    return not error or (divisor % 2 == 1 and 2 * divisor * last * error < 1)


def _bits_behind(ratio: Fraction) -> int:
    """k of m·2^-k; -1 where there is none."""
    denominator = ratio.denominator
    return denominator.bit_length() - 1 if denominator & (denominator - 1) == 0 else -1


def _lifted(
    terms: Sequence[Term],
    factors: Sequence[Sequence[int]],
    starts: Sequence[int],
    steps: Sequence[int],
    zero_point: int,
    spec: QuantSpec,
) -> ShortPoint | None:
    """One lift for all channels, so that all are clipped alike."""
    ends = []
    for c, (start, step) in enumerate(zip(starts, steps, strict=True)):
        products = [
            (m[c] * _at(t.low, c), m[c] * _at(t.high, c))
            for t, m in zip(terms, factors, strict=True)
        ]
        fixed = start + zero_point * step
        ends.append((sum(map(min, products)) + fixed, sum(map(max, products)) + fixed))
    pairs = list(zip(ends, steps, strict=True))
    lift = max(_whole_lift(least, step, spec) for (least, _), step in pairs)
    if max(most + lift * step for (_, most), step in pairs) >= _WORD:
        return None
    inside = all(
        spec.q_min <= least // step and most // step <= spec.q_max for (least, most), step in pairs
    )
    return ShortPoint(
        multipliers=tuple(_array(numbers) for numbers in factors),
        step=_array(steps),
        start=_array(starts),
        lift=lift,
        inside=inside and spec.q_min == lift == 0,
    )


def _at(numbers: Sequence[Any], channel: int) -> Any:
    return numbers[channel if len(numbers) > 1 else 0]


def _array(numbers: Sequence[int]) -> NDArray[np.int64]:
    """One number alone where all are equal."""
    same = all(number == numbers[0] for number in numbers)
    return np.array(numbers[0] if same else numbers, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class SplitPoint:
    """Ratios of scales for sums that come as two, 256·a + b, without error.

    The shift comes in two steps, of which the first rounds nothing that the second would not::

        ((256·a + b)·m + start) >> k = (a·m + ((b·m + start) >> 8)) >> (k - 8)

    Attributes:
        multiplier: m, int64, shape () or (channels,).
        shift: k, 9 at least.
        start: ⌊f · 2^k⌋ + 2^(k-1), int64, shape () or (channels,).
        fine_lift: added to the first step's results, so that no sum there is negative.
        lift: as in ``ShortPoint``.
    """

    multiplier: NDArray[np.int64]
    shift: int
    start: NDArray[np.int64]
    fine_lift: int
    lift: int


def split_point(
    sums: Term, addends: Sequence[Fraction], zero_point: int, spec: QuantSpec
) -> SplitPoint | None:
    """Integers for ratios; None as of ``short_point``.

    Args:
        sums: a and b; both have the same ends.
        addends: f, LSB of the result, one per channel, or one alone.
        zero_point: z of the result.
        spec: of the result.
    """
    behind = [_bits_behind(ratio) for ratio in sums.ratios]
    if min(behind) < 0:
        return None
    shift = max(9, *behind)
    unit, coarse = 1 << shift, 1 << (shift - 8)
    count = max(len(addends), len(sums.ratios), len(sums.low))
    factors = [int(_at(sums.ratios, c) * unit) for c in range(count)]
    starts = [floor(_at(addends, c) * unit) + unit // 2 for c in range(count)]
    ends = [(m * _at(sums.low, c), m * _at(sums.high, c)) for c, m in enumerate(factors)]
    fine_lift = -(min(min(pair) for pair in ends) // 256)
    if max(max(pair) for pair in ends) + 255 + 256 * fine_lift >= _WORD:
        return None
    least, most = 0, 0
    for pair, start in zip(ends, starts, strict=True):
        fixed = zero_point * coarse
        least = min(least, min(pair) + ((min(pair) + start) >> 8) + fixed)
        most = max(most, max(pair) + ((max(pair) + start) >> 8) + fixed)
    lift = _whole_lift(least, coarse, spec)
    if most + lift * coarse >= _WORD:
        return None
    return SplitPoint(_array(factors), shift, _array(starts), fine_lift, lift)


def _whole_lift(least: int, unit: int, spec: QuantSpec) -> int:
    """What keeps sums from ``least`` up, at 1/unit LSB, from being negative; vanishes in a cast.

    Nothing where codes are unsigned, as a sum below 0 gives 0, however it is divided; but one that
    is no int32 must become one.
    """
    if not spec.q_min and least >= -_WORD:
        return 0
    size = 1 << stored_bits(spec)
    return -(-max(-spec.q_min, -(least // unit)) // size) * size


def linear_terms(
    taken: QuantSpec, codes: NDArray[Any], ratios: Sequence[Fraction]
) -> tuple[Term, ...]:
    """The sums that a linear can make of any codes.

    Args:
        taken: spec of x; of its bytes where it has 16 bits.
        codes: of the weight, shape (features, channels).
        ratios: M, one per channel, or one alone.
    """
    wide = codes.astype(np.int64)
    up, down = np.maximum(wide, 0).sum(axis=0), np.minimum(wide, 0).sum(axis=0)
    low = (taken.q_min * up + taken.q_max * down).tolist()
    high = (taken.q_max * up + taken.q_min * down).tolist()
    return (Term(ratios, low, high),)


def exact_in_float(
    ratios: Sequence[Fraction], bounds: Sequence[int], result: Encoding
) -> list[bool]:
    """For each channel, whether float32 makes the exact codes of float(a)·M.

    Below 2^24 the product is exact. It never falls as a grows: beyond the first a of which the
    result is clipped, and up to which it is exact, all is clipped.

    Args:
        ratios: M, one per channel, or one alone.
        bounds: greatest |a|, as many or one alone.
        result: encoding of the result.
    """
    count = max(len(ratios), len(bounds))
    return [_is_exact(_at(ratios, c), _at(bounds, c), result.reach + 1) for c in range(count)]


def _is_exact(ratio: Fraction, bound: int, limit: int) -> bool:
    k = ratio.denominator.bit_length() - 1
    if ratio.denominator != 1 << k or k > _FLOAT_SHIFT or ratio <= 0:
        return False
    last = min(bound, -(-limit // ratio))
    return max(last, last * ratio.numerator, ratio.numerator) <= _FLOAT_WHOLE
