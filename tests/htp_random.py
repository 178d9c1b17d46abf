"""Fresh cases by chance: single operations and short chains, as language models and CNNs have them.

Types, shapes, ranks, granularities, encodings and axes are drawn; most operands agree with each
other, as in real graphs, and some do not. Case ``i`` of a seed is the same however many are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.htp_draw import Chain, Draw, forced
from tests.htp_random_decoders import DECODERS
from tests.qdq_cases import Case, Operand, Step, bias, const, floats, ints, single, y

_UNARY = (
    "Sigmoid", "Tanh", "Relu", "Gelu", "Neg", "Abs", "Sqrt", "Exp", "Log", "Reciprocal", "Erf",
    "Sin", "Cos", "Floor", "Ceil", "Round", "Sign", "Elu", "Softplus", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Identity",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max")
_REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2")
_COMPARE = ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, named "seed/index/family"."""
    for index in range(count):
        draw = Draw(random.Random(f"{seed}/{index}"))
        family = draw.random.choices(list(_FAMILIES), weights=list(_FAMILIES.values()))[0]
        case = family(draw)
        io = "int" if draw.chance(0.4 if family in DECODERS else 0.15) else "float"
        yield replace(case, name=f"{seed}/{index}/{case.name}", io=io)


# ------------------------------------------------------------------------------ single operations


def _matmul_const(draw: Draw) -> Case:
    dtype, k, n = draw.dtype(), draw.one((16, 32, 64, 96)), draw.one((8, 16, 48))
    lead = draw.shape(1, 6)[:-1]
    act = draw.operand(dtype, (*lead, k))
    w = draw.weight((k, n), 1, 0)
    if draw.chance(0.08):
        act = replace(act, shape=(2, 4, k))
        w = replace(w, shape=(2, k, n), granularity="tensor", block=0)
    return single("MatMul_const", "MatMul", [act, w], draw.result(draw.like(dtype)))


def _matmul_dynamic(draw: Draw) -> Case:
    a = draw.dtype()
    m, k, n = (draw.one((1, 4, 8, 16)) for _ in range(3))
    lead = draw.shape(1, 5)[:-1]
    other = lead if draw.chance(0.8) else lead[1:] if draw.chance(0.5) else (1,) * len(lead)
    left, right = draw.operand(a, (*lead, m, k)), draw.operand(draw.like(a, 0.4), (*other, k, n))
    return single("MatMul_dyn", "MatMul", [left, right], draw.result(draw.like(a)))


def _gemm(draw: Draw) -> Case:
    dtype, m, k, n = draw.dtype(), draw.one((1, 4, 8)), draw.one((16, 32, 64)), draw.one((8, 24))
    trans_b = int(draw.chance(0.7))
    act = draw.operand(dtype, (m, k))
    w = draw.weight((n, k) if trans_b else (k, n), 1 - trans_b, trans_b)
    attributes: dict[str, Any] = {"transB": trans_b}
    if draw.chance(0.1):
        attributes[draw.one(("alpha", "beta"))] = 0.5
    inputs = [act, w, *draw.bias(act, w, n)]
    return single("Gemm", "Gemm", inputs, draw.result(draw.like(dtype)), **attributes)


def _conv(draw: Draw) -> Case:
    dtype, c, n = draw.dtype(), draw.one((8, 16, 32)), draw.one((4, 16))
    dims = draw.random.choices((1, 2, 3), weights=(2, 8, 1))[0]
    size = draw.one((1, 3))
    transposed = draw.chance(0.15)
    groups = c if not transposed and draw.chance(0.25) else 1
    n = c if groups > 1 else n
    act = draw.operand(dtype, (1, c, *(8,) * dims))
    shape = (c, n, *(size,) * dims) if transposed else (n, c // groups, *(size,) * dims)
    channel, blocks = (1, 0) if transposed else (0, 1)
    w = draw.weight(shape, channel, blocks)
    attributes: dict[str, Any] = {"group": groups} if groups > 1 else {}
    if draw.chance(0.3):
        attributes["strides"] = [2] * dims
    if size == 3 and draw.chance(0.5):
        attributes["pads"] = [1] * (2 * dims)
    op = "ConvTranspose" if transposed else "Conv"
    inputs = [act, w, *draw.bias(act, w, n)]
    return single(op, op, inputs, draw.result(draw.like(dtype)), **attributes)


def _unary(draw: Draw) -> Case:
    op, dtype = draw.one(_UNARY), draw.dtype()
    operand = draw.operand(dtype, draw.shape())
    result = draw.result(draw.like(dtype, 0.9))
    if op in {"Sigmoid", "Tanh"} and draw.chance(0.5):
        result = forced(op, dtype)
    return single(op, op, [operand], result)


def _binary(draw: Draw) -> Case:
    op, a = draw.one(_BINARY), draw.dtype()
    shape = draw.shape()
    other = draw.one(
        (shape, shape, shape, shape[-1:], (1,) * len(shape), (), (*shape[:-1], 1), shape[1:])
    )
    operands = [draw.operand(a, shape), draw.operand(draw.like(a), other, const_too=True)]
    if draw.chance(0.2):
        operands.reverse()
    if draw.chance(0.05):
        operands[1] = floats(0.5)
    return single(
        op, op, operands, draw.result(draw.like(operands[0].dtype if operands[0].quantized else a))
    )


def _softmax(draw: Draw) -> Case:
    op, dtype, shape = draw.one(("Softmax", "Softmax", "LogSoftmax")), draw.dtype(), draw.shape()
    axis = -1 if draw.chance(0.7) else draw.random.randrange(len(shape))
    result = forced("Sigmoid", dtype) if draw.chance(0.5) else draw.result(draw.like(dtype))
    return single(op, op, [draw.operand(dtype, shape)], result, axis=axis)


def _norm(draw: Draw) -> Case:
    op = draw.one(
        ("RMSNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
         "LayerNormalization", "LpNormalization")
    )  # fmt: skip
    dtype, shape = draw.dtype(), draw.shape(1, 6)
    operand, result = draw.operand(dtype, shape), draw.result(draw.like(dtype, 0.9))
    if op == "LpNormalization":
        axis = -1 if draw.chance(0.7) else draw.random.randrange(len(shape))
        return single(op, op, [operand], result, axis=axis, p=draw.one((1, 2, 2, 2)))
    axis = -1 if draw.chance(0.8) else draw.random.randrange(len(shape))
    size = shape[axis:]
    factor = Operand(
        draw.like(dtype, 0.5), size, const=True, zero_point=None if draw.chance(0.7) else 0
    )
    inputs = [operand, factor]
    if op == "LayerNormalization" and draw.chance(0.7):
        kind = draw.one(("s32", "s32", "u8", dtype))
        scale = operand.real_scale * factor.real_scale if kind == "s32" else 0.0
        inputs.append(const(kind, *size, scale=scale))
    opset = 23 if op == "RMSNormalization" else 21
    return single(op, op, inputs, result, axis=axis, opset=opset)


def _move(draw: Draw) -> Case:
    """Reshape, Transpose and their kin."""
    op = draw.one(
        ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Slice",
         "Pad", "Concat", "Split", "DepthToSpace", "SpaceToDepth")
    )  # fmt: skip
    dtype, shape = draw.dtype(), draw.shape()
    rank = len(shape)
    axis = draw.random.randrange(rank)
    attributes: dict[str, Any] = {}
    operand = draw.operand(dtype, shape)
    inputs: list[Operand] = [operand]
    if op == "Reshape":
        inputs.append(
            ints(*draw.one(((-1,), (1, -1), (-1, shape[-1]), (*shape, 1), (1, 1, 1, -1))))
        )
    elif op == "Transpose":
        attributes["perm"] = draw.random.sample(range(rank), rank)
    elif op == "Squeeze":
        inputs = [operand := draw.operand(dtype, (1, *shape[1:], 4)), ints(0)]
    elif op == "Unsqueeze":
        inputs.append(ints(draw.random.randrange(rank + 1)))
    elif op == "Flatten":
        attributes["axis"] = axis
    elif op == "Expand":
        inputs = [operand := draw.operand(dtype, (*shape[:-1], 1)), ints(*shape)]
    elif op == "Tile":
        inputs.append(ints(*(draw.one((1, 1, 2)) for _ in shape)))
    elif op == "Slice":
        step = draw.one((1, 1, 2))
        inputs += [ints(0), ints(max(1, shape[axis] - 1)), ints(axis), ints(step)]
    elif op == "Pad":
        pads = [draw.one((0, 0, 1)) for _ in range(2 * rank)]
        inputs.append(ints(*pads))
    elif op == "Concat":
        attributes["axis"] = axis
        second = replace(operand) if draw.chance(0.6) else draw.operand(draw.like(dtype), shape)
        inputs = [operand, second]
    elif op == "Split":
        whole = draw.operand(dtype, (*shape[:-1], 8))
        results = tuple(draw.same(whole) for _ in range(2))
        return Case(op, (Step(op, (whole, ints(4, 4)), results, {"axis": -1}),))
    else:
        inputs = [operand := draw.operand(dtype, (1, 4, 4, 8))]
        attributes["blocksize"] = 2
    return single(op, op, inputs, draw.same(operand), **attributes)


def _gather(draw: Draw) -> Case:
    op = draw.one(
        ("Gather", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements")
    )
    dtype, kind = draw.dtype(), draw.one(("i64", "i32"))
    constant = draw.chance(0.4)
    table = draw.operand(dtype, (6, 5, 8)[draw.random.randrange(2) :], const_too=op == "Gather")
    rank = len(table.shape)
    if op == "Gather":
        constant = constant and not table.const  # a graph without inputs is none
        indices = Operand(kind, draw.one(((), (3,), (1, 4), (1, 2, 2))), const=constant)
        axis = draw.random.randrange(rank)
        return single(op, op, [table, indices], draw.same(table), axis=axis)
    updates = draw.operand(draw.like(dtype), (2, *table.shape[1:]))
    if draw.chance(0.7):
        updates = replace(table, shape=updates.shape)
    if op == "GatherND":
        return single(op, op, [table, Operand("i64", (3, 1), const=constant)], draw.same(table))
    if op == "ScatterND":
        rows = Operand("i64", (2, 1), const=constant, values=(0, 2))
        return single(op, op, [table, rows, updates], draw.same(table))
    indices = Operand(kind, updates.shape, const=constant)
    if op == "GatherElements":
        return single(op, op, [table, indices], draw.same(table), axis=0)
    return single(op, op, [table, indices, updates], draw.same(table), axis=0)


def _reduce(draw: Draw) -> Case:
    op, dtype, shape = draw.one(_REDUCE), draw.dtype(), draw.shape()
    count = 1 if draw.chance(0.7) else min(2, len(shape))
    axes = draw.random.sample(range(len(shape)), count)
    keep = int(draw.chance(0.6) or count == len(shape))
    operand = draw.operand(dtype, shape)
    result = (
        draw.same(operand) if op in {"ReduceMax", "ReduceMin"} else draw.result(draw.like(dtype))
    )
    return single(op, op, [operand, ints(*sorted(axes))], result, keepdims=keep)


def _choose(draw: Draw) -> Case:
    """Comparisons, Where, ArgMax, Clip, Pow, PRelu, TopK."""
    op = draw.one(("Where", "Where", "ArgMax", "Clip", "Pow", "PRelu", "TopK", *_COMPARE[:2]))
    dtype, shape = draw.dtype(), draw.shape()
    operand = draw.operand(dtype, shape)
    result = draw.result(draw.like(dtype))
    if op in _COMPARE:
        other = draw.operand(draw.like(dtype), shape, const_too=True)
        return single(op, op, [operand, other], y("bool"))
    if op == "Where":
        other = draw.operand(draw.like(dtype), draw.one((shape, (), shape[-1:])), const_too=True)
        condition = Operand("bool", shape, const=draw.chance(0.3))
        return single(op, op, [condition, operand, other], result)
    if op == "ArgMax":
        axis = draw.random.randrange(len(shape))
        keep = int(len(shape) == 1 or draw.chance(0.5))
        return single(op, op, [operand], y("i64"), axis=axis, keepdims=keep)
    if op == "TopK":
        step = Step(op, (operand, ints(1)), (result, y("i64")), {"axis": -1})
        return Case(op, (step,))
    more = [floats(-0.2), floats(0.2)][: draw.one((1, 2, 2))]
    if op == "PRelu":
        more = [const(draw.like(dtype), *shape[-1:])]
    elif op == "Pow":
        value = draw.one((2.0, 2.0, 3.0, 0.5))
        code = const(draw.like(dtype), scale=value / 100, zero_point=0, values=(100,))
        more = [code if draw.chance(0.7) else floats(value)]
    return single(op, op, [operand, *more], result)


def _pool(draw: Draw) -> Case:
    op = draw.one(("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "BatchNormalization",
                   "InstanceNormalization"))  # fmt: skip
    dtype = draw.dtype()
    image = draw.operand(dtype, (1, 8, 8, 8))
    attributes: dict[str, Any] = {}
    inputs: list[Operand | None] = [image]
    if op in {"MaxPool", "AveragePool"}:
        attributes = {"kernel_shape": [2, 2], "strides": [draw.one((1, 2))] * 2}
    elif op == "Resize":
        inputs += [None, floats(1.0, 1.0, 2.0, 2.0)]
        attributes["mode"] = draw.one(("nearest", "linear"))
        coordinates = ("asymmetric", "half_pixel", "align_corners")
        attributes["coordinate_transformation_mode"] = draw.one(coordinates)
    elif op != "GlobalAveragePool":
        gamma = draw.one(("u8", "s8", dtype))
        count = 4 if op == "BatchNormalization" else 2
        inputs += [const(gamma, 8, zero_point=0) for _ in range(count)]
    return single(op, op, inputs, draw.same(image), **attributes)


# ------------------------------------------------------------------------------------------ chains


def _fc_add_softmax(draw: Draw) -> Case:
    chain, dtype = Chain(draw), draw.dtype()
    act = draw.operand(dtype, (1, 8, 32))
    scores = chain.add(
        "MatMul", [act, draw.sensible_weight(dtype, (32, 16), 1)], draw.result(dtype)
    )
    mask_dtype = draw.like(dtype)
    total = chain.add(
        "Add", [scores, draw.operand(mask_dtype, (1, 8, 16), True)], draw.result(dtype)
    )
    last = forced("Sigmoid", dtype) if draw.chance(0.6) else draw.result(draw.like(dtype))
    chain.add("Softmax", [total], last, axis=draw.one((-1, -1, 1)))
    return chain.case("fc-add-softmax")


def _residual_norm(draw: Draw) -> Case:
    chain, dtype = Chain(draw), draw.one(("u16", "u16", "u8", "s16"))
    chain.opset = 23
    shape = draw.shape(2, 5)
    left = draw.operand(dtype, shape, False)
    total = chain.add("Add", [left, draw.operand(draw.like(dtype, 0.9), shape)], draw.result(dtype))
    gamma = const(draw.like(dtype, 0.6), shape[-1])
    normed = chain.add("RMSNormalization", [total, gamma], draw.result(dtype), axis=-1)
    if draw.chance(0.5):
        w = draw.sensible_weight(dtype, (shape[-1], 16), 1)
        chain.add("MatMul", [normed, w], draw.result(draw.like(dtype, 0.9)))
    return chain.case("residual-norm")


def _silu_mul(draw: Draw) -> Case:
    chain, dtype = Chain(draw), draw.dtype()
    shape = draw.shape(2, 5)
    gate = replace(draw.operand(dtype, shape), tag="gate")
    covers = draw.chance(0.6)
    sigmoid = chain.add(
        "Sigmoid", [gate], forced("Sigmoid", dtype) if covers else draw.result(dtype)
    )
    silu = chain.add("Mul", [gate, sigmoid], draw.result(draw.like(dtype, 0.9)))
    up = draw.operand(draw.like(dtype, 0.9), shape)
    chain.add("Mul", [silu, up], draw.result(draw.like(dtype, 0.9)))
    return chain.case("silu-mul")


def _attention(draw: Draw) -> Case:
    chain, dtype = Chain(draw), draw.one(("u16", "u16", "u8", "s8", "s16"))
    lead = draw.one(((1, 2), (2,), (1, 2, 2)))
    kv = draw.one(("u8", "s8", "s16", dtype))
    q, k, v = (draw.operand(t, (*lead, 8, 16)) for t in (dtype, kv, kv))
    keys: Operand | tuple[int, int] = replace(k, shape=(*lead, 16, 8))
    if draw.chance(0.5):
        rank = len(lead) + 2
        result = y(k.dtype, scale=k.scale, zero_point=k.zero_point)
        keys = chain.add("Transpose", [k], result, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = chain.add("MatMul", [q, keys], draw.result(dtype))
    if draw.chance(0.7):
        mask = draw.operand(draw.like(dtype, 0.9), (8, 8), True)
        scores = chain.add("Add", [scores, mask], draw.result(dtype))
    covers = draw.chance(0.7)
    weights = chain.add(
        "Softmax", [scores], forced("Sigmoid", dtype) if covers else draw.result(dtype)
    )
    chain.add("MatMul", [weights, v], draw.result(draw.like(dtype, 0.9)))
    return chain.case("attention")


def _rotary(draw: Draw) -> Case:
    """x·cos + (−x₂, x₁)·sin on halves."""
    chain, dtype = Chain(draw), draw.dtype()
    lead = draw.one(((1, 2, 4), (2, 4), (1, 2, 2, 4)))
    source = replace(draw.operand(dtype, (*lead, 8)), tag="x")
    keep = y(dtype, scale=source.scale, zero_point=source.zero_point)
    halves = Step("Split", (source, ints(4, 4)), (keep, keep), {"axis": -1})
    chain.steps.append(halves)
    cos, sin = (replace(draw.operand(draw.like(dtype, 0.95), (4, 4), True), tag=t) for t in "cs")
    result = draw.result(dtype)
    parts = []
    for op, a, b in (("Sub", 0, 1), ("Add", 1, 0)):
        first = chain.add("Mul", [(0, a), cos], result)
        second = chain.add("Mul", [(0, b), sin], result)
        parts.append(
            chain.add(op, [first, second], result if draw.chance(0.8) else draw.result(dtype))
        )
    chain.add("Concat", list(parts), result, axis=-1)
    return chain.case("rotary")


def _convert(draw: Draw) -> Case:
    """A change of type or encoding between two operations."""
    chain, a, b = Chain(draw), draw.dtype(), draw.dtype()
    shape = draw.shape(1, 5)
    first = chain.add(
        draw.one(("Relu", "Sigmoid", "Sqrt")), [draw.operand(a, shape)], draw.result(a)
    )
    again = chain.add("Identity", [first], draw.result(b))
    if draw.chance(0.5):
        chain.add(draw.one(_BINARY), [again, draw.operand(draw.like(b), shape)], draw.result(b))
    else:
        chain.add("Softmax", [again], draw.result(draw.like(b)))
    return chain.case("convert")


def _conv_block(draw: Draw) -> Case:
    chain, dtype = Chain(draw), draw.one(("u8", "s8", "u16"))
    act = draw.operand(dtype, (1, 8, 8, 8))
    w = draw.sensible_weight(dtype, (8, 8, 3, 3), 0)
    inputs: list[Operand | tuple[int, int] | None] = [act, w, bias(act, w, 8)]
    made = chain.add("Conv", inputs, result := draw.result(dtype), pads=[1] * 4)
    if draw.chance(0.7):
        made = chain.add(draw.one(("Relu", "HardSwish", "Clip")), [made], result)
    if draw.chance(0.6):
        made = chain.add(
            "Add", [made, draw.operand(draw.like(dtype), (1, 8, 8, 8))], draw.result(dtype)
        )
    if draw.chance(0.5):
        chain.add("GlobalAveragePool", [made], draw.result(draw.like(dtype)))
    return chain.case("conv-block")


def _walk(draw: Draw) -> Case:
    """Two to four operations of one type that keep the shape or move it."""
    chain, dtype = Chain(draw), draw.dtype()
    shape = draw.shape(2, 5)
    value: Operand | tuple[int, int] = draw.operand(dtype, shape)
    encoding = y(dtype, scale=value.scale, zero_point=value.zero_point)  # type: ignore[union-attr]
    for _ in range(draw.random.randint(2, 4)):
        op = draw.one(("unary", "const", "Transpose", "Reshape", "Softmax", "Add"))
        fresh = draw.result(draw.like(dtype, 0.95))
        if op in {"Transpose", "Reshape"}:
            result = encoding if draw.chance(0.85) else fresh
            if op == "Transpose":
                perm = draw.random.sample(range(len(shape)), len(shape))
                value = chain.add(op, [value], result, perm=perm)
                shape = tuple(shape[i] for i in perm)
            else:
                shape = (*shape[1:], shape[0])
                value = chain.add(op, [value, ints(*shape)], result)
        else:
            result = fresh
            if op == "unary":
                value = chain.add(draw.one(_UNARY[:10]), [value], result)
            elif op == "const":
                value = chain.add(
                    draw.one(_BINARY), [value, const(encoding.dtype, shape[-1])], result
                )
            elif op == "Softmax":
                value = chain.add(op, [value], result)
            else:
                value = chain.add(op, [value, draw.operand(encoding.dtype, shape)], result)
        encoding = result
    return chain.case("walk")


_FAMILIES: dict[Callable[[Draw], Case], int] = {
    _matmul_const: 14, _matmul_dynamic: 8, _gemm: 7, _conv: 10, _unary: 9, _binary: 11,
    _softmax: 5, _norm: 9, _move: 11, _gather: 5, _reduce: 5, _choose: 6, _pool: 4,
    _fc_add_softmax: 3, _residual_norm: 4, _silu_mul: 3, _attention: 5, _rotary: 2, _convert: 3,
    _conv_block: 3, _walk: 5, **DECODERS,
}  # fmt: skip
