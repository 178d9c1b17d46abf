"""Small Q/DQ graphs for the tests of integer forms, and what exact arithmetic makes of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from qnpu.compiler.integer_math import round_half_up
from qnpu.compiler.quant_types import QuantSpec
from qnpu.passes.fold_requantize import FoldRequantize
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import S8, U8, U16

KINDS = {"uint8": U8, "int8": S8, "uint16": U16}
SCALES = {"a": 0.013, "b": 0.0071, "y": 0.05}
Numbers = np.ndarray[Any, Any]


def cell(
    body: str, kinds: dict[str, str], shapes: dict[str, str], zeros: dict[str, int]
) -> ir.Model:
    """Codes ``a`` and ``b`` behind DequantizeLinear → body, which makes ``h`` → codes ``y``."""
    inputs = ", ".join(f"{kinds[n]}[{shapes[n]}] {n}" for n in "ab" if n in kinds)
    constants = ", ".join(
        f"float s{n} = {{{SCALES[n]}}}, {kinds[n]} z{n} = {{{zeros[n]}}}" for n in kinds
    )
    reals = "\n".join(f"r{n} = DequantizeLinear({n}, s{n}, z{n})" for n in "ab" if n in kinds)
    return parse(f"""
        g ({inputs}) => ({kinds["y"]}[{shapes["y"]}] y)
        <{constants}>
        {{ {reals} h = {body} y = QuantizeLinear(h, sy, zy) }}
    """)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def folded(model: ir.Model, **feeds: Array) -> Array:
    """What the integer graph gives; nothing is left to fold."""
    assert apply(FoldRequantize(), model) > 0
    assert apply(FoldRequantize(), model) == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(model))
    found: Array = run_model(model, feeds)[0]
    return found


def whole(given: Array, zero: int) -> Numbers:
    """Codes less their zero point, as Python's integers."""
    return given.astype(object) - zero


def rounded(sums: Numbers, ratio: Fraction, zero: int, spec: QuantSpec) -> Numbers:
    """⌊sum · ratio + 1/2⌋ + zero, clipped."""
    flat = [round_half_up(Fraction(int(n)) * ratio) + zero for n in np.asarray(sums).reshape(-1)]
    return np.asarray(np.clip(flat, spec.q_min, spec.q_max)).reshape(np.shape(sums))


def scale(name: str) -> Fraction:
    return Fraction(float(np.float32(SCALES[name])))


def with_constant(model: ir.Model, name: str, array: Array, dtype: ir.DataType) -> None:
    """Makes an input a constant: the text format holds neither 4-bit codes nor large ones."""
    value = next(v for v in model.graph.inputs if v.name == name)
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    model.graph.register_initializer(value)


def linear(kind: str, weight: str, *, gemm: bool = False) -> tuple[ir.Model, Numbers, Numbers]:
    """A linear with a constant weight, its codes and its scales; with a bias as Gemm."""
    low, high = (-7, 8) if weight == "int4" else (-127, 128)
    numbers = np.random.default_rng(3).integers(low, high, (30, 6))
    stored = numbers.T if gemm else numbers
    shape = ", ".join(map(str, stored.shape))
    scales = np.linspace(0.001, 0.02, 6).astype(np.float32)
    steps = np.float32(0.013) * scales
    zeros = ",".join(["0"] * 6)
    body = "h = MatMul(ra, rw)"
    if gemm:
        body = "rc = DequantizeLinear<axis = 0>(c, sc, zc) h = Gemm<transB = 1>(ra, rw, rc)"
    model = parse(f"""
        g ({kind}[5, 30] a, {weight}[{shape}] w, {weight}[6] zw) => (uint16[5, 6] y)
        <float[6] sw = {{{",".join(repr(float(s)) for s in scales)}}},
         int32[6] c = {{5, -4000, 300, 0, 77, -1}}, int32[6] zc = {{{zeros}}},
         float[6] sc = {{{",".join(repr(float(s)) for s in steps)}}},
         float sa = {{0.013}}, {kind} za = {{100}}, float sy = {{0.05}}, uint16 zy = {{30000}}>
        {{ ra = DequantizeLinear(a, sa, za)
           rw = DequantizeLinear<axis = {0 if gemm else 1}>(w, sw, zw) {body}
           y = QuantizeLinear(h, sy, zy) }}
    """)
    dtype = ir.DataType[weight.upper()]
    with_constant(model, "w", stored, dtype)
    with_constant(model, "zw", np.zeros(6), dtype)
    return model, numbers, scales
