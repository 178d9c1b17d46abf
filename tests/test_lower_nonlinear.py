"""lower-nonlinear: forms, tables and formulas against exact numbers, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from math import erf

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.quant_types import QuantSpec
from qnpu.passes.lower_nonlinear import LowerNonlinear
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import S8, S16, U8, U16, codes

KINDS = {"uint8": U8, "int8": S8, "uint16": U16, "int16": S16}


def around(
    operator: str,
    *,
    kind: str = "uint16",
    result: str = "uint16",
    scale: float = 1e-3,
    step: float = 1.0 / 65536,
    zero: int = 20000,
    result_zero: int = 0,
    shape: str = "4, 30",
    constants: str = "",
) -> ir.Model:
    """Codes → DequantizeLinear → operator → QuantizeLinear → codes."""
    return parse(f"""
        g ({kind}[{shape}] x) => ({result}[{shape}] y)
        <float s = {{{scale}}}, {kind} z = {{{zero}}}, float t = {{{step}}},
         {result} o = {{{result_zero}}} {constants}>
        {{
            real = DequantizeLinear(x, s, z)
            h = {operator}
            y = QuantizeLinear(h, t, o)
        }}
    """)


def operators(model: ir.Model) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in model.graph]


def lowered(model: ir.Model, given: Array) -> Array:
    """What the integer graph gives."""
    assert apply(LowerNonlinear(), model) == 1
    assert apply(LowerNonlinear(), model) == 0
    found: Array = run_model(model, {"x": given})[0]
    return found


def clipped(real: Array, step: float, zero: int, spec: QuantSpec) -> Array:
    return np.clip(real / step + zero, spec.q_min, spec.q_max)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Sigmoid(real)": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh(real)": np.tanh,
    "Gelu(real)": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "Exp(real)": np.exp,
    "Relu(real)": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("operator", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("result", ["uint8", "int16"])
def test_functions_of_one_number_are_exactly_rounded(operator: str, kind: str, result: str) -> None:
    spec, out = KINDS[kind], KINDS[result]
    scale, step, zero = (
        8.0 / (1 << spec.bits),
        4.0 / (1 << out.bits),
        (spec.q_min + spec.q_max) // 3,
    )
    model = around(
        operator, kind=kind, result=result, scale=scale, step=step, zero=zero, result_zero=7
    )
    given = codes(spec, 4, 30)
    found = lowered(model, given)
    assert operators(model) == [("qnpu", "IntLookup")]
    real = FUNCTIONS[operator]((given.astype(np.float64) - zero) * scale)
    expected = np.floor(clipped(np.asarray(real), step, 7, out) + 0.5)
    np.testing.assert_array_equal(found, np.minimum(expected, out.q_max))


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_a_number_times_a_function_of_it(kind: str) -> None:
    """Both roundings stay: that of the sigmoid and that of the product."""
    spec = KINDS[kind]
    zero = (spec.q_min + spec.q_max) // 3
    model = parse(f"""
        g ({kind}[4, 30] x) => (uint16[4, 30] y)
        <float s = {{0.05}}, {kind} z = {{{zero}}}, float p = {{0.0000152587890625}},
         uint16 o = {{0}}, float t = {{0.0002}}, uint16 n = {{5000}}>
        {{
            real = DequantizeLinear(x, s, z)
            h = Sigmoid(real)
            h_codes = QuantizeLinear(h, p, o)
            h_real = DequantizeLinear(h_codes, p, o)
            product = Mul(real, h_real)
            y = QuantizeLinear(product, t, n)
        }}
    """)
    given = codes(spec, 4, 30)
    assert apply(LowerNonlinear(), model) == 2
    assert operators(model) == [("qnpu", "IntLookup")]
    scale, step = float(np.float32(0.05)), float(np.float32(0.0002))
    real = (given.astype(np.float64) - zero) * scale
    sigmoid = np.floor(65536 / (1 + np.exp(-real)) + 0.5)
    expected = np.clip(np.floor(real * sigmoid / 65536 / step + 0.5) + 5000, 0, 65535)
    np.testing.assert_array_equal(run_model(model, {"x": given})[0], expected)


@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8")])
def test_a_function_times_another_number(kinds: tuple[str, str]) -> None:
    """Of 8 bits: a table of both, with the roundings of the sigmoid and of the product."""
    spec, other = (KINDS[kind] for kind in kinds)
    zeros = [(item.q_min + item.q_max) // 3 for item in (spec, other)]
    model = parse(f"""
        g ({kinds[0]}[4, 64] x, {kinds[1]}[4, 64] w) => (uint16[4, 64] y)
        <float s = {{0.05}}, {kinds[0]} z = {{{zeros[0]}}}, {kinds[1]} zw = {{{zeros[1]}}},
         float p = {{0.0000152587890625}}, uint16 o = {{0}}, float t = {{0.0002}},
         uint16 n = {{30000}}>
        {{
            a = DequantizeLinear(x, s, z)
            h = Sigmoid(a)
            h_codes = QuantizeLinear(h, p, o)
            h_real = DequantizeLinear(h_codes, p, o)
            b = DequantizeLinear(w, s, zw)
            product = Mul(h_real, b)
            y = QuantizeLinear(product, t, n)
        }}
    """)
    assert apply(LowerNonlinear(), model) == 2
    assert operators(model) == [("qnpu", "IntLookupPair")]
    given, factor = codes(spec, 4, 64), codes(other, 4, 64, seed=1)
    scale, step = float(np.float32(0.05)), float(np.float32(0.0002))
    sigmoid = np.floor(65536 / (1 + np.exp(-scale * (given.astype(float) - zeros[0]))) + 0.5)
    real = np.minimum(sigmoid, 65535) / 65536 * scale * (factor.astype(float) - zeros[1])
    expected = np.clip(np.floor(real / step + 0.5) + 30000, 0, 65535)
    found = run_model(model, {"x": given, "w": factor})[0]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 200


@pytest.mark.parametrize(("kind", "shape"), [("uint16", "4"), ("uint8", "1")])
def test_other_products_are_left_alone(kind: str, shape: str) -> None:
    model = parse(f"""
        g (uint8[4] x, {kind}[{shape}] w) => (uint8[4] y)
        <float s = {{0.1}}, uint8 z = {{0}}, {kind} o = {{0}}>
        {{
            a = DequantizeLinear(x, s, z) b = DequantizeLinear(w, s, o)
            product = Mul(a, b) y = QuantizeLinear(product, s, z)
        }}
    """)
    assert apply(LowerNonlinear(), model) == 0


def test_powers_of_negative_numbers() -> None:
    """The exponent is what DequantizeLinear makes of its code: 3, as float32 has it."""
    constants = ", uint16 p = {65535}, float ps = {4.5777066e-05}, uint16 pz = {0}"
    text = "Pow(real, three)"
    model = around(text, scale=1e-4, step=1e-3, result_zero=30000, constants=constants)
    first = model.graph[0]
    three = ir.node(
        "DequantizeLinear", [model.graph.initializers[name] for name in ("p", "ps", "pz")]
    )
    three.outputs[0].name, three.outputs[0].type = "three", ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(first, three)
    next(n for n in model.graph if n.op_type == "Pow").replace_input_with(1, three.outputs[0])
    given = codes(U16, 4, 30)
    found = lowered(model, given)
    expected = clipped(((given.astype(np.float64) - 20000) * 1e-4) ** 3, 1e-3, 30000, U16)
    assert np.abs(found - expected).max() < 0.51


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax(axis: int) -> None:
    model = around(f"Softmax<axis = {axis}>(real)")
    given = codes(U16, 4, 30)
    found = lowered(model, given)
    assert operators(model) == [("qnpu", "IntSoftmax")]
    real = np.exp((given.astype(np.float64) - 20000) * 1e-3)
    real = real / real.sum(axis=axis, keepdims=True)
    assert np.abs(found - clipped(real, 1 / 65536, 0, U16)).max() < 0.51


@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize("gains", ["same", "each its own", "none"])
def test_norms(kind: str, gains: str) -> None:
    generator = np.random.default_rng(0)
    numbers = np.full(30, 2000) if gains == "same" else generator.integers(0, 3000, 30)
    constants = f""", uint16[30] g = {{{",".join(map(str, numbers))}}}, float gs = {{0.001}},
         uint16 gz = {{1000}}"""
    operator = f"{kind}<axis = -1, epsilon = 0.00001>(real, gain)"
    model = around(operator, step=1e-3, result_zero=30000, constants=constants)
    gain = ir.node(
        "DequantizeLinear", [model.graph.initializers[name] for name in ("g", "gs", "gz")]
    )
    gain.outputs[0].name, gain.outputs[0].type = "gain", ir.TensorType(ir.DataType.FLOAT)
    gain.outputs[0].shape = ir.Shape([30])
    model.graph.insert_before(model.graph[0], gain)
    norm = next(n for n in model.graph if n.op_type == kind)
    norm.replace_input_with(1, gain.outputs[0])
    given = codes(U16, 4, 30)
    given[1] = 20000
    given[1, 0] = 20003  # a row near zero
    found = lowered(model, given)
    name = "IntRMSNorm" if kind == "RMSNormalization" else "IntLayerNorm"
    assert operators(model) == [("qnpu", name)]
    real = (given.astype(np.float64) - 20000) * 1e-3
    if kind == "LayerNormalization":
        real = real - real.mean(axis=-1, keepdims=True)
    real = real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + 1e-5)
    expected = clipped(real * (numbers - 1000) * 1e-3, 1e-3, 30000, U16)
    assert np.abs(found - expected).max() < 0.6


def test_a_norm_to_8_bits() -> None:
    """Its gains are one number, and its last product takes 32 bits."""
    operator = "RMSNormalization<axis = -1, epsilon = 0.00001>(real, gain)"
    more = ", uint8 g = {200}, float gs = {0.01}, uint8 gz = {50}"
    model = around(operator, result="uint8", step=0.03, result_zero=100, constants=more)
    names = [model.graph.initializers[name] for name in ("g", "gs", "gz")]
    gain = ir.node("DequantizeLinear", names)
    gain.outputs[0].name, gain.outputs[0].type = "gain", ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(model.graph[0], gain)
    norm = next(n for n in model.graph if n.op_type == "RMSNormalization")
    norm.replace_input_with(1, gain.outputs[0])
    given = codes(U16, 4, 30)
    found = lowered(model, given)
    assert operators(model) == [("qnpu", "IntRMSNormShort")]
    real = (given.astype(np.float64) - 20000) * 1e-3
    real = real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + 1e-5) * 1.5
    assert np.abs(found - clipped(real, 0.03, 100, U8)).max() < 0.52


@pytest.mark.parametrize(
    "body",
    [
        "h = Sigmoid(x) y = QuantizeLinear(h, t, o)",  # a float comes in
        "r = DequantizeLinear(x, s, z) h = Sigmoid(r) y = Identity(h)",  # read as a float
        "r = DequantizeLinear(x, s, z) h = Custom(r) y = QuantizeLinear(h, t, o)",
    ],
)
def test_must_not_fire(body: str) -> None:
    kind = "float" if "Sigmoid(x)" in body else "uint8"
    out = "float" if "Identity" in body else "uint8"
    model = parse(f"""
        g ({kind}[4] x) => ({out}[4] y)
        <float s = {{0.1}}, uint8 z = {{0}}, float t = {{0.1}}, uint8 o = {{0}}> {{ {body} }}
    """)
    before = operators(model)
    assert apply(LowerNonlinear(), model) == 0
    assert operators(model) == before
