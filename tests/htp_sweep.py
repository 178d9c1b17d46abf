"""Single operations over all types of activations and weights, ranks, axes and encodings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.qdq_cases import (
    ACTIVATIONS,
    SCALES,
    SHAPE,
    WEIGHTS,
    Case,
    Operand,
    Shape,
    Step,
    binary,
    code_range,
    const,
    conv,
    floats,
    gemm,
    ints,
    matmul_const,
    matmul_dynamic,
    single,
    unary,
    weight,
    x,
    y,
)  # fmt: skip

_BIG: Shape = (2, 4, 8, 16)
_IMAGE: Shape = (1, 8, 8, 8)
_POINTWISE = (
    "Sigmoid", "Tanh", "Relu", "Gelu", "Neg", "Abs", "Sqrt", "Exp", "Log", "Reciprocal", "Erf",
    "Sin", "Cos", "Floor", "Ceil", "Round", "Sign", "Elu", "Softplus", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Selu", "Celu", "ThresholdedRelu", "Softsign", "Mish", "Tan", "Atan", "Asin",
    "Acos", "Sinh", "Cosh", "Identity", "Softmax", "LogSoftmax",
)  # fmt: skip
_REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2",
    "ReduceSumSquare", "ReduceL1", "ReduceLogSumExp",
)  # fmt: skip
_ARITHMETIC = ("Add", "Mul", "Sub", "Div", "Min", "Max")
_COMPARISONS = ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
_OTHER = {"u8": "u16", "s8": "s16", "u16": "u8", "s16": "s8"}


def sweep() -> Iterator[Case]:
    """Every case once; names are unique."""
    seen: set[str] = set()
    for case in _all():
        if case.key not in seen:
            seen.add(case.key)
            yield case


def _all() -> Iterator[Case]:
    yield from _plain()
    for dtype in ACTIVATIONS:
        for part in (
            _dynamic, _products, _pointwise, _norms, _layout, _reductions, _constants, _axes,
            _encodings, _blocks, _convolutions, _attention,
        ):  # fmt: skip
            yield from part(dtype)
        for other in ACTIVATIONS:
            if other != dtype:
                yield from _mixed(dtype, other)
        for rank in range(1, 7):
            if dtype != "s8":
                yield from _rank(dtype, rank)


def named(case: Case, tail: str) -> Case:
    """The same with a longer name."""
    return replace(case, name=f"{case.name}/{tail}")


def _dynamic(dtype: str) -> Iterator[Case]:
    """MatMul of two graph inputs: types, zero points, codes as inputs, broadcast over rank 5."""
    for other in ACTIVATIONS:
        case = matmul_dynamic(dtype, other)
        yield case
        yield replace(case, name=f"{case.name}/codes", io="int")
        for lead in ((2, 1, 3), (1, 3, 1), (1, 2, 2)):
            for second in ((1, 1, 1), (1, 1), ()):
                shapes = ((*lead, 8, 16), (*second, 16, 8))
                tail = f"rank5_{''.join(map(str, lead))}x{''.join(map(str, second)) or 'none'}"
                yield named(matmul_dynamic(dtype, other, shapes=shapes), tail)
    for other, zero in product(ACTIVATIONS, (0, 6)):
        yield named(matmul_dynamic(dtype, other, zero_point=zero), f"zero{zero}")


def _products(dtype: str) -> Iterator[Case]:
    """MatMul and Gemm with constant weights: biases, other result types, zero points."""
    for w, granularity in product(WEIGHTS, ("tensor", "channel")):
        yield matmul_const(dtype, w, granularity)
        for b in ("s32", None):
            yield named(gemm(dtype, w, granularity, b, transB=1), "transB")
            yield conv(dtype, w, granularity, b)
    for w, granularity in product(("s4", "s8", "u8", "s16"), ("tensor", "channel")):
        for zero in (1, 3):
            yield named(matmul_const(dtype, w, granularity, zero_point=zero), f"weight_zero{zero}")
        if granularity == "channel":
            yield named(matmul_const(dtype, w, granularity, axis=0), "axis0")
        else:
            yield named(matmul_const(dtype, w, granularity, explicit_zero=False), "no_zero")
        for b in ("f32", "u8", "s8", "u16", "s16"):
            yield named(gemm(dtype, w, granularity, b, transB=1), "transB")
        yield gemm(dtype, w, granularity, "s32")
        other = _OTHER[dtype]
        yield named(gemm(dtype, w, granularity, "s32", transB=1, out=other), f"transB->{other}")
        for out in ACTIVATIONS:
            if out != dtype:
                yield matmul_const(dtype, w, granularity, out=out)
    for w, rank in product(("s4", "s8"), (1, 2, 4, 5, 6)):
        shape = (1, 1, 1, 2, 8, 64)[-rank:]
        inputs = [x(dtype, *shape), weight(w, "channel", 64, 32)]
        yield single(f"MatMul_const/{dtype}x{w}/channel/rank{rank}", "MatMul", inputs, y(dtype))
    for w in ("s4", "s8", "u8"):
        inputs = [x(dtype, 2, 8, 64), const(w, 2, 64, 32)]
        yield single(f"MatMul_const/{dtype}x{w}/batched", "MatMul", inputs, y(dtype))
        inputs = [const(w, 8, 64), x(dtype, 64, 32)]
        yield single(f"MatMul_const_left/{w}x{dtype}", "MatMul", inputs, y(dtype))
        yield named(gemm(dtype, w, "channel", "s32", transB=1, alpha=0.5), "alpha0.5")
        yield named(gemm(dtype, w, "channel", "s32", transA=0, beta=2.0), "beta2")


def _blocks(dtype: str) -> Iterator[Case]:
    """Weights in blocks with float scales, or with integer ones (LPBQ)."""
    for w in ("s4", "u4", "s8", "u8"):
        for granularity in ("block16", "block32", "block64", "lpbq16", "lpbq32", "lpbq64"):
            yield matmul_const(dtype, w, granularity)
            yield conv(dtype, w, granularity, None, channels=(64, 32))
        for granularity in ("block32", "lpbq32"):
            yield named(gemm(dtype, w, granularity, None, transB=1), "transB")
    for bits in (4, 8):
        codes = Operand("raw_u8", (32, 2, 4 * bits), const=True)
        inputs = [x(dtype, 1, 8, 64), codes, Operand("f32", (64,), const=True)]
        attributes = {"K": 64, "N": 32, "bits": bits, "block_size": 32}
        name = f"MatMulNBits/{dtype}/{bits}"
        yield single(name, "MatMulNBits", inputs, y(dtype), domain="com.microsoft", **attributes)


def _convolutions(dtype: str) -> Iterator[Case]:
    kinds = ("Conv3x3", "ConvDepthwise", "ConvTranspose", "Conv1d", "Conv3d")
    weights = product(("u4", "s4", "s8", "u8", "s16"), ("tensor", "channel"), kinds, ("s32", None))
    for w, granularity, kind, b in weights:
        yield conv(dtype, w, granularity, b, kind)
    image = x(dtype, *_IMAGE)
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for tail, result in (("", y(dtype)), ("/diff_enc", y(dtype, scale=SCALES[dtype] * 1.5))):
        for op in ("MaxPool", "AveragePool"):
            yield single(f"{op}/{dtype}{tail}", op, [image], result, **pool)
        for op in ("GlobalAveragePool", "GlobalMaxPool"):
            yield single(f"{op}/{dtype}{tail}", op, [image], result)
        for mode, extra in (
            ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
            ("linear", {"coordinate_transformation_mode": "half_pixel"}),
        ):
            inputs = [x(dtype, 1, 4, 8, 8), None, floats(1.0, 1.0, 2.0, 2.0)]
            yield single(
                f"Resize/{dtype}/{mode}{tail}", "Resize", inputs, result, mode=mode, **extra
            )


def _pointwise(dtype: str) -> Iterator[Case]:
    for op in _POINTWISE:
        yield unary(op, dtype)
    yield unary("Swish", dtype, opset=24)
    for op in _ARITHMETIC:
        yield binary(op, dtype, dtype)
    big = x(dtype, *_BIG)
    for op in _COMPARISONS:
        yield single(f"{op}/{dtype}", op, [big, big], y("bool"))
    condition = Operand("bool", _BIG)
    yield single(f"Where/{dtype}", "Where", [condition, big, big], y(dtype))
    limits = (floats(-0.2), floats(0.2))
    yield single(f"Clip/{dtype}", "Clip", [big, *limits], y(dtype))
    yield single(f"Clip/{dtype}/min", "Clip", [big, limits[0]], y(dtype))
    codes = (const(dtype, values=(5,)), const(dtype, values=(100,)))
    yield single(f"Clip/{dtype}/quantized", "Clip", [big, *codes], y(dtype))
    for exponent in (2.0, 0.5, -0.5, 3.0):
        inputs = [big, floats(exponent)]
        yield single(f"Pow/{dtype}/float{exponent:g}", "Pow", inputs, y(dtype))
        if exponent > 0:
            code = const(dtype, scale=exponent / 100, zero_point=0, values=(100,))
            yield single(f"Pow/{dtype}/{exponent:g}", "Pow", [big, code], y(dtype))
    for shape in ((4, 1, 1), (1,)):
        inputs = [big, const(dtype, *shape)]
        yield single(f"PRelu/{dtype}/slope{len(shape)}", "PRelu", inputs, y(dtype))
    for op in ("ArgMax", "ArgMin"):
        yield single(f"{op}/{dtype}", op, [big], y("i64"), axis=-1)
    yield single(f"ArgMax/{dtype}/flat", "ArgMax", [big], y("i64"), axis=1, keepdims=0)
    topk = Step("TopK", (big, ints(2)), (y(dtype), y("i64")), {"axis": -1})
    yield Case(f"TopK/{dtype}", (topk,))


def _norms(dtype: str) -> Iterator[Case]:
    source = x(dtype, 1, 8, 32)
    image = x(dtype, *_IMAGE)
    for gamma in ACTIVATIONS:
        inputs = [source, const(gamma, 32)]
        tail = f"{dtype}x{gamma}"
        for op, opset in (("RMSNormalization", 23), ("SimplifiedLayerNormalization", 21)):
            yield single(f"{op}/{tail}", op, inputs, y(dtype), opset=opset, axis=-1)
        scale = SCALES[dtype] * SCALES[gamma]
        biases = [const("s32", 32, scale=scale, zero_point=0), None, const(dtype, 32)]
        for b in biases:
            name = f"LayerNormalization/{tail}+{b.dtype if b else None}"
            more = [*inputs, b] if b else inputs
            yield single(name, "LayerNormalization", more, y(dtype), axis=-1)
    for gamma in sorted({"u8", "s8", dtype}):
        tail = f"{dtype}x{gamma}"
        scale = SCALES[dtype] * SCALES[gamma]
        factor = const(gamma, 8)
        s32 = const("s32", 8, scale=scale, zero_point=0)
        for b in (s32, factor):
            name = f"InstanceNormalization/{tail}+{b.dtype}"
            yield single(name, "InstanceNormalization", [image, factor, b], y(dtype))
        statistics = [const(gamma, 8, zero_point=0)] * 4
        name = f"BatchNormalization/{tail}"
        yield single(name, "BatchNormalization", [image, *statistics], y(dtype))
        name = f"GroupNormalization/{tail}"
        inputs = [image, factor, factor]
        yield single(name, "GroupNormalization", inputs, y(dtype), num_groups=2)


def _layout(dtype: str) -> Iterator[Case]:
    """Operations that move codes, with the result in the same encoding or in another one."""
    for tail, result in (("", y(dtype)), ("/diff_enc", y(dtype, scale=SCALES[dtype] * 1.5))):
        for name, op, inputs, attributes in _moves(dtype):
            yield single(f"{name}/{dtype}{tail}", op, inputs, result, **attributes)
        step = Step("Split", (x(dtype, *_BIG), ints(2, 2)), (result, result), {"axis": 1})
        yield Case(f"Split/{dtype}{tail}", (step,))


def _moves(dtype: str) -> Iterator[tuple[str, str, list[Operand | None], dict[str, Any]]]:
    big, small, square = x(dtype, *_BIG), x(dtype, 4, 8), x(dtype, 1, 8, 8)
    table = const(dtype, 40, 16)
    pads = ints(0, 0, 1, 1, 0, 0, 1, 1)
    rows = Operand("i64", (2, 8), const=True, values=(0,) * 8 + (2,) * 8)
    yield "Reshape", "Reshape", [big, ints(2, 32, 16)], {}
    yield "Transpose", "Transpose", [big], {"perm": [0, 2, 1, 3]}
    yield "Squeeze", "Squeeze", [x(dtype, 1, 4, 8), ints(0)], {}
    yield "Unsqueeze", "Unsqueeze", [small, ints(0)], {}
    yield "Flatten", "Flatten", [big], {"axis": 2}
    yield "Expand", "Expand", [x(dtype, 1, 4, 1, 16), ints(1, 4, 8, 16)], {}
    yield "Tile", "Tile", [big, ints(1, 1, 2, 1)], {}
    yield "Slice", "Slice", [big, ints(0), ints(4), ints(2)], {}
    yield "Slice_step2", "Slice", [big, ints(0), ints(8), ints(2), ints(2)], {}
    yield "Concat", "Concat", [big, big], {"axis": 1}
    for kind in ("i32", "i64"):
        yield f"Gather_table_{kind}", "Gather", [table, Operand(kind, (1, 8))], {"axis": 0}
        inputs = [small, Operand(kind, (4, 8))]
        yield f"GatherElements_{kind}", "GatherElements", list(inputs), {"axis": 1}
    yield "Gather", "Gather", [big, ints(0, 2)], {"axis": 2}
    yield "Gather_scalar", "Gather", [big, ints(1, scalar=True)], {"axis": 1}
    constant = Operand("i64", (2, 8), const=True)
    yield "GatherElements_const", "GatherElements", [small, constant], {"axis": 0}
    nd = Operand("i64", (3, 1), const=True)
    yield "GatherND", "GatherND", [x(dtype, 4, 8, 16), nd], {}
    updates = x(dtype, 2, 8)
    fixed = Operand("i64", (2, 1), const=True, values=(0, 2))
    yield "ScatterND", "ScatterND", [small, fixed, updates], {}
    yield "ScatterND_dynamic", "ScatterND", [small, Operand("i64", (2, 1)), updates], {}
    pairs = Operand("i64", (2, 2), const=True, values=(0, 0, 0, 2))
    yield "ScatterND_pairs", "ScatterND", [x(dtype, 1, 4, 8), pairs, updates], {}
    yield "ScatterElements", "ScatterElements", [small, rows, updates], {"axis": 0}
    yield "Pad", "Pad", [big, pads], {}
    for mode in ("edge", "reflect"):
        yield f"Pad_{mode}", "Pad", [big, pads], {"mode": mode}
    for op in ("DepthToSpace", "SpaceToDepth"):
        yield op, op, [big], {"blocksize": 2}
    yield "DepthToSpace_CRD", "DepthToSpace", [big], {"blocksize": 2, "mode": "CRD"}
    yield "Trilu", "Trilu", [square], {}
    yield "CumSum", "CumSum", [small, ints(1, scalar=True)], {}
    for op in ("Relu", "Identity"):
        yield f"{op}_big", op, [big], {}
    for op in ("Min", "Max"):
        yield f"{op}_big", op, [big, big], {}
    yield "ReduceMax_last", "ReduceMax", [big, ints(3)], {}
    yield "Where_big", "Where", [Operand("bool", _BIG), big, big], {}


def _reductions(dtype: str) -> Iterator[Case]:
    big = x(dtype, *_BIG)
    for op, axes, keep in product(_REDUCTIONS, ((3,), (1,), (2, 3)), (1, 0)):
        if axes == (1,) and not keep:
            continue
        name = f"{op}/{dtype}/axes{'+'.join(map(str, axes))}/keep{keep}"
        yield single(name, op, [big, ints(*axes)], y(dtype), keepdims=keep)
    yield single(f"ReduceSum/{dtype}/all", "ReduceSum", [big], y(dtype), keepdims=0)


def _constants(dtype: str) -> Iterator[Case]:
    """A constant operand: a vector, a scalar, on the left, or without an encoding."""
    big = x(dtype, *_BIG)
    for op in ("Add", "Mul"):
        for tail, operand in (("vector", const(dtype, 16)), ("scalar", const(dtype))):
            yield single(f"{op}/{dtype}/const_{tail}", op, [big, operand], y(dtype))
    yield single(f"Mul/{dtype}/const_one", "Mul", [big, const(dtype, 1)], y(dtype))
    yield single(f"Mul/{dtype}/const_float", "Mul", [big, floats(0.5)], y(dtype))
    vector = Operand("f32", (16,), const=True)
    yield single(f"Add/{dtype}/const_float", "Add", [big, vector], y(dtype))
    for op in ("Div", "Sub"):
        yield single(f"{op}/{dtype}/const_left", op, [const(dtype), big], y(dtype))
    yield single(f"Cast/{dtype}->i32", "Cast", [big], y("i32"), to=TensorProto.INT32)
    for kind in ("i32", "i64", "bool"):
        source = Operand(kind, (2, 4))
        yield single(f"Cast/{kind}->{dtype}", "Cast", [source], y(dtype), to=TensorProto.FLOAT)
    shape = ints(1, 4, 8, 16)
    yield single(f"Expand/{dtype}/nothing", "Expand", [x(dtype, *SHAPE), shape], y(dtype))


def _axes(dtype: str) -> Iterator[Case]:
    big = x(dtype, *_BIG)
    for axis in range(4):
        tail = f"{dtype}/axis{axis}"
        for op in ("Softmax", "LogSoftmax", "LpNormalization"):
            yield single(f"{op}/{tail}", op, [big], y(dtype), axis=axis)
        yield single(f"Concat/{tail}", "Concat", [big, big], y(dtype), axis=axis)
        yield single(f"ArgMax/{tail}", "ArgMax", [big], y("i64"), axis=axis)
        yield single(f"Gather/{tail}", "Gather", [big, ints(0, 1)], y(dtype), axis=axis)
        position = ints(axis, scalar=True)
        yield single(f"CumSum/{tail}", "CumSum", [big, position], y(dtype))
        if axis > 0:
            gamma = const("u8", *_BIG[axis:])
            for op, opset in (("RMSNormalization", 23), ("LayerNormalization", 21)):
                yield single(f"{op}/{tail}", op, [big, gamma], y(dtype), opset=opset, axis=axis)
            yield single(f"Flatten/{tail}", "Flatten", [big], y(dtype), axis=axis)
    yield single(f"LpNormalization/{dtype}/p1", "LpNormalization", [big], y(dtype), axis=-1, p=1)
    for axis in (-1, 1):
        name = f"LpNormalization/{dtype}/p2/axis{axis}"
        yield single(name, "LpNormalization", [big], y(dtype), axis=axis, p=2)
    for perm in ([3, 2, 1, 0], [0, 2, 3, 1], [1, 0, 2, 3]):
        name = f"Transpose/{dtype}/{''.join(map(str, perm))}"
        yield single(name, "Transpose", [big], y(dtype), perm=perm)
    shapes: dict[str, Shape] = {
        "scalar": (), "one": (1,), "last": (16,), "middle": (4, 1, 16), "mask": (1, 1, 8, 16),
        "column": (8, 1),
    }  # fmt: skip
    for (tail, shape), op in product(shapes.items(), ("Add", "Sub", "Mul", "Div")):
        yield named(binary(op, dtype, dtype, shapes=(_BIG, shape)), f"broadcast_{tail}")


def _encodings(dtype: str) -> Iterator[Case]:
    """Forced encodings of results, codes as graph inputs and outputs, operation sets."""
    low, high = code_range(dtype)
    forced = ((1 / 256, 0), (1 / 65536, 0), (1 / 128, 128), (1 / 32768, 32768), (1 / 128, 0),
              (1 / 32768, 0), (0.02, None))  # fmt: skip
    for op, (scale, zero) in product(("Sigmoid", "Tanh", "Softmax"), forced):
        if zero is None or low <= zero <= high:
            result = {"scale": scale, "zero_point": zero}
            yield named(unary(op, dtype, result=result), f"scale{scale:.3g}_zero{zero}")
    for op in ("RMSNormalization", "LayerNormalization", "LpNormalization", "Softmax"):
        inputs = [x(dtype, 1, 8, 1)]
        if op in {"RMSNormalization", "LayerNormalization"}:
            inputs.append(const(dtype, 1))
        opset = 23 if op == "RMSNormalization" else 21
        yield single(f"{op}/{dtype}/one", op, inputs, y(dtype), axis=-1, opset=opset)
    yield named(binary("Add", dtype, dtype, io="int"), "codes")
    yield named(matmul_const(dtype, "s8", "channel", io="int"), "codes")
    for op in ("Softmax", "Sigmoid", "Relu"):
        yield named(unary(op, dtype, io="int"), "codes")
    inputs = [x(dtype, 2, 4, 8), ints(8, 8)]
    yield single(f"Reshape/{dtype}/codes", "Reshape", inputs, y(dtype), io="int")
    inputs = [const(dtype, 40, 16), Operand("i32", (1, 8))]
    yield single(f"Gather/{dtype}/codes", "Gather", inputs, y(dtype), io="int")
    for opset in (13, 17, 18, 19, 20, 22, 23, 24):
        if opset >= 21 or dtype.endswith("8"):  # 16 bits came with 21
            yield named(binary("Add", dtype, dtype, opset=opset), f"opset{opset}")
            yield named(matmul_const(dtype, "s8", "channel", opset=opset), f"opset{opset}")
            yield named(unary("Softmax", dtype, opset=opset), f"opset{opset}")


def _attention(dtype: str) -> Iterator[Case]:
    heads = x(dtype, 1, 2, 8, 16)
    positions = Operand("i64", (1, 8))
    inputs = [heads, const(dtype, 8, 8), const(dtype, 8, 8), positions]
    name = f"RotaryEmbedding/{dtype}"
    yield single(name, "RotaryEmbedding", inputs, y(dtype), opset=23)
    table = x(dtype, 1, 8, 8)
    yield named(
        single(name, "RotaryEmbedding", [heads, table, table], y(dtype), opset=23), "per_token"
    )
    yield single(f"Attention/{dtype}", "Attention", [heads] * 3, y(dtype), opset=23)


def _mixed(dtype: str, other: str) -> Iterator[Case]:
    """Two types in one operation, or a result of another type."""
    a, b = x(dtype, *_BIG), x(other, *_BIG)
    for op in ("Add", "Mul", "Sub", "Div", "Max"):
        yield binary(op, dtype, other)
    for op in ("Add", "Mul"):
        yield binary(op, dtype, dtype, other)
        yield binary(op, dtype, other, other)
    condition = Operand("bool", _BIG)
    yield single(f"Where/{dtype}+{other}", "Where", [condition, a, b], y(dtype))
    yield single(f"Concat/{dtype}+{other}", "Concat", [a, b], y(dtype), axis=1)
    yield single(f"Greater/{dtype}+{other}", "Greater", [a, b], y("bool"))
    for op in ("Softmax", "Sigmoid", "Tanh", "Relu", "Gelu", "Sqrt", "Exp", "Neg", "HardSwish"):
        yield unary(op, dtype, other)
    tail = f"{dtype}->{other}"
    yield single(f"Reshape/{tail}", "Reshape", [a, ints(2, 32, 16)], y(other))
    yield single(f"Transpose/{tail}", "Transpose", [a], y(other), perm=[0, 1, 3, 2])
    yield single(f"ReduceMean/{tail}", "ReduceMean", [a, ints(3)], y(other))
    image = x(dtype, *_IMAGE)
    yield single(f"MaxPool/{tail}", "MaxPool", [image], y(other), kernel_shape=[2, 2])
    steps = (
        Step("Relu", (a,), (y(dtype),)),
        Step("Identity", ((0, 0),), (y(other),)),
        Step("Add", ((1, 0), b), (y(other),)),
    )
    yield Case(f"Convert/{tail}", steps)


def _rank(dtype: str, rank: int) -> Iterator[Case]:
    shape = (1, 2, 2, 3, 4, 8)[-rank:]
    last = rank - 1
    operand, tail = x(dtype, *shape), f"rank{rank}"

    def one(op: str, inputs: list[Operand | None], **more: Any) -> Case:
        result = more.pop("result", y(dtype))
        return single(f"{op}/{dtype}/{tail}", op, inputs, result, **more)

    for op in _ARITHMETIC:
        yield named(binary(op, dtype, dtype, shapes=(shape, shape)), tail)
    for op in (
        "Softmax", "Sigmoid", "Tanh", "Relu", "Gelu", "Sqrt", "Exp", "Reciprocal", "HardSwish",
        "LogSoftmax", "Neg", "Abs", "Log", "Elu", "Sin", "Cos", "Floor", "Ceil", "Round", "Sign",
        "Softplus", "HardSigmoid", "LeakyRelu", "Asin", "Atan",
    ):  # fmt: skip
        yield named(unary(op, dtype, shape=shape), tail)
    if rank > 1:
        yield one("Transpose", [operand], perm=[*range(rank - 2), last, last - 1])
        left, right = (1, 2, 2, 2, 8, 16)[-rank:], (1, 2, 2, 2, 16, 8)[-rank:]
        second = "u8" if dtype[0] == "u" else dtype
        yield named(matmul_dynamic(dtype, second, shapes=(left, right)), tail)
    yield named(one("Reshape", [operand, ints(-1, 8)]), "to2")
    flat = x(dtype, int(np.prod(shape[:-1])), 8)
    yield named(one("Reshape", [flat, ints(*shape)]), "from2")
    yield one("Concat", [operand, operand], axis=last)
    yield one("Slice", [operand, ints(0), ints(4), ints(last)])
    split = Step("Split", (operand, ints(4, 4)), (y(dtype), y(dtype)), {"axis": last})
    yield Case(f"Split/{dtype}/{tail}", (split,))
    ones = [1] * last
    zeros = [0] * last
    yield one("Tile", [operand, ints(*ones, 2)])
    yield one("Gather", [operand, ints(0, 2)], axis=last)
    yield one("Expand", [x(dtype, *shape[:-1], 1), ints(*shape)])
    yield one("Pad", [operand, ints(*zeros, 1, *zeros, 1)])
    for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"):
        yield one(op, [operand, ints(last)])
    yield one("Where", [Operand("bool", shape), operand, operand])
    yield one("Clip", [operand, floats(-0.2), floats(0.2)])
    yield one("RMSNormalization", [operand, const(dtype, 8)], opset=23, axis=-1)
    b = const("s32", 8, scale=SCALES[dtype] * 0.02, zero_point=0)
    yield one("LayerNormalization", [operand, const("u8", 8), b], axis=-1)
    yield one("LpNormalization", [operand], axis=-1)
    yield one("PRelu", [operand, const(dtype, 8)])
    topk = Step("TopK", (operand, ints(1)), (y(dtype), y("i64")), {"axis": -1})
    yield Case(f"TopK/{dtype}/{tail}", (topk,))
    yield one("ArgMax", [operand], result=y("i64"), axis=-1)
    yield one("Equal", [operand, operand], result=y("bool"))
    yield one("Unsqueeze", [operand, ints(0)])
    indices = Operand("i64", shape, const=True, values=(0,) * int(np.prod(shape)))
    yield one("GatherElements", [operand, indices], axis=last)


def _plain() -> Iterator[Case]:
    """Tensors that carry no encoding: indices, masks, floats."""
    flags = Operand("bool", (4, 8))
    for op in ("And", "Or", "Xor"):
        yield single(f"{op}/bool", op, [flags, flags], y("bool"))
    yield single("Not/bool", "Not", [flags], y("bool"))
    yield single("ConstantOfShape/f32", "ConstantOfShape", [ints(2, 4)], y("f32"))
    ends = [ints(number, scalar=True) for number in (0, 4, 1)]
    yield single("Range/i64", "Range", ends, y("i64"))
    casts = {"i32": TensorProto.INT32, "i64": TensorProto.INT64, "f32": TensorProto.FLOAT,
             "bool": TensorProto.BOOL}  # fmt: skip
    for kind in ("i32", "i64", "f32"):
        operand = Operand(kind, (4, 8))
        for op in (*_ARITHMETIC, "Equal", "Less", "Greater", "Mod"):
            more = {"fmod": 1} if op == "Mod" and kind == "f32" else {}
            result = y("bool" if op in _COMPARISONS else kind)
            yield single(f"{op}/{kind}", op, [operand, operand], result, **more)
        for op in ("Transpose", "Abs", "Neg"):
            yield single(f"{op}/{kind}", op, [operand], y(kind))
        if kind == "f32":
            for op in ("Softmax", "Sigmoid"):
                yield single(f"{op}/{kind}", op, [operand], y(kind))
        yield single(f"Reshape/{kind}", "Reshape", [operand, ints(8, 4)], y(kind))
        yield single(f"Gather/{kind}", "Gather", [operand, ints(0, 1)], y(kind))
        yield single(f"Concat/{kind}", "Concat", [operand, operand], y(kind), axis=0)
        for other, number in casts.items():
            yield single(f"Cast/{kind}->{other}", "Cast", [operand], y(other), to=number)
