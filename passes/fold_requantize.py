"""fold-requantize: linear operators on codes, scales folded into integer multipliers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import (
    Arguments,
    add_arguments,
    join_arguments,
    multiply_arguments,
    requantize_arguments,
    split_arguments,
)
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import FixedPoint, exact_ratios, fixed_point
from qnpu.compiler.op_traits import is_float, is_standard, layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE, input_operand
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.qdq_edit import equal
from qnpu.compiler.quant_types import widened
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    conversions,
    label,
    real_constant,
    stored_type,
)
from qnpu.compiler.rules import NoIntegerForm

_INT32_MAX = 2**31 - 1
_BLOCK = 2**21  # numbers that elementwise operators get at a time: as int64 they stay in a cache
_CLOSE_PRODUCT = Fraction(1, 256)  # LSB; a product of activations need not be exact


@dataclass(frozen=True)
class FoldRequantize(Pass):
    """Lets everything that adds, multiplies, moves or converts codes work on the codes themselves.

    Before → after::

        DQ(x: u8), DQ(w: s8) → MatMul → Q          MatMulInteger(x, w) → qnpu.IntRequantize
        DQ(x: u16), DQ(w: s8) → MatMul → Q         qnpu.IntSplit, 2 MatMulInteger, qnpu.IntAdd
        DQ(a), DQ(b) → MatMul → Q                  the same, with zero points of both
        DQ(a), DQ(b) → Add, Sub → Q                qnpu.IntAdd
        DQ(a), DQ(b) → Mul → Q                     qnpu.IntMul; by one number: qnpu.IntLookup
        DQ → Q                                     qnpu.IntLookup
        DQ → Reshape, Transpose, Concat … → Q      the same operator on codes

    y = clamp(⌊Σ (q_x - z_x)·q_w · s_x·s_w/s_y + 1/2⌋ + z_y): -z_x·Σ q_w and the bias are one
    constant per channel. Sums of each byte stay below 2^31, which the weights prove; where they
    do not, features are cut into pieces whose sums meet in 64 bits, as those of the two bytes do.
    4-bit codes stay packed: a Cast unpacks them as the file is loaded. Where a result is large
    (logits), its channels are computed in several parts, because numbers of 64 bits would else go
    through main memory a dozen times.

    Exact: what comes out is the exact result rounded half up, but for one in 2^30 that lies too
    close to a tie (``qnpu.compiler.integer_math``); IntMul is within 2^-8 LSB of it.

    Raises QN401 for every operator that still computes on floats.
    """

    name: ClassVar[str] = "fold-requantize"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.INTEGER

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            if not is_standard(node) or node.op_type in (QUANTIZE, DEQUANTIZE):
                continue
            if layout_inputs(node):
                count += _move_codes(editor, node)
                continue
            fold = _FOLDS.get(node.op_type)
            results = coded_results(node.outputs[0]) if fold is not None else None
            if fold is None or not results:
                continue
            made = [fold(editor, node, result) for result in results]
            count += editor.take_over_all([result.codes for result in results], made)
        for before, result in conversions(model.graph):
            editor.take_over(
                result.codes, _scaled(editor, result.quantize, before, Fraction(1), result)
            )
            count += 1
        common.RemoveUnusedNodesPass()(model)
        _refuse_floats(model.graph)
        return count


Fold = Callable[[IntegerEditor, ir.Node, CodedResult], ir.Value | None]


def _refuse_floats(graph: ir.Graph) -> None:
    faults = [
        NoIntegerForm(node.op_type).at(node=label(node))
        for node in graph
        if node.op_type not in (QUANTIZE, DEQUANTIZE)
        and any(v is not None and is_float(v) for v in (*node.inputs, *node.outputs))
    ]
    if faults:
        raise DiagnosticError(faults)


def _move_codes(editor: IntegerEditor, node: ir.Node) -> int:
    """Runs a layout operator on codes, where all encodings around it are one."""
    operands = {v: coded_input(v) for v in layout_inputs(node)}
    results = [coded_results(value) for value in node.outputs if value.uses()]
    encodings = [operand.encoding for operand in operands.values() if operand is not None]
    if len(encodings) < len(operands) or any(found is None for found in results):
        return 0
    encodings += [result.encoding for found in results for result in found or ()]
    if not all(equal(encodings[0], other) for other in encodings):
        return 0
    for index, value in enumerate(node.inputs):
        operand = operands.get(value) if value is not None else None
        if operand is not None:
            node.replace_input_with(index, operand.codes)
    for value in node.outputs:
        value.type = ir.TensorType(stored_type(encodings[0].spec.dtype))
        for result in coded_results(value) or ():
            editor.take_over(result.codes, value)
    return 1


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


def _add(
    editor: IntegerEditor, node: ir.Node, result: CodedResult, sign: int = 1
) -> ir.Value | None:
    one, other = (coded_input(value) for value in node.inputs[:2])
    if one is None or other is None:
        return None
    ratios = [
        exact_ratios([item.encoding.scale], result.encoding.scale)[0] for item in (one, other)
    ]
    fixed = fixed_point(
        [ratios[0], sign * ratios[1]], [one.reach, other.reach], result.encoding, terms=2
    )
    zeros = one.zero_point, other.zero_point
    arguments = add_arguments(fixed, zeros, result.zero_point, result.encoding.spec)
    function = "IntAdd" if fixed.low is None else "IntAddFine"
    return editor.call(function, [one.codes, other.codes], arguments, result.codes, before=node)


def _subtract(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    return _add(editor, node, result, sign=-1)


def _multiply(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    one, other = (coded_input(value) for value in node.inputs[:2])
    if one is None or other is None:
        return None
    if one.single is not None:
        one, other = other, one
    if other.single is not None and _keeps_shape(node, one.codes):
        factor = other.single * Fraction(other.scale)
        return _scaled(editor, node, one, factor, result)
    ratios = exact_ratios([one.encoding.scale, other.encoding.scale], result.encoding.scale)
    bound = one.reach * other.reach
    fixed = fixed_point(ratios, [bound], result.encoding, close=_CLOSE_PRODUCT)
    if fixed.low is not None:
        return None
    zeros = one.zero_point, other.zero_point
    arguments = multiply_arguments(fixed, zeros, result.zero_point, result.encoding.spec)
    return editor.call("IntMul", [one.codes, other.codes], arguments, result.codes, before=node)


def _divide(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    one, other = (coded_input(value) for value in node.inputs[:2])
    if one is None or other is None or not other.single or not _keeps_shape(node, one.codes):
        return None
    return _scaled(editor, node, one, 1 / (other.single * Fraction(other.scale)), result)


def _negate(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    one = coded_input(node.inputs[0])
    return None if one is None else _scaled(editor, node, one, Fraction(-1), result)


def _scaled(
    editor: IntegerEditor, node: ir.Node, one: CodedInput, factor: Fraction, result: CodedResult
) -> ir.Value:
    """Codes at another scale, times a factor: one of few numbers, so looked up."""
    ratio = exact_ratios([one.encoding.scale], result.encoding.scale)[0] * factor
    table = result.rounded(one.numbers * float(ratio))
    return editor.lookup(one.codes, table, result.codes, before=node)


def _keeps_shape(node: ir.Node, codes: ir.Value) -> bool:
    return codes.shape is not None and codes.shape == node.outputs[0].shape


def _matmul(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
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


def _pieces(weights: NDArray[Any]) -> list[tuple[int, int]]:
    """Ranges of features over which no sum of a byte times weights can leave int32.

    Args:
        weights: greatest |code| of each, shape (features, channels).
    """
    features, count = len(weights), 1
    while True:
        edges = np.linspace(0, features, count + 1).astype(int)
        totals = np.add.reduceat(weights, edges[:-1], axis=0)
        if int(totals.max()) * 255 <= _INT32_MAX or count == features:
            return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        count += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    """8-bit codes and their zero point, LSB."""

    codes: ir.Value
    zero_point: int


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
    if len(sums) == 2 and bound <= _INT32_MAX:
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


def _gemm(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    attributes = node.attributes
    if attributes.get_int("transA", 0) or any(
        attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
    ):
        return None
    return _linear(editor, node, result)


def _linear(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    """A product with a constant weight, of which channels are the last axis of the result."""
    one, weight = coded_input(node.inputs[0]), _Weight.of(node)
    if one is None or weight is None or (one.encoding.spec.bits > 8 and one.encoding.spec.signed):
        return None
    operand = editor.weight(weight.value, weight.codes, transposed=weight.transposed, before=node)
    parts = [_Bytes(part.codes, 0) for part in _bytes(editor, one, node)]
    shape = static_shape(node.outputs[0])
    count = -(-prod(shape) // _BLOCK) if shape else 1
    channels = weight.codes.shape[1]
    if count == 1 or shape is None:
        return _channels(editor, node, one, weight, operand, parts, result)
    made = []
    for start, end in itertools.pairwise(np.linspace(0, channels, count + 1).astype(int).tolist()):
        like = ir.Value(
            name=f"{name_of(result.codes)}_{start}",
            type=result.codes.type,
            shape=ir.Shape([*shape[:-1], end - start]),
        )
        columns = editor.part(operand, -1, start, end, before=node)
        piece = replace(result, codes=like)
        made.append(_channels(editor, node, one, weight.part(start, end), columns, parts, piece))
    return editor.joined(made, result.codes, before=node)


def _channels(
    editor: IntegerEditor,
    node: ir.Node,
    one: CodedInput,
    weight: _Weight,
    operand: ir.Value,
    parts: list[_Bytes],
    result: CodedResult,
) -> ir.Value:
    """All channels of a linear, or some: sums, then codes."""
    codes = weight.codes.astype(np.int64)
    sums, cross = np.abs(codes).sum(axis=0), -one.zero_point * codes.sum(axis=0)
    bias = weight.bias_at(one.encoding.scale)
    added = [int(a) + b for a, b in zip(cross, bias, strict=True)]
    ratios = exact_ratios([one.encoding.scale, weight.scale], result.encoding.scale)
    bounds = [int(total) * one.reach + abs(int(b)) for total, b in zip(sums, bias, strict=True)]
    fixed = fixed_point(ratios, bounds, result.encoding)
    pieces = _pieces(np.abs(codes))
    products = [_product(editor, node, part, _Bytes(operand, 0), result, pieces) for part in parts]
    largest = int(sums.max()) * one.encoding.spec.q_max
    return _summed(editor, node, products, fixed, result, added, largest)


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A constant weight.

    Attributes:
        value: its codes in the graph.
        codes: int8, shape (features, channels).
        scale: shape () or (channels,).
        transposed: ``value`` has channels first.
        bias: real, shape (channels,); None where there is none.
    """

    value: ir.Value
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    transposed: bool
    bias: NDArray[np.float64] | None

    @classmethod
    def of(cls, node: ir.Node) -> _Weight | None:
        value = node.inputs[1]
        operand = input_operand(value) if value is not None else None
        array = constant_array(operand.codes) if operand is not None and operand.constant else None
        if operand is None or array is None or operand.codes is None or array.ndim != 2:
            return None
        if operand.scale is None or operand.zero_point is None or operand.zero_point.any():
            return None
        if operand.granularity not in ("tensor", "channel") or operand.dtype not in ("s4", "s8"):
            return None
        transposed = bool(node.attributes.get_int("transB", 0))
        if operand.granularity == "channel" and operand.axis != int(not transposed):
            return None
        bias = None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = real_constant(input_operand(node.inputs[2]))
            channels = array.shape[0 if transposed else 1]
            if bias is None or bias.size not in (1, channels):
                return None
            bias = np.broadcast_to(bias.reshape(-1), (channels,))
        codes = widened(array).astype(np.int8)
        return cls(operand.codes, codes.T if transposed else codes, operand.scale, transposed, bias)

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


def _where(editor: IntegerEditor, node: ir.Node, result: CodedResult) -> ir.Value | None:
    chosen = [coded_input(value) for value in node.inputs[1:3]]
    if any(item is None for item in chosen) or node.inputs[0] is None:
        return None
    codes = [_at_result(editor, node, item, result) for item in chosen if item is not None]
    return editor.call("IntWhere", [node.inputs[0], *codes], {}, result.codes, before=node)


def _at_result(
    editor: IntegerEditor, node: ir.Node, item: CodedInput, result: CodedResult
) -> ir.Value:
    """Codes at the encoding of the result."""
    if equal(item.encoding, result.encoding):
        return item.codes
    like = ir.Value(
        name=f"{name_of(item.codes)}_as_{name_of(result.codes)}",
        type=result.codes.type,
        shape=item.codes.shape,
    )
    return _scaled(editor, node, item, Fraction(1), replace(result, codes=like))


_FOLDS: dict[str, Fold] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Neg": _negate,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Where": _where,
}
