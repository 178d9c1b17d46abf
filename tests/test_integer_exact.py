"""Softmax and norms on integers against exact numbers, on whatever numbers hypothesis finds.

Three things are asked of each function, of random, extreme and degenerate rows alike:

* ONNX Runtime gives the codes of the NumPy twin, bit for bit;
* those are what the formula gives in integers without end, so that nothing overflows;
* they are the exact result, of 50 decimal digits, rounded and clipped, to half an LSB and the slack
  that each case states for itself.

A new function joins with a strategy that draws a ``Case`` of it, in ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from qnpu.compiler.integer_arguments import Arguments, norm_arguments, softmax_arguments
from qnpu.compiler.integer_math import NormNumbers, NormShape, norm_numbers, softmax_numbers
from qnpu.compiler.quant_types import QuantSpec
from qnpu.runtime_check import reference
from tests.integer_nodes import S8, S16, SPECS, U8, U16, Array, call, result

_DIGITS = 50
Rows = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One call of a function, and what it should give.

    Attributes:
        function: its name.
        operands: codes, shape (rows, features).
        arguments: all others.
        spec: of the result.
        twin: codes of the NumPy twin.
        formula: codes by integers without end.
        exact: before rounding and clipping, LSB from code 0, one per element.
        slack: LSB by which what is rounded may be off the exact number, one per element.
    """

    function: str
    operands: list[Array]
    arguments: Arguments
    spec: QuantSpec
    twin: Array
    formula: Rows
    exact: list[list[Decimal]]
    slack: list[list[Decimal]]


def check(case: Case) -> Array:
    """Asserts the three things; returns the codes."""
    found = call(case.function, case.operands, case.arguments, case.spec.dtype)[0]
    np.testing.assert_array_equal(found, case.twin)
    np.testing.assert_array_equal(found, np.array(case.formula))
    low, high = Decimal(case.spec.q_min), Decimal(case.spec.q_max)
    for code, exact, slack in zip(
        found.reshape(-1), _flat(case.exact), _flat(case.slack), strict=True
    ):
        away = abs(Decimal(int(code)) - min(max(exact, low), high))
        assert away <= Decimal("0.5") + slack, (int(code), exact, slack)
    return found


def _flat(rows: list[list[Decimal]]) -> list[Decimal]:
    return [number for row in rows for number in row]


def _decimal(number: Fraction | float | int) -> Decimal:
    whole = Fraction(number)
    return Decimal(whole.numerator) / Decimal(whole.denominator)


def _clipped(number: int, spec: QuantSpec) -> int:
    return min(max(number, spec.q_min), spec.q_max)


def _codes(spec: QuantSpec, features: int) -> st.SearchStrategy[Rows]:
    """One to four rows: of any codes, of the two ends, all the same, or hardly apart."""
    whole = st.integers(spec.q_min, spec.q_max)
    ends = st.sampled_from([spec.q_min, spec.q_max])
    middle = st.integers(spec.q_min, spec.q_max - 2)
    close = middle.flatmap(lambda c: _row(st.integers(c, c + 2), features))
    rows = st.one_of(
        _row(whole, features), _row(ends, features), whole.map(lambda c: [c] * features), close
    )
    return st.lists(rows, min_size=1, max_size=4)


def _row(codes: st.SearchStrategy[int], features: int) -> st.SearchStrategy[list[int]]:
    return st.lists(codes, min_size=features, max_size=features)


# --------------------------------------------------------------------------------------- softmax


def softmax_case(
    rows: Rows, kind: QuantSpec, spec: QuantSpec, scale: float, zero: int, step: float
) -> Case:
    """IntSoftmax of rows.

    Slack: each exponential is off by half of one, and so is each addend of the sum; the numerator
    is, too, where 1/s_y is no whole number. Rounding a quotient down changes nothing.
    """
    given_codes = np.array(rows, kind.code_dtype)
    to = result(spec, step)
    numbers = softmax_numbers(scale, kind.bits, to)
    formula: Rows = []
    exact: list[list[Decimal]] = []
    slack: list[list[Decimal]] = []
    with localcontext(prec=_DIGITS):
        most = 1 / _decimal(float(to.scale))
        for row in rows:
            weights = [int(numbers.exponentials[max(row) - code]) for code in row]
            half, total = 1 << (numbers.shift - 1), sum(weights)
            shares = [w * numbers.numerator // total for w in weights]
            formula.append([_clipped((n + half >> numbers.shift) + zero, spec) for n in shares])
            real = [(-_decimal(scale) * (max(row) - code)).exp() for code in row]
            exact.append([most * item / sum(real) + zero for item in real])
            bound = most * (len(row) + 1) / (2 * Decimal(int(numbers.exponentials[0])))
            rounded = 0 if numbers.shift == 1 else Decimal(2) ** -(numbers.shift + 1)
            slack.append([bound + rounded] * len(row))
    return Case(
        "IntSoftmax",
        [given_codes],
        softmax_arguments(numbers, -1, zero, spec),
        spec,
        reference.softmax(given_codes, numbers, -1, zero, spec),
        formula,
        exact,
        slack,
    )


@st.composite
def softmaxes(draw: st.DrawFn) -> Case:
    kind, spec = draw(st.sampled_from([U8, S8, U16, S16])), draw(st.sampled_from(SPECS))
    rows = draw(st.integers(1, 12).flatmap(lambda features: _codes(kind, features)))
    scale = draw(st.floats(2.0**-20, 4.0, width=32))
    zero = draw(st.sampled_from([spec.q_min, 0, spec.q_max // 2]))
    step = draw(st.sampled_from([1.0, 0.75, 2.0])) / (1 << spec.bits)
    return softmax_case(rows, kind, spec, scale, zero, step)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_of_which_all_is_masked_is_even(spec: QuantSpec) -> None:
    """The least code everywhere, and the same for a row of any other code."""
    rows = [[code] * 8 for code in (U16.q_min, U16.q_max, 777)]
    found = check(softmax_case(rows, U16, spec, 0.001, spec.q_min, 1.0 / (1 << spec.bits)))
    assert (found == (1 << spec.bits) // 8 + spec.q_min).all()


def test_a_tie_goes_up() -> None:
    """512 equal shares of 256 LSB: half an LSB each."""
    found = check(softmax_case([[9] * 512], U8, U8, 0.1, 0, 1.0 / 256))
    assert (found == 1).all()


def test_a_whole_share_saturates() -> None:
    rows = [[65535, *[0] * 11], [0] * 11 + [65535]]
    for spec in SPECS:
        found = check(softmax_case(rows, U16, spec, 1.0, spec.q_min, 1.0 / (1 << spec.bits)))
        assert found[0].tolist() == [spec.q_max] + [spec.q_min] * 11
        assert found[1].tolist() == [spec.q_min] * 11 + [spec.q_max]


def test_a_long_row_of_weights_too_small_to_count() -> None:
    """Rows of 4096: each of 4095 weights is less than half of what counts; half an LSB at most."""
    distance, scale = 60_000, 20.2 / 60_000  # exp(-20.2) · 2^28 = 0.45
    row = [distance] + [0] * 4095
    case = softmax_case([row], U16, U16, scale, 0, 1.0 / 65536)
    assert case.formula[0][0] == 65535  # saturated: the exact one is 65535.54
    found = check(case)
    assert abs(Decimal(int(found[0, 0])) - case.exact[0][0]) < 1


# ----------------------------------------------------------------------------------------- norms


def norm_case(
    rows: Rows,
    norm: NormShape,
    gains: tuple[list[int], float],
    spec: QuantSpec,
    step: float,
    zeros: tuple[int, int],
    biases: Sequence[float] | None,
    kind: QuantSpec,
) -> Case:
    """IntRMSNorm of rows, or IntLayerNorm of a centred norm; zeros of what goes in and comes out.

    Slack: the share is off by 2^-56 of itself and by six, N by one and by what
    the mean's rounding adds to it, half a step of the mean squared per feature; then what that
    rounding itself makes of an element, and one in 2^20 for the bias.
    """
    given_codes, to = np.array(rows, kind.code_dtype), result(spec, step)
    codes = np.array(gains[0], np.int64), gains[1]
    bias = None if biases is None else np.array(biases, np.float64)
    numbers = norm_numbers(norm, codes, to, bias)
    if norm.centred:
        size = norm.features
        more = {"finer": numbers.finer, "size": size, "half": size // 2}
        twin = reference.layer_norm(given_codes, numbers, zeros[1], spec)
    else:
        more = {"zero": zeros[0]}
        twin = reference.rms_norm(given_codes, zeros[0], numbers, zeros[1], spec)
    formula: Rows = []
    exact: list[list[Decimal]] = []
    slack: list[list[Decimal]] = []
    for row in rows:
        centred = _centred(row, norm, numbers, zeros[0])
        energy = sum(c * c for c in centred) * numbers.prescale + numbers.epsilon
        share = _share(numbers.numerator, energy)
        formula.append(_norm_codes(centred, share, numbers, zeros[1], spec))
        with localcontext(prec=_DIGITS):
            reals = _norm_reals(row, norm, gains, biases, zeros[0])
            unit = _decimal(float(to.scale))
            exact.append([y / unit + zeros[1] for y, _ in reals])
            relative = Decimal(2) ** -56 + 6 / Decimal(max(share, 1))
            blurred = numbers.prescale * norm.features / Decimal(4) if norm.centred else 0
            relative += (1 + blurred) / Decimal(energy)
            scale = Decimal(share) / (1 << numbers.shift)
            slack.append(
                [
                    abs(y) / unit * relative
                    + (abs(g) * scale / 2 if norm.centred else 0)
                    + Decimal(2) ** -20
                    for (_, y), g in zip(reals, gains[0], strict=True)
                ]
            )
    return Case(
        "IntLayerNorm" if norm.centred else "IntRMSNorm",
        [given_codes],
        norm_arguments(numbers, 1, zeros[1], spec, **more),
        spec,
        twin,
        formula,
        exact,
        slack,
    )


def _centred(row: list[int], norm: NormShape, numbers: NormNumbers, zero: int) -> list[int]:
    if not norm.centred:
        return [code - zero for code in row]
    fine = [code * numbers.finer for code in row]
    mean = (sum(fine) + norm.features // 2) // norm.features
    return [code - mean for code in fine]


def _share(numerator: int, number: int) -> int:
    """Four steps of Newton's method towards the root of a number near 2^62, then one division for
    the rest, as documented."""
    shift = 31 - sum(number >= 1 << (2 * power) for power in range(31))
    scaled, root = number << (2 * shift), 3 << 29
    for _ in range(4):
        root = (root + scaled // root) // 2
    root -= 1
    slope = ((scaled - root * root << 28) // (2 * root) << 31) // root
    share = (numerator << shift) // root
    return share - ((share >> 30) * slope >> 29)


def _norm_codes(
    centred: list[int], share: int, numbers: NormNumbers, zero: int, spec: QuantSpec
) -> list[int]:
    gains = np.broadcast_to(numbers.gain, (len(centred),)).tolist()
    biases = np.broadcast_to(numbers.bias, (len(centred),)).tolist()
    half = 1 << (numbers.shift - 1)
    return [
        _clipped((c * g * share + b + half >> numbers.shift) + zero, spec)
        for c, g, b in zip(centred, gains, biases, strict=True)
    ]


def _norm_reals(
    row: list[int],
    norm: NormShape,
    gains: tuple[list[int], float],
    biases: Sequence[float] | None,
    zero: int,
) -> list[tuple[Decimal, Decimal]]:
    """Results, and what they are without the bias; real."""
    mean = Fraction(sum(row), norm.features) if norm.centred else Fraction(zero)
    centred = [(code - mean) * Fraction(norm.scale) for code in row]
    energy = sum((c * c for c in centred), Fraction(0)) / norm.features + Fraction(norm.epsilon)
    root = _decimal(energy).sqrt()
    plain = [
        _decimal(c * g * Fraction(gains[1])) / root for c, g in zip(centred, gains[0], strict=True)
    ]
    added = [_decimal(b) for b in biases] if biases is not None else [Decimal(0)] * len(row)
    return [(y + b, y) for y, b in zip(plain, added, strict=True)]


def norms(*, centred: bool) -> st.SearchStrategy[Case]:
    """Cases of a norm whose results fill the range of codes, or a part of it, or burst it."""

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        kind, spec = draw(st.sampled_from([U8, U16])), draw(st.sampled_from(SPECS))
        features = draw(st.integers(1, 24))
        norm = NormShape(
            features,
            kind.bits,
            draw(st.floats(2.0**-16, 16.0, width=32)),
            draw(st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3])),
            centred,
        )
        gains = draw(_row(st.integers(-32767, 32767), features)), 2.0**-12
        top = max(1, *map(abs, gains[0])) * gains[1] * features**0.5
        step = float(np.float32(top / (1 << spec.bits) * draw(st.sampled_from([0.1, 1.0, 3.0]))))
        zeros = (
            draw(st.integers(kind.q_min, kind.q_max)),
            draw(st.sampled_from([spec.q_min, 0, spec.q_max])),
        )
        reals = st.floats(-top, top)
        biases = draw(st.lists(reals, min_size=features, max_size=features)) if centred else None
        rows = draw(_codes(kind, features))
        try:
            return norm_case(rows, norm, gains, spec, step, zeros, biases, kind)
        except ValueError:  # as documented: an epsilon far above all squares leaves no room
            reject()

    return cases()


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_of_zeros_gives_the_zero_point(spec: QuantSpec, centred: bool) -> None:
    norm = NormShape(8, 16, 0.01, 1e-6, centred)
    biases = [0.0] * 8 if centred else None
    case = norm_case([[500] * 8], norm, ([32767] * 8, 0.001), spec, 0.5, (500, 3), biases, U16)
    assert (check(case) == 3).all()


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_greatest_numbers_saturate(spec: QuantSpec, centred: bool) -> None:
    """One code at each end, a width of a large model, gains of 16 bits, a scale that bursts."""
    size = 4096
    norm = NormShape(size, 16, 16.0, 1e-6, centred)
    row = [32768] * size
    row[0], row[1] = 65535, 0
    biases = [0.0] * size if centred else None
    case = norm_case(
        [row], norm, ([32767] * size, 1.0), spec, 0.01, (32768, spec.q_min), biases, U16
    )
    found = check(case)
    assert found[0, 0] == spec.q_max
    assert found[0, 1] == spec.q_min


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_code_away_from_zero_among_many(spec: QuantSpec) -> None:
    """The least energy there is; its root has as many bits as any other's."""
    row = [100] * 576
    row[3] = 101
    norm, gains = NormShape(576, 16, 0.001, 1e-12, centred=False), ([4096] * 576, 2.0**-12)
    case = norm_case([row], norm, gains, spec, 48.0 / (1 << spec.bits), (100, 0), None, U16)
    found = check(case)
    expected = min(float(case.exact[0][3]), spec.q_max)
    assert abs(int(found[0, 3]) - expected) < 0.6


# -------------------------------------------------------------------------------------- functions

CASES: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    "IntSoftmax": softmaxes,
    "IntRMSNorm": lambda: norms(centred=False),
    "IntLayerNorm": lambda: norms(centred=True),
}


@pytest.mark.parametrize("function", CASES)
def test_exact(function: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=CASES[function]())
    def holds(case: Case) -> None:
        assert case.function == function
        check(case)

    holds()
