"""integer_short: sums proved to fit 32 bits, exact results, ratios that have no such form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qnpu.compiler.integer_math import round_half_up
from qnpu.compiler.integer_short import (
    Term,
    exact_in_float,
    linear_terms,
    quotient_point,
    short_point,
    split_point,
)
from qnpu.compiler.quant_types import QuantSpec
from tests.integer_nodes import S8, S16, SPECS, U8, U16, result


def by_hand(total: Fraction, zero: int, low: int, high: int) -> int:
    return min(max(round_half_up(total) + zero, low), high)


@given(
    st.sampled_from(SPECS),
    st.lists(st.tuples(st.integers(1, 255), st.integers(0, 12)), min_size=1, max_size=3),
    st.integers(-3000, 0),
    st.integers(0, 3000),
    st.fractions(-100, 100, max_denominator=7),
    st.data(),
)
def test_exact_at_the_ends_and_at_ties(
    spec: object,
    forms: list[tuple[int, int]],
    low: int,
    high: int,
    addend: Fraction,
    data: st.DataObject,
) -> None:
    assert isinstance(spec, type(U8))
    zero = data.draw(st.integers(spec.q_min, spec.q_max))
    ratios = [Fraction(m, 1 << k) for m, k in forms]
    point = short_point([Term(ratios, [low], [high])], [addend], zero, spec)
    assert point is not None
    for channel, ratio in enumerate(ratios):
        step = int(point.step)
        m, start = (
            int(np.broadcast_to(a, len(ratios))[channel])
            for a in (point.multipliers[0], point.start)
        )
        ties = [round(Fraction(2 * n + 1, 2) / ratio) for n in (-3, 0, 5)]
        for a in (low, high, 0, *(min(max(tie, low), high) for tie in ties)):
            lifted = a * m + start + (zero + point.lift) * step
            assert (0 if spec.signed or point.lift else -1 << 31) <= lifted < 1 << 31
            cut = int(Fraction(lifted, step))  # towards 0
            found = min(max(cut, point.lift + spec.q_min), point.lift + spec.q_max)
            expected = by_hand(a * ratio + addend, zero, spec.q_min, spec.q_max)
            assert found - point.lift == expected
    assert point.lift % (1 << spec.bits) == 0


def test_two_terms() -> None:
    terms = [Term([Fraction(3, 4)], [0], [65535]), Term([Fraction(1, 64)], [0], [65535])]
    point = short_point(terms, [Fraction(-9)], 100, U16)
    assert point is not None
    assert [int(m) for m in point.multipliers] == [48, 1]
    assert point.step == 1 << 6


def test_one_shift_for_all_channels() -> None:
    ratios = [Fraction(1, 4), Fraction(17, 256)]
    point = short_point([Term(ratios, [-1000], [1000])], [Fraction(0)], 0, U8)
    assert point is not None
    assert point.step == 1 << 8
    np.testing.assert_array_equal(point.multipliers[0], [64, 17])


@given(
    st.sampled_from(SPECS),
    st.lists(st.integers(1, 999), min_size=1, max_size=3),
    st.integers(-(1 << 20), 1 << 20),
    st.sampled_from([Fraction(0), *(Fraction(s, 1 << b) for s in (1, -1) for b in (25, 17, 9))]),
    st.data(),
)
def test_quotients_are_exact_wherever_they_are_said_to_be(
    spec: object, divisors: list[int], added: int, error: Fraction, data: st.DataObject
) -> None:
    """At the ends, around ties, and where results begin to be clipped."""
    assert isinstance(spec, type(U8))
    zero = data.draw(st.integers(spec.q_min, spec.q_max))
    ratios = [Fraction(1, d) * (1 + error) for d in divisors]
    reach = 1 << 22
    point = quotient_point(Term(ratios, [-reach], [reach]), [Fraction(added)], zero, spec)
    if point is None:
        assert error or spec.signed  # a lift for one channel can be too much for another
        return
    for channel, (ratio, divisor) in enumerate(zip(ratios, divisors, strict=True)):
        step, start = (
            int(np.broadcast_to(a, len(ratios))[channel]) for a in (point.step, point.start)
        )
        assert step == divisor
        ends = [end - zero + place for end in (spec.q_min, spec.q_max) for place in (-2, -1, 0, 1)]
        halves = [(2 * n + 1) * divisor // 2 - added for n in (-70000, -2, -1, 0, 7, *ends)]
        near = [h + d for h in halves for d in (-1, 0, 1)]
        for a in (-reach, reach, -added, *(n for n in near if abs(n) <= reach)):
            lifted = a + start + (zero + point.lift) * step
            assert (0 if spec.signed else -1 << 31) <= lifted < 1 << 31
            cut = int(Fraction(lifted, step))  # towards 0
            found = min(max(cut, point.lift + spec.q_min), point.lift + spec.q_max)
            expected = by_hand((a + added) * ratio, zero, spec.q_min, spec.q_max)
            assert found - point.lift == expected
    assert point.lift % (1 << spec.bits) == 0


def test_what_is_no_quotient() -> None:
    def quotient(ratio: Fraction, high: int = 1000, added: Fraction = Fraction(0)) -> bool:
        return quotient_point(Term([ratio], [0], [high]), [added], 0, U16) is not None

    off = 1 + Fraction(1, 1 << 18)
    assert quotient(Fraction(1, 6))
    assert quotient(off / 7)
    assert not quotient(off / 6)  # 3 would be halfway
    assert quotient(off / 7, high=(1 << 17) - 1)
    assert not quotient(off / 7, high=1 << 17)
    assert quotient(off, high=1 << 30)  # what is clipped does not count
    assert not quotient(Fraction(1, 7), added=Fraction(1, 2))
    assert not quotient(Fraction(1, 7), high=(1 << 31) - 3)
    assert not quotient(Fraction(2, 7))


def test_what_no_sum_can_clip() -> None:
    """Codes from 0 to 65,535, and no sum below 0."""

    def inside(low: int, high: int, zero: int = 100, spec: QuantSpec = U16) -> bool:
        point = quotient_point(Term([Fraction(1, 9)], [low], [high]), [Fraction(0)], zero, spec)
        assert point is not None
        return point.inside

    assert inside(-904, 9 * 65435 + 4)
    assert not inside(-905, 0)
    assert not inside(0, 9 * 65435 + 5)
    assert not inside(0, 9, spec=S16)  # what lifts those vanishes in a cast alone


def test_sums_of_two_bytes() -> None:
    sums = Term([Fraction(5, 1 << 10), Fraction(3, 4)], [-300, -7], [500, 9])
    point = split_point(sums, [Fraction(-1, 3), Fraction(8)], 100, U16)
    assert point is not None
    assert point.shift == 10
    np.testing.assert_array_equal(point.multiplier, [5, 768])
    np.testing.assert_array_equal(point.start, [512 - 342, 512 + 8192])
    assert 256 * point.fine_lift >= 5376  # 7 · 768
    assert split_point(Term([Fraction(1, 3)], [0], [1]), [Fraction(0)], 0, U16) is None
    for far in (1 << 28, 1 << 24):  # of which the sum of low bytes, or the whole, is too large
        many = Term([Fraction(255, 1 << 12)], [-far], [far])
        assert split_point(many, [Fraction(0)], 0, U16) is None


def test_what_has_no_short_form() -> None:
    assert short_point([Term([Fraction(1, 3)], [0], [1])], [Fraction(0)], 0, U8) is None
    many = Term([Fraction(255, 256)], [0], [1 << 25])
    assert short_point([many], [Fraction(0)], 0, U8) is None
    assert short_point([Term([Fraction(1, 2)], [0], [9])], [Fraction(0)], 0, U8) is not None


def test_terms_of_a_linear_are_its_extremes() -> None:
    (term,) = linear_terms(U8, np.array([[3, -1], [-2, 0]], np.int8), [Fraction(1)])
    assert term.low == [-510, -255]
    assert term.high == [765, 0]
    (term,) = linear_terms(S8, np.array([[3], [-2]], np.int8), [Fraction(1)])
    assert (term.low, term.high) == ([-128 * 3 - 127 * 2], [127 * 3 + 128 * 2])


@given(st.integers(1, 31), st.integers(0, 18), st.integers(0, 255), st.integers(1, 1 << 26))
def test_float32_is_exact_where_it_is_said_to_be(m: int, k: int, zero: int, bound: int) -> None:
    ratio = Fraction(m, 1 << k)
    if not all(exact_in_float([ratio], [bound], result(U8, zero=zero))):
        return
    known = {bound, -bound, 0, 1, bound - 1}
    known |= {round(Fraction(2 * n + 1, 2) / ratio) + d for n in (-256, -1, 0, 255) for d in (0, 1)}
    for a in (a for a in known if abs(a) <= bound):
        product = np.float32(a) * np.float32(float(ratio))
        found = min(max(int(np.rint(product)), -zero), 255 - zero)
        exact = round(a * ratio)  # half to even
        assert found == min(max(exact, -zero), 255 - zero)


def test_float32_is_not_exact_everywhere() -> None:
    to = result(U8, zero=0)
    ratios = [Fraction(31, 1 << 14), Fraction(31, 1 << 20), Fraction(1, 3), Fraction(31, 1 << 20)]
    bounds = [1 << 30, 1 << 30, 10, 1 << 19]
    assert exact_in_float(ratios, bounds, to) == [True, False, False, True]
    assert exact_in_float(ratios[:1], [5, 6], to) == [True, True]
