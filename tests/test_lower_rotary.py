"""lower-rotary: one rounding instead of three, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.quant_types import QuantSpec
from qnpu.passes.lower_rotary import LowerRotary
from tests.conftest import apply, parse, run_model
from tests.integer_nodes import U8, U16, codes

ANGLES = np.outer(np.arange(6), [1.0, 0.3, 0.05, 0.001])
KINDS = {"uint8": U8, "uint16": U16}


def rotary(
    kind: str, operator: str = "Sub", *, second: str = "sa", more: str = "", constants: str = ""
) -> ir.Model:
    """a·cos ± b·sin over 6 positions and 4 pairs."""
    tables = {"c": np.cos(ANGLES), "n": np.sin(ANGLES)}
    stored = {k: np.rint(v * 32767).astype(int).reshape(-1) for k, v in tables.items()}
    held = ", ".join(f"int16[6, 4] {k} = {{{','.join(map(str, v))}}}" for k, v in stored.items())
    return parse(f"""
        g ({kind}[3, 6, 4] a, {kind}[3, 6, 4] b) => (uint16[3, 6, 4] y)
        <{constants + "," if constants else ""}
         {held}, float st = {{0.000030518509}}, int16 zt = {{0}},
         float sa = {{0.05}}, float sb = {{0.07}}, {kind} za = {{100}}, float sp = {{0.0004}},
         uint16 zp = {{32768}}, float sy = {{0.0005}}, uint16 zy = {{30000}}>
        {{
            ra = DequantizeLinear(a, sa, za)
            rb = DequantizeLinear(b, {second}, za)
            rc = DequantizeLinear(c, st, zt)
            rn = DequantizeLinear(n, st, zt)
            p = Mul(ra, rc)
            pq = QuantizeLinear(p, sp, zp)
            pr = DequantizeLinear(pq, sp, zp)
            q = Mul(rn, rb)
            qq = QuantizeLinear(q, sp, zp)
            qr = DequantizeLinear(qq, sp, zp)
            h = {operator}(pr, qr)
            y = QuantizeLinear(h, sy, zy)
            {more}
        }}
    """)


def spread(spec: QuantSpec, seed: int) -> np.ndarray:
    """Codes near enough to the zero point that products are not clipped."""
    found = codes(spec, 3, 6, 4, seed=seed).astype(np.int64)
    return np.clip(found % 256, 0, 255).astype(spec.code_dtype)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("second", ["sa", "sb"])
def test_one_rounding(kind: str, operator: str, second: str) -> None:
    model = rotary(kind, operator, second=second)
    a, b = spread(KINDS[kind], 0), spread(KINDS[kind], 1)
    before = run_model(model, {"a": a, "b": b})[0].astype(int)
    assert apply(LowerRotary(), model) == 1
    assert apply(LowerRotary(), model) == 0
    assert [(n.domain, n.op_type) for n in model.graph] == [("qnpu", "IntRotate")]
    found = run_model(model, {"a": a, "b": b})[0].astype(int)
    sign = 1 if operator == "Add" else -1
    scales = np.float32(0.05), np.float32(0.05 if second == "sa" else 0.07)
    one, other = (
        (item.astype(np.float64) - 100) * scale for item, scale in zip((a, b), scales, strict=True)
    )
    tables = [np.rint(f(ANGLES) * 32767) * np.float32(0.000030518509) for f in (np.cos, np.sin)]
    real = one * tables[0] + sign * other * tables[1]
    expected = np.clip(real / np.float32(0.0005) + 30000, 0, 65535)
    assert np.abs(found - expected).max() < 0.51
    assert np.abs(found - before).max() <= 2
    assert not np.array_equal(found, before)


def test_a_result_that_is_narrowed() -> None:
    """It is rounded once, to the narrow type."""
    model = rotary("uint8")
    a, b = spread(U8, 0), spread(U8, 1)
    (wide,) = model.graph.outputs
    constants = {"sn": ir.tensor(np.float32(0.2)), "zn": ir.tensor(np.uint8(100))}
    values = [ir.Value(name=name, const_value=v) for name, v in constants.items()]
    for value in values:
        model.graph.register_initializer(value)
    scale, zero = (model.graph.initializers[name] for name in ("sy", "zy"))
    back = ir.node("DequantizeLinear", [wide, scale, zero])
    narrow = ir.node("QuantizeLinear", [back.outputs[0], *values])
    narrow.outputs[0].name, narrow.outputs[0].type = "n", ir.TensorType(ir.DataType.UINT8)
    narrow.outputs[0].shape = wide.shape
    model.graph.extend([back, narrow])
    model.graph.outputs[0] = narrow.outputs[0]
    assert apply(LowerRotary(), model) == 1
    assert [(n.domain, n.op_type) for n in model.graph] == [("qnpu", "IntRotate")]
    found = run_model(model, {"a": a, "b": b})[0].astype(int)
    one, other = ((item.astype(np.float64) - 100) * np.float32(0.05) for item in (a, b))
    tables = [np.rint(f(ANGLES) * 32767) * np.float32(0.000030518509) for f in (np.cos, np.sin)]
    real = (one * tables[0] - other * tables[1]) / np.float32(0.2) + 100
    assert np.abs(found - np.clip(real, 0, 255)).max() < 0.51


LINEAR = "int8[4, 2] wq = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] sw = {0.1, 1}, int8[2] zw = {0, 0}"


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_every_rounding_is_kept_where_all_linears_take_16_bits(kind: str) -> None:
    more = """
        w = DequantizeLinear<axis = 1>(wq, sw, zw)
        l = MatMul(ra, w)
        u = QuantizeLinear(l, sy, zy)
    """
    model = rotary(kind, more=more, constants=LINEAR)
    model.graph.outputs.append(list(model.graph)[-1].outputs[0])
    assert apply(LowerRotary(), model) == (kind == "uint8")
    assert ("IntRotate" in {node.op_type for node in model.graph}) == (kind == "uint8")


@pytest.mark.parametrize(
    "model",
    [
        rotary("uint8", "Mul"),
        rotary("uint8", more="twice = Identity(pq)"),  # used twice, once the output is added
    ],
    ids=["operator", "used twice"],
)
def test_must_not_fire(model: ir.Model) -> None:
    extra = [node.outputs[0] for node in model.graph if node.op_type == "Identity"]
    model.graph.outputs.extend(extra)
    before = [node.op_type for node in model.graph]
    assert apply(LowerRotary(), model) == 0
    assert [node.op_type for node in model.graph] == before
