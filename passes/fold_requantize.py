"""fold-requantize: linear operators on codes, scales folded into integer multipliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.integer_arguments import (
    add_arguments,
    multiply_arguments,
    short_arguments,
)
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_linear import fold_gemm, fold_matmul
from qnpu.compiler.integer_math import exact_ratios, fixed_point
from qnpu.compiler.integer_short import Term, short_point
from qnpu.compiler.op_traits import is_float, is_scale, is_standard, layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.qdq_edit import equal
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    conversions,
    label,
    stored_type,
)
from qnpu.compiler.rules import NoIntegerForm

_CLOSE_PRODUCT = Fraction(1, 256)  # LSB; a product of activations need not be exact


@dataclass(frozen=True)
class FoldRequantize(Pass):
    """Lets everything that adds, multiplies, moves or converts codes work on the codes themselves.

    Before → after::

        DQ(x: u8), DQ(w: s8) → MatMul → Q: u8      QLinearMatMul(x, w), where that is exact
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
    (logits), its channels are computed in several parts, because sums would else go through
    main memory half a dozen times.

    Where ratios of scales are small whole numbers times 2^-k (snap-scales), 32 bits are enough, and
    so is the float32 that QLinearMatMul requantizes with: both are proved exact for each linear by
    its weights, QLinearMatMul with ties to even. Its scales are a = 1, M per channel, y = 1.

    Exact: what comes out is the exact result rounded half up, but for one in 2^30 that lies too
    close to a tie (``qnpu.compiler.integer_math``); IntMul is within 2^-8 LSB of it.

    Raises QN401 for every operator that still computes on floats.
    """

    name: ClassVar[str] = "fold-requantize"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.INTEGER

    cpu: Cpu = Cpu.ANY

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model, self.cpu), 0
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
        and any(
            v is not None and is_float(v) and not is_scale(v) for v in (*node.inputs, *node.outputs)
        )
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


def _add(
    editor: IntegerEditor, node: ir.Node, result: CodedResult, sign: int = 1
) -> ir.Value | None:
    one, other = (coded_input(value) for value in node.inputs[:2])
    if one is None or other is None:
        return None
    ratios = [
        sign_of * exact_ratios([item.encoding.scale], result.encoding.scale)[0]
        for item, sign_of in ((one, 1), (other, sign))
    ]
    zeros = one.zero_point, other.zero_point
    spec = result.encoding.spec
    terms = [
        Term([ratio], [item.encoding.spec.q_min], [item.encoding.spec.q_max])
        for item, ratio in zip((one, other), ratios, strict=True)
    ]
    cross = -zeros[0] * ratios[0] - zeros[1] * ratios[1]
    short = short_point(terms, [cross], result.zero_point, spec)
    if short is not None:
        function, arguments = "IntAddShort", short_arguments(short, result.zero_point, spec)
    else:
        fixed = fixed_point(ratios, [one.reach, other.reach], result.encoding, terms=2)
        arguments = add_arguments(fixed, zeros, result.zero_point, spec)
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
    "MatMul": fold_matmul,
    "Gemm": fold_gemm,
    "Where": _where,
}
