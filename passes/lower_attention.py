"""lower-attention: scores, softmax and what it mixes as one formula that forms no probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import (
    exponentials_arguments,
    join_arguments,
    normalize_arguments,
    signed_arguments,
    split_arguments,
)
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import attention_numbers, round_half_up
from qnpu.compiler.op_traits import is_standard, layout_inputs
from qnpu.compiler.operands import DEQUANTIZE
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.qdq_edit import equal
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    only_source,
    only_user,
)

_INT32_MAX = 2**31 - 1
_HALF = 128  # what int8 codes are less than uint8 codes
_MOST_STEP = 2**16  # LSB of scores, which are finer than a step
_MOST_CODES = 256  # of a constant mask


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Puts integer functions in the place of an attention, from its scores to its result.

    Before → after::

        DQ(q) · DQ(k) → Q → DQ → Mul(c) → Q → DQ       MatMulInteger(q, k)
          → Add(mask) → Q → DQ → Softmax → Q → DQ  →   qnpu.IntExponentials
          → MatMul(DQ(v)) → Q                          2 MatMulInteger, qnpu.IntNormalize

    e_j = exp(-s·(max x - x_j)) from a table, as 16 bits, the largest of a row being 65,535, or as
    24 where y has 16; y = ⌊Σ e_j·v_j / Σ e_j · s_v/s_y + 1/2⌋ + z. Scores stay sums in 32 bits, and
    the division comes last, of as many numbers as come out: neither scores nor probabilities are
    rounded or clipped on the way, so this is nearer to the float graph than the Q/DQ graph is.
    Σ e_j is one more column of the values, all ones. Codes that are only moved and then narrowed
    are narrow from the beginning.

    Must not fire where scores go through anything but one mask and factors above 0, where one of
    them is read elsewhere, keys or values have more than 8 bits, queries are signed with 16, sums
    could leave int32, or a shape is not known.
    """

    name: ClassVar[str] = "lower-attention"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            attention = _Attention.ending_at(node)
            results = coded_results(node.outputs[0]) if attention is not None else None
            if attention is None or not results:
                continue
            narrowed = [_Narrowed.of(result) for result in results]
            made = [_lowered(editor, attention, item) for item in narrowed]
            count += editor.take_over_all([item.result.codes for item in narrowed], made)
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """An attention whose inner results go nowhere else.

    Attributes:
        mix: the MatMul at its end.
        queries: (…, S, D)
        keys: (…, D, T)
        values: (…, T, E)
        scale: real units per LSB of a score, as the softmax takes it.
        mask: added to scores; None where there is none.
        mask_factor: that a mask is multiplied with before the softmax.
        shape: of the scores.
    """

    mix: ir.Node
    queries: CodedInput
    keys: CodedInput
    values: CodedInput
    scale: Fraction
    mask: CodedInput | None
    mask_factor: Fraction
    shape: tuple[int, ...]

    @classmethod
    def ending_at(cls, node: ir.Node) -> _Attention | None:
        """The attention of which a node is the last, where it can be lowered as one."""
        if node.op_type != "MatMul" or not is_standard(node):
            return None
        softmax, values = only_source(node.inputs[0]), coded_input(node.inputs[1])
        if softmax is None or softmax.op_type != "Softmax" or values is None or values.constant:
            return None
        shape = static_shape(softmax.outputs[0])
        if shape is None or softmax.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            return None
        above = _Scores.of(softmax.inputs[0], shape)
        if above is None or above.factor <= 0:
            return None
        queries, keys = (coded_input(value) for value in above.product.inputs)
        if queries is None or keys is None or keys.constant:
            return None
        scale = Fraction(queries.scale) * Fraction(keys.scale) * above.factor
        found = cls(node, queries, keys, values, scale, above.mask, above.mask_factor, shape)
        return found if found.fits else None

    @property
    def fits(self) -> bool:
        """Codes are of kinds that are multiplied, and no sum of theirs can leave int32."""
        queries = self.queries.encoding.spec
        if (queries.bits > 8 and queries.signed) or any(
            item.encoding.spec.bits > 8 for item in (self.keys, self.values)
        ):
            return False
        depth, keys, values = (
            static_shape(i.codes) for i in (self.queries, self.keys, self.values)
        )
        if depth is None or keys is None or values is None:
            return False
        reach = depth[-1] * self.queries.reach * self.keys.reach + max(
            map(abs, _mask_numbers(self)), default=0
        )
        return 2 * reach + _MOST_STEP <= _INT32_MAX and self.shape[-1] * 255 * 255 <= _INT32_MAX


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """What lies between a product and a softmax.

    Attributes:
        product: the MatMul.
        factor: that its results are multiplied with.
        mask: that is added.
        mask_factor: that the mask is multiplied with after that.
    """

    product: ir.Node
    factor: Fraction
    mask: CodedInput | None
    mask_factor: Fraction

    @classmethod
    def of(cls, value: ir.Value | None, shape: tuple[int, ...]) -> _Scores | None:
        factor, mask, mask_factor = Fraction(1), None, Fraction(1)
        node = only_source(value)
        while node is not None and is_standard(node) and static_shape(node.outputs[0]) == shape:
            if node.op_type == "MatMul":
                return cls(node, factor, mask, mask_factor)
            step = _Step.of(node, shape)
            if step is None or (step.mask is not None and mask is not None):
                return None
            if step.mask is not None:
                mask, mask_factor = step.mask, factor
            factor *= step.factor
            node = only_source(step.scores)
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A product with one number, or a sum with a mask.

    Attributes:
        scores: the operand that is neither.
        factor: 1 of a sum.
        mask: of a sum.
    """

    scores: ir.Value
    factor: Fraction
    mask: CodedInput | None

    @classmethod
    def of(cls, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
        if node.op_type not in ("Mul", "Div", "Add"):
            return None
        one, other = node.inputs
        first, second = coded_input(one), coded_input(other)
        if one is None or other is None or first is None or second is None:
            return None
        if node.op_type == "Add":
            if only_source(one) is None or static_shape(one) != shape:
                one, second = other, first
            return cls(one, Fraction(1), second)
        if node.op_type == "Mul" and first.single is not None:
            one, second = other, first
        if not second.single:
            return None
        factor = second.single * Fraction(second.scale)
        return cls(one, factor if node.op_type == "Mul" else 1 / factor, None)


def _mask_numbers(attention: _Attention) -> list[int]:
    """What each code of the mask is, LSB of the scores, in the order of a table."""
    mask = attention.mask
    if mask is None:
        return []
    ratio = Fraction(mask.scale) * attention.mask_factor / attention.scale
    return [round_half_up(int(number) * ratio) for number in mask.numbers]


@dataclass(frozen=True, slots=True, eq=False)
class _Narrowed:
    """Codes that an attention may give at once.

    Attributes:
        result: what becomes of the attention's result in the end.
        layouts: operators that move its elements before that, in order.
    """

    result: CodedResult
    layouts: tuple[ir.Node, ...]

    @classmethod
    def of(cls, result: CodedResult) -> _Narrowed:
        """The narrower codes behind layout operators, where nothing else reads the wide ones."""
        layouts: list[ir.Node] = []
        codes = result.codes
        while True:
            dequantize = only_user(codes, DEQUANTIZE)
            real = dequantize.outputs[0] if dequantize is not None else None
            found = coded_results(real) if real is not None and len(real.uses()) == 1 else None
            if found and found[0].encoding.spec.bits < result.encoding.spec.bits:
                return cls(found[0], tuple(layouts))
            user = only_user(real) if real is not None else None
            if user is None or list(layout_inputs(user)) != [real] or len(user.outputs) > 1:
                return cls(result, ())
            layouts.append(user)
            moved = coded_results(user.outputs[0])
            if not moved or len(moved) > 1 or not equal(moved[0].encoding, result.encoding):
                return cls(result, ())
            codes = moved[0].codes

    def move(self, editor: IntegerEditor, codes: ir.Value, before: ir.Node) -> ir.Value:
        """The layout operators, on codes."""
        for node in self.layouts:
            others = [codes if item is node.inputs[0] else item for item in node.inputs]
            moved = ir.Node("", node.op_type, others, node.attributes.values(), num_outputs=1)
            moved.name = editor.free_name(f"{name_of(codes)}_{node.op_type}")
            value = moved.outputs[0]
            value.name = editor.free_name(f"{name_of(node.outputs[0])}_codes")
            value.type, value.shape = codes.type, node.outputs[0].shape
            editor.graph.insert_before(before, moved)
            codes = value
        return codes


def _lowered(editor: IntegerEditor, attention: _Attention, narrowed: _Narrowed) -> ir.Value:
    node, result = attention.mix, narrowed.result
    numbers = attention_numbers(attention.scale, Fraction(attention.values.scale), result.encoding)
    scores = _scores(editor, attention)
    mask = _mask(editor, attention)
    like = _like(scores, "exponentials", ir.DataType.UINT8, attention.shape)
    high = editor.call(
        "IntExponentials" if numbers.bytes == 2 else "IntExponentialsFine",
        [scores, mask],
        exponentials_arguments(numbers, prod(attention.shape)),
        like,
        before=node,
    )
    producer = high.producer()
    weights = list(producer.outputs) if producer is not None else []
    values, zero = _signed(editor, attention.values, node)
    columns = _with_ones(editor, values, node)
    shape = static_shape(columns)
    target = _like(
        result.codes, "", ir.DataType.INT32, (*attention.shape[:-1], (shape or (0,))[-1])
    )
    sums = [
        editor.accumulator("MatMulInteger", [part, columns], target, before=node)
        for part in weights
    ]
    arguments = normalize_arguments(numbers, zero, result.zero_point, result.encoding.spec)
    function = "IntNormalize" if numbers.bytes == 2 else "IntNormalizeFine"
    mixed = _like(result.codes, "", result.encoding.spec.dtype, static_shape(node.outputs[0]))
    codes = editor.call(function, sums, arguments, mixed, before=node)
    return narrowed.move(editor, codes, node)


def _scores(editor: IntegerEditor, attention: _Attention) -> ir.Value:
    """Queries times keys, int32."""
    node, queries = attention.mix, attention.queries
    keys, zero = _signed(editor, attention.keys, node)
    like = _like(attention.mix.outputs[0], "scores", ir.DataType.INT32, attention.shape)
    if queries.encoding.spec.bits <= 8:
        parts = [(queries.codes, queries.zero_point)]
    else:
        high, low = editor.split(queries.codes, split_arguments(), before=node)
        parts = [(high, queries.zero_point >> 8), (low, queries.zero_point & 255)]
    sums = [
        editor.accumulator(
            "MatMulInteger",
            [part, keys, editor.zero_point(own, part), editor.zero_point(zero, keys)],
            like,
            before=node,
        )
        for part, own in parts
    ]
    if len(sums) == 1:
        return sums[0]
    return editor.call("IntJoin", sums, join_arguments(), like, before=node)


def _mask(editor: IntegerEditor, attention: _Attention) -> ir.Value:
    """The mask in LSB of the scores, int32; 0 where there is none."""
    node, mask = attention.mix, attention.mask
    if mask is None:
        return editor.number(np.array(0, np.int32))
    table = np.array(_mask_numbers(attention), np.int32)
    like = _like(mask.codes, "in_scores", ir.DataType.INT32, static_shape(mask.codes))
    codes, held = mask.codes, constant_array(mask.codes) if mask.constant else None
    if held is not None:
        used, places = np.unique(held.astype(np.int64), return_inverse=True)
        if len(used) <= _MOST_CODES:  # a smaller table, and bytes that all layers share
            codes = editor.number(places.reshape(held.shape).astype(np.uint8))
            table = np.pad(table[used], (0, _MOST_CODES - len(used)))
    return editor.lookup(codes, table, like, before=node)


def _signed(editor: IntegerEditor, operand: CodedInput, node: ir.Node) -> tuple[ir.Value, int]:
    """Codes as int8, and their zero point."""
    if operand.encoding.spec.signed:
        return operand.codes, operand.zero_point
    like = _like(operand.codes, "signed", ir.DataType.INT8, static_shape(operand.codes))
    codes = editor.call("IntSigned", [operand.codes], signed_arguments(), like, before=node)
    return codes, operand.zero_point - _HALF


def _with_ones(editor: IntegerEditor, values: ir.Value, node: ir.Node) -> ir.Value:
    """Values and a column of ones."""
    shape = static_shape(values) or ()
    ones = editor.number(np.ones((*shape[:-1], 1), np.int8))
    like = _like(values, "and_ones", ir.DataType.INT8, (*shape[:-1], shape[-1] + 1))
    return editor.joined([values, ones], like, before=node)


def _like(
    value: ir.Value, suffix: str, kind: ir.DataType, shape: tuple[int, ...] | None
) -> ir.Value:
    """What a new tensor is to be like."""
    name = f"{name_of(value)}_{suffix}" if suffix else name_of(value)
    return ir.Value(
        name=name, type=ir.TensorType(kind), shape=ir.Shape(shape) if shape is not None else None
    )
