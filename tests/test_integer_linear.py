"""integer_linear: products of codes on ONNX Runtime against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import last_dimension
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_math import round_half_up
from qnpu.compiler.integer_only import float_faults
from qnpu.passes.fold_requantize import FoldRequantize
from qnpu.runtime_check.session import adds_in_32_bits
from tests.conftest import Array, apply, parse, run_model
from tests.integer_cells import (
    KINDS,
    cell,
    folded,
    linear,
    operators,
    rounded,
    scale,
    whole,
    with_constant,
)
from tests.integer_nodes import U16, codes


@pytest.mark.parametrize("result", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("a", "b"), [("uint8", "uint8"), ("uint16", "uint8"), ("uint8", "uint16"), ("int8", "uint8")]
)
def test_products_of_two_activations(a: str, b: str, result: str) -> None:
    named, zeros = {"a": a, "b": b, "y": result}, {"a": 100, "b": 77, "y": 90}
    shapes = {"a": "2, 5, 30", "b": "2, 30, 7", "y": "2, 5, 7"}
    model = cell("MatMul(ra, rb)", named, shapes, zeros)
    first, second = codes(KINDS[a], 2, 5, 30), codes(KINDS[b], 2, 30, 7, seed=1)
    found = folded(model, a=first, b=second)
    assert operators(model).count("MatMulInteger") == 1 + ("uint16" in (a, b))
    sums = whole(first, 100) @ whole(second, 77)
    ratio = scale("a") * scale("b") / scale("y")
    np.testing.assert_array_equal(found, rounded(sums, ratio, 90, KINDS[result]))


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("gemm", [False, True])
def test_linears(kind: str, weight: str, gemm: bool) -> None:
    model, numbers, scales = linear(kind, weight, gemm=gemm)
    a = codes(KINDS[kind], 5, 30)
    found = folded(model, a=a)
    sums = whole(a, 100) @ numbers.astype(object)
    if gemm:
        sums = sums + np.array([5, -4000, 300, 0, 77, -1], object)
    for channel, step in enumerate(scales):
        ratio = scale("a") * Fraction(float(step)) / scale("y")
        expected = rounded(sums[:, channel], ratio, 30000, U16)
        np.testing.assert_array_equal(found[:, channel], expected)


def test_four_bit_weights_stay_packed() -> None:
    model, _, _ = linear("uint8", "int4")
    apply(FoldRequantize(), model)
    assert model.graph.initializers["w"].dtype is ir.DataType.INT4
    assert operators(model)[:2] == ["Cast", "MatMulInteger"]


def test_features_are_cut_where_sums_could_leave_int32() -> None:
    """70,000 weights of 127 times 255 are 2.3e9."""
    features = 70_000
    model = parse(f"""
        g (uint8[1, {features}] a, int8[{features}, 1] w) => (uint16[1, 1] y)
        <float[1] sw = {{1.0}}, int8[1] zw = {{0}}, float sa = {{1.0}},
         uint8 za = {{0}}, float sy = {{40000.0}}, uint16 zy = {{0}}>
        {{ ra = DequantizeLinear(a, sa, za) rw = DequantizeLinear<axis = 1>(w, sw, zw)
           h = MatMul(ra, rw) y = QuantizeLinear(h, sy, zy) }}
    """)
    with_constant(model, "w", np.full((features, 1), 127), ir.DataType.INT8)
    found = folded(model, a=np.full((1, features), 255, np.uint8))
    assert operators(model).count("MatMulInteger") == 2
    assert int(found[0, 0]) == round_half_up(Fraction(features * 127 * 255, 40000))


def test_large_results_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model, _, _ = linear("uint16", "int8", gemm=True)
    model, _, _ = linear("uint16", "int8", gemm=True)
    a = codes(U16, 5, 30)
    expected = folded(whole_model, a=a)
    monkeypatch.setattr("qnpu.compiler.integer_linear._BLOCK", 29)
    monkeypatch.setattr("qnpu.compiler.integer_linear._PART", 12)  # 30 results: three parts
    found = folded(model, a=a)
    assert operators(model)[-1] == "Concat"
    assert operators(model).count("MatMulInteger") == 6
    np.testing.assert_array_equal(found, expected)


def on_grid(
    kind: str, given: str, weight: str, scales: list[float], end: float, bias: bool = False
) -> tuple[ir.Model, Array]:
    """A linear of 32 features with scale 1 of x, one scale per channel of W, ``end`` of y."""
    count = len(scales)
    low, high = (-7, 8) if weight == "int4" else (-127, 128)
    numbers = np.random.default_rng(5).integers(low, high, (32, count))
    body = "rc = DequantizeLinear<axis = 0>(c, sw, zc) h = Gemm(ra, rw, rc)"
    model = parse(f"""
        g ({kind}[64, 32] a, {weight}[32, {count}] w, {weight}[{count}] zw)
            => ({given}[64, {count}] y)
        <float[{count}] sw = {{{",".join(map(repr, scales))}}},
         int32[{count}] c = {{{",".join(str(700 * i - 999) for i in range(count))}}},
         int32[{count}] zc = {{{",".join(["0"] * count)}}},
         float sa = {{1.0}}, {kind} za = {{100}}, float sy = {{{end!r}}}, {given} zy = {{90}}>
        {{ ra = DequantizeLinear(a, sa, za) rw = DequantizeLinear<axis = 1>(w, sw, zw)
           {body if bias else "h = MatMul(ra, rw)"} y = QuantizeLinear(h, sy, zy) }}
    """)
    dtype = ir.DataType[weight.upper()]
    with_constant(model, "w", numbers, dtype)
    with_constant(model, "zw", np.zeros(count), dtype)
    return model, numbers


def extremes(kind: str, numbers: Array) -> Array:
    """Random codes, and those that make the sums of each channel least and greatest."""
    spec = KINDS[kind]
    found = codes(spec, 64, 32)
    for channel in range(min(24, numbers.shape[1])):
        up = numbers[:, channel] > 0
        found[2 * channel] = np.where(up, spec.q_max, spec.q_min)
        found[2 * channel + 1] = np.where(up, spec.q_min, spec.q_max)
    return found


WIDE = [(64, 64, 1), (65, 64, 2), (150, 64, 3), (256, 64, 4), (257, 64, 1), (150, 65, 1)]


@pytest.mark.parametrize(("count", "tall", "parts"), WIDE)
@pytest.mark.parametrize("given", ["uint8", "uint16"])
def test_products_with_more_channels_than_rows_are_made_in_parts(
    monkeypatch: pytest.MonkeyPatch, count: int, tall: int, parts: int, given: str
) -> None:
    """Of 64 rows: parts of 64 channels at most, of no more than 256, from ``tall`` rows.

    A QLinearMatMul gives the bytes. Codes of 16 bits take a MatMulInteger, here of half as many
    features as rows.
    """
    scales = [2.0 ** -(3 + channel % 4) for channel in range(count)]
    model, numbers = on_grid("uint8", given, "int8", scales, 1.0)
    monkeypatch.setattr("qnpu.compiler.integer_linear._TALL", tall)
    monkeypatch.setattr("qnpu.compiler.integer_linear._DEEP", 0.5)
    a = extremes("uint8", numbers)
    found = folded(model, a=a)
    maker = {"uint8": "QLinearMatMul", "uint16": "MatMulInteger"}[given]
    widths = [last_dimension(n.outputs[0]) for n in model.graph if n.op_type == maker]
    assert len(widths) == parts
    assert parts == 1 or all(width is not None and width <= 64 for width in widths)
    assert (operators(model)[-1] == "Concat") == (parts > 1)
    sums = whole(a, 100) @ numbers.astype(object)
    for channel, step in enumerate(scales):
        exact = sums[:, channel], Fraction(step), 90
        expected = to_even(*exact, given) if given == "uint8" else rounded(*exact, KINDS[given])
        np.testing.assert_array_equal(found[:, channel], expected)


@pytest.mark.parametrize(("given", "parts"), [("uint8", 1), ("uint16", 4)])
def test_bytes_made_at_once_may_be_large(
    monkeypatch: pytest.MonkeyPatch, given: str, parts: int
) -> None:
    """64 rows of 20 channels, 1,280 results: of int32 no more than 400 at once."""
    model, numbers = on_grid("uint8", given, "int8", [0.125] * 20, 1.0)
    monkeypatch.setattr("qnpu.compiler.integer_linear._BLOCK", 1279)
    monkeypatch.setattr("qnpu.compiler.integer_linear._PART", 400)
    folded(model, a=extremes("uint8", numbers))
    made = operators(model)
    assert made.count("QLinearMatMul") + made.count("MatMulInteger") == parts


@pytest.mark.parametrize(("given", "parts"), [("uint8", 3), ("uint16", 1)])
def test_sums_of_few_features_are_left_whole(
    monkeypatch: pytest.MonkeyPatch, given: str, parts: int
) -> None:
    """32 features for 64 rows: what is joined would be int32, but for bytes of a QLinearMatMul."""
    model, numbers = on_grid("uint8", given, "int8", [0.125] * 150, 1.0)
    monkeypatch.setattr("qnpu.compiler.integer_linear._TALL", 64)
    folded(model, a=extremes("uint8", numbers))
    made = operators(model)
    assert made.count("QLinearMatMul") + made.count("MatMulInteger") == parts


def to_even(sums: Array, ratio: Fraction, zero: int, kind: str) -> Array:
    exact = [round(int(n) * ratio) + zero for n in sums]
    return np.clip(np.array(exact, np.int64), KINDS[kind].q_min, KINDS[kind].q_max)


@pytest.mark.parametrize(("kind", "given"), [("uint8", "uint8"), ("int8", "int8")])
@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_bytes_on_the_grid_are_requantized_by_float32(kind: str, given: str, weight: str) -> None:
    """Ratios of n·2^-k, n of 1 to 31; ties go to the even code, as QuantizeLinear's do."""
    scales = [(1 + c) * 2.0 ** -(2 + c % 5) for c in range(31)]
    model, numbers = on_grid(kind, given, weight, scales, 8.0)
    a = extremes(kind, numbers)
    found = folded(model, a=a)
    unsigned = ["Cast", "BitwiseXor"] * (kind == "uint8" and weight == "int8")
    assert operators(model) == ["Cast"] * (weight == "int4") + unsigned + ["QLinearMatMul"]
    assert not list(float_faults(model))
    ties = 0
    for channel, scale_of in enumerate(scales):
        ratio = Fraction(scale_of) / 8
        sums = whole(a, 100) @ numbers[:, channel].astype(object)
        ties += sum((2 * int(n) * ratio).denominator == 1 and n * ratio % 1 != 0 for n in sums)
        np.testing.assert_array_equal(found[:, channel], to_even(sums, ratio, 90, given))
    assert ties > 10
    assert {found.min(), found.max()} == {KINDS[given].q_min, KINDS[given].q_max}


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bits_on_the_grid_are_requantized_in_32(kind: str, weight: str, bias: bool) -> None:
    scales = [(8 + c) * 2.0 ** -(3 + c % 3) for c in range(24)]
    model, numbers = on_grid(kind, "uint16", weight, scales, 1.0, bias)
    a = extremes(kind, numbers)
    found = folded(model, a=a)
    assert operators(model)[-2:] == ["MatMulInteger", "IntRequantizeShort"]
    for channel, scale_of in enumerate(scales):
        sums = whole(a, 100) @ numbers[:, channel].astype(object)
        sums = sums + (700 * channel - 999 if bias else 0)
        np.testing.assert_array_equal(found[:, channel], rounded(sums, Fraction(scale_of), 90, U16))


def test_bytes_with_a_bias_are_requantized_in_32_bits() -> None:
    scales = [(8 + c) * 2.0**-8 for c in range(24)]
    model, numbers = on_grid("uint8", "uint8", "int8", scales, 8.0, bias=True)
    a = extremes("uint8", numbers)
    found = folded(model, a=a)
    assert operators(model)[-2:] == ["MatMulInteger", "IntRequantizeShort"]
    for channel, scale_of in enumerate(scales):
        sums = whole(a, 100) @ numbers[:, channel].astype(object) + 700 * channel - 999
        expected = rounded(sums, Fraction(scale_of) / 8, 90, KINDS["uint8"])
        np.testing.assert_array_equal(found[:, channel], expected)


@pytest.mark.parametrize("given", ["uint8", "uint16"])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_both_bytes_on_the_grid(given: str, bias: bool) -> None:
    scales = [(8 + c) * 2.0 ** -(9 + c % 3) for c in range(24)]
    model, numbers = on_grid(
        "uint16", given, "int8", scales, 2.0 if given == "uint16" else 512.0, bias
    )
    a = extremes("uint16", numbers)
    found = folded(model, a=a)
    assert operators(model)[-3:] == ["MatMulInteger", "MatMulInteger", "IntSumBytesShort"]
    for channel, scale_of in enumerate(scales):
        sums = whole(a, 100) @ numbers[:, channel].astype(object)
        sums = sums + (700 * channel - 999 if bias else 0)
        ratio = Fraction(scale_of) / (2 if given == "uint16" else 512)
        np.testing.assert_array_equal(found[:, channel], rounded(sums, ratio, 90, KINDS[given]))


@pytest.mark.parametrize("given", ["uint8", "uint16"])
def test_off_the_grid_neither_is_used(given: str) -> None:
    scales = [float(np.float32(1.1 ** (c - 30))) for c in range(6)]
    model, _ = on_grid("uint8", given, "int8", scales, 3.0)
    apply(FoldRequantize(), model)
    assert {"QLinearMatMul", "IntRequantizeShort"}.isdisjoint(operators(model))
    assert operators(model)[-1].startswith("IntRequantize")


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("cpu", list(Cpu))
def test_kinds_of_bytes_that_are_multiplied(kind: str, weight: str, cpu: Cpu) -> None:
    """Two products of uint8 and int8 need more than 16 bits: 2 · 255 · 127."""
    model, numbers = on_grid(kind, "uint16", weight, [2.0**-3] * 24, 1.0)
    a = extremes(kind, numbers)
    apply(FoldRequantize(cpu), model)
    products = [node for node in model.graph if node.op_type == "MatMulInteger"]
    assert len(products) == 1 + (kind == "uint16")
    unsigned = cpu is Cpu.ANY and kind != "int8" and weight == "int8"
    kinds = {value.dtype for node in products if (value := node.inputs[1])}
    assert kinds == {ir.DataType.UINT8 if unsigned else ir.DataType.INT8}
    assert operators(model).count("BitwiseXor") == unsigned
    if cpu is Cpu.ANY or kind == "int8" or weight == "int4" or adds_in_32_bits():
        sums = whole(a, 100) @ numbers.astype(object)
        expected = rounded(sums, Fraction(1, 8), 90, U16)
        np.testing.assert_array_equal(run_model(model, {"a": a})[0], expected)


def test_types_that_differ_have_no_float32_form() -> None:
    model, _ = on_grid("int8", "uint8", "int8", [2.0**-8] * 4, 8.0)
    apply(FoldRequantize(), model)
    assert operators(model) == ["MatMulInteger", "IntRequantizeShort"]


def test_ratios_too_small_for_float32() -> None:
    """Sums of 4096 features pass 2^24 before results are clipped."""
    features = 4096
    model = parse(f"""
        g (uint8[1, {features}] a, int8[{features}, 1] w) => (uint8[1, 1] y)
        <float[1] sw = {{15.0}}, int8[1] zw = {{0}}, float sa = {{1.0}},
         uint8 za = {{0}}, float sy = {{16777216.0}}, uint8 zy = {{0}}>
        {{ ra = DequantizeLinear(a, sa, za) rw = DequantizeLinear<axis = 1>(w, sw, zw)
           h = MatMul(ra, rw) y = QuantizeLinear(h, sy, zy) }}
    """)
    with_constant(model, "w", np.full((features, 1), 127), ir.DataType.INT8)
    found = folded(model, a=np.full((1, features), 254, np.uint8))
    assert operators(model)[-2:] == ["MatMulInteger", "IntRequantizeInside"]
    assert int(found[0, 0]) == round_half_up(Fraction(features * 127 * 254 * 15, 1 << 24))


@pytest.mark.parametrize("cpu", [Cpu.ANY, Cpu.VNNI])
@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("weight", ["int4", "uint4"])
def test_weights_in_blocks_are_int8_weights_per_channel(kind: str, weight: str, cpu: Cpu) -> None:
    """4-bit codes times whole block scales are whole numbers of one scale per channel."""
    random = np.random.default_rng(3)
    numbers, times = random.integers(-7, 8, (32, 6)), random.integers(1, 16, (2, 6))
    scales = np.linspace(0.0001, 0.002, 6).astype(np.float32)
    zero = 8 if weight == "uint4" else 0
    model = parse(f"""
        g ({kind}[5, 32] a, {weight}[32, 6] w, {weight}[2, 6] zw, uint8[2, 6] m)
        => (uint16[5, 6] y)
        <float[6] sw = {{{",".join(repr(float(s)) for s in scales)}}},
         float sa = {{0.013}}, {kind} za = {{100}}, float sy = {{0.05}}, uint16 zy = {{30000}}>
        {{ ra = DequantizeLinear(a, sa, za)
           t = DequantizeLinear<axis = 1>(m, sw)
           rw = DequantizeLinear<axis = 0, block_size = 16>(w, t, zw)
           h = MatMul(ra, rw)
           y = QuantizeLinear(h, sy, zy) }}
    """)
    dtype = ir.DataType[weight.upper()]
    with_constant(model, "w", numbers + zero, dtype)
    with_constant(model, "zw", np.full((2, 6), zero), dtype)
    with_constant(model, "m", times, ir.DataType.UINT8)
    if not adds_in_32_bits() and cpu is Cpu.VNNI:
        pytest.skip("this CPU saturates")
    a = codes(KINDS[kind], 5, 32)
    assert apply(FoldRequantize(cpu), model) > 0
    assert list(float_faults(model)) == []
    assert {v.dtype for v in model.graph.initializers.values()}.isdisjoint({dtype})
    (found,) = run_model(model, {"a": a})
    sums = whole(a, 100) @ (numbers * np.repeat(times, 16, axis=0)).astype(object)
    for channel, step in enumerate(scales):
        ratio = scale("a") * Fraction(float(step)) / scale("y")
        expected = rounded(sums[:, channel], ratio, 30000, U16)
        np.testing.assert_array_equal(found[:, channel], expected)


def test_blocks_that_no_byte_holds_stay_float() -> None:
    """Block scales of another tool's file may have eight bits."""
    model = parse("""
        g (uint8[5, 32] a, int4[32, 6] w, uint8[2, 6] m) => (uint16[5, 6] y)
        <float[6] sw = {1, 1, 1, 1, 1, 1}, float sa = {0.013}, uint8 za = {100},
         float sy = {0.05}, uint16 zy = {30000}>
        { ra = DequantizeLinear(a, sa, za)
          t = DequantizeLinear<axis = 1>(m, sw)
          rw = DequantizeLinear<axis = 0, block_size = 16>(w, t)
          h = MatMul(ra, rw)
          y = QuantizeLinear(h, sy, zy) }
    """)
    with_constant(model, "w", np.full((32, 6), 7), ir.DataType.INT4)
    with_constant(model, "m", np.full((2, 6), 19), ir.DataType.UINT8)
    with pytest.raises(DiagnosticError) as caught:
        apply(FoldRequantize(), model)
    assert caught.value.codes == ["QN401"]
