"""What the integer functions compute, in NumPy: the twins of ``qnpu.compiler.integer_functions``.

Written after the formulas, with signed 64-bit integers and arithmetic shifts, not after the ONNX
bodies. Every twin gives the codes that its function gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.integer_math import (
    ROOT_COARSE,
    ROOT_DENSE,
    ROOT_PART,
    ROOT_START,
    ROOT_STEP,
    AttentionNumbers,
    FixedPoint,
    NormNumbers,
    RotaryNumbers,
    Share,
    ShortShare,
    SoftmaxNumbers,
    root_starts,
)
from qnpu.compiler.integer_short import ShortPoint, SplitPoint
from qnpu.compiler.quant_types import QuantSpec

Codes = NDArray[Any]
Int64 = NDArray[np.int64]


def requantize(numbers: Codes, ratio: FixedPoint, zero_point: int, spec: QuantSpec) -> Codes:
    """y = clamp(⌊a·M + 1/2⌋ + z); ``ratio`` broadcasts along the last axis."""
    return _rounded([numbers], [ratio.high], [ratio.low], ratio, zero_point, spec)


def add(
    operands: Sequence[Codes],
    zero_points: Sequence[int],
    ratio: FixedPoint,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """y = clamp(⌊Σ (q_i - z_i)·M_i + 1/2⌋ + z); ``ratio`` holds one M per operand."""
    numbers = [
        codes.astype(np.int64) - zero for codes, zero in zip(operands, zero_points, strict=True)
    ]
    low = [None] * len(numbers) if ratio.low is None else list(ratio.low)
    return _rounded(numbers, list(ratio.high), low, ratio, zero_point, spec)


def requantize_short(
    operands: Sequence[Codes], point: ShortPoint, zero_point: int, spec: QuantSpec
) -> Codes:
    """y = clamp(⌊Σ a_i·M_i + f + 1/2⌋ + z), M and f as ``ShortPoint`` says."""
    sums = _weighted([item.astype(np.int64) for item in operands], point.multipliers)
    return _codes((sums + point.start) // point.step, zero_point, spec)


def sum_bytes_short(
    high: Codes, low: Codes, point: SplitPoint, zero_point: int, spec: QuantSpec
) -> Codes:
    """y = clamp(⌊(256·a + b)·M + f + 1/2⌋ + z), M and f as ``SplitPoint`` says."""
    sums = (256 * high.astype(np.int64) + low) * point.multiplier
    return _codes((sums + point.start) >> point.shift, zero_point, spec)


def multiply(
    first: Codes,
    second: Codes,
    zero_points: tuple[int, int],
    ratio: FixedPoint,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """y = clamp(⌊(q_a - z_a)·(q_b - z_b)·M + 1/2⌋ + z)."""
    one, other = first.astype(np.int64) - zero_points[0], second.astype(np.int64) - zero_points[1]
    return requantize(one * other, ratio, zero_point, spec)


def rotate(
    operands: tuple[Codes, Codes],
    zero_points: tuple[int, int],
    numbers: RotaryNumbers,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """y = clamp(⌊((q_a - z_a)·t_a + (q_b - z_b)·t_b) / 2^shift + 1/2⌋ + z)."""
    one, other = (
        (codes.astype(np.int64) - zero) * table.astype(np.int64)
        for codes, zero, table in zip(operands, zero_points, numbers.tables, strict=True)
    )
    nearest = (one + other + (1 << (numbers.shift - 1))) >> numbers.shift
    return _codes(nearest, zero_point, spec)


def rotate_by(
    operands: tuple[Codes, Codes, Codes, Codes],
    zero_points: tuple[int, int, int, int],
    sign: int,
    ratio: FixedPoint,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """y = clamp(⌊((q_a - z_a)·(q_c - z_c) ± (q_b - z_b)·(q_s - z_s))·M + 1/2⌋ + z)."""
    a, b, cosines, sines = (
        codes.astype(np.int64) - zero for codes, zero in zip(operands, zero_points, strict=True)
    )
    return requantize(a * cosines + sign * b * sines, ratio, zero_point, spec)


def rotate_halves(
    codes: Codes,
    zero: int,
    halves: tuple[RotaryNumbers, RotaryNumbers],
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """Both halves of the last axis, each by ``rotate`` with the other one."""
    one, other = np.split(codes, 2, axis=-1)
    turned = [
        rotate(operands, (zero, zero), numbers, zero_point, spec)
        for operands, numbers in zip(((one, other), (other, one)), halves, strict=True)
    ]
    return np.concatenate(turned, axis=-1)


def rotate_halves_by(
    operands: tuple[Codes, Codes, Codes],
    zero_points: tuple[int, int, int],
    ratio: FixedPoint,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """Both halves of the last axis by ``rotate_by``: a·cos - b·sin and b·cos + a·sin."""
    codes, cosines, sines = operands
    zeros = zero_points[0], *zero_points
    one, other = np.split(codes, 2, axis=-1)
    turned = [
        rotate_by((*pair, cosines, sines), zeros, sign, ratio, zero_point, spec)
        for pair, sign in (((one, other), -1), ((other, one), 1))
    ]
    return np.concatenate(turned, axis=-1)


def _rounded(
    numbers: Sequence[Codes],
    high: Sequence[Any],
    low: Sequence[Any],
    ratio: FixedPoint,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    wide = [item.astype(np.int64) for item in numbers]
    total = _weighted(wide, high)
    if ratio.low is not None:
        total = total + (_weighted(wide, low) >> ratio.fine)
    return _codes((total + (1 << (ratio.shift - 1))) >> ratio.shift, zero_point, spec)


def _weighted(numbers: Sequence[Int64], factors: Sequence[Any]) -> Int64:
    first, *rest = (a * m for a, m in zip(numbers, factors, strict=True))
    for item in rest:
        first = first + item
    return np.asarray(first, np.int64)


def _codes(nearest: Int64, zero_point: int, spec: QuantSpec) -> Codes:
    codes: Codes = np.clip(nearest + zero_point, spec.q_min, spec.q_max).astype(spec.code_dtype)
    return codes


def softmax(
    codes: Codes, numbers: SoftmaxNumbers, axis: int, zero_point: int, spec: QuantSpec
) -> Codes:
    """y = clamp(⌊e·numerator / Σe / 2^shift + 1/2⌋ + z), e of each code's distance to max x."""
    wide = codes.astype(np.int64)
    weights = numbers.exponentials[wide.max(axis=axis, keepdims=True) - wide]
    shares = weights * numbers.numerator // weights.sum(axis=axis, keepdims=True)
    nearest = (shares + (1 << (numbers.shift - 1))) >> numbers.shift
    return _codes(nearest, zero_point, spec)


def exponentials(scores: Codes, mask: Codes, numbers: AttentionNumbers) -> Int64:
    """e of max x - x in steps, rounded, along the last axis; x = scores + mask."""
    masked = scores.astype(np.int64) + mask
    distance = masked.max(axis=-1, keepdims=True) - masked + numbers.step // 2
    found: Int64 = numbers.exponentials[
        np.minimum(distance // numbers.step, len(numbers.exponentials) - 1)
    ]
    return found


def attention(
    weights: Int64,
    values: Codes,
    value_zero: int,
    share: Share | ShortShare,
    zero_point: int,
    spec: QuantSpec,
) -> Codes:
    """y = clamp(⌊Σ_j e_j·(v_j - z_v) / Σe · s_v/s_y + 1/2⌋ + z), as ``share`` says.

    Args:
        weights: e, shape (…, S, T).
        values: codes, shape (…, T, D).
        value_zero: z_v.
        share: of the attention.
        zero_point: z of the result.
        spec: of the result.
    """
    total = weights.sum(axis=-1, keepdims=True)
    sums = weights @ values.astype(np.int64)
    if isinstance(share, ShortShare):
        half = total * share.ratio >> share.shift
        return _codes((sums - value_zero * total + half) // (2 * half), zero_point, spec)
    sums = sums * (share.numerator // total) - value_zero * share.numerator
    return _codes((sums + (1 << (share.shift - 1))) >> share.shift, zero_point, spec)


def reciprocal_root(numbers: Int64, numerator: int) -> Int64:
    """numerator / √n, of n from 1 to 2^62, within 6 and a part in 2^56.

    Newton's method finds the root of n·4^t, which has 61 or 62 bits; a division finds the rest.
    """
    powers = 4 ** np.arange(31, dtype=np.int64)
    shift = 31 - (numbers[..., None] >= powers).sum(axis=-1).astype(np.int64)
    scaled, root = numbers << (2 * shift), np.full_like(numbers, ROOT_START)
    for _ in range(4):
        root = (root + scaled // root) // 2
    root = root - 1
    slope = (scaled - root * root) * ROOT_PART // (2 * root) * ROOT_STEP // root
    whole = numerator // root
    share = (whole << shift) + ((numerator - whole * root) << shift) // root
    return np.asarray(share - share // ROOT_COARSE * slope // ROOT_DENSE)


def rms_norm(
    codes: Codes, zero: int, numbers: NormNumbers, zero_point: int, spec: QuantSpec
) -> Codes:
    """c·γ / √(mean c² + ε) over the last axis, as ``NormNumbers`` says."""
    return _normalized(codes.astype(np.int64) - zero, numbers, zero_point, spec)


def short_rms_norm(
    codes: Codes, zero: int, numbers: NormNumbers, zero_point: int, spec: QuantSpec
) -> Codes:
    """As ``rms_norm`` with gains of 1; the root whole, by three steps from ``root_starts``."""
    centred = codes.astype(np.int64) - zero
    energy = (centred * centred).sum(axis=-1, keepdims=True) * numbers.prescale + numbers.epsilon
    powers, starts = root_starts(numbers.epsilon)
    root = starts[np.searchsorted(powers, energy, side="right") - 1]
    for _ in range(3):
        root = (root + energy // root) // 2
    sums = centred * (numbers.numerator // root)
    return _codes((sums + (1 << (numbers.shift - 1))) >> numbers.shift, zero_point, spec)


def layer_norm(codes: Codes, numbers: NormNumbers, zero_point: int, spec: QuantSpec) -> Codes:
    """(x - mean x)·γ / √(var x + ε) + β over the last axis, as ``NormNumbers`` says."""
    wide = codes.astype(np.int64) * numbers.finer
    size = wide.shape[-1]
    mean = (wide.sum(axis=-1, keepdims=True) + size // 2) // size
    return _normalized(wide - mean, numbers, zero_point, spec)


def _normalized(centred: Int64, numbers: NormNumbers, zero_point: int, spec: QuantSpec) -> Codes:
    energy = (centred * centred).sum(axis=-1, keepdims=True) * numbers.prescale + numbers.epsilon
    share = reciprocal_root(energy, numbers.numerator)
    sums = centred * numbers.gain * share + numbers.bias
    return _codes((sums + (1 << (numbers.shift - 1))) >> numbers.shift, zero_point, spec)
