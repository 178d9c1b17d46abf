"""The cases of the real compiler's recorded verdicts, rebuilt from their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
from onnx import TensorProto

from tests.htp_sweep import sweep
from tests.qdq_cases import (
    SCALES,
    SHAPE,
    Case,
    Operand,
    Shape,
    Step,
    bias,
    binary,
    const,
    conv,
    gemm,
    ints,
    matmul_const,
    matmul_dynamic,
    single,
    unary,
    x,
    y,
)  # fmt: skip

__all__ = ["build_case", "recorded_case", "sweep"]


def build_case(name: str) -> onnx.ModelProto:
    """The model of a recorded case.

    Args:
        name: operation/types/variant, as "MatMul_const/u16xs4/per_channel".

    Raises:
        KeyError: no such operation is known.
    """
    return recorded_case(name).build()


def recorded_case(name: str) -> Case:
    """As ``build_case``, before it is built."""
    op, _, rest = name.partition("/")
    types, _, variant = rest.partition("/")
    return replace(_RECORDED[op](op, types, variant), name=name)


def _recorded_binary(op: str, types: str, variant: str) -> Case:
    types, _, out = types.partition("->")
    a, _, b = types.partition("+")
    shapes = {"bcast_mask": (SHAPE, (1, 1, 8, 16)), "rank6": (_RANK6, _RANK6)}
    constant = op == "Mul_const"
    return binary(
        op.removesuffix("_const"),
        a,
        b or a,
        out,
        shapes.get(variant, (SHAPE, (16,) if constant else SHAPE)),
        constant=constant,
    )


def _recorded_unary(op: str, types: str, variant: str) -> Case:
    dtype, _, out = types.partition("->")
    shape = {"rank5": _RANK5, "rank6": _RANK6}.get(variant, SHAPE)
    attributes: dict[str, Any] = {}
    if op in {"Softmax", "L2Norm(LpNormalization)"}:
        attributes["axis"] = 1 if variant == "axis1" else -1
    if op == "Softmax":
        attributes["result"] = {"scale": 2.0 ** -int(dtype[1:]), "zero_point": 0}
    if op == "Swish(op24)":
        attributes["opset"] = 24
    names = {"Gelu20": "Gelu", "L2Norm(LpNormalization)": "LpNormalization", "Swish(op24)": "Swish"}
    return unary(names.get(op, op), dtype, out, shape, **attributes)


_RANK5: Shape = (1, 2, 2, 8, 16)
_RANK6: Shape = (1, 2, 2, 2, 8, 16)


def _recorded_layout(op: str, dtype: str, variant: str) -> Case:
    """Operations that move codes; "diff_enc" gives the result another encoding."""
    shape = {"rank5": _RANK5, "rank6": _RANK6}.get(variant, SHAPE)
    result = y(dtype, scale=SCALES[dtype] * 1.5 if variant == "diff_enc" else 0.0)
    source = x(dtype, *shape)
    last = len(shape) - 1
    zeros = [0] * last
    if op == "Split":
        step = Step(op, (source, ints(8, 8)), (result, result), {"axis": last})
        return Case(op, (step,))
    inputs: dict[str, list[Operand]] = {
        "Concat": [source, x(dtype, *shape)],
        "Expand": [x(dtype, *shape[:-2], 1, shape[-1]), ints(*shape)],
        "Pad": [source, ints(*zeros, 1, *zeros, 1)],
        "Reshape": [source, ints(-1, shape[-1])],
        "Slice": [source, ints(0), ints(4), ints(last)],
        "Squeeze": [source, ints(0)],
        "Tile": [source, ints(*[1] * last, 2)],
        "Transpose": [source],
        "Unsqueeze": [source, ints(0)],
    }
    attributes: dict[str, dict[str, Any]] = {
        "Concat": {"axis": last},
        "Transpose": {"perm": [*range(last - 1), last, last - 1]},
    }
    return single(op, op, inputs[op], result, **attributes.get(op, {}))


def _recorded_matmul_const(op: str, types: str, variant: str) -> Case:
    types, _, out = types.partition("->")
    act, _, w = types.partition("x")
    granularity, more = "channel", dict[str, Any]()
    if variant == "per_tensor":
        granularity = "tensor"
    elif variant.startswith("block"):
        granularity, more["mkn"] = variant, (8, 128, 32)
    elif variant.startswith("K"):
        k, n, *m = (int(number) for number in re.findall(r"\d+", variant))
        more["mkn"] = (m[0] if m else 8, k, n)
    elif variant == "act_zp!=32768":
        more["act_zero"] = 30000
    elif variant == "per_channel_wzp!=0":
        more["zero_point"] = 3
    if out:
        more["out"] = out.removesuffix("out")
    return matmul_const(act, w, granularity, **more)


def _recorded_matmul_dynamic(op: str, types: str, variant: str) -> Case:
    types, _, out = types.partition("->")
    a, _, b = types.partition("x")
    zero = {"in1_zp0": 0, "in1_zp_asym": 20000, "in1_asym": 100}.get(variant)
    shapes = ((1, 2, 2, 8, 16), (1, 2, 2, 16, 8)) if variant == "rank5" else None
    return matmul_dynamic(a, b, out, shapes, zero_point=zero)


def _recorded_weighted(op: str, types: str, variant: str) -> Case:
    """Gemm and Conv1x1."""
    act, _, w = types.partition("x")
    granularity = {"per_tensor": "tensor", "per_channel": "channel", "bias_u8": "tensor"}.get(
        variant.removesuffix("+b32"), variant
    )
    b = "u8" if variant == "bias_u8" else "s32" if variant.endswith("+b32") else None
    if op == "Gemm":
        return gemm(act, w, granularity, b, transB=1)
    return conv(act, w, granularity, b, channels=(128, 16))


def _recorded_norm(op: str, types: str, variant: str) -> Case:
    act, _, gamma = types.removesuffix("+b32").partition("x")
    shape = (8, 32) if variant == "rank2" else (1, 8, 32)
    zero = 0 if variant == "g_zp0" else None
    inputs = [x(act, *shape), const(gamma, 32, zero_point=zero)]
    if op == "LayerNorm":
        return single(
            op, "LayerNormalization", [*inputs, bias(inputs[0], inputs[1], 32)], y(act), axis=-1
        )
    kind = op.removesuffix("(op23)")
    opset = 23 if kind == "RMSNormalization" else 21
    return single(op, kind, inputs, y(act), axis=-1, opset=opset)


def _recorded_convert(op: str, types: str, variant: str) -> Case:
    """A change of type before an Add."""
    a, _, b = types.partition("->")
    steps = (
        Step("Identity", (x(a, *SHAPE),), (y(b, scale=SCALES[b] * 1.5),)),
        Step("Add", ((0, 0), x(b, *SHAPE)), (y(b),)),
    )
    return Case(op, steps)


def _recorded_gather(op: str, dtype: str, variant: str) -> Case:
    table = const(dtype, 40, 16)
    scale = table.real_scale * (1.5 if variant == "diff_enc" else 1.0)
    indices = Operand("i64" if variant == "i64" else "i32", (1, 8))
    return single(op, "Gather", [table, indices], y(dtype, scale=scale), axis=0)


def _recorded_reduce(op: str, dtype: str, variant: str) -> Case:
    return single(op, op, [x(dtype, *SHAPE), ints(3)], y(dtype), keepdims=1)


def _recorded_clip(op: str, dtype: str, variant: str) -> Case:
    limits = [Operand("f32", const=True, values=(value,)) for value in (-0.2, 0.2)]
    return single(op, op, [x(dtype, *SHAPE), *limits], y(dtype))


def _recorded_pow(op: str, dtype: str, variant: str) -> Case:
    """The exponent is unsigned where it is positive, signed where it is not."""
    value = float(op.removeprefix("Pow"))
    code = 100 if value > 0 else -100
    kind = ("u" if value > 0 else "s") + dtype[1:]
    exponent = const(kind, scale=abs(value) / 100, zero_point=0, values=(code,))
    return single(op, "Pow", [x(dtype, *SHAPE), exponent], y(dtype))


def _recorded_silu(op: str, dtype: str, variant: str) -> Case:
    operand = x(dtype, *SHAPE, tag="x")
    sigmoid = Step("Sigmoid", (operand,), (y(dtype, scale=1 / 65536, zero_point=0),))
    return Case(op, (sigmoid, Step("Mul", (operand, (0, 0)), (y(dtype),))))


def _recorded_topk(op: str, dtype: str, variant: str) -> Case:
    step = Step(op, (x(dtype, 4, 16), ints(2)), (y(dtype), y("i64")), {"axis": -1})
    return Case(op, (step,))


def _recorded_scatter(op: str, dtype: str, variant: str) -> Case:
    rows = Operand("i64", (2, 8))
    return single(op, op, [x(dtype, 4, 8), rows, x(dtype, 2, 8)], y(dtype), axis=0)


def _recorded_argmax(op: str, dtype: str, variant: str) -> Case:
    return single(op, op, [x(dtype, *SHAPE)], y("i64"), axis=-1)


def _recorded_cast(op: str, types: str, variant: str) -> Case:
    return single(op, op, [Operand("i32", SHAPE)], y("f32"), to=TensorProto.FLOAT)


def _recorded_where(op: str, dtype: str, variant: str) -> Case:
    inputs = [Operand("bool", SHAPE), x(dtype, *SHAPE), x(dtype, *SHAPE)]
    return single(op, op, inputs, y(dtype))


def _recorded_float(op: str, kind: str, variant: str) -> Case:
    return single(op, kind, [Operand("f32", SHAPE)], y("f32"), axis=-1)


def _recorded_codes(op: str, dtype: str, variant: str) -> Case:
    return matmul_const(dtype, "s8", "channel", io="int")


def _recorded_rotary(op: str, dtype: str, variant: str) -> Case:
    inputs = [x(dtype, 1, 2, 8, 16), const(dtype, 8, 8), const(dtype, 8, 8)]
    inputs.append(Operand("i64", (1, 8)))
    return single(op, "RotaryEmbedding", inputs, y(dtype), opset=23)


def _recorded_matmul_integer(op: str, types: str, variant: str) -> Case:
    inputs = [Operand("raw_u8", (8, 16)), Operand("raw_s8", (16, 8), const=True)]
    return single(op, op, inputs, y("i32"))


def _recorded_nbits(op: str, dtype: str, variant: str) -> Case:
    """Four bits, blocks of 32 along k, float scales."""
    k, n, block = 64, 32, 32
    codes = Operand("raw_u8", (n, k // block, block // 2), const=True)
    scales = Operand("f32", (n * k // block,), const=True)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": block}
    inputs = [x(dtype, 1, 8, k), codes, scales]
    return single(op, op, inputs, y(dtype), domain="com.microsoft", **attributes)


def _recorded_qlinear(op: str, types: str, variant: str) -> Case:
    """u8 × s8 with scales and zero points as operands."""

    def number(value: float, dtype: str) -> Operand:
        return Operand(dtype, const=True, values=(value,))

    inputs = [
        Operand("raw_u8", (1, 8, 64)), number(0.02, "f32"), number(128, "raw_u8"),
        Operand("raw_s8", (64, 32), const=True), number(0.02, "f32"), number(0, "raw_s8"),
        number(0.1, "f32"), number(128, "raw_u8"),
    ]  # fmt: skip
    return single(op, op, inputs, y("raw_u8"))


_BINARIES = ("Add", "Sub", "Mul", "Mul_const", "Div", "Min", "Max")
_UNARIES = (
    "Abs", "Cos", "Exp", "Gelu20", "HardSwish", "L2Norm(LpNormalization)", "Neg", "Reciprocal",
    "Sigmoid", "Sin", "Softmax", "Sqrt", "Swish(op24)", "Tanh",
)  # fmt: skip
_LAYOUT = (
    "Concat", "Expand", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
)  # fmt: skip
_NORMS = (
    "LayerNorm", "RMSNormalization", "RMSNormalization(op23)", "SimplifiedLayerNormalization",
)  # fmt: skip
_RECORDED: dict[str, Callable[[str, str, str], Case]] = {
    **dict.fromkeys(_BINARIES, _recorded_binary),
    **dict.fromkeys(_UNARIES, _recorded_unary),
    **dict.fromkeys(_LAYOUT, _recorded_layout),
    **dict.fromkeys(_NORMS, _recorded_norm),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), _recorded_reduce),
    **dict.fromkeys(("Pow-0.5", "Pow2"), _recorded_pow),
    **dict.fromkeys(("Gemm", "Conv1x1"), _recorded_weighted),
    "ArgMax": _recorded_argmax,
    "Cast": _recorded_cast,
    "Clip": _recorded_clip,
    "Convert": _recorded_convert,
    "Gather_embed": _recorded_gather,
    "MatMulInteger": _recorded_matmul_integer,
    "MatMulNBits": _recorded_nbits,
    "MatMul_const": _recorded_matmul_const,
    "MatMul_dyn": _recorded_matmul_dynamic,
    "QLinearMatMul": _recorded_qlinear,
    "RotaryEmbedding(op23)": _recorded_rotary,
    "ScatterElements": _recorded_scatter,
    "SiLU(Sigmoid*x)": _recorded_silu,
    "TopK": _recorded_topk,
    "Where": _recorded_where,
    "float": _recorded_float,
    "int_io": _recorded_codes,
}
