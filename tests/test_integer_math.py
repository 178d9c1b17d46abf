"""Fixed-point ratios give what exact fractions give."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qnpu.compiler.integer_math import CLOSE, exact_ratios, fixed_point, round_half_up
from qnpu.compiler.quant_types import QuantSpec
from qnpu.runtime_check.reference import add, requantize
from tests.integer_nodes import SPECS, U8, U16, result

scales = st.floats(2.0**-24, 2.0**6, width=32).filter(lambda x: x > 0)


def exact(terms: list[tuple[int, Fraction]], zero_point: int, low: int, high: int) -> int:
    total = sum((number * ratio for number, ratio in terms), Fraction(0))
    return min(max(round_half_up(total) + zero_point, low), high)


def near_tie(terms: list[tuple[int, Fraction]]) -> bool:
    """Closer to a tie than the integers resolve, and not on it."""
    total = sum((number * ratio for number, ratio in terms), Fraction(0)) * 2
    distance = abs(total - round_half_up(total))
    return 0 < distance <= 2 * CLOSE and round_half_up(total) % 2 == 1


@given(
    scale=scales,
    step=scales,
    bits=st.integers(1, 34),
    number=st.integers(-(1 << 34), 1 << 34),
    spec=st.sampled_from(SPECS),
    share=st.floats(0, 1),
)
@example(scale=1.0, step=2.0, bits=4, number=3, spec=U8, share=0.0)  # a tie
@example(scale=1.0, step=2.0, bits=4, number=-3, spec=U16, share=0.5)
@example(scale=2.0**-24, step=2.0**6, bits=34, number=1 << 34, spec=U16, share=1.0)
def test_requantized_numbers_are_exact(
    scale: float, step: float, bits: int, number: int, spec: QuantSpec, share: float
) -> None:
    bound = 1 << bits
    ratio = exact_ratios([np.float32(scale)], np.float32(step))
    number = max(-bound, min(bound, number))
    zero = spec.q_min + round(share * (spec.q_max - spec.q_min))
    terms = [(number, ratio[0])]
    if near_tie(terms) or ratio[0] * bound >= 1 << 24:  # far outside of any type
        return
    found = requantize(
        np.array([number]), fixed_point(ratio, [bound], result(spec, zero=zero)), zero, spec
    )
    assert int(found[0]) == exact(terms, zero, spec.q_min, spec.q_max)


def test_results_wider_than_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        fixed_point([Fraction(1 << 33)], [1 << 30], result(U16))


@given(
    one=scales,
    other=scales,
    step=scales,
    a=st.integers(0, 65535),
    b=st.integers(0, 65535),
    zeros=st.tuples(*[st.integers(0, 65535)] * 3),
)
@example(one=1.0, other=1.0, step=2.0, a=3, b=0, zeros=(0, 0, 0))
def test_sums_are_exact(
    one: float, other: float, step: float, a: int, b: int, zeros: tuple[int, int, int]
) -> None:
    ratios = [exact_ratios([np.float32(s)], np.float32(step))[0] for s in (one, other)]
    if max(ratios) * 65535 >= 1 << 24:
        return
    terms = [(a - zeros[0], ratios[0]), (b - zeros[1], ratios[1])]
    if near_tie(terms):
        return
    fixed = fixed_point(ratios, [65535], result(U16, zero=zeros[2]), terms=2)
    operands = [np.array([a], np.uint16), np.array([b], np.uint16)]
    found = add(operands, zeros[:2], fixed, zeros[2], U16)
    assert int(found[0]) == exact(terms, zeros[2], 0, 65535)


def test_every_sum_of_eight_bit_codes_rounds_as_fractions_do() -> None:
    """All accumulators of a small product, with scales that make ties and scales that do not."""
    numbers = np.arange(-40000, 40001)
    for scale, step in ((0.5, 2.0**7), (0.013, 1.7), (3.1e-5, 0.01)):
        ratio = exact_ratios([np.float32(scale)], np.float32(step))
        found = requantize(numbers, fixed_point(ratio, [40000], result(U8, zero=128)), 128, U8)
        expected = [exact([(int(n), ratio[0])], 128, 0, 255) for n in numbers]
        np.testing.assert_array_equal(found, expected)


def test_channels_have_ratios_of_their_own() -> None:
    weights = np.array([0.5, 1e-6, 3.0], np.float32)
    ratios = exact_ratios([np.float32(0.25), weights], np.float32(0.125))
    assert ratios[0] == 1
    assert ratios[2] == 6
    fixed = fixed_point(ratios, [1000], result(U16))
    found = requantize(np.array([[100, 100, 100], [-100, 1000, -3]]), fixed, 0, U16)
    np.testing.assert_array_equal(found, [[100, 0, 600], [0, 0, 0]])


def test_a_second_multiplier_is_there_where_one_is_not_close_enough() -> None:
    ratio = exact_ratios([np.float32(0.013)], np.float32(1.7))
    to = result(U16)
    assert fixed_point(ratio, [1 << 12], to).low is None
    assert fixed_point(ratio, [1 << 33], to).low is not None
    assert fixed_point(ratio, [1 << 22], to).low is not None
    assert fixed_point(ratio, [1 << 22], result(U8)).low is None  # most of it is clipped
    assert fixed_point(ratio, [1 << 33], to, close=Fraction(1)).low is None
    assert (
        fixed_point([Fraction(1, 4)], [1 << 33], to).low is None
    )  # nothing is left behind the point
