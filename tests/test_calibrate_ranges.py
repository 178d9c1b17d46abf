"""calibrate-ranges: every tensor gets an encoding, from itself, its operator, or data."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.rotated_weights import mark_rotated_weights
from qnpu.compiler.target import load_target
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.runtime_check.feeds import ArraySamples, FeedSource
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.range_measuring import fixed_encoding
from tests.conftest import normal, parse

NETWORK = """
    g (float[2, 4] x) => (float[2, 2] y)
    <float[4, 2] w = {1, -8, 2, 7, -3, 6, 4, 5}, float[2] b = {1, -2}, float[2] c = {0.5, 3},
     int64[2] shape = {2, 2}>
    {
        h = Gemm(x, w, b)
        r = Reshape(h, shape)
        m = Mul(r, c)
        p = Softmax(m)
        t = Tanh(p)
        y = Sigmoid(t)
    }
"""


def calibrated(
    text: str,
    data: FeedSource,
    *,
    scheme: str = "w8a16",
    target: str = "onnxruntime",
    method: RangeMethod = RangeMethod.MIN_MAX,
    segment_bytes: int = 2**20,
) -> tuple[Compilation, int]:
    compilation = Compilation(parse(text), load_target(target))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    before = model_to_text(compilation.model)
    count = CalibrateRanges(data, method, segment_bytes).run(compilation)
    assert model_to_text(compilation.model) == before
    compilation.stage = Stage.ENCODED
    verify_stage(compilation)
    return compilation, count


def test_what_is_encoded_and_how() -> None:
    x = normal(6, 4)
    compilation, count = calibrated(NETWORK, ArraySamples({"x": x}))
    table = compilation.encodings
    # not the bias (derived) and not the copy r (shared)
    assert set(table) == {"x", "w", "c", "h", "m", "p", "t", "y"}
    assert count == len(table)
    np.testing.assert_allclose(table["w"].scale, np.array([4, 8]) / 127, rtol=1e-7)
    np.testing.assert_allclose(table["c"].scale, 3 / 65535, rtol=1e-7)
    span = x.max() - x.min()
    np.testing.assert_allclose(table["x"].scale, span / 65535, rtol=1e-6)
    h = x @ np.array([[1, -8], [2, 7], [-3, 6], [4, 5]]) + [1, -2]
    np.testing.assert_allclose(table["h"].scale, (h.max() - h.min()) / 65535, rtol=1e-6)


def test_a_second_run_measures_nothing_new() -> None:
    data = ArraySamples({"x": normal(2, 4)})
    compilation, _ = calibrated(NETWORK, data)
    before = {name: compilation.encodings[name] for name in compilation.encodings}
    assert CalibrateRanges(data).run(compilation) == 0
    assert all(compilation.encodings[name].same_as(before[name]) for name in before)


@pytest.mark.parametrize("limit", [1, 100, 2**20])
@pytest.mark.parametrize("method", list(RangeMethod))
def test_cuts_do_not_change_the_numbers(limit: int, method: RangeMethod) -> None:
    data = ArraySamples({"x": normal(8, 4)})
    expected, _ = calibrated(NETWORK, data, method=method)
    actual, _ = calibrated(NETWORK, data, method=method, segment_bytes=limit)
    assert list(actual.encodings) == list(expected.encodings)
    assert all(
        actual.encodings[name].same_as(expected.encodings[name]) for name in actual.encodings
    )


@pytest.mark.parametrize(
    ("target", "scheme", "softmax", "tanh"),
    [
        ("onnxruntime", "w8a16", (2**-16, 0), (2**-15, 2**15)),
        ("mediatek-mdla", "w8a16", (2**-15, 0), (2**-15, 0)),
    ],
)
def test_fixed_ranges_have_power_of_two_scales(
    target: str, scheme: str, softmax: tuple[float, int], tanh: tuple[float, int]
) -> None:
    data = ArraySamples({"x": normal(2, 4)})
    compilation, _ = calibrated(NETWORK, data, target=target, scheme=scheme)
    for name, expected in (("p", softmax), ("y", softmax), ("t", tanh)):
        encoding = compilation.encodings[name]
        assert (float(encoding.scale), int(encoding.zero_point)) == expected


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_fixed_encodings_reach_the_range_but_for_one_step(
    bits: int, signed: bool, low: float
) -> None:
    encoding = fixed_encoding(QuantSpec(bits, signed, signed), low, 1.0)
    step = float(encoding.scale)
    assert np.log2(step) == np.floor(np.log2(step))
    assert float(encoding.high) == 1.0 - step
    if low < 0:
        assert float(encoding.low) in (-1.0, -1.0 + step)  # symmetric codes leave the lowest out
    else:
        assert float(encoding.low) <= 0.0


def test_four_bit_weights_are_clipped_eight_bit_ones_are_not() -> None:
    """Also where clipping would pay at 8 bits: 200 weights lie halfway between two codes."""
    column = [1.0, *[0.5] * 200]
    text = f"""
        g (float[1, 201] x) => (float[1, 1] y)
        <float[201, 1] w = {{{", ".join(map(str, column))}}}, float[1, 1] v = {{1}}>
        {{ h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }}
    """
    data = ArraySamples({"x": normal(2, 201)})
    eight, _ = calibrated(text, data, method=RangeMethod.MSE)
    four, _ = calibrated(text, data, scheme="w4a16", method=RangeMethod.MSE)
    np.testing.assert_allclose(eight.encodings["w"].scale, [1 / 127], rtol=1e-6)
    assert 0.4 / 7 < float(four.encodings["w"].scale[0]) < 0.95 / 7


# x is copied before the linear takes it, as heads are; the second linear's input is no rotation's
ROTATED = """
    g (float[2, 4] x) => (float[2, 4] y)
    <float[4, 4] w = {1, -2, 2, 1, -3, 6, 4, 5, 1, 1, 1, -4, 1, 3, 2, 1},
     float[4, 4] v = {1, -2, 2, 1, -3, 6, 4, 5, 1, 1, 1, -4, 1, 3, 2, 1}, int64[2] s = {4, 2}>
    {
        a = Neg(x)
        b = Reshape(a, s)
        c = Transpose<perm: ints = [1, 0]>(b)
        d = MatMul(c, w)
        e = Relu(d)
        f = MatMul(e, v)
        y = Relu(f)
    }
"""


def rotated_calibration(method: RangeMethod, scheme: str = "w8a16") -> Compilation:
    compilation = Compilation(parse(ROTATED))
    weight = compilation.graph.initializers["w"]
    mark_rotated_weights(compilation.model, inputs=[weight])
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    CalibrateRanges(ArraySamples({"x": normal(64, 4)}), method).run(compilation)
    return compilation


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_rotated_inputs_take_another_rule(scheme: str) -> None:
    """PAPER: Mean where rotated, also of what a copy is made from; the rest as Max-Min.

    Where a requantize point narrows the input, that is what the linear takes.
    """
    mean = rotated_calibration(RangeMethod.MEAN_3_SIGMA, scheme).encodings
    extremes = rotated_calibration(RangeMethod.MIN_MAX, scheme).encodings
    paper = rotated_calibration(RangeMethod.PAPER, scheme).encodings
    assert set(paper) == set(mean)
    rotated = {name for name in paper if paper[name].same_as(mean[name])}
    assert rotated == {"w", "c_requantized" if scheme == "w8a8" else "a"}
    others = set(paper) - rotated
    assert all(paper[name].same_as(extremes[name]) for name in others)


def test_the_table_at_eight_and_four_bits() -> None:
    """At 8 Max-Min everywhere; a merged weight of 4 bits takes the Mean, another does not."""
    wide = rotated_calibration(RangeMethod.TABLE).encodings
    extremes = rotated_calibration(RangeMethod.MIN_MAX).encodings
    assert all(wide[name].same_as(extremes[name]) for name in wide)
    narrow = rotated_calibration(RangeMethod.TABLE, "w4a16").encodings
    mean = rotated_calibration(RangeMethod.MEAN_3_SIGMA, "w4a16").encodings
    assert narrow["w"].same_as(mean["w"])
    assert not narrow["w"].same_as(rotated_calibration(RangeMethod.MIN_MAX, "w4a16").encodings["w"])


def test_search_weighs_errors_by_the_weights_of_the_linears_behind() -> None:
    """A wide feature that both linears take no notice of is clipped."""
    text = """
        g (float[2, 2] x) => (float[2, 2] y, float[2, 2] z)
        <float[2, 2] w = {1e-5, 1e-5, 1, 1}, float[2, 2] v = {0, 1e-5, 2, 1}>
        { a = Neg(x)  y = MatMul(a, w)  z = MatMul(a, v) }
    """
    data = normal(64, 2)
    data[:, 0] *= 1000
    samples = ArraySamples({"x": data})
    heeded, _ = calibrated(text, samples, scheme="w8a8", method=RangeMethod.SEARCH)
    assert float(heeded.encodings["a_requantized"].high) < 100
    tapped = text.replace("z = MatMul(a, v)", "z = MatMul(a, v)  t = Neg(a)  u = Relu(t)")
    shared, _ = calibrated(tapped, samples, scheme="w8a16", method=RangeMethod.SEARCH)
    assert float(shared.encodings["a"].high) > 1000


def test_progress_ends_at_one() -> None:
    seen: list[tuple[str, float]] = []
    compilation = Compilation(parse(NETWORK))
    AssignBitWidths(Scheme.parse("w8a16")).run(compilation)
    data = ArraySamples({"x": normal(4, 4)})
    CalibrateRanges(data, progress=lambda step, part: seen.append((step, part))).run(compilation)
    parts = [part for _, part in seen]
    assert {step for step, _ in seen} == {"calibrate"}
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def fault(text: str, data: FeedSource) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        calibrated(text, data)
    return caught.value.codes


@pytest.mark.parametrize("numbers", ["{0.0, 1.0}", "{1.0, 2.0}", "{-1.0, 1.0}"])
def test_infinite_activations(numbers: str) -> None:
    """0/0 is NaN, 1/0 infinite; a tensor that is +inf throughout is no less a fault."""
    text = f"""
        g (float[2] x) => (float[2] y) <float[2] one = {numbers}, float zero = {{0}}>
        {{ a = Mul(x, one)  y = Div(a, zero) }}
    """
    assert fault(text, ArraySamples({"x": np.ones((2,), np.float32)})) == ["QN304"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infinite_inputs(bad: float) -> None:
    x = np.array([1, bad], np.float32)
    text = "g (float[2] x) => (float[2] y) { y = Relu(x) }"
    assert fault(text, ArraySamples({"x": x})) == ["QN304"]


def test_infinite_weights() -> None:
    text = """
        g (float[1, 1] x) => (float[1, 1] y) <float[1, 1] w = {inf}, float[1, 1] v = {nan}>
        { h = MatMul(x, w)  y = MatMul(h, v) }
    """
    assert fault(text, ArraySamples({"x": normal(1, 1)})) == ["QN107", "QN107"]


def test_data_that_do_not_fit() -> None:
    assert fault(NETWORK, ArraySamples({"x": normal(2, 5)})) == ["QN301"]


def test_scalars_and_empty_tensors() -> None:
    compilation, _ = calibrated(
        """
        g (float[2, 4] x) => (float y) <float[0] none = {}, int64[1] all = {-1}>
        {
            flat = Reshape(x, all)
            more = Concat<axis: int = 0>(flat, none)
            y = ReduceSum<keepdims: int = 0>(more)
        }
        """,
        ArraySamples({"x": np.ones((2, 4), np.float32)}),
    )
    np.testing.assert_allclose(compilation.encodings["y"].scale, 8 / 65535, rtol=1e-7)


def test_a_constant_of_rank_zero_on_a_symmetric_target() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y) <float c = {2}> { y = Mul(x, c) }"
    compilation, _ = calibrated(text, ArraySamples({"x": normal(2, 4)}), target="mediatek-mdla")
    np.testing.assert_allclose(compilation.encodings["c"].scale, 2 / 32767, rtol=1e-7)
