"""fold-conversions: a result that is only narrowed is rounded once, to the narrow type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.op_traits import is_standard, layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quantized_results import only_user

_EXACT = frozenset({"Add", "Sub", "MatMul", "Gemm", "Conv", "Neg"})
"""What integers compute exactly as the Q/DQ graph says keeps both roundings, and stays equal."""


@dataclass(frozen=True)
class FoldConversions(Pass):
    """Leaves out an encoding that nothing reads but a pair that changes it.

    Before → after::

        RMSNormalization → Q(u16) → DQ(u16) → Q(u8)        RMSNormalization → Q(u8)

    ⌊x/s_8⌉ in the place of ⌊s_16·⌊x/s_16⌉/s_8⌉: nearer to x, and another code in about one of 2^8
    cases. Meant for integer graphs, where each rounding costs several operators; an NPU's own
    operators may want the wider type.

    Must not fire on sums and products with weights, on layout operators, where the wide codes are
    read elsewhere or are an output, on what is no operator of ONNX, or where the second type is not
    narrower.
    """

    name: ClassVar[str] = "fold-conversions"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        count = 0
        for node in list(model.graph):
            if not is_standard(node) or node.op_type in (*_EXACT, QUANTIZE, DEQUANTIZE):
                continue
            if len(node.outputs) == 1 and not layout_inputs(node) and _fold(node.outputs[0]):
                count += 1
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


def _fold(value: ir.Value) -> bool:
    """Lets the narrow QuantizeLinear read the value itself."""
    wide = only_user(value, QUANTIZE)
    dequantize = only_user(wide.outputs[0], DEQUANTIZE) if wide is not None else None
    narrow = only_user(dequantize.outputs[0], QUANTIZE) if dequantize is not None else None
    if wide is None or dequantize is None or narrow is None:
        return False
    before, after = wide.outputs[0].dtype, narrow.outputs[0].dtype
    if before is None or after is None or before.bitwidth <= after.bitwidth:
        return False
    if list(wide.inputs[1:]) != list(dequantize.inputs[1:]):
        return False
    narrow.replace_input_with(0, value)
    return True
