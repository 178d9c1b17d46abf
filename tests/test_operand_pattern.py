"""Patterns of operands in target profiles."""

from __future__ import annotations

import pytest

from qnpu.compiler.operand_pattern import pattern_of
from qnpu.compiler.operands import Operand, operations
from tests.conftest import parse

TEXT = """
    g (float[2, 4] x) => (float[2, 4] y)
    <float s = {0.5}, int8 z = {3}, float t = {0.02}, uint8 zt = {128}, uint8 two = {228}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        c = DequantizeLinear(two, t, zt)
        p = Pow(xd, c)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""


def operands() -> tuple[Operand, Operand]:
    (power,) = operations(parse(TEXT).graph)
    base, exponent = power.present
    return base, exponent


@pytest.mark.parametrize(
    ("pattern", "base", "exponent"),
    [
        ("*", True, True),
        ("s8", True, False),
        ("s8|u8", True, True),
        ("u16", False, False),
        ("* const", False, True),
        ("* ones", False, False),
        ("* var", True, False),
        ("* tensor", True, True),
        ("* channel|tensor", True, True),
        ("* channel", False, False),
        ("* z=0", False, False),
        ("* z!=0", True, True),
        ("* z!=mid", True, False),
        ("* rank=2", True, False),
        ("* rank=0", False, True),
        ("* block=32", False, False),
        ("* value=2", False, True),
        ("* value=3", False, False),
        ("u8 const value=2", False, True),
        ("* alone", True, False),
        ("* moved", False, False),
        ("-", False, False),
    ],
)
def test_what_fits(pattern: str, base: bool, exponent: bool) -> None:
    found = tuple(pattern_of(pattern).fits(operand) for operand in operands())
    assert found == (base, exponent)


def test_operators_that_move_codes() -> None:
    """On either side; Concat takes several encodings, so it is none of them."""
    for op, moved in (("Transpose", True), ("Concat<axis: int = 0>", False), ("Abs", False)):
        (operation,) = operations(parse(TEXT.replace("Pow(xd, c)", f"{op}(xd)")).graph)
        for operand in (operation.present[0], operation.outputs[0]):
            assert pattern_of("s8 moved").fits(operand) == moved


def test_an_input_left_out() -> None:
    assert pattern_of("-").fits(None)
    assert not pattern_of("*").fits(None)


@pytest.mark.parametrize("text", ["u8 constant", "* z=1", "* rank=x", "* tensor|row"])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no word of a pattern"):
        pattern_of(text)
