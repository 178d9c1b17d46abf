"""Random pieces of decoders as exporters write them: caches, grouped queries, rotary, gated MLPs.

Shapes are small, and mostly fit; types are mostly those of one scheme (W4A16, W8A8 …), with a slip
now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.htp_draw import Chain, Draw, forced
from tests.qdq_cases import Case, Operand, Shape, const, floats, ints, y

_Value = Operand | tuple[int, int]


class _Decoder(Chain):
    """A chain in one scheme: type of activations, of keys and values, and of weights."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.act = draw.random.choices(("u16", "u8", "s16", "s8"), weights=(6, 4, 2, 1))[0]
        self.kv = draw.one({"u16": ("u8", "s8", "s16", "u16")}.get(self.act, (self.act,)))
        self.rows = draw.one((1, 1, 4, 8, 16))
        self.opset = 23

    def real(self) -> Operand:
        """A new encoding of the activations' type, or now and then of another."""
        return self.draw.result(self.draw.like(self.act, 0.97))

    def linear(self, value: _Value, k: int, n: int, result: Operand | None = None) -> _Value:
        if self.draw.chance(0.1):
            weight = self.draw.weight((k, n), 1, 0)
        elif self.draw.chance(0.25) and k % 16 == 0:
            block = 32 if k % 32 == 0 and self.draw.chance(0.5) else 16
            weight = const("s4", k, n, granularity="lpbq", axis=0, block=block)
        else:
            weight = self.draw.sensible_weight(self.act, (k, n), 1)
        return self.add("MatMul", [value, weight], result or self.real())

    def norm(self, value: _Value, size: int) -> _Value:
        """One operator, or spelled out as x · 1/sqrt(mean(x²) + epsilon) · gain."""
        gain = const(self.draw.like(self.act, 0.8), size)
        if self.draw.chance(0.7):
            return self.add("RMSNormalization", [value, gain], self.real(), axis=-1)
        square = self.add("Mul", [value, value], self.real())
        mean = self.add("ReduceMean", [square, ints(-1)], self.real(), keepdims=1)
        more = self.add("Add", [mean, const(self.act, 1)], self.real())
        root = self.add("Sqrt", [more], self.real())
        if self.draw.chance(0.5):
            scaled = self.add("Div", [value, root], self.real())
        else:
            scaled = self.add(
                "Mul", [value, self.add("Reciprocal", [root], self.real())], self.real()
            )
        return self.add("Mul", [scaled, gain], self.real())

    def moved(self, op: str, inputs: list[_Value | None], held: Operand, **more: object) -> _Value:
        """What moves codes keeps their encoding, or now and then does not."""
        slips = self.draw.chance(0.03)
        return self.add(op, inputs, self.draw.result(held.dtype) if slips else held, **more)

    def input(self, dtype: str, *shape: int) -> Operand:
        """A graph input, which several steps may read."""
        return replace(self.draw.operand(dtype, shape), tag=f"in{len(self.steps)}{shape}")


def _held(operand: Operand) -> Operand:
    """A result in an operand's encoding."""
    return y(operand.dtype, scale=operand.scale, zero_point=operand.zero_point)


def _grouped_attention(draw: Draw) -> Case:
    """New keys and values behind a cache; heads of queries share them by Expand, or by shape."""
    chain, kvh, group, hd = _Decoder(draw), draw.one((1, 2, 3)), draw.one((1, 2, 4)), 8
    past, rows = draw.one((0, 8, 16, 24)), chain.rows
    span = past + rows
    keys, values = _cached(chain, kvh, hd, past, True), _cached(chain, kvh, hd, past, False)
    queries: Operand = chain.input(chain.act, 1, kvh * group, rows, hd)
    if group > 1 and draw.chance(0.5):
        keys = _repeated(chain, keys, (kvh, group, hd, span))
        values = _repeated(chain, values, (kvh, group, span, hd))
    elif group > 1:
        queries = replace(queries, shape=(1, kvh, group * rows, hd), tag="grouped")
        group, rows = 1, group * rows
    scores: _Value = chain.add("MatMul", [queries, keys[0]], chain.real())
    if draw.chance(0.6):
        scaling = const(chain.act, scale=0.25 / 100, zero_point=0, values=(100,))
        scores = chain.add(draw.one(("Mul", "Div")), [scores, scaling], chain.real())
    if draw.chance(0.7):
        mask = chain.input(draw.like(chain.act, 0.95), 1, 1, rows, span)
        scores = chain.add("Add", [scores, mask], chain.real())
    covers = forced("Sigmoid", chain.act) if draw.chance(0.7) else chain.real()
    weights = chain.add("Softmax", [scores], covers, axis=-1)
    mixed: _Value = chain.add("MatMul", [weights, values[0]], held := chain.real())
    if draw.chance(0.7):
        mixed = chain.moved("Transpose", [mixed], held, perm=[0, 2, 1, 3])
        size = kvh * group * hd
        mixed = chain.moved("Reshape", [mixed, ints(1, -1, size)], held)
        chain.linear(mixed, size, 16)
    return chain.case("grouped-attention")


def _cached(
    chain: _Decoder, heads: int, hd: int, past: int, transposed: bool
) -> tuple[_Value, Operand]:
    """Keys (1, heads, hd, span) or values (1, heads, span, hd), and their encoding."""
    new = chain.input(chain.kv, 1, heads, chain.rows, hd)
    held = _held(new)
    value: _Value = new
    if transposed:
        value = chain.moved("Transpose", [value], held, perm=[0, 1, 3, 2])
    if past:
        shape = (1, heads, hd, past) if transposed else (1, heads, past, hd)
        cache = replace(new, shape=shape, tag=f"cache{shape}{transposed}")
        value = chain.moved("Concat", [cache, value], held, axis=3 if transposed else 2)
    return value, held


def _repeated(
    chain: _Decoder, cached: tuple[_Value, Operand], shape: Shape
) -> tuple[_Value, Operand]:
    """(1, heads, …) for every query of a group: (1, heads · group, …)."""
    value, held = cached
    heads, group, *rest = shape
    value = chain.moved("Unsqueeze", [value, ints(2)], held)
    value = chain.moved("Expand", [value, ints(1, heads, group, *rest)], held)
    return chain.moved("Reshape", [value, ints(1, heads * group, *rest)], held), held


def _heads(draw: Draw) -> Case:
    """A projection parted into heads, normalized, and turned by rotary tables."""
    chain, heads, hd, k = _Decoder(draw), draw.one((1, 2, 3, 9)), 8, draw.one((16, 32))
    value = chain.linear(chain.input(chain.act, 1, chain.rows, k), k, heads * hd, chain.real())
    held = chain.steps[-1].outputs[0]
    value = chain.moved("Reshape", [value, ints(1, -1, heads, hd)], held)
    value = chain.moved("Transpose", [value], held, perm=[0, 2, 1, 3])
    if draw.chance(0.4):
        value = chain.norm(value, hd)
        held = chain.steps[-1].outputs[0]
    turned = _turned(chain, value, held, hd)
    if draw.chance(0.4):
        kept = replace(chain.steps[-1].outputs[0], dtype=chain.kv, scale=0.0, zero_point=None)
        chain.add("Identity", [turned], kept)
    return chain.case("heads")


def _turned(chain: _Decoder, value: _Value, held: Operand, hd: int) -> _Value:
    """By halves, x·cos + rotate(x)·sin; a table is a constant or an input."""
    tables = [
        replace(chain.draw.operand(chain.act, (chain.rows, hd), True), tag=tag) for tag in "cs"
    ]
    halves = [
        chain.moved("Slice", [value, ints(start), ints(start + hd // 2), ints(-1)], held)
        for start in (0, hd // 2)
    ]
    minus = chain.draw.one((held, chain.real()))
    other = chain.add("Neg", [halves[1]], minus)
    rotated = chain.moved("Concat", [other, halves[0]], held, axis=-1)
    straight = chain.add("Mul", [value, tables[0]], chain.real())
    across = chain.add("Mul", [rotated, tables[1]], chain.real())
    return chain.add("Add", [straight, across], chain.real())


def _gated_mlp(draw: Draw) -> Case:
    """down(silu(gate(x)) · up(x)) + x, behind a norm or not."""
    chain, k, n = _Decoder(draw), draw.one((16, 32)), draw.one((32, 48))
    source = chain.input(chain.act, *draw.one(((1,), (), (1, 1))), chain.rows, k)
    value: _Value = chain.norm(source, k) if draw.chance(0.6) else source
    gate, up = chain.linear(value, k, n), chain.linear(value, k, n)
    if draw.chance(0.8):
        covers = forced("Sigmoid", chain.act) if draw.chance(0.7) else chain.real()
        sigmoid = chain.add("Sigmoid", [gate], covers)
        active = chain.add("Mul", [gate, sigmoid], chain.real())
    else:
        active = chain.add("Gelu", [gate], chain.real())
    down = chain.linear(chain.add("Mul", [active, up], chain.real()), n, k)
    if draw.chance(0.7):
        chain.add("Add", [source, down], chain.real())
    return chain.case("gated-mlp")


def _embedding(draw: Draw) -> Case:
    """A table of 4 to 16 bits, its rows at the activations' type, a norm."""
    chain, size = _Decoder(draw), draw.one((16, 32))
    table = draw.operand(draw.one(("s4", "s8", "u8", chain.act)), (12, size))
    ids = Operand(draw.one(("i32", "i64")), (1, chain.rows))
    value = chain.moved("Gather", [replace(table, const=True), ids], _held(table), axis=0)
    if table.dtype != chain.act:
        value = chain.add("Identity", [value], chain.real())
    if draw.chance(0.3):
        factor = const(chain.act, scale=5.5 / 100, zero_point=0, values=(100,))
        value = chain.add("Mul", [value, factor], chain.real())
    chain.norm(value, size)
    return chain.case("embedding")


def _head(draw: Draw) -> Case:
    """The last norm, one row of it or all, logits, a soft cap."""
    chain, k = _Decoder(draw), draw.one((16, 32))
    value = chain.norm(chain.input(chain.act, 1, chain.rows, k), k)
    held = chain.steps[-1].outputs[0]
    if draw.chance(0.5):
        value = chain.moved("Slice", [value, ints(-1), ints(1 << 30), ints(1)], held)
    logits = chain.linear(value, k, 48)
    if draw.chance(0.4):
        cap = const(chain.act, scale=30 / 100, zero_point=0, values=(100,))
        small = chain.add("Div", [logits, cap], chain.real())
        covers = forced("Tanh", chain.act) if draw.chance(0.7) else chain.real()
        chain.add("Mul", [chain.add("Tanh", [small], covers), cap], chain.real())
    return chain.case("head")


def _requantized_move(draw: Draw) -> Case:
    """Two encodings of one type in a row, beside an operator that moves codes."""
    chain, dtype = _Decoder(draw), draw.dtype()
    ends = ("Relu", "Sigmoid", "Sqrt", "Mul")

    def computed(value: _Value, result: Operand) -> _Value:
        op = draw.one(ends)
        second = [const(dtype, 8)] if op == "Mul" and not isinstance(value, Operand) else []
        return chain.add("Relu" if op == "Mul" and not second else op, [value, *second], result)

    before, after = draw.result(dtype), draw.result(draw.like(dtype, 0.9))
    value: _Value = draw.operand(dtype, (4, 8))
    if draw.chance(0.7):
        value = computed(value, before)
    else:
        before = _held(value) if isinstance(value, Operand) else before
    first = draw.chance(0.5)
    moves = draw.one(("Transpose", "Reshape", "Unsqueeze", "Slice"))
    for step in ("convert", "move") if first else ("move", "convert"):
        if step == "convert":
            value = chain.add("Identity", [value], after)
            continue
        more = {
            "Transpose": [],
            "Reshape": [ints(2, 2, 8)],
            "Unsqueeze": [ints(0)],
            "Slice": [ints(0), ints(2), ints(0)],
        }[moves]
        attributes = {"perm": [1, 0]} if moves == "Transpose" else {}
        value = chain.moved(moves, [value, *more], after if first else before, **attributes)
    if draw.chance(0.7):
        chain.add(draw.one(("Relu", "Sigmoid", "Sqrt")), [value], draw.result(after.dtype))
    return chain.case("requantized-move")


def _conv_linear(draw: Draw) -> Case:
    """A linear as a 1x1 convolution, channels moved to the second place and back."""
    chain, k, n = _Decoder(draw), draw.one((16, 32)), draw.one((16, 48))
    source = chain.input(chain.act, 1, chain.rows, k)
    held = _held(source)
    value = chain.moved("Reshape", [source, ints(1, 1, -1, k)], held)
    value = chain.moved("Transpose", [value], held, perm=[0, 3, 1, 2])
    weight = draw.sensible_weight(chain.act, (n, k, 1, 1), 0)
    made: _Value = chain.add("Conv", [value, weight], result := chain.real())
    made = chain.moved("Transpose", [made], result, perm=[0, 2, 3, 1])
    if draw.chance(0.6):
        chain.add("Mul", [made, chain.input(chain.act, 1, 1, chain.rows, n)], chain.real())
    return chain.case("conv-linear")


def _mask(draw: Draw) -> Case:
    """A causal mask chosen by Where, or computed from positions, on scores."""
    chain, rows, span = _Decoder(draw), draw.one((1, 8)), draw.one((8, 16))
    scores = chain.input(chain.act, 1, draw.one((1, 2, 9)), rows, span)
    if draw.chance(0.5):
        allowed = Operand("bool", draw.one(((1, 1, rows, span), (rows, span))))
        low = const(chain.act, *draw.one(((), (1,))), zero_point=None)
        operands: list[_Value | None] = [allowed, scores, low]
        value = chain.add("Where", operands, chain.real())
    else:
        mask = chain.input(draw.like(chain.act, 0.9), 1, 1, rows, span)
        value = chain.add("Add", [scores, mask], chain.real())
        if draw.chance(0.3):
            value = chain.add("Max", [value, floats(-50.0)], chain.real())
    covers = forced("Sigmoid", chain.act) if draw.chance(0.7) else chain.real()
    chain.add("Softmax", [value], covers, axis=-1)
    return chain.case("mask")


DECODERS: dict[Callable[[Draw], Case], int] = {
    _grouped_attention: 6, _heads: 5, _gated_mlp: 5, _embedding: 3, _head: 3,
    _requantized_move: 5, _conv_linear: 2, _mask: 3,
}  # fmt: skip
