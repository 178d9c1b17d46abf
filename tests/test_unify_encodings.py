"""unify-encodings: one encoding around layout operators, biases that fit the accumulator."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.op_traits import encoding_groups
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.target import load_target
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import Array, normal, parse


def unified(
    text: str, target: str = "onnxruntime", scheme: str = "w8a16", **data: Array
) -> tuple[Compilation, int]:
    compilation = Compilation(parse(text), load_target(target))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    CalibrateRanges(ArraySamples(data)).run(compilation)
    count = UnifyEncodings().run(compilation)
    compilation.stage = Stage.ENCODED
    verify_stage(compilation)
    for group in encoding_groups(compilation.graph):
        encodings = [compilation.encodings[v.name or ""] for v in group]
        assert all(encoding.same_as(encodings[0]) for encoding in encodings)
    assert UnifyEncodings().run(compilation) == 0
    return compilation, count


def test_concat_takes_the_union() -> None:
    compilation, count = unified(
        "g (float[1, 2] a, float[1, 2] b) => (float[1, 4] c) { c = Concat<axis: int = 1>(a, b) }",
        a=np.array([[-1, 2]], np.float32),
        b=np.array([[-3, 1]], np.float32),
    )
    assert count == 3
    union = Encoding.from_range(QuantSpec(16, False, False), -3.0, 2.0)
    merged = compilation.encodings["c"]
    np.testing.assert_allclose(merged.scale, union.scale, rtol=1e-4)  # ends lie on old codes
    step = float(union.scale)
    np.testing.assert_allclose([float(merged.low), float(merged.high)], [-3, 2], atol=step)


def test_copies_take_the_encoding_of_their_source() -> None:
    compilation, count = unified(
        """
        g (float[2, 4] x) => (float[4, 1] y)
        <int64[1] s = {8}, int64[1] from = {0}, int64[1] to = {4}, int64[1] axis = {1}>
        {
            r = Relu(x)
            flat = Reshape(r, s)
            part = Slice(flat, from, to)
            y = Unsqueeze(part, axis)
        }
        """,
        x=normal(2, 4),
    )
    assert count == 3
    assert all(compilation.encodings[n].same_as(compilation.encodings["r"]) for n in ("flat", "y"))


def test_an_input_copied_to_an_output() -> None:
    compilation, count = unified(
        "g (float[1, 4] x) => (float[4] y) <int64[1] s = {4}> { y = Reshape(x, s) }",
        x=normal(1, 4),
    )
    assert count == 1
    assert compilation.encodings["y"].same_as(compilation.encodings["x"])


def test_a_constant_that_is_moved_counts_too() -> None:
    compilation, _ = unified(
        """
        g (float[1, 2] x) => (float[1, 4] y) <float[1, 2] sink = {-100, 3}>
        { r = Relu(x)  y = Concat<axis: int = 1>(sink, r) }
        """,
        x=normal(1, 2),
    )
    assert float(compilation.encodings["r"].low) == pytest.approx(-100, rel=1e-4)


def test_a_table_shares_with_the_rows_taken_from_it() -> None:
    compilation, _ = unified(
        """
        g (int64[1, 1] ids) => (float[1, 1, 2] y) <float[2, 2] table = {-7, 1, 0.5, 0.25}>
        { y = Gather(table, ids) }
        """,
        ids=np.array([[1]]),
    )
    assert float(compilation.encodings["y"].low) == pytest.approx(-7, rel=1e-4)


def test_a_fixed_range_wins_where_it_covers_the_others() -> None:
    text = """
        g (float[1, 2] x, float[1, 2] z) => (float[1, 4] y)
        { p = Softmax(x)  y = Concat<axis: int = 1>(p, z) }
    """
    inside = np.array([[0.25, 0.5]], np.float32)
    compilation, _ = unified(text, x=inside, z=inside)
    assert float(compilation.encodings["y"].scale) == 2**-16
    compilation, _ = unified(text, x=inside, z=4 * inside)
    assert float(compilation.encodings["y"].scale) == pytest.approx(2 / 65535, rel=1e-4)


def test_symmetric_targets() -> None:
    compilation, _ = unified(
        "g (float[1, 2] a, float[1, 2] b) => (float[1, 4] c) { c = Concat<axis: int = 1>(a, b) }",
        target="mediatek-mdla",
        a=np.array([[-1, 2]], np.float32),
        b=np.array([[-3, 1]], np.float32),
    )
    merged = compilation.encodings["c"]
    assert int(merged.zero_point) == 0
    np.testing.assert_allclose(merged.scale, 3 / 32767, rtol=1e-6)


def test_groups_that_agree_are_left_alone() -> None:
    _, count = unified(
        "g (float[1, 4] x) => (float[1, 4] y) { r = Relu(x)  y = Neg(r) }", x=normal(1, 4)
    )
    assert count == 0


def linear(bias: str, weight: str = "{1, -4, 3, 2}") -> str:
    return f"""
        g (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {weight}, float[2] b = {bias}>
        {{ y = Gemm(x, w, b) }}
    """


def test_a_bias_has_the_scale_of_the_accumulator() -> None:
    compilation, count = unified(linear("{0.5, -8}"), x=np.array([[-1, 1]], np.float32))
    table = compilation.encodings
    assert count == 1
    assert table["b"].spec.bits == 32
    np.testing.assert_array_equal(table["b"].scale, table["x"].scale * table["w"].scale)
    np.testing.assert_array_equal(table["b"].zero_point, [0, 0])
    np.testing.assert_allclose(table["w"].scale, np.array([3, 4]) / 127, rtol=1e-7)


@pytest.mark.parametrize("bias", [1e3, 1e6, 3.7e8, 1e20])
def test_a_weight_makes_room_for_its_bias(bias: float) -> None:
    """The bias of channel 0 would pass 2^31 LSB; the channel is coarser then, not wrapped."""
    compilation, count = unified(
        linear(f"{{{bias}, -{bias}}}", "{1e-9, 1, 2e-9, 2}"), x=np.array([[-1, 1]], np.float32)
    )
    table = compilation.encodings
    assert count == 2  # the weight and its bias
    array = constant_array(compilation.graph.initializers["b"])
    assert array is not None
    encoding = table["b"]
    restored = encoding.dequantize(encoding.quantize(array))
    np.testing.assert_allclose(restored, array, rtol=2e-6)
    codes = encoding.quantize(array).astype(np.int64)
    assert abs(codes).max() <= 2**31 - 1
    assert codes[0] > 0 > codes[1]


def test_room_for_two_biases_of_one_weight() -> None:
    """The second linear raises the scale, so the first bias must be derived after it."""
    compilation, _ = unified(
        """
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {1e-9, 1, 1e-9, 1}, float[2] b = {1, 1}, float[2] c = {1000, 1}>
        { [one] h = Gemm(x, w, b)  r = Relu(h)  [two] y = Gemm(r, w, c) }
        """,
        x=np.array([[-1, 1]], np.float32),
    )
    table = compilation.encodings
    np.testing.assert_array_equal(table["b"].scale, table["x"].scale * table["w"].scale)
    np.testing.assert_array_equal(table["c"].scale, table["r"].scale * table["w"].scale)


def test_a_dead_channel_keeps_a_usable_scale() -> None:
    compilation, _ = unified(linear("{5, 1}", "{0, 1, 0, 1}"), x=np.array([[-1, 1]], np.float32))
    encoding = compilation.encodings["b"]
    array = np.array([5, 1], np.float32)
    np.testing.assert_allclose(
        encoding.dequantize(encoding.quantize(array)), array, atol=float(encoding.scale.max())
    )
