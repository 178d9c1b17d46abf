"""Requantization without floats: real ratios as integer multipliers and one shift.

One rounding everywhere, half up, once, at the end (quantnpu.md §6)::

    y = clamp(⌊Σ_i a_i · M_i + 1/2⌋ + z),  M_i = s_i / s_y, the exact ratio of scales
      = clamp(((Σ_i a_i · m_i + 2^(shift-1)) >> shift) + z),  m_i = round(M_i · 2^shift)

where Σ a·m stays within 62 bits. That may leave too few bits behind the point; the rest of
each ratio is then a second multiplier, M ≈ (m + m₂ · 2^-fine) · 2^-shift. As Σ a·m is a whole
number, the nested shift rounds nothing twice::

    y = clamp(((Σ_i a_i · m_i + ((Σ_i a_i · m₂_i) >> fine) + 2^(shift-1)) >> shift) + z)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, isqrt, log, log2
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnpu.compiler.quant_types import Encoding, QuantSpec

INT32_MAX = 2**31 - 1
LIFT_BITS = 62
"""2^62 is added to sums before a logical shift: none is negative then."""
ROOT_START = 3 << 29
"""Where Newton's method begins, for a root of 2^30 to 2^31."""
ROOT_PART, ROOT_STEP = 1 << 28, 1 << 31
"""Steps of what is left of a root, 0 to 2; and of that by the root, times the former."""
ROOT_COARSE, ROOT_DENSE = 1 << 30, 1 << 29
"""What a share is divided by before it is multiplied with that quotient, and after."""
_MOST_FINE = 30

CLOSE = Fraction(1, 1 << 28)
"""Error, LSB, that a requantization may have before its rounding and still be called exact: of
2^28 results one may fall to the other side of a tie."""


@dataclass(frozen=True, slots=True, eq=False)
class FixedPoint:
    """Ratios of scales as integers.

    Attributes:
        high: m, int64, shape () or (ratios,).
        shift: bits behind the point.
        low: m₂, int64, same shape; None where high alone is close enough.
        fine: bits of ``low``.
    """

    high: NDArray[np.int64]
    shift: int
    low: NDArray[np.int64] | None = None
    fine: int = 0

    @property
    def parts(self) -> list[int]:
        """Each ratio as one number, at 2^-(shift + fine)."""
        high = [int(number) << self.fine for number in self.high.reshape(-1)]
        low = [0] * len(high) if self.low is None else self.low.reshape(-1).tolist()
        return [a + int(b) for a, b in zip(high, low, strict=True)]


def exact_ratios(numerators: Iterable[ArrayLike], denominator: ArrayLike) -> list[Fraction]:
    """Products of scales divided by a scale, without any rounding.

    Args:
        numerators: float32 scales to multiply, each of shape () or (channels,).
        denominator: float32 scale, shape ().

    Returns:
        One per channel; one alone where every scale is.
    """
    product = [1 / Fraction(float(np.asarray(denominator)))]
    for item in numerators:
        factors = [Fraction(float(number)) for number in np.asarray(item).reshape(-1)]
        count = max(len(product), len(factors))
        product = [product[i % len(product)] * factors[i % len(factors)] for i in range(count)]
    return product


def fixed_point(
    ratios: Sequence[Fraction],
    bounds: Sequence[int],
    result: Encoding,
    *,
    terms: int = 1,
    close: Fraction = CLOSE,
) -> FixedPoint:
    """Integers for ratios, as close as 64-bit sums allow.

    Args:
        ratios: M, one or several.
        bounds: greatest |a| that each is multiplied with, LSB; as many, or one for all.
        result: encoding of the result; where that is clipped no closeness is needed.
        terms: how many products are added up.
        close: error before the rounding, LSB, above which a second multiplier is worth its price.

    Raises:
        ValueError: results have more bits than sums.
    """
    pairs = [(ratio, bounds[index % len(bounds)]) for index, ratio in enumerate(ratios)]
    largest = max(abs(ratio) * bound for ratio, bound in pairs) * terms
    size = (largest.numerator // largest.denominator).bit_length()
    shift = min(most_shift(result.spec), _sum_bits(result.spec) - size)
    if shift < 1:
        raise ValueError(f"results of {size} bits do not fit")
    reach = result.reach if terms == 1 else None
    high = [round_half_up(ratio * (1 << shift)) for ratio in ratios]
    error = max(
        _relevant(ratio, bound, reach) * abs(ratio - Fraction(number, 1 << shift))
        for (ratio, bound), number in zip(pairs, high, strict=True)
    )
    shape = () if len(ratios) == 1 else (len(ratios),)
    if error * terms <= close:
        return FixedPoint(np.array(high, np.int64).reshape(shape), shift)
    fine = min(_MOST_FINE, LIFT_BITS - 1 - (max(bounds) * terms).bit_length())
    scaled = [round_half_up(ratio * (1 << (shift + fine))) for ratio in ratios]
    parts = [divmod(number, 1 << fine) for number in scaled]
    whole, rest = (np.array(part, np.int64).reshape(shape) for part in zip(*parts, strict=True))
    return FixedPoint(whole, shift, rest, fine)


def most_shift(spec: QuantSpec) -> int:
    """Bits behind the point, so that what is left of 2^62 vanishes in the cast to codes."""
    return LIFT_BITS - stored_bits(spec)


def stored_bits(spec: QuantSpec) -> int:
    """Bits of the integers that hold codes: a byte at least."""
    return max(8, spec.bits)


def _sum_bits(spec: QuantSpec) -> int:
    """Bits of a sum: with 2^62 and a zero point added it is neither negative nor beyond 2^64."""
    return LIFT_BITS - int(spec.signed)


def _relevant(ratio: Fraction, bound: int, reach: int | None) -> Fraction:
    """Greatest |a| of which the result is not clipped."""
    if reach is None or not ratio:
        return Fraction(bound)
    return min(Fraction(bound), (reach + 1) / abs(ratio))


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxNumbers:
    """What an integer softmax counts with.

    Attributes:
        exponentials: round(2^b · exp(-s_x·d)) for every distance d of two codes, int64; b as great
            as 62 bits of a product with ``numerator`` allow.
        numerator: 2^shift / s_y, a whole number where s_y is a power of two.
        shift: bits behind the point; one is enough to round a whole number.
    """

    exponentials: NDArray[np.int64]
    numerator: int
    shift: int


_MOST_EXPONENT_BITS = 44  # a row of 2^17 codes has a sum of 61
_FEW_BITS = 10  # behind the point, where 1/s_y is no whole number


def softmax_numbers(scale: float, bits: int, result: Encoding) -> SoftmaxNumbers:
    """Numbers of a softmax.

    Args:
        scale: s_x, real units per LSB of what comes in.
        bits: of what comes in.
        result: encoding of what comes out.
    """
    steps = 1 / Fraction(float(result.scale))
    shift = 1 if steps.denominator == 1 else _FEW_BITS
    numerator = round_half_up(steps * (1 << shift))
    size = min(_MOST_EXPONENT_BITS, LIFT_BITS - 1 - numerator.bit_length())
    distances = np.arange(1 << bits, dtype=np.float64)
    exponentials = np.rint(np.exp(-scale * distances) * 2.0**size).astype(np.int64)
    return SoftmaxNumbers(exponentials, numerator, shift)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """How Σ e·v becomes codes in 64 bits: y = ((Σ e·v)·⌊numerator / Σ e⌋ >> shift) + z.

    Attributes:
        numerator: ⌊2^shift · s_v/s_y⌋.
        shift: bits behind the point.
    """

    numerator: int
    shift: int


@dataclass(frozen=True, slots=True, eq=False)
class ShortShare:
    """How Σ e·v becomes codes in 32 bits: y = ⌊(Σ e·v + h·(2z + 1)) / 2h⌋, h = Σe·ratio >> shift.

    2h is Σ e · s_y/s_v. Signed results are lifted by ``lift``, so that no sum is negative; of
    unsigned ones that would change nothing.

    Attributes:
        ratio: round(2^shift · s_y/2s_v).
        shift: bits behind the point of h.
        lift: LSB, vanishes in the cast to codes.
    """

    ratio: int
    shift: int
    lift: int


@dataclass(frozen=True, slots=True, eq=False)
class AttentionNumbers:
    """What an attention counts with that never forms its probabilities.

    y = Σ e_j·v_j / Σ e_j · s_v/s_y + z, with e_j = exponentials[d], d being max x - x_j in steps,
    rounded.

    Attributes:
        exponentials: round(e_0 · exp(-s_x·step·d)), of two bytes, int64; the last is 0.
        step: LSB of the scores.
        share: how the quotient is made.
    """

    exponentials: NDArray[np.int64]
    step: int
    share: Share | ShortShare


@dataclass(frozen=True, slots=True)
class MixedValues:
    """What is known of the values that an attention mixes.

    Attributes:
        scale: s_v, real units per LSB.
        reach: greatest |code|, LSB.
        zero_point: of the codes.
        keys: how many exponentials a row has at most.
    """

    scale: Fraction
    reach: int
    zero_point: int
    keys: int


_MOST_PEAK = (1 << 16) - 1  # two bytes
_LEAST_PEAK = 1 << 13  # of exponentials that are smaller so that Σ e·v fits int32
_LEAST_HALF = 1 << 10  # of h, so that a quotient of 8 bits is off by 1/8 LSB at most
_HALF_SHIFT = 32


def attention_numbers(
    scale: Fraction, values: MixedValues, result: Encoding, *, short: bool = False
) -> AttentionNumbers:
    """Numbers of an attention.

    Args:
        scale: s_x, real units per LSB of a score; above 0.
        values: that it mixes.
        result: encoding of what comes out, of 8 bits.
        short: the quotient in 32 bits, where that is close enough.
    """
    ratio = values.scale / Fraction(float(result.scale))
    room = INT32_MAX // (values.keys * values.reach)
    share: Share | ShortShare | None = None
    if short:
        lift = (1 << stored_bits(result.spec)) if result.spec.q_min else 0
        start = (abs(lift + int(result.zero_point)) + 1) / ratio + abs(values.zero_point)
        most = min(INT32_MAX // ceil(values.keys * (values.reach + start)), _MOST_PEAK)
        if most >= _LEAST_PEAK and most / (2 * ratio) >= _LEAST_HALF:
            bits = _HALF_SHIFT - ceil(1 / ratio).bit_length()
            share = ShortShare(round_half_up((1 << bits) / (2 * ratio)), bits, lift)
            room = most
    most = min(room if room >= _LEAST_PEAK else _MOST_PEAK, _MOST_PEAK)
    far = log(2 * most) / float(scale)  # LSB, beyond which an exponential is rounded to 0
    step = ceil(far / ((1 << 16) - 2))
    distances = np.arange(ceil(far / step) + 1) * float(step)
    exponentials = np.rint(np.exp(-float(scale) * distances) * most).astype(np.int64)
    exponentials[-1] = 0
    return AttentionNumbers(exponentials, step, share or _share(ratio, result.spec))


def _share(ratio: Fraction, spec: QuantSpec) -> Share:
    size = (ratio.numerator // ratio.denominator).bit_length()
    shift = min(most_shift(spec), LIFT_BITS - 18 - size)  # |Σ e·v / Σ e| <= 255
    whole = ratio * (1 << shift)
    return Share(whole.numerator // whole.denominator, shift)


@dataclass(frozen=True, slots=True, eq=False)
class NormNumbers:
    """What an integer norm counts with: y = ((c·gain·⌊numerator / √N⌋ + bias) >> shift) + z.

    c are the codes less their zero point; of LayerNorm, the codes times ``finer``, less the mean of
    that, a whole number. N = prescale·Σc² + epsilon.

    Attributes:
        gain: codes of the gains less their zero point, int64, shape () or (features,).
        bias: at 2^-shift LSB, int64, shape () or (features,).
        epsilon: at the scale of N, one at least.
        prescale: a power of four.
        numerator: below 2^62.
        shift: bits behind the point.
        finer: steps of the mean per LSB; 1 where none is taken off.
    """

    gain: NDArray[np.int64]
    bias: NDArray[np.int64]
    epsilon: int
    prescale: int
    numerator: int
    shift: int
    finer: int = 1


@dataclass(frozen=True, slots=True)
class NormShape:
    """What is known of a norm before its gains.

    Attributes:
        features: that it runs over.
        bits: of the codes it takes.
        scale: real units per LSB of those.
        epsilon: ε, real.
        centred: a LayerNorm.
    """

    features: int
    bits: int
    scale: float
    epsilon: float
    centred: bool


def norm_numbers(
    norm: NormShape,
    gains: tuple[NDArray[np.int64], float],
    result: Encoding,
    bias: NDArray[np.float64] | None = None,
) -> NormNumbers:
    """Numbers of a norm.

    Args:
        norm: its shape.
        gains: codes less their zero point, and their scale.
        result: encoding of what comes out.
        bias: real.

    Raises:
        ValueError: sums do not fit 62 bits.
    """
    codes, gain_scale = gains[0], Fraction(gains[1])
    if codes.size == 1 and int(codes.reshape(-1)[0]) > 0:  # all the bits are the share's then
        codes, gain_scale = np.array(1, np.int64), gain_scale * int(codes.reshape(-1)[0])
    bits = norm.bits
    if norm.centred:  # the mean is as fine as the sum of squares allows
        bits = max(bits, (LIFT_BITS - 1 - norm.features.bit_length()) // 2)
    finer = 1 << (bits - norm.bits)
    floor = norm.features * Fraction(norm.epsilon) * finer**2 / Fraction(norm.scale) ** 2
    largest = (norm.features << (2 * bits)) + floor
    half = (LIFT_BITS - (largest.numerator // largest.denominator).bit_length()) // 2
    if half < 0:
        raise ValueError(f"{norm.features} squares of {bits} bits do not fit")
    root = Fraction(isqrt(norm.features << 64), 1 << 32)
    step = Fraction(float(result.scale))
    ratio = root * gain_scale / step
    largest = ratio * max(1, int(np.abs(codes).max()))
    shift = min(
        most_shift(result.spec),
        LIFT_BITS - 2 - (largest.numerator // largest.denominator).bit_length(),
        LIFT_BITS - 1 - half - (ratio.numerator // ratio.denominator).bit_length(),
    )
    if shift < 1:
        raise ValueError("results do not fit")
    offsets = np.zeros((), np.int64)
    if bias is not None:
        offsets = np.rint(bias / float(step) * (1 << shift)).astype(np.int64)
    return NormNumbers(
        gain=codes,
        bias=offsets,
        epsilon=max(1, round_half_up(floor * (1 << (2 * half)))),
        prescale=1 << (2 * half),
        numerator=round_half_up(ratio * (1 << (shift + half))),
        shift=shift,
        finer=finer,
    )


_ROOT_OCTAVES = 1.5  # between two powers


def root_starts(least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a root of a number from ``least`` to 2^62 begins, so that three steps are enough.

    A start in the middle between two powers is off by 30 % at the most, and by 2^-22 after three
    steps of Newton's method.

    Returns:
        Powers, from ``least`` up, and the start for numbers from each of them on, both rising.
    """
    count = ceil((LIFT_BITS - log2(least)) / _ROOT_OCTAVES)
    ends = np.geomspace(float(least), 2.0**LIFT_BITS, count + 1)
    powers = np.rint(ends[:-1]).astype(np.int64)
    powers[0] = least
    middles = np.sqrt(ends[:-1]) * np.sqrt(np.sqrt(ends[1] / ends[0]))
    return powers, np.maximum(1, np.rint(middles)).astype(np.int64)


_SHORT_BITS = 29  # of a product, so that it stays in int32 when 2^30 lifts it above 0


def short_norm_numbers(
    norm: NormShape, gains: tuple[NDArray[np.int64], float], result: Encoding
) -> NormNumbers | None:
    """Numbers of an RMSNorm whose last product takes 32 bits.

    A row's reciprocal root has 8 bits at least, so 8-bit results are off by 0.4 LSB at most.

    Args:
        norm: its shape.
        gains: codes less their zero point, and their scale.
        result: encoding of what comes out.

    Returns:
        None where gains differ, or one is not above 0, or results have more or less than 8 bits.
    """
    codes, scale = gains
    if norm.centred or result.spec.bits != 8 or codes.size > 1 or int(codes.reshape(-1)[0]) <= 0:
        return None
    wide = norm_numbers(norm, gains, result)
    ratio = Fraction(isqrt(norm.features << 64), 1 << 32)
    ratio *= Fraction(scale) * int(codes.reshape(-1)[0]) / Fraction(float(result.scale))
    size = (ratio.numerator // ratio.denominator).bit_length()
    shift = min(_SHORT_BITS - size, 28 - stored_bits(result.spec))  # a zero point is below 2^28
    if shift < 1:
        return None
    half = (wide.prescale.bit_length() - 1) // 2
    return replace(wide, numerator=round_half_up(ratio * (1 << (shift + half))), shift=shift)


@dataclass(frozen=True, slots=True, eq=False)
class RotaryNumbers:
    """What a rotation counts with: y = (((q_a - z_a)·t_a + (q_b - z_b)·t_b) >> shift) + z.

    Attributes:
        tables: t, at 2^-shift LSB of the result, int32 or int64.
        shift: bits behind the point.
    """

    tables: tuple[NDArray[Any], NDArray[Any]]
    shift: int


_LEAST_SHIFT = 10  # error of a table of 8-bit codes: 255 / 2^10 LSB of the result


def rotary_numbers(
    tables: tuple[NDArray[np.float64], NDArray[np.float64]],
    reaches: tuple[int, int],
    result: Encoding,
) -> RotaryNumbers:
    """Numbers of a rotation: in 32 bits where those are enough, else in 64.

    Args:
        tables: what a code is multiplied with, in LSB of the result.
        reaches: greatest distance of either operand's codes from its zero point, LSB.
        result: encoding of what comes out.
    """
    peaks = [float(np.abs(table).max(initial=0.0)) for table in tables]
    bound = sum(reach * peak for reach, peak in zip(reaches, peaks, strict=True))
    size = max(ceil(bound), 1 << stored_bits(result.spec)).bit_length()
    shift = min(30 - size, 31 - stored_bits(result.spec))
    word: type[np.signedinteger[Any]] = np.int32
    if shift < _LEAST_SHIFT or max(reaches) > 255:
        shift, word = min(60 - size, most_shift(result.spec)), np.int64
    one, other = (np.rint(table * 2.0**shift).astype(word) for table in tables)
    return RotaryNumbers((one, other), shift)


def round_half_up(number: Fraction) -> int:
    """⌊x + 1/2⌋."""
    return (2 * number.numerator + number.denominator) // (2 * number.denominator)
