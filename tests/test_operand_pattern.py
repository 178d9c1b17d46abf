"""Patterns of operands in target profiles."""

from __future__ import annotations

import pytest

from qnpu.compiler.operand_pattern import pattern_of
from qnpu.compiler.operands import Operand, Operation, operations
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
        ("* size=-1:4..4", True, False),
        ("* size=-1:5..", False, False),
        ("* size=-2:1..2", True, True),
        ("* size=-3:2..", False, False),
        ("* multiple=-1:4", True, False),
        ("* no-multiple=-1:3", True, True),
        ("* from=Relu", False, False),
        ("* holds=2", False, False),
        ("* fed", False, False),
        ("-", False, False),
    ],
)
def test_what_fits(pattern: str, base: bool, exponent: bool) -> None:
    found = tuple(pattern_of(pattern).fits(operand) for operand in operands())
    assert found == (base, exponent)


CHAIN = """
    g (int8[2, 4] xq) => (int8[2, 4] rq)
    <float s = {0.5}, int8 z = {3}, float t = {0.25}>
    {
        xd = DequantizeLinear(xq, s, z)
        p = Softmax(xd)
        pq = QuantizeLinear(p, s, z)
        pd = DequantizeLinear(pq, s, z)
        r = Sub(xd, pd)
        rq = QuantizeLinear(r, s, z)
    }
"""


def fitting(text: str, pattern: str) -> list[str]:
    """Operators of which the last input (or, of the first, the output) fits."""
    first, second = operations(parse(text).graph)
    found = {first.op_type: first.outputs[0], second.op_type: second.present[-1]}
    return [name for name, operand in found.items() if pattern_of(pattern).fits(operand)]


def test_what_made_an_operand() -> None:
    assert fitting(CHAIN, "* from=Softmax") == ["Softmax", "Sub"]
    assert fitting(CHAIN, "* from=Softmax/Sub") == []
    assert fitting(CHAIN, "* from=Softmax/*") == []
    assert fitting(CHAIN, "* from=Softmax/1:Exp") == []  # which has one input
    assert fitting(CHAIN, "* fed") == ["Softmax", "Sub"]
    (_, last) = operations(parse(CHAIN.replace("Sub(xd, pd)", "Sub(pd, xd)")).graph)
    assert not pattern_of("* from=Softmax").fits(last.present[1])
    twice = CHAIN.replace("r = Sub(xd, pd)", "r = Relu(pd)")
    (_, relu) = operations(parse(twice).graph)
    assert pattern_of("* from=Relu/Softmax").fits(relu.outputs[0])
    assert pattern_of("* from=Relu/*").fits(relu.outputs[0])
    assert not pattern_of("* from=Relu/1:Softmax").fits(operands()[0])


@pytest.mark.parametrize(
    ("reader", "leaves"),
    [
        ("Sub(xd, pd)", False),
        ("Sigmoid(pd)", True),
        ("Relu(pd)", False),
        ("Add(pd, s)", True),
        ("Add(pd, xd)", False),
    ],
)
def test_codes_that_leave_the_graph(reader: str, leaves: bool) -> None:
    """At once, or through operators that keep the layout of rows."""
    first, second = operations(parse(CHAIN.replace("Sub(xd, pd)", reader)).graph)
    assert pattern_of("* leaves").fits(first.outputs[0]) == leaves
    assert pattern_of("* leaves").fits(second.outputs[0])
    assert not pattern_of("* leaves").fits(operations_of(TEXT).outputs[0])


def operations_of(text: str) -> Operation:
    (only,) = operations(parse(text).graph)
    return only


def test_what_a_constant_holds() -> None:
    axes = operations_of(TEXT.replace("Pow(xd, c)", "ReduceMin(xd, two)")).present[1]
    assert pattern_of("* holds=228").fits(axes)
    assert not pattern_of("* holds=3").fits(axes)


def test_an_input_left_out() -> None:
    assert pattern_of("-").fits(None)
    assert not pattern_of("*").fits(None)


@pytest.mark.parametrize("text", ["u8 constant", "* z=1", "* rank=x", "* tensor|row", "* size=2"])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no word of a pattern"):
        pattern_of(text)
