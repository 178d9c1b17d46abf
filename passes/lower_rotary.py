"""lower-rotary: a sum of two products with constant tables, as RoPE is, in one rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.integer_arguments import rotate_arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import rotary_numbers
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quantized_attention import NarrowedResult
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    only_source,
)


@dataclass(frozen=True)
class LowerRotary(Pass):
    """Puts one integer function in the place of two products with constants and their sum.

    Before → after, C and S constants::

        DQ(a) · DQ(C) → Q → DQ ↘
                                Add, Sub → Q            qnpu.IntRotate(a, b)
        DQ(b) · DQ(S) → Q → DQ ↗

    y = clamp(⌊((q_a - z_a)·c + (q_b - z_b)·s)/2^n + 1/2⌋ + z_y), c = round(C·s_a/s_y·2^n), n such
    that sums of 8-bit codes stay within 31 bits (quantnpu.md §6: cosines as fixed-point numbers).
    Both products are neither rounded nor clipped on the way, so this is nearer to the float graph
    than the Q/DQ graph is; from that it differs by 1 LSB of the result and half an LSB of each
    product, and by more where a product is clipped there.

    A result that is only narrowed is narrow from the beginning.

    Must not fire where a product is used twice, a table is no constant, or shapes differ.
    """

    name: ClassVar[str] = "lower-rotary"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            if not is_standard(node) or node.op_type not in ("Add", "Sub"):
                continue
            products = [_product(value) for value in node.inputs]
            results = coded_results(node.outputs[0])
            one, other = products if len(products) == 2 else (None, None)
            if one is None or other is None or not results:
                continue
            if one.shape != other.shape:
                continue
            narrow = [NarrowedResult.of(result, moved=False).result for result in results]
            made = [_rotated(editor, node, one, other, result) for result in narrow]
            count += editor.take_over_all([result.codes for result in narrow], made)
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """Codes times a constant.

    Attributes:
        operand: the codes.
        table: the constant, real.
        shape: of the product.
    """

    operand: CodedInput
    table: NDArray[np.float64]
    shape: tuple[int, ...]


def _product(value: ir.Value | None) -> _Product | None:
    """What a sum takes, where that is such a product, used nowhere else."""
    node = only_source(value)
    if node is None or node.op_type != "Mul":
        return None
    one, other = (coded_input(item) for item in node.inputs)
    if one is None or other is None:
        return None
    if one.constant:
        one, other = other, one
    codes, shape = constant_array(other.codes), static_shape(node.outputs[0])
    if one.constant or codes is None or shape is None or static_shape(one.codes) != shape:
        return None
    return _Product(one, (codes.astype(np.float64) - other.zero_point) * other.scale, shape)


def _rotated(
    editor: IntegerEditor, node: ir.Node, one: _Product, other: _Product, result: CodedResult
) -> ir.Value:
    sign = -1 if node.op_type == "Sub" else 1
    numbers = rotary_numbers(
        (
            one.table * (one.operand.scale / result.scale),
            other.table * (sign * other.operand.scale / result.scale),
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
