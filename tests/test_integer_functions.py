"""Integer functions on ONNX Runtime give the codes of their twins, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.integer_arguments import (
    add_arguments,
    exponentials_arguments,
    inside_arguments,
    join_arguments,
    lookup_arguments,
    lookup_pair_arguments,
    multiply_arguments,
    norm_arguments,
    normalize_arguments,
    requantize_arguments,
    root_arguments,
    rotate_arguments,
    rotate_by_arguments,
    short_arguments,
    short_norm_arguments,
    short_normalize_arguments,
    signed_arguments,
    softmax_arguments,
    sum_bytes_arguments,
)
from qnpu.compiler.integer_math import (
    MixedValues,
    NormShape,
    ShortShare,
    attention_numbers,
    exact_ratios,
    fixed_point,
    norm_numbers,
    rotary_numbers,
    round_half_up,
    short_norm_numbers,
    softmax_numbers,
)
from qnpu.compiler.integer_short import Term, quotient_point, short_point, split_point
from qnpu.compiler.quant_types import QuantSpec
from qnpu.runtime_check import reference
from tests.conftest import normal
from tests.integer_nodes import S8, S16, SPECS, U8, U16, Array, call, codes, result

each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@each_spec
@pytest.mark.parametrize("bits", [12, 26, 34])
def test_requantize(spec: QuantSpec, bits: int) -> None:
    bound = 1 << bits
    generator = np.random.default_rng(bits)
    numbers = generator.integers(-bound, bound, (64, 40))
    bias = generator.integers(-bound // 4, bound // 4, 40)
    weights = generator.uniform(0.5, 1.0, 40).astype(np.float32)
    step = np.float32(bound / (1 << spec.bits) * (1.1 if bits > 12 else 1.0))
    zero = (spec.q_min + spec.q_max) // 3
    ratios = exact_ratios([weights], step)
    fixed = fixed_point(ratios, [2 * bound], result(spec, zero=zero))
    arguments = requantize_arguments(fixed, zero, spec, [Fraction(int(b)) for b in bias])
    function = "IntRequantize" if fixed.low is None else "IntRequantizeFine"
    assert (fixed.low is None) == (bits == 12)
    found = call(function, [numbers], arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.requantize(numbers + bias, fixed, zero, spec))
    assert len(np.unique(found)) > 200


@each_spec
@pytest.mark.parametrize("close", [Fraction(1), Fraction(0)], ids=["coarse", "fine"])
def test_add(spec: QuantSpec, close: Fraction) -> None:
    operands = [codes(U16, 30, 50), codes(U8, 30, 50, seed=1)]
    ratios = [Fraction(1, 300), Fraction(7, 11)]
    zero = (spec.q_min + spec.q_max) // 2
    to = result(spec, zero=zero)
    fixed = fixed_point(ratios, [65535, 255], to, terms=2, close=close)
    function = "IntAdd" if fixed.low is None else "IntAddFine"
    assert (fixed.low is None) == bool(close)
    arguments = add_arguments(fixed, (30000, 100), zero, spec)
    found = call(function, operands, arguments, spec.dtype)[0]
    expected = reference.add(operands, (30000, 100), fixed, zero, spec)
    np.testing.assert_array_equal(found, expected)


@each_spec
@pytest.mark.parametrize("channels", [1, 40])
def test_requantize_short(spec: QuantSpec, channels: int) -> None:
    bound = 1 << 19
    numbers = np.random.default_rng(1).integers(-bound, bound, (64, 40)).astype(np.int32)
    numbers[0, :2] = -bound, bound
    step = 24 - spec.bits
    ratios = [Fraction(9 + c % 23, 1 << (step + c % 2)) for c in range(channels)]
    addends = [Fraction(c * 7919 % 100 - 50, 3) for c in range(channels)]
    zero = (spec.q_min + spec.q_max) // 3
    point = short_point([Term(ratios, [-bound], [bound])], addends, zero, spec)
    assert point is not None
    found = call("IntRequantizeShort", [numbers], short_arguments(point, zero, spec), spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.requantize_short([numbers], point, zero, spec))
    assert len(np.unique(found)) > 100
    for channel in range(channels):
        exact = [
            round_half_up(int(a) * ratios[channel] + addends[channel]) + zero
            for a in numbers[:, channel]
        ]
        np.testing.assert_array_equal(found[:, channel], np.clip(exact, spec.q_min, spec.q_max))


@each_spec
@pytest.mark.parametrize("channels", [1, 40])
def test_requantize_short_by_division(spec: QuantSpec, channels: int) -> None:
    bound = 1 << (spec.bits + 10)
    numbers = np.random.default_rng(1).integers(-bound, bound, (64, 40)).astype(np.int32)
    numbers[0, :2] = -bound, bound
    divisors = [2001 + 2 * c for c in range(channels)]
    added = [Fraction(c * 7919 % 1000 - 500) for c in range(channels)]
    ratios = [Fraction(1, divisor) for divisor in divisors]
    zero = (spec.q_min + spec.q_max) // 3
    point = quotient_point(Term(ratios, [-bound], [bound]), added, zero, spec)
    assert point is not None
    assert not point.inside
    found = call("IntRequantizeShort", [numbers], short_arguments(point, zero, spec), spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.requantize_short([numbers], point, zero, spec))
    assert len(np.unique(found)) > 100
    for channel in range(channels):
        exact = [
            round_half_up((int(a) + added[channel]) * ratios[channel]) + zero
            for a in numbers[:, channel]
        ]
        np.testing.assert_array_equal(found[:, channel], np.clip(exact, spec.q_min, spec.q_max))


@pytest.mark.parametrize("spec", [U8, U16], ids=str)
def test_requantize_inside(spec: QuantSpec) -> None:
    """Up to both ends of the codes, which no sum passes."""
    zero, divisors = spec.q_max // 3, [3, 7, 64, 999]
    ratios = [Fraction(1, divisor) for divisor in divisors]
    low = [-zero * d - d // 2 for d in divisors]
    high = [(spec.q_max - zero) * d + (d - 1) // 2 for d in divisors]
    point = quotient_point(Term(ratios, low, high), [Fraction(0)], zero, spec)
    assert point is not None
    assert point.inside
    numbers = np.linspace(low, high, 5000).astype(np.int32)
    arguments = inside_arguments(point, zero, spec)
    found = call("IntRequantizeInside", [numbers], arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.requantize_short([numbers], point, zero, spec))
    assert (found.min(), found.max()) == (0, spec.q_max)


@each_spec
@pytest.mark.parametrize("channels", [1, 40])
def test_sum_bytes_short(spec: QuantSpec, channels: int) -> None:
    bound = 1 << 22
    sums = np.random.default_rng(1).integers(-bound, bound, (2, 64, 40)).astype(np.int32)
    sums[:, 0, :2] = -bound, bound
    sums[0, 1, :2], sums[1, 1, :2] = (-bound, bound), (bound, -bound)
    step = 33 - spec.bits
    ratios = [Fraction(9 + c % 23, 1 << (step + c % 2)) for c in range(channels)]
    addends = [Fraction(c * 7919 % 100 - 50, 3) for c in range(channels)]
    zero = (spec.q_min + spec.q_max) // 3
    point = split_point(Term(ratios, [-bound], [bound]), addends, zero, spec)
    assert point is not None
    arguments = sum_bytes_arguments(point, zero, spec)
    found = call("IntSumBytesShort", list(sums), arguments, spec.dtype)[0]
    expected = reference.sum_bytes_short(sums[0], sums[1], point, zero, spec)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 100
    whole = 256 * sums[0].astype(object) + sums[1]
    for channel in range(channels):
        ratio, addend = ratios[channel], addends[channel]
        exact = [round_half_up(a * ratio + addend) + zero for a in whole[:, channel]]
        np.testing.assert_array_equal(found[:, channel], np.clip(exact, spec.q_min, spec.q_max))


@each_spec
def test_add_short(spec: QuantSpec) -> None:
    operands = [codes(U16, 30, 50), codes(U16, 30, 50, seed=1)]
    zeros, zero = (30000, 100), (spec.q_min + spec.q_max) // 2
    small = 1 << (16 - min(16, spec.bits))
    ratios = [Fraction(1, small), Fraction(13, 16 * small)]
    addend = sum((-z * ratio for z, ratio in zip(zeros, ratios, strict=True)), Fraction(0))
    terms = [Term([ratio], [0], [65535]) for ratio in ratios]
    point = short_point(terms, [addend], zero, spec)
    assert point is not None
    arguments = short_arguments(point, zero, spec)
    found = call("IntAddShort", operands, arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.requantize_short(operands, point, zero, spec))
    sums = [(o.astype(object) - z) * r for o, z, r in zip(operands, zeros, ratios, strict=True)]
    exact = [round_half_up(n) + zero for n in (sums[0] + sums[1]).reshape(-1)]
    np.testing.assert_array_equal(
        found.reshape(-1), np.clip(np.array(exact, np.int64), spec.q_min, spec.q_max)
    )


@each_spec
@pytest.mark.parametrize("kinds", [(U16, U8), (U8, S16), (S8, S8)], ids=str)
def test_mul(spec: QuantSpec, kinds: tuple[QuantSpec, QuantSpec]) -> None:
    operands = [codes(kind, 30, 50, seed=index) for index, kind in enumerate(kinds)]
    zeros = (kinds[0].q_max // 3, kinds[1].q_max // 2)
    bound = (1 << kinds[0].bits) * (1 << kinds[1].bits)
    zero = (spec.q_min + spec.q_max) // 2
    fixed = fixed_point([Fraction(1 << spec.bits, bound)], [bound], result(spec, zero=zero))
    arguments = multiply_arguments(fixed, zeros, zero, spec)
    found = call("IntMul", operands, arguments, spec.dtype)[0]
    np.testing.assert_array_equal(
        found, reference.multiply(operands[0], operands[1], zeros, fixed, zero, spec)
    )


@pytest.mark.parametrize("kind", [U8, S8, U16], ids=str)
@each_spec
def test_rotate(kind: QuantSpec, spec: QuantSpec) -> None:
    operands = codes(kind, 5, 6, 8), codes(kind, 5, 6, 8, seed=1)
    angles = np.outer(np.arange(6), 0.3 ** np.arange(8))
    ratio = 0.8 * 2.0 ** (spec.bits - kind.bits)
    tables = ratio * np.cos(angles), 1.1 * ratio * np.sin(angles)
    zeros, zero = (100, 90), (spec.q_min + spec.q_max) // 2
    reach = 255 if kind.bits == 8 else 65535
    numbers = rotary_numbers(tables, (reach, reach), result(spec, 1.0))
    assert numbers.tables[0].dtype == (np.int32 if kind.bits == 8 else np.int64)
    arguments = rotate_arguments(numbers, zeros, zero, spec)
    attributes = {
        "word": ir.DataType.from_numpy(numbers.tables[0].dtype),
        "unsigned": ir.DataType.from_numpy(arguments["offset"].dtype),
    }
    given = {name: int(value) for name, value in attributes.items()}
    found = call("IntRotate", operands, arguments, spec.dtype, **given)[0]
    np.testing.assert_array_equal(found, reference.rotate(operands, zeros, numbers, zero, spec))
    one, other = (a.astype(np.float64) - z for a, z in zip(operands, zeros, strict=True))
    real = one * tables[0] + other * tables[1] + zero
    assert np.abs(found - np.clip(real, spec.q_min, spec.q_max)).max() < 0.75
    assert len(np.unique(found)) > 80


@pytest.mark.parametrize("kind", [U8, U16], ids=str)
@each_spec
def test_rotate_halves(kind: QuantSpec, spec: QuantSpec) -> None:
    given, zero = codes(kind, 5, 6, 16), (spec.q_min + spec.q_max) // 2
    angles = np.outer(np.arange(6), 0.3 ** np.arange(8))
    ratio = 0.8 * 2.0 ** (spec.bits - kind.bits)
    cosines, sines = ratio * np.cos(angles), ratio * np.sin(angles)
    reach = 255 if kind.bits == 8 else 65535
    first, second = (
        rotary_numbers(tables, (reach, reach), result(spec, 1.0))
        for tables in ((cosines, -sines), (cosines, sines))
    )
    parts = [rotate_arguments(numbers, (100, 100), zero, spec) for numbers in (first, second)]
    arguments = parts[0] | {
        name: np.concatenate([part[name] for part in parts], axis=-1)
        for name in ("table_a", "table_b", "offset")
    }
    kinds = first.tables[0].dtype, arguments["offset"].dtype
    word, unsigned = (int(ir.DataType.from_numpy(item)) for item in kinds)
    found = call("IntRotateHalves", [given], arguments, spec.dtype, word=word, unsigned=unsigned)[0]
    twin = reference.rotate_halves(given, 100, (first, second), zero, spec)
    np.testing.assert_array_equal(found, twin)
    assert len(np.unique(found)) > 80


@pytest.mark.parametrize("kind", [U8, U16], ids=str)
@each_spec
def test_rotate_halves_by(kind: QuantSpec, spec: QuantSpec) -> None:
    """By tables that IntRotaryTables puts together."""
    given = codes(kind, 2, 5, 16), codes(U16, 5, 8, seed=2), codes(S16, 5, 8, seed=3)
    zeros, zero = (100, 30000, -7), (spec.q_min + spec.q_max) // 2
    bound = 2 ** (kind.bits + 16)
    ratio = Fraction(3 << spec.bits, 4 * bound)
    fixed = fixed_point([ratio], [2 * bound], result(spec), close=Fraction(1, 256))
    word = np.int32 if kind.bits == 8 else np.int64
    kept = rotate_by_arguments(fixed, (zeros[0], *zeros), 1, zero, spec, word)
    tables = {
        name: np.array(z, word)
        for name, z in zip(("zero_cosines", "zero_sines"), zeros[1:], strict=True)
    }
    attribute = {"word": int(ir.DataType.from_numpy(np.dtype(word)))}
    whole = call("IntRotaryTables", given[1:], tables, ir.DataType(attribute["word"]), **attribute)
    centred = given[1].astype(np.int64) - zeros[1], given[2].astype(np.int64) - zeros[2]
    np.testing.assert_array_equal(whole[0], np.concatenate([centred[0]] * 2, axis=-1))
    np.testing.assert_array_equal(whole[1], np.concatenate([-centred[1], centred[1]], axis=-1))
    arguments = {"zero": kept["zero_a"]} | {
        name: kept[name] for name in ("multiplier", "offset", "shift", "low", "high")
    }
    found = call("IntRotateHalvesBy", [given[0], *whole], arguments, spec.dtype, **attribute)[0]
    twin = reference.rotate_halves_by(given, zeros, fixed, zero, spec)
    np.testing.assert_array_equal(found, twin)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [U8, U16], ids=str)
@each_spec
def test_rotate_by(kind: QuantSpec, spec: QuantSpec, sign: int) -> None:
    operands = (
        codes(kind, 2, 5, 8),
        codes(kind, 2, 5, 8, seed=1),
        codes(U16, 5, 8, seed=2),
        codes(S16, 5, 8, seed=3),
    )
    zeros, zero = (100, 90, 30000, -7), (spec.q_min + spec.q_max) // 2
    bound = 2 ** (kind.bits + 16)
    ratio = Fraction(3 << spec.bits, 4 * bound)
    fixed = fixed_point([ratio], [2 * bound], result(spec), close=Fraction(1, 256))
    word = np.int32 if kind.bits == 8 else np.int64
    arguments = rotate_by_arguments(fixed, zeros, sign, zero, spec, word)
    attribute = int(ir.DataType.from_numpy(np.dtype(word)))
    found = call("IntRotateBy", operands, arguments, spec.dtype, word=attribute)[0]
    twin = reference.rotate_by(operands, zeros, sign, fixed, zero, spec)
    np.testing.assert_array_equal(found, twin)
    a, b, c, s = (item.astype(float) - z for item, z in zip(operands, zeros, strict=True))
    real = (a * c + sign * b * s) * float(ratio) + zero
    assert np.abs(found - np.clip(real, spec.q_min, spec.q_max)).max() < 0.51


def test_join() -> None:
    high, low = np.array([[-5, 70000]], np.int32), np.array([[255, -3]], np.int32)
    found = call("IntJoin", [high, low], join_arguments(), ir.DataType.INT32)[0]
    np.testing.assert_array_equal(found, high * 256 + low)


def test_where() -> None:
    condition = np.array([True, False, True])
    chosen = [np.array([1, 2, 60000], np.uint16), np.array([7, 50000, 9], np.uint16)]
    found = call("IntWhere", [condition, *chosen], {}, U16.dtype)[0]
    np.testing.assert_array_equal(found, np.where(condition, *chosen))


def test_split() -> None:
    whole = codes(U16, 7, 9)
    high, low = call("IntSplit", [whole], {"eight": np.array(8, np.uint32)}, U8.dtype)
    np.testing.assert_array_equal(high.astype(np.int64) * 256 + low, whole)


@each_spec
@pytest.mark.parametrize("shape", [(30, 50), (2, 3), (3, 5), (1,)])
@pytest.mark.parametrize("known", [True, False])
def test_lookup(spec: QuantSpec, shape: tuple[int, ...], known: bool) -> None:
    given = codes(spec, *shape)
    table = codes(U16, 1 << spec.bits, seed=3)
    arguments = lookup_arguments(table, given.size if known else 0)
    found = call("IntLookup", [given], arguments, U16.dtype)[0]
    np.testing.assert_array_equal(found, table[given.astype(np.int64) % (1 << spec.bits)])


@pytest.mark.parametrize("kinds", [(U8, U8), (S8, U8), (U8, S8), (S8, S8)], ids=str)
def test_lookup_pair(kinds: tuple[QuantSpec, QuantSpec]) -> None:
    one, other = (codes(kind, 300, 500, seed=index) for index, kind in enumerate(kinds))
    table = codes(U16, 1 << 16, seed=3)
    arguments = lookup_pair_arguments(table, one.size)
    found = call("IntLookupPair", [one, other], arguments, U16.dtype)[0]
    places = 256 * one.astype(np.int64) + other
    np.testing.assert_array_equal(found, table[places % (1 << 16)])
    assert len(np.unique(places)) > 0.8 * len(table)


def test_signed() -> None:
    given = np.arange(256, dtype=np.uint8)
    found = call("IntSigned", [given], signed_arguments(), S8.dtype)[0]
    np.testing.assert_array_equal(found, np.arange(-128, 128))


@pytest.mark.parametrize("spec", [U8, S8], ids=str)
@pytest.mark.parametrize("scale", [Fraction(1, 50), Fraction(1, 10**6)], ids=["coarse", "fine"])
@pytest.mark.parametrize("keys", [60, 1 << 10, 1 << 13])
@pytest.mark.parametrize("short", [False, True])
def test_attention(spec: QuantSpec, scale: Fraction, keys: int, short: bool) -> None:
    """Exponentials and their share, of rows with a mask, and of one where all is masked."""
    generator = np.random.default_rng(0)
    most = 20 * scale.denominator
    scores = generator.integers(-most, most, (3, 20, 60)).astype(np.int32)
    mask = np.where(np.arange(60) > 40, -50 * scale.denominator, 0).astype(np.int32)
    mask = np.stack([mask, np.full(60, -50 * scale.denominator, np.int32)])[[0] * 19 + [1]]
    values = codes(S8, 3, 60, 8)
    zero, step = (spec.q_min + spec.q_max) // 3, 2.0 ** (1 - spec.bits)
    mixed = MixedValues(Fraction(1, 128), 128, 5, keys)
    numbers = attention_numbers(scale, mixed, result(spec, step), short=short)
    assert (numbers.step > 1) == (scale < Fraction(1, 10**5))
    fits = keys == 60 or (keys == 1 << 10 and not spec.signed)
    assert isinstance(numbers.share, ShortShare) == (short and fits)
    arguments = exponentials_arguments(numbers, scores.size)
    parts = call("IntExponentials", [scores, mask], arguments, U8.dtype)
    weights = reference.exponentials(scores, mask, numbers)
    np.testing.assert_array_equal(256 * parts[0].astype(np.int64) + parts[1], weights)
    peak = int(weights.max())
    assert weights[..., :40].max() == peak == numbers.exponentials[0]
    columns = np.concatenate([values, np.ones((3, 60, 1), np.int8)], axis=-1).astype(np.int64)
    kind = np.int32 if peak * keys * 128 < 1 << 31 else np.int64
    peaks = {60: 65535, 1 << 10: 16383, 1 << 13: 65535}  # of a share in 64 bits
    assert peak == peaks[keys] or (short and fits and peak >= 1 << 13)
    sums = [(part.astype(np.int64) @ columns).astype(kind) for part in parts]
    joined = call("IntJoin", sums, join_arguments(kind), ir.DataType.from_numpy(np.dtype(kind)))
    np.testing.assert_array_equal(joined[0], weights @ columns)
    if isinstance(numbers.share, ShortShare):
        shares = short_normalize_arguments(numbers.share, 5, zero, spec)
        found = call("IntNormalizeShort", joined, shares, spec.dtype)[0]
    else:
        shares = normalize_arguments(numbers.share, 5, zero, spec)
        found = call("IntNormalize", joined, shares, spec.dtype)[0]
    twin = reference.attention(weights, values, 5, numbers.share, zero, spec)
    np.testing.assert_array_equal(found, twin)
    real = np.exp(float(scale) * (scores + mask - (scores + mask).max(axis=-1, keepdims=True)))
    mixed_real = real @ (values - 5.0) / real.sum(axis=-1, keepdims=True) / 128 / step + zero
    off = np.abs(found - np.clip(mixed_real, spec.q_min, spec.q_max)).max()
    assert off < (0.55 if short and fits else 0.52)


@pytest.mark.parametrize("spec", [U8, S8], ids=str)
@pytest.mark.parametrize("ratio", [Fraction(1, 3), Fraction(1), Fraction(4)])
def test_a_short_share_at_its_ends(spec: QuantSpec, ratio: Fraction) -> None:
    """All values at one end, all exponentials the greatest: sums are as large as they can be."""
    for zero in (spec.q_min, 17, spec.q_max):
        for end, value_zero in ((-128, -128), (-128, 127), (127, -128), (127, 0)):
            mixed = MixedValues(ratio / 64, 128, value_zero, 128)
            encoding = replace(result(spec, 1 / 64), zero_point=np.array(zero, np.int32))
            share = attention_numbers(Fraction(1, 50), mixed, encoding, short=True)
            assert isinstance(share.share, ShortShare)
            weights = np.full((1, 128), share.exponentials[0])
            values = np.full((128, 1), end, np.int8)
            columns = np.concatenate([values, np.ones_like(values)], axis=-1).astype(np.int64)
            sums = weights @ columns
            assert np.abs(sums).max() < 1 << 31
            arguments = short_normalize_arguments(share.share, value_zero, zero, spec)
            given = sums.astype(np.int32)
            found = call("IntNormalizeShort", [given], arguments, spec.dtype)[0]
            expected = np.clip((end - value_zero) * float(ratio) + zero, spec.q_min, spec.q_max)
            assert abs(float(found.item()) - float(expected)) < 0.7


def softmax_case(kind: QuantSpec, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """Codes from ONNX Runtime, from the twin, and real codes, of a row with a mask."""
    scale, step = 20.0 / (1 << kind.bits), 1.0 / (1 << spec.bits)
    given = codes(kind, 4, 30, 200)
    given[:, :, 150:] = kind.q_min
    given[0, 0] = kind.q_max
    numbers = softmax_numbers(scale, kind.bits, result(spec, step))
    arguments = softmax_arguments(numbers, -1, spec.q_min, spec)
    found = call("IntSoftmax", [given], arguments, spec.dtype)[0]
    twin = reference.softmax(given, numbers, -1, spec.q_min, spec)
    real = np.exp(scale * given.astype(np.float64))
    real = real / real.sum(axis=-1, keepdims=True) / step + spec.q_min
    return found, twin, np.clip(real, spec.q_min, spec.q_max)


@each_spec
@pytest.mark.parametrize("kind", [U8, U16, S8, S16], ids=str)
def test_softmax(spec: QuantSpec, kind: QuantSpec) -> None:
    found, twin, real = softmax_case(kind, spec)
    np.testing.assert_array_equal(found, twin)
    assert np.abs(found - real).max() < 0.51  # half an LSB is the rounding's own


@each_spec
@pytest.mark.parametrize("kind", [U8, U16], ids=str)
def test_rms_norm(spec: QuantSpec, kind: QuantSpec) -> None:
    given, zero, size = codes(kind, 40, 96), kind.q_max // 3, 96
    given[0], given[1] = zero, zero + 1
    gains = (np.random.default_rng(2).integers(-200, 200, size), 0.01)
    scale, step = 0.03, 8.0 / (1 << spec.bits)
    numbers = norm_numbers(
        NormShape(size, kind.bits, scale, 1e-5, centred=False), gains, result(spec, step)
    )
    z = (spec.q_min + spec.q_max) // 2
    arguments = norm_arguments(numbers, 1, z, spec, zero=zero)
    found = call("IntRMSNorm", [given], arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.rms_norm(given, zero, numbers, z, spec))
    real = scale * (given.astype(np.float64) - zero)
    real = real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + 1e-5) * gains[0] * gains[1]
    expected = np.clip(real / step + z, spec.q_min, spec.q_max)
    # of rows an LSB or two from zero the root keeps fewer bits
    assert np.abs(found - expected)[2:].max() < 0.51
    assert np.abs(found - expected).max() < 0.75


@pytest.mark.parametrize("spec", [U8, S8], ids=str)
@pytest.mark.parametrize("kind", [U8, U16, S16], ids=str)
@pytest.mark.parametrize("scale", [0.03, 40.0])
def test_short_rms_norm(spec: QuantSpec, kind: QuantSpec, scale: float) -> None:
    """Rows of extremes, of nothing, of one code away from nothing, at a fine and a coarse scale."""
    given, zero = codes(kind, 40, 96), kind.q_max // 3
    given[0], given[1], given[2], given[2, 5] = zero, zero + 1, zero, zero + 1
    given[3], given[4] = kind.q_max, kind.q_min
    step, z = 8.0 / (1 << spec.bits), (spec.q_min + spec.q_max) // 3
    norm = NormShape(96, kind.bits, scale, 1e-5, centred=False)
    gains = np.array([150]), 0.01
    numbers = short_norm_numbers(norm, gains, result(spec, step))
    assert numbers is not None
    arguments = short_norm_arguments(numbers, zero, z, spec)
    found = call("IntRMSNormShort", [given], arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.short_rms_norm(given, zero, numbers, z, spec))
    real = scale * (given.astype(np.float64) - zero)
    real = real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + 1e-5) * 1.5
    expected = np.clip(real / step + z, spec.q_min, spec.q_max)
    assert np.abs(found - expected).max() < 0.75


@pytest.mark.parametrize(
    ("gains", "spec"), [([1, 2], U8), ([-1], U8), ([0], U8), ([1], U16)], ids=str
)
def test_norms_that_are_not_short(gains: list[int], spec: QuantSpec) -> None:
    norm = NormShape(2, 16, 0.03, 1e-5, centred=False)
    codes_and_scale = np.array(gains, np.int64), 0.01
    assert short_norm_numbers(norm, codes_and_scale, result(spec, 0.01)) is None


@each_spec
@pytest.mark.parametrize("kind", [U8, U16], ids=str)
def test_layer_norm(spec: QuantSpec, kind: QuantSpec) -> None:
    given, size = codes(kind, 40, 96), 96
    given[0] = 7
    gains = (np.random.default_rng(2).integers(-200, 200, size), 0.01)
    bias = normal(size).astype(np.float64)
    scale, step = 0.03, 8.0 / (1 << spec.bits)
    numbers = norm_numbers(
        NormShape(size, kind.bits, scale, 1e-5, centred=True), gains, result(spec, step), bias
    )
    z = (spec.q_min + spec.q_max) // 2
    more = {"finer": numbers.finer, "size": size, "half": size // 2}
    arguments = norm_arguments(numbers, 1, z, spec, **more)
    found = call("IntLayerNorm", [given], arguments, spec.dtype)[0]
    np.testing.assert_array_equal(found, reference.layer_norm(given, numbers, z, spec))
    real = scale * given.astype(np.float64)
    real = real - real.mean(axis=-1, keepdims=True)
    real = (
        real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + 1e-5) * gains[0] * gains[1] + bias
    )
    expected = np.clip(real / step + z, spec.q_min, spec.q_max)
    assert np.abs(found - expected).max() < 0.52


@pytest.mark.parametrize("numerator", [1, 10**9, (1 << 61) + 12345])
def test_reciprocal_roots(numerator: int) -> None:
    generator = np.random.default_rng(0)
    numbers = np.concatenate(
        [
            [1, 2, 3, 4, (1 << 62) - 1],
            4 ** np.arange(31),
            4 ** np.arange(1, 31) - 1,
            generator.integers(1, 1 << 62, 500),
            generator.integers(1, 1 << 20, 500),
        ]
    )[:, None]
    arguments = {"numerator": np.array(numerator, np.int64), **root_arguments()}
    found = call("IntReciprocalRoot", [numbers], arguments, ir.DataType.INT64)[0]
    np.testing.assert_array_equal(found, reference.reciprocal_root(numbers, numerator))
    exact = numerator / np.sqrt(numbers.astype(np.longdouble))
    assert (np.abs(found - exact) < 6 + exact * 2.0**-56).all()
