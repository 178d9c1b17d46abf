"""widen-sums: the residual stream in 32 bits, the same numbers, and what stays narrow."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.integer_arguments import inside_arguments, short_arguments, split_arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_short import Term, quotient_point, short_point
from qnpu.compiler.quant_types import QuantSpec
from qnpu.passes.widen_sums import WidenSums
from tests.conftest import apply, parse, run_model
from tests.integer_nodes import S16, U8, U16, codes
from tests.lowered import lowered

FEEDS = {"a": codes(U16, 3, 40), "b": codes(U16, 3, 40, seed=1)}
PARTS = {"a": np.linspace(0, 70000, 120).astype(np.int32).reshape(3, 40), "b": codes(U16, 3, 80)}


def chain(spec: QuantSpec, *, reader: str = "") -> ir.Model:
    """(a + b) + b, rounded to codes twice, the second time to 8 bits."""
    model = parse("g (uint16[3, 40] a, uint16[3, 40] b) => (uint8[3, 40] y) { y = Identity(a) }")
    editor, anchor = IntegerEditor(model), model.graph[0]
    a, b = model.graph.inputs
    ends = [spec.q_min, spec.q_max]

    def add(
        one: ir.Value, name: str, taken: tuple[int, int], given: QuantSpec, zero: int
    ) -> ir.Value:
        unit = 1 << (16 - given.bits)
        terms = [
            Term([Fraction(1, 4 * unit)], [taken[0]], [taken[1]]),
            Term([Fraction(1, 2 * unit)], [0], [65535]),
        ]
        point = short_point(terms, [Fraction(0)], zero, given)
        assert point is not None
        like = ir.Value(name=name, type=ir.TensorType(given.dtype), shape=a.shape)
        arguments = short_arguments(point, zero, given)
        return editor.call("IntAddShort", [one, b], arguments, like, before=anchor)

    inner = add(a, "inner", (0, 65535), spec, -9000)
    y = add(inner, "outer", (ends[0], ends[1]), U8, -20)
    if reader == "IntSplit":
        editor.split(inner, split_arguments(), before=anchor)
    elif reader == "output":
        model.graph.outputs.append(inner)
    editor.take_over(model.graph.outputs[0], y)
    return model


def test_the_same_numbers() -> None:
    model = chain(U16)
    before = run_model(model, FEEDS)[0]
    inner = model.graph[0].outputs[0]
    assert apply(WidenSums(), model) == 1
    assert apply(WidenSums(), model) == 0
    assert inner.dtype is ir.DataType.INT32
    after = run_model(model, FEEDS)[0]
    assert len(np.unique(after)) > 50
    np.testing.assert_array_equal(after, before)


def test_codes_are_clipped_as_those_of_16_bits() -> None:
    """Sums below 0 are 0, and those above 65,535 that."""
    model = chain(U16)
    apply(WidenSums(), model)
    inner = model.graph[0].outputs[0]
    model.graph.outputs.append(inner)
    found = run_model(model, FEEDS)[1]
    a, b = (FEEDS[name].astype(np.int64) for name in "ab")
    np.testing.assert_array_equal(found, np.clip((a + 2 * b + 2) // 4 - 9000, 0, 65535))
    assert found.min() == 0


def inside(editor: IntegerEditor, a: ir.Value, divisor: int, anchor: ir.Node) -> ir.Value:
    """16-bit codes a / divisor + 9, made by IntRequantizeInside, which has no ends."""
    made = quotient_point(Term([Fraction(1, divisor)], [0], [70000]), [Fraction(0)], 9, U16)
    assert made is not None
    assert made.inside
    like = ir.Value(name=f"part_{divisor}", type=ir.TensorType(U16.dtype), shape=a.shape)
    arguments = inside_arguments(made, 9, U16)
    return editor.call("IntRequantizeInside", [a], arguments, like, before=anchor)


def outer(editor: IntegerEditor, one: ir.Value, b: ir.Value, anchor: ir.Node) -> ir.Value:
    """8-bit codes of one / 64 + b / 512."""
    terms = [Term([Fraction(1, 64)], [0], [65535]), Term([Fraction(1, 512)], [0], [65535])]
    point = short_point(terms, [Fraction(0)], 3, U8)
    assert point is not None
    like = ir.Value(name="outer", type=ir.TensorType(U8.dtype), shape=b.shape)
    return editor.call("IntAddShort", [one, b], short_arguments(point, 3, U8), like, before=anchor)


def test_results_that_are_never_clipped() -> None:
    model = parse("g (int32[3, 40] a, uint16[3, 40] b) => (uint8[3, 40] y) { y = Cast<to=2>(b) }")
    editor, anchor = IntegerEditor(model), model.graph[0]
    a, b = model.graph.inputs
    inner = inside(editor, a, 7, anchor)
    editor.take_over(model.graph.outputs[0], outer(editor, inner, b, anchor))
    feeds = {"a": PARTS["a"], "b": FEEDS["b"]}
    before = run_model(model, feeds)[0]
    assert apply(WidenSums(), model) == 1
    assert inner.dtype is ir.DataType.INT32
    np.testing.assert_array_equal(run_model(model, feeds)[0], before)
    assert len(np.unique(before)) > 50


@pytest.mark.parametrize(
    ("spec", "reader"), [(S16, ""), (U16, "IntSplit"), (U16, "output")], ids=str
)
def test_must_not_fire(spec: QuantSpec, reader: str) -> None:
    model = chain(spec, reader=reader)
    assert apply(WidenSums(), model) == 0
    assert model.graph[0].outputs[0].dtype is spec.dtype


def in_parts(*, reader: str = "") -> ir.Model:
    """Codes made in two parts of their channels, joined, and added to others."""
    model = parse("""
        g (int32[3, 40] a, uint16[3, 80] b) => (uint8[3, 80] y) { y = Cast<to=2>(b) }
    """)
    editor, anchor = IntegerEditor(model), model.graph[0]
    a, b = model.graph.inputs
    made = [inside(editor, a, divisor, anchor) for divisor in (7, 9)]
    if reader == "none of one part":
        made[1] = editor.part(b, -1, 0, 40, before=anchor)
    joined = editor.joined(made, b, axis=-1, before=anchor)
    total = outer(editor, joined, b, anchor)
    if reader == "part":
        model.graph.outputs.append(made[1])
    elif reader == "second":
        editor.split(made[0], split_arguments(), before=anchor)
    elif reader == "join":
        editor.split(joined, split_arguments(), before=anchor)
    editor.take_over(model.graph.outputs[0], total)
    return model


def test_parts_that_are_joined() -> None:
    model = in_parts()
    before = run_model(model, PARTS)[0]
    assert apply(WidenSums(), model) == 1
    assert apply(WidenSums(), model) == 0
    made = [v for node in model.graph for v in node.outputs if node.op_type != "IntAddShort"]
    assert [value.dtype for value in made] == [ir.DataType.INT32] * 3
    np.testing.assert_array_equal(run_model(model, PARTS)[0], before)
    assert len(np.unique(before)) > 50


@pytest.mark.parametrize("reader", ["part", "second", "join", "none of one part"])
def test_must_not_fire_on_parts_that_others_make_or_read(reader: str) -> None:
    model = in_parts(reader=reader)
    assert apply(WidenSums(), model) == 0
    made = [value for node in model.graph for value in node.outputs]
    assert all(value.dtype is not ir.DataType.INT32 for value in made)


def test_the_residual_stream_of_a_decoder() -> None:
    """All sums, and what linears add to them; neither is multiplied there, nor divided."""
    made = lowered("llama", "w8a8", integer=True)
    sums = [node for node in made.integer.graph if node.op_type == "IntAddShort"]
    assert len(sums) == 4
    assert {node.outputs[0].dtype for node in sums} == {ir.DataType.INT32}
    assert {v.dtype for node in sums[1:] for v in node.inputs[:2] if v} == {ir.DataType.INT32}
