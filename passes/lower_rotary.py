"""lower-rotary: a sum of two products with tables, as RoPE is, in one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.integer_arguments import rotate_arguments, rotate_by_arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import INT32_MAX, exact_ratios, fixed_point, rotary_numbers
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.operands import input_operand
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    NarrowedResult,
    coded_input,
    coded_results,
    only_source,
)

_BYTE_BITS = 8
_CLOSE = Fraction(1, 256)  # LSB


@dataclass(frozen=True)
class LowerRotary(Pass):
    """Puts one integer function in the place of two products with tables and their sum.

    Before → after, C and S constants (or not: qnpu.IntRotateBy)::

        DQ(a) · DQ(C) → Q → DQ ↘
                                Add, Sub → Q            qnpu.IntRotate(a, b)
        DQ(b) · DQ(S) → Q → DQ ↗

    y = clamp(⌊((q_a - z_a)·c + (q_b - z_b)·s)/2^n + 1/2⌋ + z_y), c = round(C·s_a/s_y·2^n), n such
    that sums of 8-bit codes stay within 31 bits (quantnpu.md §6: cosines as fixed-point numbers).
    Both products are neither rounded nor clipped on the way, so this is nearer to the float graph
    than the Q/DQ graph is; from that it differs by 1 LSB of the result and half an LSB of each
    product, and by more where a product is clipped there.

    A result that is only narrowed is narrow from the beginning.

    Tables that are computed, as for positions that come in, stay codes of their own.

    Must not fire in a graph whose linears all take 16 bits: it is exact rather than fast, and each
    of the Q/DQ graph's roundings is kept. Nor where a product is used twice, shapes differ, or
    computed tables or what they are multiplied with differ in scale.
    """

    name: ClassVar[str] = "lower-rotary"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        if min(_input_bits(model.graph), default=0) > _BYTE_BITS:
            return 0
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            if not is_standard(node) or node.op_type not in ("Add", "Sub"):
                continue
            products = [_product(value) for value in node.inputs]
            results = coded_results(node.outputs[0])
            one, other = products if len(products) == 2 else (None, None)
            if one is None or other is None or not results:
                continue
            if static_shape(one.operand.codes) != static_shape(other.operand.codes):
                continue
            narrow = [NarrowedResult.of(result, moved=False).result for result in results]
            made = [_rotated(editor, node, one, other, result) for result in narrow]
            count += editor.take_over_all([result.codes for result in narrow], made)
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


def _input_bits(graph: ir.Graph) -> Iterator[int]:
    """Bits of what each linear takes."""
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or not is_standard(node):
            continue
        one, other = coded_input(node.inputs[0]), node.inputs[1]
        weight = input_operand(other) if other is not None else None
        if one is not None and weight is not None and weight.constant:
            yield one.encoding.spec.bits


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """Codes times those of a table.

    Attributes:
        operand: the former, of the product's shape.
        table: the latter.
    """

    operand: CodedInput
    table: CodedInput

    @property
    def real(self) -> NDArray[np.float64] | None:
        """The table, where it is constant."""
        codes = constant_array(self.table.codes)
        if codes is None:
            return None
        return (codes.astype(np.float64) - self.table.zero_point) * self.table.scale


def _product(value: ir.Value | None) -> _Product | None:
    """What a sum takes, where that is such a product, used nowhere else."""
    node = only_source(value)
    if node is None or node.op_type != "Mul":
        return None
    one, other = (coded_input(item) for item in node.inputs)
    if one is None or other is None:
        return None
    shape = static_shape(node.outputs[0])
    if one.constant or static_shape(one.codes) != shape:
        one, other = other, one
    if one.constant or shape is None or static_shape(one.codes) != shape:
        return None
    return _Product(one, other)


def _rotated(
    editor: IntegerEditor, node: ir.Node, one: _Product, other: _Product, result: CodedResult
) -> ir.Value | None:
    sign = -1 if node.op_type == "Sub" else 1
    first, second = one.real, other.real
    if first is None or second is None:
        return _rotated_by(editor, node, one, other, result, sign)
    numbers = rotary_numbers(
        (
            first * (one.operand.scale / result.scale),
            second * (sign * other.operand.scale / result.scale),
        ),
        (one.operand.reach, other.operand.reach),
        result.encoding,
    )
    zeros = one.operand.zero_point, other.operand.zero_point
    kind = ir.DataType.from_numpy(numbers.tables[0].dtype)
    unsigned = ir.DataType.UINT32 if kind is ir.DataType.INT32 else ir.DataType.UINT64
    return editor.call(
        "IntRotate",
        [one.operand.codes, other.operand.codes],
        rotate_arguments(numbers, zeros, result.zero_point, result.encoding.spec),
        result.codes,
        before=node,
        word=int(kind),
        unsigned=int(unsigned),
    )


def _rotated_by(
    editor: IntegerEditor,
    node: ir.Node,
    one: _Product,
    other: _Product,
    result: CodedResult,
    sign: int,
) -> ir.Value | None:
    """By tables that are computed, as those of positions that come in."""
    products = (one, other)
    ratios = [
        exact_ratios([item.operand.encoding.scale, item.table.encoding.scale], result.scale)[0]
        for item in products
    ]
    bounds = [item.operand.reach * item.table.reach for item in products]
    if ratios[0] != ratios[1]:
        return None
    fixed = fixed_point(ratios[:1], [sum(bounds)], result.encoding, close=_CLOSE)
    if fixed.low is not None:
        return None
    word = np.int32 if sum(bounds) <= INT32_MAX else np.int64
    parts = [*(item.operand for item in products), *(item.table for item in products)]
    a, b, cosines, sines = (part.zero_point for part in parts)
    arguments = rotate_by_arguments(
        fixed, (a, b, cosines, sines), sign, result.zero_point, result.encoding.spec, word
    )
    return editor.call(
        "IntRotateBy",
        [part.codes for part in parts],
        arguments,
        result.codes,
        before=node,
        word=int(ir.DataType.from_numpy(np.dtype(word))),
    )
