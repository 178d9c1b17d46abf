"""Corners of the Hexagon profile that neither the sweep nor the random cases reach, by verdict."""

from __future__ import annotations

from tests.qdq_cases import Case, Operand, Step, bias, const, floats, ints, single, weight, x, y

INT, FLOAT, REJECT = "int", "float", "reject"

_ROW = (4, 8, 32)


def _updates(dtype: str) -> Case:
    index = Operand("i64", (2, 8), const=True, values=tuple([0] * 8 + [2] * 8))
    operands = [x("u8", 4, 8), index, x(dtype, 2, 8)]
    return single(f"ScatterElements/u8+{dtype}", "ScatterElements", operands, y("u8"), axis=0)


def _resize(coordinates: str, rounding: str, zero_point: int = 128, out: str = "u8") -> Case:
    scales = Operand("f32", (4,), const=True, values=(1.0, 1.0, 2.0, 2.0))
    return single(
        f"Resize/{coordinates}/{rounding}/{out}{zero_point}",
        "Resize",
        [x("u8", 1, 4, 8, 8), None, scales],
        y(out, zero_point=zero_point),
        mode="nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
    )


def _layer_norm(name: str, gain: Operand, out: str = "u16") -> Case:
    bias = const("s32", 32, scale=1e-8, zero_point=0)
    operands = [x("u16", *_ROW), gain, bias]
    return single(f"LayerNormalization/{name}", "LayerNormalization", operands, y(out), axis=-1)


def _rotary() -> Case:
    """Tables that are not quantized."""
    operands = [x("u16", 1, 2, 8, 16), *(Operand("f32", (1, 8, 8), const=True) for _ in range(2))]
    return single("RotaryEmbedding/f32", "RotaryEmbedding", operands, y("u16"), opset=23)


def _converted() -> Case:
    """Two users of one tensor, at two widths: the second reads it converted."""
    steps = (
        Step("Relu", (x("u16", 4, 8),), (y("u16"),)),
        Step("Identity", ((0, 0),), (y("u8"),)),
        Step("Sigmoid", ((1, 0),), (y("u8", scale=1 / 256, zero_point=0),)),
    )
    return Case("Convert/u16->u8", steps)


def _changed(behind: bool, wider: bool, dtype: str = "u8") -> Case:
    """A change of encoding in front of a Reshape, or behind it, to a wider range or a narrower."""
    before, after = y(dtype), y(dtype, scale=0.03)
    if not wider:
        before, after = after, before
    reshape = Step("Reshape", ((0 if behind else 1, 0), ints(4, 8)), (before if behind else after,))
    change = Step("Identity", ((1 if behind else 0, 0),), (after,))
    middle = (reshape, change) if behind else (change, reshape)
    source = x(dtype, 2, 16)
    steps = (Step("Relu", (source,), (before,)), *middle, Step("Relu", ((2, 0),), (after,)))
    place, range_ = "behind" if behind else "before", "wider" if wider else "narrower"
    return Case(f"Identity/{dtype}/{place}/Reshape/{range_}", steps)


def _rms(io: str, batch: int, rows: int = 8) -> Case:
    operands = [x("s16", batch, rows, 32), const("s16", 32)]
    name = f"RMSNormalization/s16/{io}/{batch}x{rows}"
    return single(name, "RMSNormalization", operands, y("s16"), opset=23, io=io, axis=-1)


def _behind_rms(op: str, *more: Operand) -> Case:
    """A batch of s16 that leaves the graph by way of another operator."""
    norm = Step("RMSNormalization", (x("s16", 4, 8, 32), const("s16", 32)), (y("s16"),))
    step = Step(op, ((0, 0), *more), (y("s16"),))
    return Case(f"RMSNormalization/s16→{op}+{len(more)}/int", (norm, step), 23, "int")


def _transpose(io: str, *perm: int) -> Case:
    operand = x("u8", 2, 3, 4, 5)
    return single(f"Transpose/{io}/{perm}", "Transpose", [operand], y("u8"), io=io, perm=[*perm])


def _attention(rows: int, transposed: bool = True, heads: int = 2) -> Case:
    """softmax(q @ kᵀ) @ v in s8, of codes that enter and leave the graph."""
    q, v = x("s8", heads, rows, 16), x("s8", heads, rows, 16)
    turn = Step("Transpose", (x("s8", heads, rows, 16),), (y("s8"),), {"perm": [0, 2, 1]})
    first = [turn] if transposed else []
    keys = (0, 0) if transposed else x("s8", heads, 16, rows)
    at = len(first)
    steps = (
        *first,
        Step("MatMul", (q, keys), (y("s8"),)),
        Step("Softmax", ((at, 0),), (y("s8"),)),
        Step("MatMul", ((at + 1, 0), v), (y("s8"),)),
    )
    return Case(f"attention/s8/{heads}x{rows}/{transposed}", steps, 21, "int")


def _cached_attention(rows: int) -> Case:
    """Keys and values each behind a cache, in s8."""
    held = y("s8")
    steps = (
        Step("Concat", (x("s8", 1, 2, 8, 8), x("s8", 1, 2, 8, 8)), (held,), {"axis": 3}),
        Step("Concat", (x("s8", 1, 2, 8, 8), x("s8", 1, 2, 8, 8)), (held,), {"axis": 2}),
        Step("MatMul", (x("s8", 1, 2, rows, 8), (0, 0)), (held,)),
        Step("Softmax", ((2, 0),), (held,)),
        Step("MatMul", ((3, 0), (1, 0)), (held,)),
    )
    return Case(f"attention/s8/cached/{rows}", steps, 21, "int")


def _select(dtype: str, *shapes: tuple[int, ...], io: str = "int") -> Case:
    operands = [Operand("bool", (8, 16)), *(x(dtype, *shape) for shape in shapes)]
    return single(f"Where/{dtype}/{shapes}/{io}", "Where", operands, y(dtype), io=io)


def _extreme(dtype: str, scale: float, *shape: int) -> Case:
    operands = [x(dtype, 2, 12), const(dtype, *shape)]
    return single(f"Min/{dtype}/{shape}/{scale}", "Min", operands, y(dtype, scale=scale))


def _batched(io: str) -> Case:
    operands = [x("s16", 2, 16, 8), x("s8", 2, 8, 16)]
    return single(f"MatMul/s16xs8/{io}", "MatMul", operands, y("s16"), io=io)


def _softmax(dtype: str, axis: int) -> Case:
    operand = x(dtype, 2, 2, 3, 4, 8)
    return single(f"Softmax/{dtype}/rank5/axis{axis}", "Softmax", [operand], y(dtype), axis=axis)


def _tile(repeats: int) -> Case:
    operands = [x("u8", 2, 1, 3, 4, 8), ints(1, 1, 1, 1, repeats)]
    return single(f"Tile/rank5/{repeats}", "Tile", operands, y("u8"))


def _gather_elements(zero_point: int) -> Case:
    operands = [x("u8", 4, 8), Operand("i64", (4, 8))]
    result = y("u8", zero_point=zero_point)
    return single(f"GatherElements/u8/{zero_point}", "GatherElements", operands, result, axis=1)


def _where(dtype: str) -> Case:
    operands = [Operand("bool", (4, 8)), Operand(dtype, (4, 8)), Operand(dtype, (4, 8))]
    return single(f"Where/{dtype}", "Where", operands, Operand(dtype))


def _gemm(axis: int, *biases: Operand) -> Case:
    operands = [x("u16", 8, 64), weight("s8", "channel", 64, 32, axis=axis), *biases]
    return single(f"Gemm/axis{axis}+{len(biases)}", "Gemm", operands, y("u16"))


def _behind_relu(op: str, second: Operand, opset: int = 21, **attributes: int) -> Case:
    """A batch of s16 that leaves the graph as codes."""
    relu = Step("Relu", (x("s16", 4, 8, 32),), (y("s16"),))
    step = Step(op, ((0, 0), second), (y("s16"),), attributes)
    return Case(f"Relu/s16→{op}/int", (relu, step), opset, "int")


def _depthwise(dtype: str, strides: int, held: str = "s4", size: int = 1) -> Case:
    kernel = const(held, 8, 1, size, size, granularity="channel", axis=0)
    operands = [x(dtype, 1, 8, 8, 8), kernel]
    name = f"Conv/{dtype}x{held}/depthwise{size}/{strides}"
    return single(name, "Conv", operands, y(dtype), group=8, strides=[strides] * 2)


def _conv3d_plus(granularity: str) -> Case:
    image, kernel = x("u16", 1, 8, 8, 8, 8), const("u4", 4, 8, 3, 3, 3, granularity=granularity)
    operands = [image, kernel, bias(image, kernel, 4)]
    return single(f"Conv3d/u16xu4/{granularity}+bias", "Conv", operands, y("u16"))


def _conv3d(act: str, dtype: str, axis: int = 0) -> Case:
    kernel = const(dtype, 8, 8, 3, 3, 3, granularity="channel", axis=axis)
    return single(f"Conv3d/{act}x{dtype}/{axis}", "Conv", [x(act, 1, 8, 8, 8, 8), kernel], y(act))


def _deconv3d() -> Case:
    kernel = const("u8", 8, 4, 1, 1, 1, granularity="channel", axis=1)
    return single(
        "ConvTranspose3d/u8xu8", "ConvTranspose", [x("u8", 1, 8, 8, 8, 8), kernel], y("u8")
    )


def _no_zero_point(left_out: bool) -> Case:
    """A 4-bit kernel per tensor, with a bias; the file states its zero point or not."""
    image, kernel = x("u8", 1, 16, 8, 8), const("s4", 16, 16, 3, 3, explicit_zero=not left_out)
    operands = [image, kernel, bias(image, kernel, 16)]
    return single(f"Conv/u8xs4/no-zero={left_out}", "Conv", operands, y("u8"))


def _minimum(axis: int, out: str = "u8") -> Case:
    operands = [x("u8", 2, 3, 4, 5, 8), ints(axis)]
    name = f"ReduceMin/rank5/{axis}/{out}"
    return single(name, "ReduceMin", operands, y(out), keepdims=1, io="int")


def _looked_up(zero_point: int, read_as: str) -> Case:
    """Rows of a 4-bit table, at the type of activations."""
    held = y("s4", zero_point=zero_point)
    table = const("s4", 12, 16, zero_point=zero_point)
    look = Step("Gather", (table, Operand("i32", (1, 4))), (held,), {"axis": 0})
    change = Step("Identity", ((0, 0),), (y(read_as),))
    return Case(f"Gather/s4z{zero_point}->{read_as}", (look, change))


def _norm_over(axis: int, out: str) -> Case:
    operands = [x("u16", 4, 8, 32), const("u16", *(4, 8, 32)[axis:])]
    name = f"RMSNormalization/axis{axis}/{out}"
    return single(name, "RMSNormalization", operands, y(out), opset=23, axis=axis)


def _lpbq_gemm(act: str, *biases: Operand) -> Case:
    blocks = const("s4", 32, 24, granularity="lpbq", axis=0, block=16)
    return single(
        f"Gemm/{act}xlpbq+{len(biases)}", "Gemm", [x(act, 4, 32), blocks, *biases], y(act)
    )


def corner_cases() -> list[tuple[Case, str]]:
    """Each with what the real compiler says on v75; what is silently changed counts as its int."""
    wide_kernel = const("s4", 4, 32, 3, 3, granularity="block", axis=1, block=16)
    wrong_axis = const("s8", 16, 8, 3, 3, granularity="channel", axis=0)
    blocks = const("s8", 16, 8, 3, 3, granularity="block", axis=0, block=16)
    image, five = x("u8", 1, 16, 8, 8), (1, 2, 3, 4, 8)
    moved, ids = y("u16", zero_point=5), Operand("i32", (1, 8))
    return [
        (single("Gather/zero", "Gather", [x("u16", 5, 8), ints(1, 2)], moved), REJECT),
        (single("Gather/s4", "Gather", [const("s4", 40, 16), ids], y("s4")), INT),
        (_updates("u8"), INT),
        (_updates("s8"), FLOAT),
        (_resize("half_pixel", "floor"), INT),
        (_resize("asymmetric", "floor"), INT),
        (_resize("asymmetric", "ceil"), REJECT),
        (_resize("asymmetric", "ceil", 5), REJECT),
        (_resize("asymmetric", "floor", 5), INT),
        (_resize("asymmetric", "ceil", 128, "u16"), REJECT),
        (_resize("asymmetric", "floor", 128, "u16"), FLOAT),
        (single("Pow/u16^u8", "Pow", [x("u16", 4, 8), const("u8")], y("u16")), FLOAT),
        (single("Pow/u16^u16", "Pow", [x("u16", 4, 8), const("u16")], y("u16")), INT),
        (single("Pow/u16^2", "Pow", [x("u16", 4, 8), floats(2.0)], y("u16")), FLOAT),
        (_rotary(), FLOAT),
        (_converted(), INT),
        (_changed(behind=False, wider=True), FLOAT),
        (_changed(behind=False, wider=False), INT),
        (_changed(behind=True, wider=True), INT),
        (_changed(behind=True, wider=False), FLOAT),
        (_changed(behind=False, wider=False, dtype="u16"), FLOAT),
        (_transpose("int", 0, 3, 1, 2), REJECT),
        (_transpose("int", 0, 2, 3, 1), REJECT),
        (_transpose("int", 0, 2, 1, 3), INT),
        (_transpose("float", 0, 3, 1, 2), INT),
        (_attention(8), REJECT),
        (_attention(17), REJECT),
        (_attention(24), INT),
        (_cached_attention(1), REJECT),
        (_cached_attention(16), INT),
        (_attention(8, transposed=False), INT),
        (_attention(8, heads=1), INT),
        (_select("s16", (8, 16), (16,)), REJECT),
        (_select("s16", (16,), (8, 16)), REJECT),
        (_select("s16", (8, 16), ()), INT),
        (_select("s16", (8, 16), (16,), io="float"), INT),
        (_select("s8", (8, 16), (16,)), INT),
        (_select("s8", (16,), (8, 16)), REJECT),
        (_extreme("s8", 0.0, 2, 12), REJECT),
        (_extreme("s8", 0.03, 2, 12), INT),
        (_extreme("s8", 0.0, 12), INT),
        (_extreme("u16", 0.0, 2, 12), INT),
        (_rms("float", 4), INT),
        (_rms("int", 4), REJECT),
        (_rms("int", 1), INT),
        (_rms("int", 8), INT),
        (_rms("int", 4, rows=9), INT),
        (_behind_rms("MatMul", weight("s4", "channel", 32, 16)), REJECT),
        (_behind_rms("Sigmoid"), REJECT),
        (_behind_rms("Relu"), INT),
        (_behind_rms("Add", const("s16", 32)), REJECT),
        (_behind_rms("Add", x("s16", 4, 8, 32)), INT),
        (_layer_norm("u16", const("u16", 32)), INT),
        (_layer_norm("u16/zero", const("u16", 32, zero_point=0)), REJECT),
        (_layer_norm("u16->u8", const("u16", 32), "u8"), REJECT),
        (single("Conv/block/3x3", "Conv", [x("u16", 1, 32, 8, 8), wide_kernel], y("u16")), REJECT),
        (single("ConvTranspose/axis0", "ConvTranspose", [image, wrong_axis], y("u8")), REJECT),
        (single("ConvTranspose/block", "ConvTranspose", [image, blocks], y("u8")), REJECT),
        (single("Min/rank5", "Min", [x("u8", *five), x("u16", *five)], y("u8")), REJECT),
        (_depthwise("u16", 1), REJECT),
        (_depthwise("u16", 2), INT),
        (_depthwise("u8", 1), INT),
        (_depthwise("u16", 2, "s16"), REJECT),
        (_depthwise("u16", 1, "s16"), INT),
        (_depthwise("u16", 2, "s16", 3), INT),
        (_conv3d("u8", "u8"), INT),
        (_conv3d_plus("channel"), INT),
        (_conv3d_plus("tensor"), REJECT),
        (_conv3d("u16", "u4"), INT),
        (_conv3d("s8", "u8"), REJECT),
        (_conv3d("u16", "u8", axis=1), REJECT),
        (_deconv3d(), INT),
        (_no_zero_point(True), INT),
        (_no_zero_point(False), REJECT),
        (_minimum(0), REJECT),
        (_minimum(1), INT),
        (_minimum(0, "u16"), FLOAT),
        (_looked_up(0, "u16"), INT),
        (_looked_up(3, "u16"), INT),
        (single("Gather/s4z", "Gather", [const("s4", 40, 16, zero_point=3), ids], y("s4")), REJECT),
        (_norm_over(1, "u8"), REJECT),
        (_norm_over(2, "u8"), FLOAT),
        (_lpbq_gemm("u8", const("f32", 24)), INT),
        (_lpbq_gemm("u8"), REJECT),
        (_lpbq_gemm("s8"), INT),
        (_gemm(0), INT),
        (_gemm(1), INT),
        (_softmax("s16", 4), INT),
        (_softmax("s16", 1), REJECT),
        (_softmax("u16", 1), INT),
        (_tile(1), REJECT),
        (_tile(2), INT),
        (_gather_elements(128), INT),
        (_gather_elements(5), REJECT),
        (_where("i32"), INT),
        (_gemm(0, const("f32", 32)), REJECT),
        (_behind_relu("RMSNormalization", const("s16", 32), opset=23, axis=-1), REJECT),
        (_behind_relu("MatMul", x("s8", 4, 32, 16)), INT),
        (_batched("float"), INT),
        (_batched("int"), REJECT),
    ]
