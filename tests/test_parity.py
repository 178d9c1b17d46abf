"""The parity certificate: it passes on what the passes make, and each way to spoil that shows."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import constant_array, name_of, set_constant
from qnpu.compiler.integer_model import lower_model
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.quant_types import widened
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.parity import (
    AccumulatorParity,
    ParityCertificate,
    TensorParity,
    parity_certificate,
)
from qnpu.runtime_check.session import Feeds
from tests.conftest import parse
from tests.lowered import Lowered, lowered

KINDS = {"add", "layout", "linear", "multiply", "norm"}
EXACT = {"add", "conversion", "layout", "linear"}


def certificate(made: Lowered) -> ParityCertificate:
    return parity_certificate(made.qdq, made.integer, made.feeds)


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        ("llama", "w8a8"),
        ("llama", "w8a16"),
        ("llama", "w4a8"),
        ("llama", "w4a4"),
        ("gemma3", "w8a8"),
        ("gemma3", "w8a16"),
        ("gpt2", "w8a8"),
        ("gpt2", "w8a16"),
    ],
)
def test_decoders(architecture: str, scheme: str) -> None:
    """Exact operators give equal codes, the others are within 1 LSB at 8 bits, 4 at 16."""
    found = certificate(lowered(architecture, scheme))
    assert found.passed
    assert not found.unchecked
    kinds = {item.kind for item in found.summary()}
    is_one = architecture != "gpt2" and scheme in ("w8a8", "w4a8")
    assert kinds >= KINDS | {"attention" if is_one else "softmax"}
    for item in found.summary():
        assert item.passed
        assert item.equal == 1.0 if item.kind in EXACT else item.equal > 0.99
    for tensor in found.tensors:
        assert tensor.max_lsb <= (0 if tensor.kind in EXACT else 1 if tensor.bits == 8 else 4)


def test_every_element_is_counted_once() -> None:
    made = lowered("llama", "w8a8")
    found = certificate(made)
    shapes = {name_of(v): v.shape for node in made.integer.graph for v in node.outputs}
    for tensor in found.tensors:
        shape = shapes[tensor.name]
        assert shape is not None
        assert (
            sum(tensor.histogram)
            == tensor.elements
            == len(made.feeds) * prod(d for d in shape if isinstance(d, int))
        )
    assert sum(item.elements for item in found.summary()) == sum(
        sum(tensor.histogram) for tensor in found.tensors
    )


def test_sums_stay_below_their_bounds() -> None:
    made = lowered("llama", "w8a16")
    found = certificate(made)
    makers = [n for n in made.integer.graph if n.op_type in ("MatMulInteger", "IntJoin")]
    assert [item.node for item in found.accumulators] == [name_of(node) for node in makers]
    assert [item.operator for item in found.accumulators] == [node.op_type for node in makers]
    assert {item.constant for item in found.accumulators} == {True, False}
    for item in found.accumulators:
        assert 0 < item.seen_bits <= item.bound_bits <= 31


def call(model: ir.Model, function: str, argument: str) -> tuple[ir.Node, int]:
    """The last call of a function or of its twin with finer multipliers; index of an argument."""
    names = {function, f"{function}Fine"}
    nodes = [n for n in model.graph if n.op_type in names]
    node = [n for n in nodes if n.outputs[0].dtype is not ir.DataType.INT32][-1]  # of codes
    definition = model.functions["qnpu", node.op_type, ""]
    return node, [name_of(value) for value in definition.inputs].index(argument)


def spoil(model: ir.Model, function: str, argument: str, more: int) -> str:
    """Adds to an argument of one call; returns the tensor that is wrong then."""
    node, index = call(model, function, argument)
    value = node.inputs[index]
    array = constant_array(value)
    assert array is not None
    spoilt = ir.Value(
        name="spoilt", type=value.type if value else None, shape=ir.Shape(array.shape)
    )
    set_constant(spoilt, array + np.asarray(more, array.dtype))
    model.graph.register_initializer(spoilt)
    node.replace_input_with(index, spoilt)
    return name_of(node.outputs[0])


@pytest.mark.parametrize(
    ("function", "argument", "more"),
    [
        ("IntRequantize", "multiplier", 2**40),
        ("IntAdd", "multiplier_a", 2**40),
        ("IntLookupPair", "table", 6),
        ("IntNormalize", "numerator", 2**49),
        ("IntRMSNormShort", "numerator", 2**52),
        ("IntLookup", "table", 6),
    ],
)
def test_a_spoilt_node_is_found_and_no_other(function: str, argument: str, more: int) -> None:
    """Nodes behind it are fed with right codes, so their tensors stay right."""
    made = lowered("llama", "w8a8")
    before = certificate(made)
    name = spoil(made.integer, function, argument, more)
    after = certificate(made)
    assert before.passed
    assert not after.passed
    readers = {name_of(v): n for n in made.integer.graph for v in n.inputs if v is not None}
    while name not in {tensor.name for tensor in after.tensors}:  # codes that are moved first
        name = name_of(readers[name].outputs[0])
    changed = [b.name for a, b in zip(before.tensors, after.tensors, strict=True) if a != b]
    assert changed == [name]
    assert [t.name for t in after.tensors if not t.passed] == [name]
    assert [item.passed for item in after.summary()].count(False) == 1


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_how_far_codes_are_off(steps: int) -> None:
    made = lowered("llama", "w8a8")
    node, index = call(made.integer, "IntRequantize", "shift")
    shift = constant_array(node.inputs[index])
    assert shift is not None
    name = spoil(made.integer, "IntRequantize", "offset", steps << int(shift))
    (tensor,) = [t for t in certificate(made).tensors if t.name == name]
    assert tensor.max_lsb == steps
    assert tensor.histogram[min(steps, 5)] > 0.9 * tensor.elements  # the others are clipped
    assert steps - 1 <= tensor.beyond <= steps
    assert sum(tensor.histogram) == tensor.elements


def test_a_node_that_nothing_compares() -> None:
    made = lowered("llama", "w8a8")
    last = ir.node("Identity", [made.integer.graph.outputs[0]], name="idle")
    made.integer.graph.append(last)
    found = certificate(made)
    assert found.unchecked == ("idle",)
    assert not found.passed


def test_codes_that_lost_their_name() -> None:
    """Two nodes are then compared as one, which is no fault."""
    made = lowered("llama", "w8a8")
    before = certificate(made)
    layout = next(n for n in made.integer.graph if n.op_type == "Reshape")
    value = layout.inputs[0]
    assert value is not None
    lost, value.name = name_of(value), "renamed"
    after = certificate(made)
    assert after.passed
    assert not after.unchecked
    assert set(after.unmatched) - set(before.unmatched) == {lost}
    (whole,) = [t for t in after.tensors if t.name == name_of(layout.outputs[0])]
    assert whole.kind == "layout"
    assert "MatMulInteger" in whole.functions
    assert whole.functions[-1] == "Reshape"


def test_the_same_each_time() -> None:
    made = lowered("llama", "w8a8")
    one, other = (json.dumps(certificate(made).to_json()) for _ in range(2))
    assert one == other
    found = json.loads(one)
    assert found["passed"]
    assert {item["kind"] for item in found["summary"]} >= KINDS
    assert len(found["tensors"]) == len(certificate(made).tensors)
    assert found["tensors"][0]["limit"] == 0


LINEAR = """
    g (float[1, 4] x) => (float[1, 2] y)
    <float sx = {0.5}, uint8 zx = {0}, float[2] sw = {0.25, 0.5}, int8[2] zw = {0, 0},
     int8[4, 2] w = {127, -1, 127, -1, 127, -1, 127, -1}, float sy = {1}, uint8 zy = {128}>
    {
        xq = QuantizeLinear(x, sx, zx)
        xd = DequantizeLinear(xq, sx, zx)
        wd = DequantizeLinear<axis: int = 1>(w, sw, zw)
        h = MatMul(xd, wd)
        yq = QuantizeLinear(h, sy, zy)
        y = DequantizeLinear(yq, sy, zy)
    }
"""


def small(text: str, feeds: list[Feeds]) -> ParityCertificate:
    """That of a Q/DQ graph in ONNX text."""
    qdq = parse(text)
    return parity_certificate(qdq, lower_model(qdq), feeds)


@pytest.mark.parametrize(
    ("scale", "operator"), [("0.5", "QLinearMatMul"), ("0.51", "MatMulInteger")]
)
def test_the_bound_of_sums_is_the_sum_of_weights(scale: str, operator: str) -> None:
    """4 · 127 · 255 = 129540, which is what the largest input leads to."""
    text = LINEAR.replace("sx = {0.5}", f"sx = {{{scale}}}")
    found = small(text, [{"x": np.full((1, 4), 200.0, np.float32)}])
    assert found.accumulators == (
        AccumulatorParity(found.accumulators[0].node, operator, True, 17, 17),
    )
    assert found.passed
    (tensor,) = found.tensors
    assert (tensor.kind, tensor.operator, tensor.elements) == ("linear", "MatMul", 2)
    less = small(text, [{"x": np.full((1, 4), 0.5, np.float32)}])  # 4 · 127 = 508
    assert less.accumulators[0].seen_bits == 9


def test_the_bound_of_two_activations_is_their_depth() -> None:
    text = """
        g (uint8[1, 8] a, uint8[8, 1] b) => (uint8[1, 1] y)
        <float s = {0.5}, uint8 z = {100}, float t = {900}>
        {
            ad = DequantizeLinear(a, s, z)
            bd = DequantizeLinear(b, s, z)
            h = MatMul(ad, bd)
            y = QuantizeLinear(h, t, z)
        }
    """
    extremes = {"a": np.full((1, 8), 255, np.uint8), "b": np.zeros((8, 1), np.uint8)}
    (sums,) = small(text, [extremes]).accumulators
    assert not sums.constant
    assert sums.bound_bits == (8 * 155 * 155).bit_length()
    assert sums.seen_bits == (8 * 155 * 100).bit_length()


def test_the_bound_of_joined_sums() -> None:
    """16-bit codes with a zero point of 0x8001: 65535 - 0x8001 below, 0x8001 above it."""
    text = """
        g (uint16[1, 4] x) => (uint8[1, 1] y)
        <float sx = {0.5}, uint16 zx = {32769}, float[1] sw = {0.25}, int8[1] zw = {0},
         int8[4, 1] w = {127, -127, 5, 0}, float sy = {20000}, uint8 zy = {128}>
        {
            xd = DequantizeLinear(x, sx, zx)
            wd = DequantizeLinear<axis: int = 1>(w, sw, zw)
            h = MatMul(xd, wd)
            y = QuantizeLinear(h, sy, zy)
        }
    """
    found = small(text, [{"x": np.array([[0, 65535, 0, 7]], np.uint16)}])
    assert found.passed
    high, low, *joined = found.accumulators
    assert high.bound_bits == low.bound_bits == (259 * 255).bit_length()
    assert [(j.operator, j.bound_bits) for j in joined] == [("IntJoin", (259 * 65535).bit_length())]
    assert joined[0].seen_bits == (127 * 65535).bit_length()


def test_the_bound_of_weights_of_four_bits() -> None:
    """A node of the graph unpacks them."""
    made = lowered("llama", "w4a8")
    found = {item.node: item for item in certificate(made).accumulators}
    unpacked = 0
    for node in made.integer.graph:
        weight = node.inputs[1] if node.op_type == "MatMulInteger" else None
        cast = weight.producer() if weight is not None else None
        if cast is not None and cast.op_type == "Cast":
            codes = widened(np.asarray(constant_array(cast.inputs[0]))).astype(int)
            bound = 255 * int(np.abs(codes).sum(axis=0).max())
            assert found[name_of(node)].constant
            assert found[name_of(node)].bound_bits == bound.bit_length()
            unpacked += 1
    assert unpacked > 10


def test_sums_that_could_overflow_fail() -> None:
    tensor = TensorParity(
        "y", "Add", "n", ("IntAdd",), "add", 8, 1, (1, 0, 0, 0, 0, 0), 0, 0.0, 0, (), 0
    )
    fits, not_so = (AccumulatorParity("m", "MatMulInteger", True, bits, 3) for bits in (31, 32))
    assert ParityCertificate((tensor,), (fits,), (), ()).passed
    assert not ParityCertificate((tensor,), (not_so,), (), ()).passed
    assert not ParityCertificate((), (), (), ()).passed


@pytest.mark.parametrize(
    ("kind", "bits", "limit"),
    [("linear", 8, 0), ("layout", 16, 0), ("norm", 8, 1), ("softmax", 16, 4), ("multiply", 16, 4)],
)
def test_limits(kind: str, bits: int, limit: int) -> None:
    for lsb in (limit, limit + 1):
        tensor = TensorParity("y", "", "", (), kind, bits, 1, (0,) * 6, lsb, 0.0, 0, (), 0)
        assert tensor.limit == limit
        assert tensor.passed == (lsb == limit)


HALVES = """
    g (uint8[8] x) => (uint8[8] y)
    <float s = {0.5}, float t = {1}, uint8 zero = {0}, uint8 ten = {10}>
    {
        d = DequantizeLinear(x, s, zero)
        y = QuantizeLinear(d, t, ten)
    }
"""


def test_ties_are_counted_and_count_as_equal() -> None:
    """0.5 and 2.5 are rounded in two ways, 1.5 and 3.5 both up; 127.5 + 10 is not clipped."""
    codes = np.array([0, 1, 2, 3, 4, 5, 6, 7], np.uint8)
    found = small(HALVES, [{"x": codes}])
    (tensor,) = found.tensors
    assert (tensor.kind, tensor.operator) == ("conversion", "Convert")
    assert (tensor.ties, tensor.max_lsb, tensor.histogram[0]) == (2, 0, 8)
    assert found.passed


def test_real_numbers_or_codes_at_the_ends() -> None:
    x = np.array([[0.5, 3, 70, 127]], np.float32)
    real = small(LINEAR, [{"x": x}])
    codes = parse(LINEAR)
    LowerIo().run(Compilation(codes))
    lowered_too = parity_certificate(
        codes, lower_model(parse(LINEAR)), [{"x": (x * 2).astype(np.uint8)}]
    )
    assert real == lowered_too
    assert real.passed


def test_an_exponent_is_a_whole_number() -> None:
    """(-2)³ exists; (-2)^2.9999999 does not."""
    text = """
        g (uint8[3] x) => (uint8[3] y)
        <float s = {0.1}, uint8 z = {128}, uint8 e = {254}, float t = {0.011811024}, uint8 o = {0}>
        {
            d = DequantizeLinear(x, s, z)
            n = DequantizeLinear(e, t, o)
            h = Pow(d, n)
            y = QuantizeLinear(h, s, z)
        }
    """
    (tensor,) = small(text, [{"x": np.array([108, 128, 140], np.uint8)}]).tensors
    assert tensor.kind == "lookup"
    assert tensor.histogram[0] == 3


PRODUCTS = """
    g (uint8[3] a, uint8[3] b) => (uint8[3] y)
    <float s = {1}, float half = {0.5}, uint8 zero = {0}, uint8 one = {1}>
    {
        ad = DequantizeLinear(a, s, zero)
        bd = DequantizeLinear(b, s, zero)
        c = DequantizeLinear(one, s, zero)
        p = Mul(ad, c)
        q = Mul(bd, c)
        pq = QuantizeLinear(p, half, zero)
        qq = QuantizeLinear(q, half, zero)
        pd = DequantizeLinear(pq, half, zero)
        qd = DequantizeLinear(qq, half, zero)
        h = Add(pd, qd)
        y = QuantizeLinear(h, s, zero)
    }
"""
ONE_ROUNDING = """
    <ir_version: 10, opset_import: ["" : 23, "qnpu" : 1]>
    g (uint8[3] a, uint8[3] b) => (uint8[3] y) { y = qnpu.IntRotate(a, b) }
    <domain: "qnpu", opset_import: ["" : 23]>
    IntRotate (a, b) => (y) { y = Add(a, b) }
"""


def test_a_function_that_rounds_once() -> None:
    """Both products are clipped at 127.5 in the Q/DQ graph: 200 + 20 is 148 there, not 220."""
    feeds = {"a": np.array([3, 200, 90], np.uint8), "b": np.array([4, 20, 1], np.uint8)}
    found = parity_certificate(parse(PRODUCTS), parse(ONE_ROUNDING), [feeds])
    (tensor,) = found.tensors
    assert tensor.kind == "rotary"
    assert tensor.skipped == found.unmatched == ("pq", "qq")
    assert (tensor.histogram, tensor.max_lsb, tensor.max_lsb_rounded) == ((3, 0, 0, 0, 0, 0), 0, 72)
    assert found.passed
    assert found.summary()[0].max_lsb_rounded == 72


def test_any_other_function_rounds_as_often_as_the_graph() -> None:
    feeds = {"a": np.array([3, 200, 90], np.uint8), "b": np.array([4, 20, 1], np.uint8)}
    spelt_out = parse(ONE_ROUNDING.replace("IntRotate", "IntOther"))
    (tensor,) = parity_certificate(parse(PRODUCTS), spelt_out, [feeds]).tensors
    assert (tensor.kind, tensor.skipped, tensor.max_lsb) == ("add", (), 72)
    assert not tensor.passed


NARROWED = """
    g (uint8[3] x) => (uint8[3] y)
    <float s = {0.25}, float t = {1}, float u = {4}, uint8 z = {0}, uint16 zero = {0}>
    {
        d = DequantizeLinear(x, s, z)
        h = Relu(d)
        wide = QuantizeLinear(h, t, zero)
        wd = DequantizeLinear(wide, t, zero)
        y = QuantizeLinear(wd, u, z)
    }
"""


def test_a_result_that_is_narrowed_is_rounded_once() -> None:
    """5.75 is 1.4375 LSB, so 1; by way of 6, which is 1.5 LSB, it is 2."""
    found = small(NARROWED, [{"x": np.array([23, 8, 40], np.uint8)}])
    (tensor,) = found.tensors
    assert (tensor.operator, tensor.kind, tensor.skipped) == ("Relu", "lookup", ("wide",))
    assert (tensor.histogram[0], tensor.max_lsb, tensor.max_lsb_rounded) == (3, 0, 1)
    assert found.passed
