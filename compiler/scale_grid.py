"""Scales of few significant bits, so that ratios of scales are small whole numbers times 2^-k."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnpu.compiler.quant_types import Encoding

WEIGHT_BITS = 5
"""Of n in a weight's scales, where nothing asks for fewer."""
FLOAT32_BITS = 24


def few_bits_above(
    least: ArrayLike, bits: int, factor: float | np.floating = 1.0
) -> NDArray[np.float32]:
    """The smallest n·2^e·factor from ``least`` up, 2^(bits-1) ≤ n < 2^bits.

    Args:
        least: positive, any shape.
        bits: of n.
        factor: positive.

    Raises:
        ValueError: such numbers have more bits than float32.
    """
    step = float(factor)
    if bits + odd_part(step).bit_length() > FLOAT32_BITS:
        raise ValueError(f"{bits} bits times {step:g} are no float32")
    wanted = np.asarray(least, np.float64)
    mantissa, exponent = np.frexp(wanted / step)
    whole = np.ceil(np.ldexp(mantissa, bits))
    found = np.ldexp(whole, exponent - bits) * step
    short = found < wanted  # where the quotient was rounded down to a whole number
    found = np.where(short, np.ldexp(whole + 1, exponent - bits) * step, found)
    return np.asarray(found, np.float32)


def odd_part(number: float | np.floating) -> int:
    """n of a positive float n·2^e, n odd."""
    whole = Fraction(float(number)).numerator
    return whole // (whole & -whole)


def weight_factor(taken: Encoding, given: Encoding) -> int:
    """t such that a weight's scale n·t·2^e makes s_x·s_w/s_y a small multiple of n·2^-k.

    With odd parts X of s_x and Y of s_y this is Y / gcd(X, Y); the ratio is n·X / gcd(X, Y).

    Args:
        taken: encoding of x, per tensor.
        given: encoding of y, per tensor.
    """
    one, other = odd_part(taken.scale.item()), odd_part(given.scale.item())
    return other // gcd(one, other)


def with_larger_scale(encoding: Encoding, scale: NDArray[np.float32]) -> Encoding:
    """The encoding with another scale, shape kept; zero points stay.

    All of its range grows about zero, so a larger scale covers what the old one did.
    """
    return replace(encoding, scale=scale.reshape(encoding.scale.shape))
