"""Graph inputs and outputs that are codes: which they are, their encodings, and the way back.

The encodings lie in the model's metadata, so that they also stand in the file that is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, TypeAdapter

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.marks import read_mark
from qnpu.compiler.operands import input_operand, output_operand
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of
from qnpu.compiler.quant_types import Encoding, QuantSpec

MARK = "qnpu.integer_io"
_Type = Literal["INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32"]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_TABLE = TypeAdapter(dict[str, tuple[_Type, _Scale, int]])


def mark_integer(model: ir.Model, encodings: Mapping[str, Encoding]) -> None:
    """Notes inputs and outputs that are codes, by name, beside those noted before."""
    if encodings:
        table = {
            name: [str(e.spec.dtype), float(e.scale), int(e.zero_point)]
            for name, e in (integer_io(model) | dict(encodings)).items()
        }
        model.metadata_props[MARK] = json.dumps(table)


def integer_io(model: ir.Model) -> dict[str, Encoding]:
    """Inputs and outputs that are codes of real numbers, by name, each with its encoding.

    Raises:
        DiagnosticError: QN119 the mark is no table of them.
    """
    table = read_mark(model, MARK, _TABLE) or {}
    return {name: _encoding(*entry) for name, entry in table.items()}


def _encoding(dtype: str, scale: float, zero_point: int) -> Encoding:
    kind = ir.DataType[dtype]
    spec = QuantSpec(kind.bitwidth, signed=not dtype.startswith("U"), symmetric=False)
    return Encoding(spec, np.array(scale, np.float32), np.array(zero_point, np.int32))


def io_encodings(model: ir.Model) -> dict[str, Encoding]:
    """Encodings of a Q/DQ graph's inputs and outputs, codes or real; those without are left out."""
    found = {name_of(value): encoding_of(output_operand(value)) for value in model.graph.inputs}
    found |= {name_of(value): encoding_of(input_operand(value)) for value in model.graph.outputs}
    known = {name: encoding for name, encoding in found.items() if encoding is not None}
    return known | integer_io(model)


def with_real_io(model: ir.Model) -> ir.Model:
    """The same graph with real numbers in and out: lower-io undone.

    Before → after::

        x: u16 → DQ                    x: float → Q → DQ
        Q → y: u16                     Q → DQ → y: float

    Returns:
        A copy that shares weights; the model itself where nothing is lowered.
    """
    encodings = integer_io(model)
    if not encodings:
        return model
    copy = model.clone()
    del copy.metadata_props[MARK]
    graph, editor = copy.graph, QdqEditor(copy.graph)
    for value in graph.inputs:
        if name_of(value) in encodings:
            _quantize_input(editor, value, encodings[name_of(value)])
    for index, value in enumerate(graph.outputs):
        if name_of(value) in encodings:
            graph.outputs[index] = _dequantize_output(editor, value, encodings[name_of(value)])
    return copy


def _quantize_input(editor: QdqEditor, value: ir.Value, encoding: Encoding) -> None:
    name, users = name_of(value), list(value.uses())
    value.type = ir.TensorType(ir.DataType.FLOAT)
    codes = editor.quantize(value, name, editor.parameters(name, encoding))
    for user, index in users:
        user.replace_input_with(index, codes)


def _dequantize_output(editor: QdqEditor, codes: ir.Value, encoding: Encoding) -> ir.Value:
    name = name_of(codes)
    codes.name = editor.free_name(f"{name}_quantized")
    parameters = editor.parameters(name, encoding)
    result = editor.dequantize(codes, name, parameters)
    result.name = name
    return result
