"""lower-attention: scores, softmax and what it mixes as one formula that forms no probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import (
    exponentials_arguments,
    join_arguments,
    normalize_arguments,
    short_normalize_arguments,
    signed_arguments,
    split_arguments,
)
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import (
    INT32_MAX,
    AttentionNumbers,
    MixedValues,
    ShortShare,
    attention_numbers,
)
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quantized_attention import Block, QuantizedAttention
from qnpu.compiler.quantized_results import CodedResult, NarrowedResult, coded_results

_HALF = 128  # what int8 codes are less than uint8 codes
_MANY_QUERIES = 32  # from here on, products with int8 save more time than making it costs
_BITS = 8  # of results: at 16 an exponential's error would show, at 4 every error weighs much
_MOST_CODES = 256  # of a constant mask


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Puts integer functions in the place of an attention, from its scores to its result.

    Before → after::

        DQ(q) · DQ(k) → Q → DQ → Mul(c) → Q → DQ       MatMulInteger(q, k)
          → Add(mask) → Q → DQ → Softmax → Q → DQ  →   qnpu.IntExponentials
          → MatMul(DQ(v)) → Q                          2 MatMulInteger, qnpu.IntJoin
                                                       qnpu.IntNormalize, or …Short

    e_j = exp(-s·(max x - x_j)) from a table, as 15 or 16 bits;
    y = ⌊Σ e_j·v_j / Σ e_j · s_v/s_y + 1/2⌋ + z. Scores stay sums in 32 bits, and the division
    comes last, of as many numbers as come out: neither scores nor probabilities are rounded or
    clipped on the way, so this is nearer to the float graph than the Q/DQ graph is. Σ e_j is one
    more column of the values, all ones. Of many queries the division takes 32 bits, where there are
    so few keys that 13 bits are left for an exponential. Codes that are only moved and then
    narrowed are narrow from the beginning. Where a constant mask hides keys from whole groups of
    queries, as a causal one does, those are left out. Keys and values that serve several heads are
    not copied.

    Must not fire where results stay at 16 bits, as an exponential's error would show there, or have
    4, of which one that is off weighs much: each of the Q/DQ graph's roundings is kept then. Nor
    where scores go through anything but one mask and factors above 0, where one of them is read
    elsewhere, keys or values have more than 8 bits, queries are signed with 16, sums could leave
    int32, or a shape is not known.
    """

    name: ClassVar[str] = "lower-attention"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    cpu: Cpu = Cpu.ANY

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model, self.cpu), 0
        for node in list(model.graph):
            attention = QuantizedAttention.ending_at(node)
            results = coded_results(node.outputs[0]) if attention is not None else None
            if attention is None or not results:
                continue
            narrowed = [NarrowedResult.of(result) for result in results]
            if any(item.result.encoding.spec.bits != _BITS for item in narrowed):
                continue
            made = [_lowered(editor, attention, item) for item in narrowed]
            count += editor.take_over_all([item.result.codes for item in narrowed], made)
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


def _lowered(
    editor: IntegerEditor, attention: QuantizedAttention, narrowed: NarrowedResult
) -> ir.Value:
    node, result = attention.mix, narrowed.result
    lowering = _Lowering.of(editor, attention, result)
    codes = lowering.normalized([lowering.sums(block) for block in attention.blocks()])
    codes = _reshaped(editor, codes, static_shape(node.outputs[0]) or (), node)
    for layout in narrowed.layouts:
        codes = _moved(editor, layout, codes, node)
    return codes


@dataclass(frozen=True, slots=True, eq=False)
class _Lowering:
    """What all blocks of an attention share.

    Attributes:
        editor: of the graph.
        attention: what is lowered.
        result: what it gives.
        numbers: that it counts with.
        heads: all but the last two dimensions of the scores.
        queries: parts of the queries, 8 bits, shape (…, S, D), and the zero point of each.
        keys: 8 bits, shape (…, D, T), and their zero point.
        values: 8 bits, shape (…, T, E + 1), the last column ones; zero point of the others.
    """

    editor: IntegerEditor
    attention: QuantizedAttention
    result: CodedResult
    numbers: AttentionNumbers
    heads: tuple[int, ...]
    queries: list[tuple[ir.Value, int]]
    keys: tuple[ir.Value, int]
    values: tuple[ir.Value, int]

    @classmethod
    def of(
        cls, editor: IntegerEditor, attention: QuantizedAttention, result: CodedResult
    ) -> _Lowering:
        node, queries = attention.mix, attention.queries
        parts = [(queries.codes, queries.zero_point)]
        if queries.encoding.spec.bits > 8:
            high, low = editor.split(queries.codes, split_arguments(), before=node)
            parts = [(high, queries.zero_point >> 8), (low, queries.zero_point & 255)]
        heads = attention.shape[:-2]
        keys, values, shared = attention.keys.codes, attention.values.codes, attention.shared
        if shared is not None:
            keys, values = (item.codes for item in shared)
            batch, count = (static_shape(keys) or (1, 1))[:2]
            heads = (batch, count, shared[0].groups)
            parts = [
                (_reshaped(editor, part, (*heads, *(static_shape(part) or ())[-2:]), node), zero)
                for part, zero in parts
            ]
        zeros = [attention.keys.zero_point, attention.values.zero_point]
        many = attention.shape[-2] >= _MANY_QUERIES
        if editor.cpu is Cpu.VNNI and many:
            keys, zeros[0] = _signed(editor, keys, zeros[0], node)
            values, zeros[1] = _signed(editor, values, zeros[1], node)
        keys, zeros[0] = editor.beside(parts[0][0].dtype, keys, zeros[0], before=node)
        values, zeros[1] = editor.beside(ir.DataType.UINT8, values, zeros[1], before=node)
        values = _with_ones(editor, values, node)
        if shared is not None:
            keys = _transposed(editor, keys, node) if shared[0].transposed else keys
            keys, values = (_one_more_axis(editor, item, node) for item in (keys, values))
        mixed = MixedValues(
            scale=Fraction(attention.values.scale),
            reach=_reach(values),
            zero_point=zeros[1],
            keys=attention.shape[-1],
        )
        numbers = attention_numbers(attention.scale, mixed, result.encoding, short=many)
        return cls(
            editor,
            attention,
            result,
            numbers,
            heads,
            parts,
            (keys, zeros[0]),
            (values, zeros[1]),
        )

    def sums(self, block: Block) -> ir.Value:
        """Σ e·v of some queries and, in the last column, Σ e; shape (…, queries, E + 1)."""
        editor, node, numbers = self.editor, self.attention.mix, self.numbers
        shape = (*self.heads, block.queries, block.keys)
        scores = self._scores(block, shape)
        like = _like(scores, "exponentials", ir.DataType.UINT8, shape)
        first = editor.call(
            "IntExponentials",
            [scores, self._mask(block)],
            exponentials_arguments(numbers, prod(shape)),
            like,
            before=node,
        )
        maker = first.producer()
        values = self._cut(self.values[0], -2, block.first_key, block.end_key)
        sums = _like(self.result.codes, "", ir.DataType.INT32, (*shape[:-1], self._width))
        parts = [
            editor.accumulator("MatMulInteger", [part, values], sums, before=node)
            for part in (maker.outputs if maker is not None else ())
        ]
        kind: type[np.signedinteger[Any]] = np.int32
        peak = int(numbers.exponentials[0])
        if peak * self.attention.shape[-1] * _reach(self.values[0]) > INT32_MAX:
            parts, kind = [editor.wide(part, before=node) for part in parts], np.int64
        sums.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(kind)))
        return editor.call("IntJoin", parts, join_arguments(kind), sums, before=node)

    def normalized(self, blocks: Sequence[ir.Value]) -> ir.Value:
        """Codes of all queries, shape (…, S, E), from the sums of each block."""
        editor, node, share = self.editor, self.attention.mix, self.numbers.share
        spec, zeros = self.result.encoding.spec, (self.values[1], self.result.zero_point)
        shape, sums = (*self.heads, self.attention.shape[-2]), blocks[0]
        if len(blocks) > 1:
            like = _like(self.result.codes, "", sums.dtype, (*shape, self._width))
            sums = editor.joined(blocks, like, axis=-2, before=node)
        if isinstance(share, ShortShare):
            function = "IntNormalizeShort"
            arguments = short_normalize_arguments(share, *zeros, spec)
        else:
            function, arguments = "IntNormalize", normalize_arguments(share, *zeros, spec)
        like = _like(self.result.codes, "", spec.dtype, (*shape, self._width - 1))
        return editor.call(function, [sums], arguments, like, before=node)

    @property
    def _width(self) -> int:
        """E + 1."""
        return (static_shape(self.values[0]) or (1,))[-1]

    def _scores(self, block: Block, shape: tuple[int, ...]) -> ir.Value:
        """Queries times keys, int32."""
        editor, node = self.editor, self.attention.mix
        keys = self._cut(self.keys[0], -1, block.first_key, block.end_key)
        like = _like(node.outputs[0], "scores", ir.DataType.INT32, shape)
        sums = []
        for part, zero in self.queries:
            rows = self._cut(part, -2, block.first_query, block.end_query)
            zeros = editor.zero_point(zero, rows), editor.zero_point(self.keys[1], keys)
            operands = [rows, keys, *zeros]
            sums.append(editor.accumulator("MatMulInteger", operands, like, before=node))
        if len(sums) == 1:
            return sums[0]
        return editor.call("IntJoin", sums, join_arguments(), like, before=node)

    def _mask(self, block: Block) -> ir.Value:
        """The mask in LSB of the scores, int32; 0 where there is none."""
        mask = self.attention.mask
        if mask is None:
            return self.editor.number(np.array(0, np.int32))
        table = self.attention.mask_numbers.astype(np.int32)
        codes, held = mask.codes, constant_array(mask.codes) if mask.constant else None
        if held is not None:
            used, places = np.unique(held.astype(np.int64), return_inverse=True)
            places = places.reshape(held.shape)
            if held.shape[-2:] == self.attention.shape[-2:]:
                rows, keys = (
                    slice(block.first_query, block.end_query),
                    slice(block.first_key, block.end_key),
                )
                places = places[..., rows, keys]
            if len(used) <= _MOST_CODES:  # a smaller table, and bytes that all layers share
                codes = self.editor.number(places.astype(np.uint8))
                table = np.pad(table[used], (0, _MOST_CODES - len(used)))
        like = _like(mask.codes, "in_scores", ir.DataType.INT32, static_shape(codes))
        return self.editor.lookup(codes, table, like, before=self.attention.mix)

    def _cut(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        """A slice along one axis; the value itself where that is all of it."""
        shape = list(static_shape(value) or ())
        if shape and (start, end) == (0, shape[axis]):
            return value
        cut = self.editor.part(value, axis, start, end, before=self.attention.mix)
        if shape:
            shape[axis] = end - start
            cut.shape = ir.Shape(shape)
        return cut


def _reach(values: ir.Value) -> int:
    """Greatest |code|, LSB."""
    return _HALF if values.dtype is ir.DataType.INT8 else 255


def _moved(editor: IntegerEditor, node: ir.Node, codes: ir.Value, before: ir.Node) -> ir.Value:
    """A layout operator, on codes."""
    others = [codes if item is node.inputs[0] else item for item in node.inputs]
    moved = ir.Node("", node.op_type, others, node.attributes.values(), num_outputs=1)
    moved.name = editor.free_name(f"{name_of(codes)}_{node.op_type}")
    value = moved.outputs[0]
    value.name = editor.free_name(f"{name_of(node.outputs[0])}_codes")
    value.type, value.shape = codes.type, node.outputs[0].shape
    editor.graph.insert_before(before, moved)
    return value


def _signed(
    editor: IntegerEditor, codes: ir.Value, zero_point: int, node: ir.Node
) -> tuple[ir.Value, int]:
    """Codes as int8, and their zero point."""
    if codes.dtype is ir.DataType.INT8:
        return codes, zero_point
    like = _like(codes, "signed", ir.DataType.INT8, static_shape(codes))
    return editor.call("IntSigned", [codes], signed_arguments(), like, before=node), (
        zero_point - _HALF
    )


def _reshaped(
    editor: IntegerEditor, codes: ir.Value, shape: tuple[int, ...], node: ir.Node
) -> ir.Value:
    """Codes in another shape; the same where they have it already."""
    if static_shape(codes) == shape:
        return codes
    target = editor.number(np.array(shape, np.int64))
    return editor.move("Reshape", [codes, target], f"{name_of(codes)}_heads", shape, before=node)


def _transposed(editor: IntegerEditor, codes: ir.Value, node: ir.Node) -> ir.Value:
    """Codes with the last two dimensions in turn."""
    shape = static_shape(codes) or ()
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    turned = tuple(shape[axis] for axis in perm)
    name = f"{name_of(codes)}_transposed"
    return editor.move("Transpose", [codes], name, turned, before=node, perm=perm)


def _one_more_axis(editor: IntegerEditor, codes: ir.Value, node: ir.Node) -> ir.Value:
    """Codes that serve several heads of queries: (B, H, …) as (B, H, 1, …)."""
    shape = static_shape(codes) or ()
    wide = (*shape[:2], 1, *shape[2:])
    axes = editor.number(np.array([2], np.int64))
    return editor.move("Unsqueeze", [codes, axes], f"{name_of(codes)}_shared", wide, before=node)


def _with_ones(editor: IntegerEditor, values: ir.Value, node: ir.Node) -> ir.Value:
    """Values and a column of ones."""
    shape = static_shape(values) or ()
    kind = values.dtype or ir.DataType.INT8
    ones = editor.number(np.ones((*shape[:-1], 1), kind.numpy()))
    like = _like(values, "and_ones", kind, (*shape[:-1], shape[-1] + 1))
    return editor.joined([values, ones], like, axis=-1, before=node)


def _like(
    value: ir.Value, suffix: str, kind: ir.DataType | None, shape: tuple[int, ...] | None
) -> ir.Value:
    """What a new tensor is to be like."""
    name = f"{name_of(value)}_{suffix}" if suffix else name_of(value)
    return ir.Value(
        name=name,
        type=ir.TensorType(kind or ir.DataType.UNDEFINED),
        shape=ir.Shape(shape) if shape is not None else None,
    )
