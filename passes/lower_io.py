"""lower-io: graph inputs and outputs become the codes themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import keeps_name, name_of, replace_value
from qnpu.compiler.integer_io import mark_integer
from qnpu.compiler.op_traits import is_float
from qnpu.compiler.operands import input_operand, output_operand
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of
from qnpu.compiler.quant_types import Encoding


@dataclass(frozen=True)
class LowerIo(Pass):
    """Takes QuantizeLinear off inputs and DequantizeLinear off outputs, and notes the encodings.

    Before → after::

        x: float → Q(s_x, z_x) → DQ(s_x, z_x) → MatMul → Q(s_y, z_y) → DQ(s_y, z_y) → y: float
        x: u16 → DQ(s_x, z_x) → MatMul → Q(s_y, z_y) → y: u16

    Names stay. Who feeds the graph sends q = clamp(round(x / s_x) + z_x) and reads
    s_y · (q - z_y); scales and zero points are in the model's metadata (``integer_io``), from
    which ``with_real_io`` makes the graph as it was. The codes are those of before, bit for bit.

    Must not fire on an input that something else reads too, or is quantized in two ways; on an
    output without a scale, with several, or made of a constant; on codes of less than a byte.
    """

    name: ClassVar[str] = "lower-io"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        graph, editor = compilation.graph, QdqEditor(compilation.graph)
        lowered: dict[str, Encoding] = {}
        for value in graph.inputs:
            encoding = encoding_of(output_operand(value)) if is_float(value) else None
            if encoding is not None and encoding.spec.bits >= 8:
                _lower_input(graph, value, encoding)
                lowered[name_of(value)] = encoding
        for index, value in enumerate(graph.outputs):
            operand = input_operand(value)
            encoding = encoding_of(operand) if is_float(value) and not operand.constant else None
            if encoding is not None and encoding.spec.bits >= 8 and operand.codes is not None:
                lowered[name_of(value)] = encoding
                graph.outputs[index] = _lower_output(editor, value, operand.codes)
        mark_integer(compilation.model, lowered)
        if lowered:
            common.RemoveUnusedNodesPass()(compilation.model)
        return len(lowered)


def _lower_input(graph: ir.Graph, value: ir.Value, encoding: Encoding) -> None:
    value.type = ir.TensorType(encoding.spec.dtype)
    for quantize in list(value.consumers()):
        replace_value(graph, quantize.outputs[0], value)
        graph.remove(quantize, safe=True)


def _lower_output(editor: QdqEditor, value: ir.Value, codes: ir.Value) -> ir.Value:
    """Codes under the name of an output; a copy where they have a name of their own to keep."""
    name = name_of(value)
    value.name = editor.free_name(f"{name}_dequantized")
    if keeps_name(codes):
        copy = ir.node("Identity", [codes], name=editor.free_name(f"Identity_{name}"))
        editor.graph.append(copy)
        copy.outputs[0].type, copy.outputs[0].shape = codes.type, codes.shape
        codes = copy.outputs[0]
    codes.name = name
    return codes
