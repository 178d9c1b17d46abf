"""raise-sums: the same results of sums without offsets, and what keeps them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.integer_arguments import short_arguments, short_norm_arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_functions import named_inputs
from qnpu.compiler.integer_math import NormShape, short_norm_numbers
from qnpu.compiler.integer_short import Term, short_point
from qnpu.compiler.marks import RAISED, raised
from qnpu.passes.raise_sums import RaiseSums
from qnpu.passes.widen_sums import WidenSums
from qnpu.runtime_check.parity import parity_certificate
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import U8, U16, codes, result
from tests.lowered import lowered

SHAPE = (3, 40)
FEEDS = {"a": codes(U16, *SHAPE), "b": codes(U16, *SHAPE, seed=1)}
Ratios = tuple[Fraction, Fraction]
ONES = Fraction(1), Fraction(1)


def stream(*ratios: Ratios, zeros: tuple[int, ...] = (32000, 31000, 33000)) -> ir.Model:
    """x = a, then x = x·M + b·M' for each pair of ratios, normed at the end."""
    model = parse("g (uint16[3, 40] a, uint16[3, 40] b) => (uint8[3, 40] y) { y = Identity(a) }")
    editor, anchor = IntegerEditor(model), model.graph[0]
    x, b = model.graph.inputs
    zero = 32768
    for index, (pair, given) in enumerate(zip(ratios, zeros, strict=False)):
        terms = [Term([ratio], [0], [65535]) for ratio in pair]
        point = short_point(terms, [-zero * pair[0] - 30000 * pair[1]], given, U16)
        assert point is not None
        like = ir.Value(name=f"s{index}", type=ir.TensorType(U16.dtype), shape=x.shape)
        arguments = short_arguments(point, given, U16)
        x, zero = editor.call("IntAddShort", [x, b], arguments, like, before=anchor), given
    norm = NormShape(features=40, bits=16, scale=0.01, epsilon=1e-5, centred=False)
    numbers = short_norm_numbers(norm, (np.array(1), 1.0), result(U8, scale=0.03, zero=128))
    assert numbers is not None
    like = ir.Value(name="normed", type=ir.TensorType(U8.dtype), shape=x.shape)
    arguments = short_norm_arguments(numbers, zero, 128, U8)
    y = editor.call("IntRMSNormShort", [x], arguments, like, before=anchor)
    editor.take_over(model.graph.outputs[0], y)
    return model


def sums(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "IntAddShort"]


def offsets(model: ir.Model) -> list[int]:
    found = [constant_array(named_inputs(node, model)["offset"]) for node in sums(model)]
    return [int(array.item()) for array in found if array is not None]


def with_sums(model: ir.Model) -> dict[str, Array]:
    """What the graph gives, and all sums as the codes they stand for."""
    values = [node.outputs[0] for node in sums(model)]
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(values)
    found = run_model(model, FEEDS)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    codes_of = [array - raised(v) for v, array in zip(values, found[1:], strict=True)]
    return {
        str(v.name): array
        for v, array in zip([*outputs, *values], [found[0], *codes_of], strict=True)
    }


@pytest.mark.parametrize(
    ("ratios", "count"),
    [
        ((ONES,), 1),
        ((ONES, ONES, ONES), 3),
        ((ONES, (Fraction(1, 2), Fraction(1)), ONES), 2),  # one that is rounded takes all back
        (((Fraction(2), Fraction(3)), ONES), 2),
        (((Fraction(1), Fraction(1, 4)), ONES), 1),
    ],
    ids=str,
)
def test_the_same_codes(ratios: tuple[Ratios, ...], count: int) -> None:
    model = stream(*ratios)
    assert apply(WidenSums(), model) == len(ratios)
    before = with_sums(model)
    assert all(offsets(model))
    assert apply(RaiseSums(), model) == count
    assert offsets(model).count(0) == count
    assert apply(RaiseSums(), model) == 0
    assert sum(RAISED in node.outputs[0].metadata_props for node in sums(model)) == count
    after = with_sums(model)
    assert len(np.unique(before["y"])) > 30
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
        assert (array.min(), array.max()) == (0, 65535) or name == "y"  # clipped at both ends


def test_must_not_fire_on_sums_that_stay_narrow() -> None:
    model = stream(ONES, ONES)
    before = run_model(model, FEEDS)[0]
    assert apply(RaiseSums(), model) == 0
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], before)


def test_must_not_fire_where_a_product_would_leave_32_bits() -> None:
    steep = Fraction(1 << 14), Fraction(1)
    model = stream(ONES, steep)
    apply(WidenSums(), model)
    before = with_sums(model)
    assert apply(RaiseSums(), model) == 1
    assert not raised(sums(model)[0].outputs[0])
    np.testing.assert_array_equal(with_sums(model)["y"], before["y"])


def test_sums_that_leave_the_graph_stay_codes() -> None:
    model = stream(ONES, ONES)
    apply(WidenSums(), model)
    model.graph.outputs.append(sums(model)[0].outputs[0])
    before = run_model(model, FEEDS)
    assert apply(RaiseSums(), model) == 1
    for found, array in zip(run_model(model, FEEDS), before, strict=True):
        np.testing.assert_array_equal(found, array)


def test_a_mark_that_is_no_number() -> None:
    value = ir.Value(name="x")
    value.metadata_props[RAISED] = "much"
    with pytest.raises(DiagnosticError, match="QN119"):
        raised(value)


def test_the_residual_stream_of_a_decoder() -> None:
    """No sum adds an offset that divides nothing."""
    made = lowered("llama", "w8a8", integer=True)
    whole = [n for n in sums(made.integer) if _step(n, made.integer) == 1]
    assert whole
    assert all(raised(node.outputs[0]) for node in whole)
    others = [node for node in sums(made.integer) if node not in whole]
    assert offsets(made.integer).count(0) == len(whole)
    assert not any(raised(node.outputs[0]) for node in others)


def test_a_certificate_takes_it_off_again() -> None:
    """Of what a unit takes, and of what it makes."""
    made = lowered("llama", "w8a8", integer=True)
    assert any(raised(node.outputs[0]) for node in sums(made.integer))
    certificate = parity_certificate(made.qdq, made.integer, made.feeds[:1])
    assert certificate.passed
    equal = {item.kind: item.equal for item in certificate.summary()}
    assert equal["add"] == 1


def _step(node: ir.Node, model: ir.Model) -> int:
    array = constant_array(named_inputs(node, model)["step"])
    assert array is not None
    return int(array.item())
