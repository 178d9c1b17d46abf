"""Products of codes: integer matrix products, then codes of their sums."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import (
    Arguments,
    inside_arguments,
    join_arguments,
    requantize_arguments,
    short_arguments,
    split_arguments,
    sum_bytes_arguments,
)
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import INT32_MAX, FixedPoint, exact_ratios, fixed_point
from qnpu.compiler.integer_short import (
    BYTE,
    exact_in_float,
    linear_terms,
    quotient_point,
    short_point,
    split_point,
)
from qnpu.compiler.operands import Operand, input_operand
from qnpu.compiler.qdq_edit import block_encoding_of
from qnpu.compiler.quant_types import Encoding, widened
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    real_constant,
)

_BLOCK = 2**21  # results that are made at once; larger ones would go through main memory
_PART = 2**18  # of those, what elementwise operators get at a time: it stays in the caches
_TALL = 256  # rows from which a product is cut so that threads share it by rows
_WIDEST = 4  # channels for each row, beyond which the cuts would cost more than they save
_DEEP = 2  # features for each row, from which int32 is joined for the sake of the product


def fold_matmul(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    """Codes of a product of two activations, or of one with a constant weight.

    Args:
        editor: of the graph.
        node: MatMul.
        result: what is made of its result.

    Returns:
        None where there is no integer form.
    """
    weight = input_operand(node.inputs[1]) if node.inputs[1] is not None else None
    if weight is not None and weight.constant and weight.rank == 2:
        return _linear(editor, node, result)
    one, other = (coded_input(value) for value in node.inputs[:2])
    depth = (
        node.inputs[0].shape[-1] if node.inputs[0] is not None and node.inputs[0].shape else None
    )
    if one is None or other is None or not isinstance(depth, int):
        return None
    ratios = exact_ratios([one.encoding.scale, other.encoding.scale], result.encoding.scale)
    fixed = fixed_point(ratios, [depth * one.reach * other.reach], result.encoding)
    wide = [item for item in (one, other) if item.encoding.spec.bits > 8]
    if any(item.encoding.spec.signed for item in wide) or len(wide) == 2:
        return None
    pieces = _pieces(np.full((depth, 1), 255))
    parts = [_bytes(editor, item, node) for item in (one, other)]
    sums = [_product(editor, node, a, b, result, pieces) for a in parts[0] for b in parts[1]]
    return _summed(
        editor, node, sums, fixed, result, [Fraction(0)], depth * one.reach * other.reach
    )


def fold_gemm(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    """As ``fold_matmul``, of a Gemm with a constant weight, a bias with it."""
    attributes = node.attributes
    if attributes.get_int("transA", 0) or any(
        attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
    ):
        return None
    return _linear(editor, node, result)


def _pieces(weights: NDArray[Any]) -> list[tuple[int, int]]:
    """Ranges of features over which no sum of a byte times weights can leave int32.

    Args:
        weights: greatest |code| of each, shape (features, channels).
    """
    features, count = len(weights), 1
    while True:
        edges = np.linspace(0, features, count + 1).astype(int)
        totals = np.add.reduceat(weights, edges[:-1], axis=0)
        if int(totals.max()) * 255 <= INT32_MAX or count == features:
            return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        count += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    """8-bit codes, their zero point and, of signed ones, the greatest |code|, LSB."""

    codes: ir.Value
    zero_point: int
    reach: int = 128


def _bytes(editor: IntegerEditor, item: CodedInput, node: ir.Node) -> list[_Bytes]:
    """Codes of 16 bits as high and low byte, each with its part of the zero point."""
    if item.encoding.spec.bits <= 8:
        return [_Bytes(item.codes, item.zero_point)]
    high, low = editor.split(item.codes, split_arguments(), before=node)
    return [_Bytes(high, item.zero_point >> 8), _Bytes(low, item.zero_point & 255)]


def _product(
    editor: IntegerEditor,
    node: ir.Node,
    a: _Bytes,
    b: _Bytes,
    result: CodedResult,
    pieces: list[tuple[int, int]],
) -> ir.Value:
    """Sums of a product, int32; int64 where they are made of several pieces."""
    b = _Bytes(*editor.beside(a.codes.dtype, b.codes, b.zero_point, before=node, reach=b.reach))
    if len(pieces) == 1:
        return _whole_product(editor, node, a, b, result)
    total: ir.Value | None = None
    for start, end in pieces:
        first = _Bytes(editor.part(a.codes, -1, start, end, before=node), a.zero_point)
        second = _Bytes(editor.part(b.codes, -2, start, end, before=node), b.zero_point)
        sums = editor.wide(_whole_product(editor, node, first, second, result), before=node)
        total = sums if total is None else editor.sum(total, sums, before=node)
    if total is None:
        raise ValueError("no piece")
    return total


def _whole_product(
    editor: IntegerEditor, node: ir.Node, a: _Bytes, b: _Bytes, result: CodedResult
) -> ir.Value:
    zeros = [
        editor.zero_point(part.zero_point, part.codes) if part.zero_point else None
        for part in (a, b)
    ]
    inputs = [a.codes, b.codes, *zeros]
    while inputs[-1] is None:
        inputs.pop()
    return editor.accumulator("MatMulInteger", inputs, result.codes, before=node)


def _summed(
    editor: IntegerEditor,
    node: ir.Node,
    sums: list[ir.Value],
    fixed: FixedPoint,
    result: CodedResult,
    addends: Sequence[Fraction],
    bound: int,
) -> ir.Value:
    """Codes of one accumulator, or of those of a high and a low byte.

    Args:
        bound: greatest |sum| as the products give it, LSB.
    """
    if len(sums) == 2 and bound <= INT32_MAX:
        like = ir.Value(
            name=f"{name_of(result.codes)}_sums", type=sums[0].type, shape=result.codes.shape
        )
        sums = [editor.call("IntJoin", sums, join_arguments(), like, before=node)]
    if len(sums) == 1:
        return _requantized(editor, sums[0], fixed, result, addends, before_node=node)
    arguments = _of_bytes(
        requantize_arguments(fixed, result.zero_point, result.encoding.spec, addends)
    )
    function = "IntAdd" if fixed.low is None else "IntAddFine"
    return editor.call(function, sums, arguments, result.codes, before=node)


def _requantized(
    editor: IntegerEditor,
    numbers: ir.Value,
    fixed: FixedPoint,
    result: CodedResult,
    addends: Sequence[Fraction],
    *,
    before_node: ir.Node,
) -> ir.Value:
    arguments = requantize_arguments(fixed, result.zero_point, result.encoding.spec, addends)
    function = "IntRequantize" if fixed.low is None else "IntRequantizeFine"
    return editor.call(function, [numbers], arguments, result.codes, before=before_node)


def _of_bytes(arguments: Arguments) -> Arguments:
    """Arguments for a sum 256·a + b, made from those for the sum."""
    found = {}
    for name, array in arguments.items():
        if name.endswith("multiplier"):
            found[f"{name}_a"] = array * np.uint64(256)
            found[f"{name}_b"] = array
        else:
            found[name] = array
    return found


def _linear(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    """A product with a constant weight, of which channels are the last axis of the result."""
    one, weight = coded_input(node.inputs[0]), _Weight.of(node)
    if one is None or weight is None or (one.encoding.spec.bits > 8 and one.encoding.spec.signed):
        return None
    operand = weight.operand(editor, node)
    linear = _Linear(one, weight, result.encoding)
    at_once = linear.exact_in_float(one.codes.dtype, result.codes.dtype)
    form = _quantized_product if at_once else _channels
    shape = static_shape(node.outputs[0])
    count = 1 if shape is None else _part_count(shape, len(weight.codes), at_once=at_once)
    if shape is None or count == 1:
        return form(editor, node, linear, operand, result)
    edges = np.linspace(0, shape[-1], count + 1).astype(int).tolist()
    made = []
    for start, end in itertools.pairwise(edges):
        like = ir.Value(
            name=f"{name_of(result.codes)}_{start}",
            type=result.codes.type,
            shape=ir.Shape([*shape[:-1], end - start]),
        )
        columns = editor.part(operand, -1, start, end, before=node)
        piece, some = replace(result, codes=like), replace(linear, weight=weight.part(start, end))
        made.append(form(editor, node, some, columns, piece))
    return editor.joined(made, result.codes, axis=-1, before=node)


def _part_count(shape: Sequence[int], features: int, *, at_once: bool) -> int:
    """Into how many parts of its channels a linear's result is cut.

    ONNX Runtime's threads share a product by rows where it has at least as many rows as channels,
    else by channels. By channels, each thread writes between what the others write, and all that
    comes next, which is shared by rows, reads what others wrote: dear where the threads' cores
    have no cache in common.

    Args:
        shape: of the result, (..., channels).
        features: of x.
        at_once: the product gives codes: nothing larger goes through memory, and bytes are joined.
            Joining int32 takes so long that products of few features are left whole.
    """
    rows, channels = prod(shape[:-1]), shape[-1]
    if not at_once and rows * channels > _BLOCK:
        return min(-(-rows * channels // _PART), channels)
    if rows >= _TALL and channels <= _WIDEST * rows and (at_once or features >= _DEEP * rows):
        return -(-channels // rows)
    return 1


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    """What is known of a linear before it is run.

    Attributes:
        one: x.
        weight: W, all channels or some.
        given: encoding of y.
    """

    one: CodedInput
    weight: _Weight
    given: Encoding

    @property
    def ratios(self) -> list[Fraction]:
        """M, one per channel, or one alone."""
        return exact_ratios([self.one.encoding.scale, self.weight.scale], self.given.scale)

    @property
    def bounds(self) -> list[int]:
        """Greatest |Σ (q_x - z_x)·q_w| of each channel, LSB."""
        totals = np.abs(self.weight.codes.astype(np.int64)).sum(axis=0)
        return [int(total) * self.one.reach for total in totals]

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """See ``_pieces``."""
        return _pieces(np.abs(self.weight.codes.astype(np.int64)))

    @property
    def bias(self) -> list[Fraction]:
        """In steps of s_x·s_w, LSB."""
        return self.weight.bias_at(self.one.encoding.scale)

    @property
    def added(self) -> list[Fraction]:
        """Bias and -z_x·Σ q_w: what is added to Σ q_x·q_w, LSB."""
        cross = -self.one.zero_point * self.weight.codes.sum(axis=0, dtype=np.int64)
        return [int(a) + b for a, b in zip(cross, self.bias, strict=True)]

    def exact_in_float(self, taken: ir.DataType | None, given: ir.DataType | None) -> bool:
        """True where a QLinearMatMul gives the exact codes: bytes of one type, no bias."""
        return (
            taken is given
            and taken in (ir.DataType.UINT8, ir.DataType.INT8)
            and self.weight.bias is None
            and len(self.pieces) == 1
            and all(exact_in_float(self.ratios, self.bounds, self.given))
        )

    def short_form(self) -> tuple[str, Arguments] | None:
        """Function of one sum, or of those of both bytes, that is exact in 32 bits; arguments."""
        if len(self.pieces) > 1:
            return None
        ratios, zero, spec = self.ratios, int(self.given.zero_point), self.given.spec
        added = self.added
        addends = [a * ratios[c % len(ratios)] for c, a in enumerate(added)]
        wide = self.one.encoding.spec.bits > 8
        terms = linear_terms(BYTE if wide else self.one.encoding.spec, self.weight.codes, ratios)
        if wide:
            split = split_point(terms[0], addends, zero, spec)
            arguments = None if split is None else sum_bytes_arguments(split, zero, spec)
            return None if arguments is None else ("IntSumBytesShort", arguments)
        short = quotient_point(terms[0], added, zero, spec)
        short = short or short_point(terms, addends, zero, spec)
        if short is None:
            return None
        if short.inside:
            return "IntRequantizeInside", inside_arguments(short, zero, spec)
        return "IntRequantizeShort", short_arguments(short, zero, spec)


def _quantized_product(
    editor: IntegerEditor, node: ir.Node, linear: _Linear, operand: ir.Value, result: CodedResult
) -> ir.Value:
    scales = np.array([float(ratio) for ratio in linear.ratios], np.float32)
    unit = editor.scale(np.array(1, np.float32))
    operand, zero_point = editor.beside(
        linear.one.codes.dtype, operand, 0, before=node, reach=linear.weight.reach
    )
    ends = [
        editor.zero_point(zero, like)
        for zero, like in ((linear.one.zero_point, linear.one.codes), (zero_point, operand))
    ]
    inputs = [
        *(linear.one.codes, unit, ends[0]),
        *(operand, editor.scale(scales if scales.size > 1 else scales.reshape(())), ends[1]),
        *(unit, editor.zero_point(result.zero_point, result.codes)),
    ]
    return editor.codes("QLinearMatMul", inputs, result.codes, before=node)


def _channels(
    editor: IntegerEditor,
    node: ir.Node,
    linear: _Linear,
    operand: ir.Value,
    result: CodedResult,
) -> ir.Value:
    """All channels of a linear, or some: sums, then codes."""
    parts = [_Bytes(part.codes, 0) for part in _bytes(editor, linear.one, node)]
    pieces = linear.pieces
    second = _Bytes(operand, 0, linear.weight.reach)
    products = [_product(editor, node, part, second, result, pieces) for part in parts]
    short = linear.short_form()
    if short is not None:
        function, arguments = short
        return editor.call(function, products, arguments, result.codes, before=node)
    bounds = [b + abs(int(a)) for b, a in zip(linear.bounds, linear.bias, strict=True)]
    fixed = fixed_point(linear.ratios, bounds, result.encoding)
    totals = np.abs(linear.weight.codes.astype(np.int64)).sum(axis=0)
    largest = int(totals.max()) * linear.one.encoding.spec.q_max
    return _summed(editor, node, products, fixed, result, linear.added, largest)


def _whole_numbers(
    operand: Operand, array: NDArray[Any], channel_axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """A weight as int8 under one scale, or one per channel; None where it is none.

    4-bit codes times whole block scales up to 15 are at most 105 from zero.
    """
    if operand.granularity == "lpbq":
        encoding = block_encoding_of(operand)
        if encoding is None or operand.axis == channel_axis:
            return None
        whole = encoding.integers(array)
        fits = whole.min() >= -128 and whole.max() <= 127
        return (whole.astype(np.int8), encoding.scale) if fits else None
    if operand.scale is None or operand.zero_point is None or operand.zero_point.any():
        return None
    if operand.granularity not in ("tensor", "channel") or operand.dtype not in ("s4", "s8"):
        return None
    if operand.granularity == "channel" and operand.axis != channel_axis:
        return None
    return widened(array).astype(np.int8), operand.scale


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A constant weight.

    Attributes:
        value: its codes in the graph.
        codes: int8, shape (features, channels); of blocks (LPBQ) times their block scales.
        scale: shape () or (channels,).
        transposed: ``value`` has channels first.
        bias: real, shape (channels,); None where there is none.
        blocks: it has blocks, so that ``value`` has other codes.
    """

    value: ir.Value
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    transposed: bool
    bias: NDArray[np.float64] | None
    blocks: bool

    @classmethod
    def of(cls, node: ir.Node) -> _Weight | None:
        value = node.inputs[1]
        operand = input_operand(value) if value is not None else None
        array = constant_array(operand.codes) if operand is not None and operand.constant else None
        if operand is None or array is None or operand.codes is None or array.ndim != 2:
            return None
        transposed = bool(node.attributes.get_int("transB", 0))
        found = _whole_numbers(operand, array, int(not transposed))
        if found is None:
            return None
        codes, scale = found
        bias = None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = real_constant(input_operand(node.inputs[2]))
            channels = array.shape[0 if transposed else 1]
            if bias is None or bias.size not in (1, channels):
                return None
            bias = np.broadcast_to(bias.reshape(-1), (channels,))
        codes = codes.T if transposed else codes
        blocks = operand.granularity == "lpbq"
        return cls(operand.codes, codes, scale, transposed, bias, blocks)

    def operand(self, editor: IntegerEditor, before: ir.Node) -> ir.Value:
        """The second operand of a product, int8, shape (features, channels)."""
        if self.blocks:
            return editor.whole_weight(self.value, self.codes)
        return editor.weight(self.value, self.codes, transposed=self.transposed, before=before)

    @property
    def reach(self) -> int:
        """Greatest |code|, LSB."""
        return int(np.abs(self.codes.astype(np.int16)).max(initial=0))

    def part(self, start: int, end: int) -> _Weight:
        """Some of the channels."""
        chosen = slice(start, end)
        return replace(
            self,
            codes=self.codes[:, chosen],
            scale=self.scale[chosen] if self.scale.size > 1 else self.scale,
            bias=self.bias[chosen] if self.bias is not None else None,
        )

    def bias_at(self, scale: NDArray[np.float32]) -> list[Fraction]:
        """The bias in steps of s_x·s_w, LSB, exact: it need not be whole, scales being rounded."""
        channels = self.codes.shape[1]
        if self.bias is None:
            return [Fraction(0)] * channels
        steps = exact_ratios([np.broadcast_to(self.scale.reshape(-1), (channels,)), scale], 1.0)
        return [Fraction(float(b)) / step for b, step in zip(self.bias, steps, strict=True)]
