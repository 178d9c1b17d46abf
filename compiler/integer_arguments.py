"""Arguments of the integer functions: formulas of ``integer_math`` in numbers modulo 2^64.

Arrays are named as the parameters of ``qnpu.compiler.integer_functions``, and come in no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnpu.compiler.integer_math import (
    LIFT_BITS,
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
    round_half_up,
    stored_bits,
)
from qnpu.compiler.integer_short import ShortPoint, SplitPoint
from qnpu.compiler.quant_types import QuantSpec

Arguments = dict[str, NDArray[Any]]

_LIFT = 1 << LIFT_BITS
_NOTHING = Fraction(0)
_LOOKUP_ROWS = 4  # looked up by as many threads at most, each of which has a table in its cache
_ROOTS = 31  # powers of four below 2^62


def requantize_arguments(
    ratio: FixedPoint, zero_point: int, spec: QuantSpec, addends: Sequence[Fraction] = (_NOTHING,)
) -> Arguments:
    """Of IntRequantize, or IntRequantizeFine where the ratio has a second multiplier.

    Args:
        ratio: one M, or one per channel.
        zero_point: z of the result.
        spec: of the result.
        addends: added to what is multiplied (a bias, a zero point's cross term), LSB, not always
            whole; one per channel, or one alone.
    """
    factors = ratio.parts
    count = max(len(addends), len(factors))
    added = [
        round_half_up(addends[index % len(addends)] * factors[index % len(factors)])
        for index in range(count)
    ]
    shape = ratio.high.shape if count == len(factors) else (count,)
    offset = np.array([number >> ratio.fine for number in added], object).reshape(shape)
    found = {
        "multiplier": _unsigned(ratio.high),
        "offset": _unsigned(_rounding(ratio, zero_point) + offset),
    }
    if ratio.low is not None:
        rest = np.array([number % (1 << ratio.fine) for number in added], object).reshape(shape)
        found["fine_multiplier"] = _unsigned(ratio.low)
        found["fine_offset"] = _unsigned(_LIFT + rest)
        found["fine_shift"] = _unsigned(ratio.fine)
    return found | _limits(ratio.shift, spec)


def short_arguments(point: ShortPoint, zero_point: int, spec: QuantSpec) -> Arguments:
    """Of IntRequantizeShort, or IntAddShort where there are two terms.

    Args:
        point: the ratios.
        zero_point: z of the result.
        spec: of the result.
    """
    names = ["multiplier"] if len(point.multipliers) == 1 else ["multiplier_a", "multiplier_b"]
    start = _whole(point.start) + (zero_point + point.lift) * _whole(point.step)
    return {
        **{name: _word(m) for name, m in zip(names, point.multipliers, strict=True)},
        "offset": _word(start),
        "step": _word(point.step),
        "low": _word(point.lift + spec.q_min),
        "high": _word(point.lift + spec.q_max),
    }


def inside_arguments(point: ShortPoint, zero_point: int, spec: QuantSpec) -> Arguments:
    """Of IntRequantizeInside; see ``short_arguments``."""
    arguments = short_arguments(point, zero_point, spec)
    return {name: array for name, array in arguments.items() if name not in ("low", "high")}


def sum_bytes_arguments(point: SplitPoint, zero_point: int, spec: QuantSpec) -> Arguments:
    """Of IntSumBytesShort.

    Args:
        point: the ratios.
        zero_point: z of the result.
        spec: of the result.
    """
    shift, start = point.shift - 8, _whole(point.start)
    lifted = (zero_point + point.lift) << shift
    return {
        "multiplier": _word(point.multiplier),
        "fine_offset": _word(start % 256 + (point.fine_lift << 8)),
        "radix": _word(256),
        "offset": _word(start // 256 + lifted - point.fine_lift),
        "step": _word(1 << shift),
        "low": _word(point.lift + spec.q_min),
        "high": _word(point.lift + spec.q_max),
    }


def add_arguments(
    ratio: FixedPoint, zero_points: tuple[int, int], zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntAdd, or IntAddFine where the ratios have second multipliers.

    Args:
        ratio: M of either operand.
        zero_points: of the operands.
        zero_point: z of the result.
        spec: of the result.
    """
    parts = {"": (ratio.high, _rounding(ratio, zero_point))}
    if ratio.low is not None:
        parts["fine_"] = (ratio.low, _LIFT)
    found = _limits(ratio.shift, spec)
    for prefix, (factors, start) in parts.items():
        one, other = (int(factor) for factor in factors)
        found[f"{prefix}multiplier_a"] = _unsigned(one)
        found[f"{prefix}multiplier_b"] = _unsigned(other)
        found[f"{prefix}offset"] = _unsigned(start - zero_points[0] * one - zero_points[1] * other)
    if ratio.low is not None:
        found["fine_shift"] = _unsigned(ratio.fine)
    return found


def multiply_arguments(
    ratio: FixedPoint, zero_points: tuple[int, int], zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntMul; the second multiplier is not used."""
    return {
        "zero_a": _unsigned(zero_points[0]),
        "zero_b": _unsigned(zero_points[1]),
        "multiplier": _unsigned(ratio.high),
        "offset": _unsigned(_rounding(ratio, zero_point)),
        **_limits(ratio.shift, spec),
    }


def rotate_arguments(
    numbers: RotaryNumbers, zero_points: tuple[int, int], zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntRotate.

    Args:
        numbers: of the rotation.
        zero_points: of the operands.
        zero_point: z of the result.
        spec: of the result.
    """
    word = numbers.tables[0].dtype
    unsigned = np.dtype(f"u{word.name}")
    lift = 1 << (8 * word.itemsize - (1 if word.itemsize == 4 else 2))
    lifted = lift >> numbers.shift
    one, other = (_whole(t) * z for t, z in zip(numbers.tables, zero_points, strict=True))
    start = lift + (1 << (numbers.shift - 1)) + (zero_point << numbers.shift) - one - other
    return {
        "table_a": numbers.tables[0],
        "table_b": numbers.tables[1],
        "offset": np.asarray(start % (1 << (8 * word.itemsize)), dtype=unsigned),
        "shift": np.array(numbers.shift, unsigned),
        "low": np.array(lifted + spec.q_min, unsigned),
        "high": np.array(lifted + spec.q_max, unsigned),
    }


def rotate_by_arguments(
    ratio: FixedPoint,
    zero_points: tuple[int, int, int, int],
    sign: int,
    zero_point: int,
    spec: QuantSpec,
    word: type[np.signedinteger[Any]],
) -> Arguments:
    """Of IntRotateBy.

    Args:
        ratio: M of either product; a second multiplier is not used.
        zero_points: of the operands and of the tables.
        sign: of the second product, 1 or -1.
        zero_point: z of the result.
        spec: of the result.
        word: type of a product.
    """
    names = ("zero_a", "zero_b", "zero_cosines", "zero_sines", "sign")
    numbers = {
        name: np.array(number, word)
        for name, number in zip(names, (*zero_points, sign), strict=True)
    }
    return numbers | requantize_arguments(ratio, zero_point, spec)


def split_arguments() -> Arguments:
    """Of IntSplit."""
    return {"eight": np.array(8, np.uint32)}


def join_arguments(kind: type[np.signedinteger[Any]] = np.int32) -> Arguments:
    """Of IntJoin of sums of a type."""
    return {"radix": np.array(256, kind)}


def lookup_arguments(table: NDArray[Any], elements: int) -> Arguments:
    """Of IntLookup.

    Args:
        table: shape (2^bits,).
        elements: how many are looked up; 0 where that is not known.
    """
    rows = next(count for count in (_LOOKUP_ROWS, 2, 1) if elements % count == 0)
    return {
        "table": table,
        "copies": np.array([rows if elements else 1, len(table)], np.int64),
        "rows": np.array([rows if elements else 1, -1], np.int64),
    }


def lookup_pair_arguments(table: NDArray[Any], elements: int) -> Arguments:
    """Of IntLookupPair; as ``lookup_arguments``, the table of shape (2^16,)."""
    return {"radix": np.array(256, np.int32), **lookup_arguments(table, elements)}


def softmax_arguments(
    numbers: SoftmaxNumbers, axis: int, zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntSoftmax along one axis."""
    lifted = 1 << stored_bits(spec)  # vanishes in the cast
    start = (1 << (numbers.shift - 1)) + ((lifted + zero_point) << numbers.shift)
    return {
        "exponentials": numbers.exponentials,
        "axes": np.array([axis], np.int64),
        "numerator": np.array(numbers.numerator, np.int64),
        "offset": np.array(start, np.int64),
        "shift": _unsigned(numbers.shift),
        "high": _unsigned(lifted + spec.q_max),
    }


def exponentials_arguments(numbers: AttentionNumbers, elements: int) -> Arguments:
    """Of IntExponentials along the last axis.

    Args:
        numbers: of the attention.
        elements: how many scores there are; 0 where that is not known.
    """
    table = numbers.exponentials
    layout = lookup_arguments((table & 255).astype(np.uint8), elements)
    return {
        "high": (table >> 8).astype(np.uint8),
        "low": layout["table"],
        "axes": np.array([-1], np.int64),
        "half": np.array(numbers.step // 2, np.int32),
        "step": np.array(numbers.step, np.int32),
        "none": np.array(0, np.int32),
        "last": np.array(len(table) - 1, np.int32),
        "copies": layout["copies"],
        "rows": layout["rows"],
    }


def normalize_arguments(
    share: Share, value_zero: int, zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntNormalize.

    Args:
        share: of the attention.
        value_zero: zero point of the values as they were multiplied.
        zero_point: z of the result.
        spec: of the result.
    """
    limits = _limits(share.shift, spec)
    start = _LIFT + (1 << (share.shift - 1)) + (zero_point << share.shift)
    return {
        "numerator": np.array(share.numerator, np.int64),
        "offset": _unsigned(start - value_zero * share.numerator),
        "shift": limits["shift"],
        "least": limits["low"],
        "most": limits["high"],
        **_all_but_last(),
    }


def short_normalize_arguments(
    share: ShortShare, value_zero: int, zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntNormalizeShort; see ``normalize_arguments``."""
    return {
        "ratio": _unsigned(share.ratio),
        "shift": _unsigned(share.shift),
        "centre": _word(2 * (share.lift + zero_point) + 1),
        "zero": _word(value_zero),
        "low": _word(share.lift + spec.q_min),
        "high": _word(share.lift + spec.q_max),
        **_all_but_last(),
    }


def _all_but_last() -> Arguments:
    """Ends of slices: what is in the last column, and what is not."""
    return {
        "first": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
        "far": np.array([np.iinfo(np.int64).max], np.int64),
    }


def signed_arguments() -> Arguments:
    """Of IntSigned."""
    return {"half": np.array(128, np.uint8)}


def norm_arguments(
    numbers: NormNumbers, axes: int, zero_point: int, spec: QuantSpec, **more: int
) -> Arguments:
    """Of IntRMSNorm and IntLayerNorm.

    Args:
        numbers: of the norm.
        axes: how many, counted from the last.
        zero_point: z of the result.
        spec: of the result.
        more: scalars that only one of them takes (``zero``).
    """
    start = _LIFT + (1 << (numbers.shift - 1)) + (zero_point << numbers.shift)
    return {
        **{name: np.array(number, np.int64) for name, number in more.items()},
        "axes": np.arange(-axes, 0, dtype=np.int64),
        "epsilon": np.array(numbers.epsilon, np.int64),
        "prescale": np.array(numbers.prescale, np.int64),
        **root_arguments(),
        "numerator": np.array(numbers.numerator, np.int64),
        "gain": numbers.gain,
        "offset": _unsigned(_whole(numbers.bias) + start),
        **_limits(numbers.shift, spec),
    }


def root_arguments() -> Arguments:
    """Of IntReciprocalRoot, but for its numerator."""
    sizes = np.arange(_ROOTS, -1, -1, dtype=np.int64)
    return {
        "powers": 4 ** np.arange(_ROOTS, dtype=np.int64),
        "fours": 4**sizes,
        "twos": 2**sizes,
        "start": np.array(ROOT_START, np.int64),
        "last": np.array([-1], np.int64),
        "one": np.array(1, np.int64),
        "two": np.array(2, np.int64),
        "part": np.array(ROOT_PART, np.int64),
        "step": np.array(ROOT_STEP, np.int64),
        "coarse": np.array(ROOT_COARSE, np.int64),
        "dense": np.array(ROOT_DENSE, np.int64),
    }


def short_norm_arguments(
    numbers: NormNumbers, zero: int, zero_point: int, spec: QuantSpec
) -> Arguments:
    """Of IntRMSNormShort.

    Args:
        numbers: of a norm over the last axis, whose gains are 1.
        zero: zero point of what comes in.
        zero_point: z of the result.
        spec: of the result.
    """
    step = 1 << numbers.shift
    lift = 1 << (30 - numbers.shift)
    powers, starts = root_starts(numbers.epsilon)
    return {
        "zero": _word(zero),
        "before_last": np.array([-2], np.int64),
        "last": np.array([-1], np.int64),
        "both": np.array([-2, -1], np.int64),
        "epsilon": np.array(numbers.epsilon, np.int64),
        "prescale": np.array(numbers.prescale, np.int64),
        "powers": powers,
        "rises": np.diff(starts, prepend=0),
        "two": np.array(2, np.int64),
        "numerator": np.array(numbers.numerator, np.int64),
        "offset": _word(step // 2 + (lift + zero_point) * step),
        "step": _word(step),
        "low": _word(lift + spec.q_min),
        "high": _word(lift + spec.q_max),
    }


def _rounding(ratio: FixedPoint, zero_point: int) -> int:
    """What is added to a sum before its shift; what lifts the fine part is taken off again."""
    start = _LIFT + (1 << (ratio.shift - 1)) + (zero_point << ratio.shift)
    return start if ratio.low is None else start - (_LIFT >> ratio.fine)


def _limits(shift: int, spec: QuantSpec) -> Arguments:
    lifted = _LIFT >> shift
    return {
        "shift": _unsigned(shift),
        "low": _unsigned(lifted + spec.q_min),
        "high": _unsigned(lifted + spec.q_max),
    }


def _whole(numbers: ArrayLike) -> NDArray[Any]:
    """Python's integers, which never overflow."""
    return np.asarray(numbers).astype(object)


def _word(numbers: ArrayLike) -> NDArray[np.int32]:
    """Numbers modulo 2^32, signed."""
    return np.asarray(_whole(numbers) % (1 << 32), dtype=np.uint32).view(np.int32)


def _unsigned(numbers: ArrayLike) -> NDArray[np.uint64]:
    """Numbers modulo 2^64."""
    return np.asarray(_whole(numbers) % (1 << 64), dtype=np.uint64)
