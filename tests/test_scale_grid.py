"""scale_grid: numbers of few bits, exact in float32, checked with fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.scale_grid import few_bits_above, odd_part, weight_factor, with_larger_scale

scales = st.floats(1e-12, 1e6).map(lambda number: float(np.float32(number)))
U8 = QuantSpec(8, signed=False, symmetric=False)


def encoding(scale: float, zero: int = 0) -> Encoding:
    return Encoding(U8, np.array(scale, np.float32), np.array(zero, np.int32))


@given(scales, st.integers(1, 10), st.integers(1, 2**13).map(lambda n: n * 2.0**-20))
def test_the_next_number_of_few_bits(least: float, bits: int, factor: float) -> None:
    found = Fraction(float(few_bits_above(least, bits, factor)))
    quotient = found / Fraction(factor)
    assert quotient.denominator & (quotient.denominator - 1) == 0
    assert odd_part(float(quotient)) < 1 << bits
    assert Fraction(least) <= found
    assert found < Fraction(least) * (1 + Fraction(2, 1 << bits)) or bits == 1
    assert float(few_bits_above(float(found), bits, factor)) == float(found)


def test_powers_of_two() -> None:
    found = few_bits_above(np.array([0.5, 0.51, 3.0], np.float32), 1)
    np.testing.assert_array_equal(found, np.array([0.5, 1.0, 4.0], np.float32))
    assert found.dtype == np.float32


def test_numbers_that_float32_does_not_hold() -> None:
    with pytest.raises(ValueError, match="no float32"):
        few_bits_above(1.0, 5, 2**20 + 1)


@given(scales, scales, st.integers(16, 31), st.integers(-20, 5))
def test_the_factor_makes_ratios_small(x: float, y: float, n: int, exponent: int) -> None:
    taken, result = (encoding(float(few_bits_above(s, 5))) for s in (x, y))
    factor = weight_factor(taken, result)
    weight = Fraction(n * factor) * Fraction(2) ** exponent
    ratio = Fraction(taken.scale.item()) * weight / Fraction(result.scale.item())
    assert ratio.denominator & (ratio.denominator - 1) == 0
    assert odd_part(float(ratio)) <= n * odd_part(taken.scale.item())


def test_a_larger_scale_covers_the_old_range() -> None:
    old = encoding(0.013, 77)
    new = with_larger_scale(old, few_bits_above(old.scale, 5))
    assert float(new.low) <= float(old.low)
    assert float(new.high) >= float(old.high)
    assert new.scale.shape == ()
    assert float(new.scale) > 0.013
