"""Encodings against exact rational arithmetic and against ONNX Runtime's own kernels."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel, PerTensor, QuantSpec
from qnpu.runtime_check.session import Mode, open_session
from tests.conftest import Array, normal, parse, run_model

KINDS = [
    (4, True, True),
    (4, True, False),
    (4, False, False),
    (8, True, True),
    (8, True, False),
    (8, False, False),
    (8, False, True),
    (16, True, True),
    (16, True, False),
    (16, False, False),
]
SPECS = [QuantSpec(*kind) for kind in KINDS]

ends = st.floats(2.0**-40, 2.0**40, width=32)


def exact(encoding: Encoding, code: int) -> Fraction:
    return Fraction(float(encoding.scale)) * (code - int(encoding.zero_point))


@pytest.mark.parametrize(
    ("spec", "q_min", "q_max", "text"),
    [
        (QuantSpec(4, True, True), -7, 7, "s4 symmetric per-tensor"),
        (QuantSpec(4, True, False), -8, 7, "s4 asymmetric per-tensor"),
        (QuantSpec(8, False, False), 0, 255, "u8 asymmetric per-tensor"),
        (QuantSpec(8, True, True, PerChannel(1)), -127, 127, "s8 symmetric per-channel(axis=1)"),
        (
            QuantSpec(4, True, True, PerBlock(0, 9)),
            -7,
            7,
            "s4 symmetric per-block(axis=0, size=9)",
        ),
        (QuantSpec(16, False, True), 0, 65535, "u16 symmetric per-tensor"),
        (QuantSpec(32, True, True), -(2**31) + 1, 2**31 - 1, "s32 symmetric per-tensor"),
    ],
)
def test_codes(spec: QuantSpec, q_min: int, q_max: int, text: str) -> None:
    assert (spec.q_min, spec.q_max, str(spec)) == (q_min, q_max, text)
    limits = np.array([q_min, q_max]).astype(np.int64).astype(spec.code_dtype)
    assert limits.astype(np.int64).tolist() == [q_min, q_max]


@pytest.mark.parametrize(("bits", "signed"), [(3, True), (32, False), (2, False)])
def test_widths_without_a_type(bits: int, signed: bool) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        QuantSpec(bits, signed, True)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(low=ends, high=ends, sides=st.sampled_from(["both", "above", "below"]))
@settings(max_examples=60, deadline=None)
def test_range_and_zero(spec: QuantSpec, low: float, high: float, sides: str) -> None:
    """Zero is a code; the codes span the range but for half a step at each end."""
    low, high = (-low if sides != "above" else 0.0), (high if sides != "below" else 0.0)
    encoding = Encoding.from_range(spec, low, high)
    zero = int(encoding.zero_point)
    assert spec.q_min <= zero <= spec.q_max
    assert exact(encoding, zero) == 0
    if spec.symmetric:
        assert zero == (0 if spec.signed else 2 ** (spec.bits - 1))
    # float32 rounds the scale by 2^-24, which the widest range holds 65,535 times
    slack = Fraction(float(encoding.scale)) * (Fraction(1, 2) + Fraction(1, 2**7))
    assert exact(encoding, spec.q_min) <= Fraction(low) + slack
    assert exact(encoding, spec.q_max) >= Fraction(high) - slack
    assert float(encoding.low) == float(exact(encoding, spec.q_min))
    assert float(encoding.high) == float(exact(encoding, spec.q_max))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(low=ends, high=ends, place=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_round_trip_within_half_a_step(
    spec: QuantSpec, low: float, high: float, place: float
) -> None:
    """|x - x̂| ≤ s/2, and 2^-7 LSB for dividing in float32 and 2^-24 of x for the product."""
    encoding = Encoding.from_range(spec, -low, high)
    value = np.float32(-low + place * (high + low))
    codes = encoding.quantize(np.array([value], np.float32))
    restored = Fraction(float(encoding.dequantize(codes)[0]))
    real = Fraction(float(value))
    bound = Fraction(float(encoding.scale)) * (Fraction(1, 2) + Fraction(1, 2**7))
    assert abs(restored - real) <= bound + abs(real) / 2**22
    assert spec.q_min <= int(codes.astype(np.int64)[0]) <= spec.q_max


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_code_comes_back(spec: QuantSpec) -> None:
    encoding = Encoding.from_range(spec, -3.0, 5.0)
    codes = np.arange(spec.q_min, spec.q_max + 1).astype(spec.code_dtype)
    np.testing.assert_array_equal(encoding.quantize(encoding.dequantize(codes)), codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-2.0, -1.0)])
def test_a_range_without_zero_is_widened(spec: QuantSpec, low: float, high: float) -> None:
    widened = Encoding.from_range(spec, min(low, 0.0), max(high, 0.0))
    assert Encoding.from_range(spec, low, high).same_as(widened)


def test_an_empty_range_has_scale_one() -> None:
    for spec in SPECS:
        assert float(Encoding.from_range(spec, 0.0, 0.0).scale) == 1.0
        assert float(Encoding.from_range(spec, -1e-42, 1e-42).scale) == 1.0


def test_channels_are_independent() -> None:
    spec = QuantSpec(8, True, True, PerChannel(1))
    weights = normal(5, 3, 2) * np.array([1, 100, 0.01], np.float32)[:, None]
    peak = np.abs(weights).max(axis=(0, 2))
    together = Encoding.from_range(spec, -peak, peak)
    codes = together.quantize(weights)
    for channel in range(3):
        alone = Encoding.from_range(QuantSpec(8, True, True), -peak[channel], peak[channel])
        np.testing.assert_array_equal(codes[:, channel], alone.quantize(weights[:, channel]))
    assert np.abs(codes.astype(int)).max(axis=(0, 2)).tolist() == [127, 127, 127]


@pytest.mark.parametrize("side", [1, -1])
def test_a_bias_saturates_and_does_not_wrap(side: int) -> None:
    """float32 has no 2^31 - 1: a clip in float32 lets 2^31 through, which wraps to -2^31."""
    encoding = Encoding(
        QuantSpec(32, True, True), np.array(1e-9, np.float32), np.array(0, np.int32)
    )
    codes = encoding.quantize(np.array([side * 2.1474836, side * 3.0], np.float32))
    assert (np.sign(codes) == side).all()
    assert int(codes[1]) == side * (2**31 - 1)


def test_what_an_encoding_refuses() -> None:
    spec = QuantSpec(8, False, False)
    one, two = np.ones(1, np.float32), np.ones(2, np.float32)
    zero = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="shape"):
        Encoding(spec, two, zero)
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="scale"):
            Encoding(spec, one * np.float32(bad), zero)


def test_same_as() -> None:
    spec = QuantSpec(8, False, False)
    encoding = Encoding.from_range(spec, -1.0, 2.0)
    assert encoding.same_as(Encoding.from_range(spec, -1.0, 2.0))
    assert not encoding.same_as(Encoding.from_range(spec, -1.0, 2.5))
    assert not encoding.same_as(Encoding.from_range(spec, -1.5, 1.5))
    assert not encoding.same_as(Encoding.from_range(QuantSpec(16, False, False), -1.0, 2.0))
    assert PerTensor() == PerTensor()
    assert PerChannel(0) != PerChannel(1)


@cache
def kernel(spec: QuantSpec) -> ort.InferenceSession:
    """QuantizeLinear with scale and zero point as inputs, codes widened to int32."""
    return open_session(
        parse(
            f"""
            g (float[N] x, float s, int32 z) => (int32[N] codes, float[N] back)
            {{
                zero = Cast<to: int = {spec.dtype.value}>(z)
                q = QuantizeLinear(x, s, zero)
                codes = Cast<to: int = 6>(q)
                back = DequantizeLinear(q, s, zero)
            }}
            """
        ),
        Mode.REFERENCE,
    )


def assert_same_as_kernel(encoding: Encoding, x: Array) -> None:
    codes = encoding.quantize(x)
    feeds = {"x": x, "s": encoding.scale, "z": encoding.zero_point}
    expected, back = kernel(encoding.spec).run(["codes", "back"], feeds)
    np.testing.assert_array_equal(codes.astype(np.int32), expected)
    restored = encoding.dequantize(codes)
    np.testing.assert_array_equal(restored.view(np.int32), back.view(np.int32))


@pytest.mark.parametrize(
    "kind", [(4, True), (4, False), (8, True), (8, False), (16, True), (16, False)]
)
@given(low=ends, high=ends, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_bit_for_bit_as_onnx_runtime(
    kind: tuple[int, bool], low: float, high: float, seed: int
) -> None:
    """Inside the range and outside it, where codes saturate."""
    encoding = Encoding.from_range(QuantSpec(*kind, symmetric=False), -low, high)
    x = np.random.default_rng(seed).uniform(-2 * low, 2 * high, 257).astype(np.float32)
    assert_same_as_kernel(encoding, x)


@pytest.mark.parametrize(
    "kind", [(4, True), (4, False), (8, True), (8, False), (16, True), (16, False)]
)
def test_ties_go_to_even_as_in_onnx_runtime(kind: tuple[int, bool]) -> None:
    spec = QuantSpec(*kind, symmetric=False)
    zero = (spec.q_min + spec.q_max) // 2
    encoding = Encoding(spec, np.asarray(0.25, np.float32), np.asarray(zero, np.int32))
    halves = np.arange(-10, 10, dtype=np.float32) + np.float32(0.5)
    assert_same_as_kernel(encoding, halves * np.float32(0.25))
    inner = encoding.quantize(np.array([0.125, 0.375, -0.125, -0.375], np.float32))
    assert (inner.astype(int) - zero).tolist() == [0, 2, 0, -2]


def in_blocks(axis: int, **changes: object) -> Encoding:
    """Of a (6, 4) matrix, channels along the other axis."""
    channels, shape = (4, (3, 4)) if axis == 0 else (6, (6, 2))
    multiples = np.random.default_rng(1).integers(1, 16, shape).astype(np.uint8)
    encoding = Encoding(
        QuantSpec(4, True, True, PerBlock(axis, 2)),
        np.linspace(0.01, 0.3, channels, dtype=np.float32),
        np.zeros(channels, np.int32),
        multiples,
    )
    return replace(encoding, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_the_double_dequantization_of_onnx_runtime(axis: int) -> None:
    encoding = in_blocks(axis)
    real = normal(6, 4, seed=3, scale=2.0)
    codes, multiples = encoding.quantize(real), encoding.block_scales
    assert multiples is not None
    rows, columns = multiples.shape
    channels = len(encoding.scale)
    model = parse(
        f"g (uint8[{rows}, {columns}] m, float[{channels}] s, int4[6, 4] q) => (float[6, 4] y)"
        f" {{ t = DequantizeLinear<axis: int = {1 - axis}>(m, s)"
        f" y = DequantizeLinear<axis: int = {axis}, block_size: int = 2>(q, t) }}"
    )
    arrays: dict[str, Array] = {"m": multiples, "s": encoding.scale, "q": codes}
    for value in list(model.graph.inputs):
        model.graph.inputs.remove(value)
        name = name_of(value)
        value.const_value = ir.tensor(arrays[name], dtype=value.dtype, name=name)
        model.graph.register_initializer(value)
    (expected,) = run_model(model, {})
    found = encoding.dequantize(codes)
    np.testing.assert_array_equal(found, expected)
    steps = np.repeat(multiples, 2, axis)
    scale = encoding.scale[None] if axis == 0 else encoding.scale[:, None]
    inside = np.abs(real) <= 7 * steps * scale
    assert (np.abs(found - real) <= steps * scale / 2 * (1 + 1e-6))[inside].all()
    whole = encoding.integers(codes)
    np.testing.assert_array_equal(whole, codes.astype(int) * steps)
    assert np.abs(whole).max() <= 105
    np.testing.assert_allclose(whole * scale, found, rtol=1e-6)


def test_blocks_differ_by_their_scales() -> None:
    one = in_blocks(0)
    other = in_blocks(0)
    assert one.same_as(other)
    assert one.block_scales is not None
    assert not one.same_as(in_blocks(0, block_scales=16 - one.block_scales))
    assert not one.same_as(in_blocks(1))
    assert one.zero_point_codes.shape == (3, 4)
    np.testing.assert_allclose(one.high, 7.0 * one.scale * one.block_scales.max(axis=0))
    np.testing.assert_array_equal(one.low, -one.high)


def test_what_blocks_refuse() -> None:
    one = in_blocks(0)
    with pytest.raises(ValueError, match="go with blocks"):
        in_blocks(0, block_scales=None)
    with pytest.raises(ValueError, match="go with blocks"):
        in_blocks(0, spec=QuantSpec(4, True, True, PerChannel(1)))
    with pytest.raises(ValueError, match="at least 1"):
        in_blocks(0, block_scales=np.zeros_like(one.zero_point_codes, np.uint8))
