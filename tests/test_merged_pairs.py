"""Two pairs in a row become one: whose scale has it?"""

from __future__ import annotations

import pytest

from qnpu.compiler.merged_pairs import merge_splits_a_move
from qnpu.compiler.operands import operations
from tests.conftest import parse

TEXT = """
    g (float[2, 4] x) => (float[4, 2] y)
    <float a = {0.5}, uint8 za = {128}, float b = {0.25}, uint8 zb = {128}, int64[2] shape = {4, 2}>
    {
        xr = Relu(x)
        xq = QuantizeLinear(xr, a, za)
        xd = DequantizeLinear(xq, a, za)
        vq = QuantizeLinear(xd, b, zb)
        vd = DequantizeLinear(vq, b, zb)
        r = Reshape(vd, shape)
        rq = QuantizeLinear(r, b, zb)
        y = DequantizeLinear(rq, b, zb)
    }
"""
BEHIND = """
    g (float[2, 4] x) => (float[4, 2] y)
    <float a = {0.25}, uint8 za = {128}, float b = {0.5}, uint8 zb = {128}, int64[2] shape = {4, 2}>
    {
        xq = QuantizeLinear(x, a, za)
        xd = DequantizeLinear(xq, a, za)
        r = Reshape(xd, shape)
        rq = QuantizeLinear(r, a, za)
        rd = DequantizeLinear(rq, a, za)
        vq = QuantizeLinear(rd, b, zb)
        vd = DequantizeLinear(vq, b, zb)
        y = Relu(vd)
    }
"""


def splits(text: str) -> bool:
    (change,) = [op for op in operations(parse(text).graph) if op.op_type == "Convert"]
    return merge_splits_a_move(change.present[0], change.outputs[0])


@pytest.mark.parametrize("text", [TEXT, BEHIND])
def test_the_narrower_range_is_kept(text: str) -> None:
    """So a move on that side keeps its scale, and one on the other side does not."""
    assert not splits(text)
    swapped = text.replace("0.25", "#").replace("0.5", "0.25").replace("#", "0.5")
    assert splits(swapped)


def test_ranges_that_only_overlap_give_a_third_scale() -> None:
    assert splits(
        TEXT.replace("float b = {0.25}", "float b = {0.5}").replace("zb = {128}", "zb = {100}")
    )


def test_scales_are_equal_bit_by_bit() -> None:
    """(65535 x 0.00005) / 65535 is not 0.00005 in float32; the compiler compares exactly."""
    wide = TEXT.replace("uint8", "uint16").replace("{128}", "{32768}").replace("{0.5}", "{0.0002}")
    assert not splits(wide.replace("{0.25}", "{0.000073}"))
    assert splits(wide.replace("{0.25}", "{0.00005}"))


NOT_MERGED = {
    "another type": TEXT.replace("uint8 zb", "int8 zb").replace("zb = {128}", "zb = {0}"),
    "no zero point": TEXT.replace("(xr, a, za)", "(xr, a)").replace("(xq, a, za)", "(xq, a)"),
    "read twice": TEXT.replace("float[4, 2] y)", "float[4, 2] y, float[2, 4] w)").replace(
        "vq = Quant", "w = Relu(xd) vq = Quant"
    ),
    "codes are an output": TEXT.replace("float[4, 2] y)", "float[4, 2] y, uint8[2, 4] vq)"),
    "codes are an input": TEXT.replace("float[2, 4] x", "uint8[2, 4] xq")
    .replace("xr = Relu(x)", "")
    .replace("xq = QuantizeLinear(xr, a, za)", ""),
    "nothing moves": TEXT.replace("Reshape(vd, shape)", "Relu(vd)"),
}


@pytest.mark.parametrize("text", NOT_MERGED.values(), ids=NOT_MERGED)
def test_what_stays_two_pairs(text: str) -> None:
    swapped = text.replace("0.25", "#").replace("0.5", "0.25").replace("#", "0.5")
    assert not splits(text)
    assert not splits(swapped)
