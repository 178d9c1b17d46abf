"""insert-qdq: write encodings into the graph as QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_checks import is_quantized
from qnpu.compiler.graph_edit import (
    constant_array,
    name_of,
    replace_uses,
)
from qnpu.compiler.op_traits import float_values, is_float
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.qdq_edit import QdqEditor
from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel
from qnpu.compiler.rules import MissingEncoding


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Puts a Q/DQ pair on every float tensor and stores constants as integers.

    Before → after::

        h = MatMul(x, W)

        h = MatMul(x_dequantized, W_dequantized)       W_dequantized = DQ(W_quantized, scale[N], 0)
        h_quantized = Q(h, h_scale, h_zero_point)
        h_dequantized = DQ(h_quantized, h_scale, h_zero_point)

    A weight in blocks (LPBQ) has its scales dequantized in turn: W_dequantized =
    DQ(W_quantized, DQ(W_block_scale, W_channel_scale, 0), 0).

    q = clamp(round(x / s) + z), x̂ = s · (q - z); half to even, as QuantizeLinear-23. Zero points
    are explicit everywhere (a default one is uint8). A requantize point's Identity becomes its
    Q/DQ pair alone. Graph outputs keep their names and are the dequantized values.

    Must not fire on integer tensors, a graph that has Q/DQ pairs, or an input or constant that is
    handed through to an output. Raises QN303 for a float tensor without an encoding.
    """

    name: ClassVar[str] = "insert-qdq"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        graph, table = compilation.graph, compilation.encodings
        if is_quantized(graph):
            return 0
        editor = QdqEditor(graph)
        values = float_values(graph)
        _check_complete(values, table)
        position = {node: index for index, node in enumerate(graph)}
        for value in values:
            encoding = table[name_of(value)]
            if value.is_initializer():
                first_user = min(value.consumers(), key=position.__getitem__)
                _store_quantized(editor, value, table, first_user)
            else:
                _insert_pair(editor, value, encoding)
        for node in list(graph):
            if node.op_type == "Identity" and is_float(node.outputs[0]) and node.inputs[0]:
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                graph.remove(node, safe=True)
        common.TopologicalSortPass()(compilation.model)
        return len(values)


def _check_complete(values: list[ir.Value], table: EncodingTable) -> None:
    missing = [name_of(v) for v in values if name_of(v) not in table]
    if missing:
        raise DiagnosticError([MissingEncoding(name).at(value=name) for name in missing])


def _store_quantized(
    editor: QdqEditor, value: ir.Value, table: EncodingTable, first_user: ir.Node
) -> None:
    """Dequantizes just before the first use, so that no float weight lives longer than needed."""
    name = name_of(value)
    encoding, array = table[name], constant_array(value)
    if array is None or value.dtype is None:
        return
    codes = editor.constant(f"{name}_quantized", table.quantize(name, array), encoding.spec.dtype)
    if isinstance(encoding.spec.granularity, PerBlock):
        real = editor.dequantize_blocks(codes, name, encoding, value.dtype, before=first_user)
    else:
        real = _dequantized(editor, value, encoding, codes, first_user)
    replace_uses(value, real)
    if not value.is_graph_output():
        del editor.graph.initializers[name]


def _dequantized(
    editor: QdqEditor, value: ir.Value, encoding: Encoding, codes: ir.Value, first_user: ir.Node
) -> ir.Value:
    name, axis = name_of(value), {}
    if isinstance(encoding.spec.granularity, PerChannel):
        # Counted from the end: ONNX Runtime 1.32 turns DequantizeLinear(axis=1) → MatMul into
        # MatMulNBits with int8 activations, 129 LSB off at 16 bits, but leaves axis=-1 alone.
        axis["axis"] = encoding.spec.granularity.axis - len(codes.shape or ())
    dtype = value.dtype or ir.DataType.FLOAT
    parameters = editor.parameters(name, encoding)
    return editor.dequantize(codes, name, parameters, dtype, before=first_user, **axis)


def _insert_pair(editor: QdqEditor, value: ir.Value, encoding: Encoding) -> None:
    name, handed_out = name_of(value), value.is_graph_output() and not value.is_graph_input()
    if not value.uses() and not handed_out:
        return
    if handed_out:
        value.name = f"{name}_unquantized"
    dequantized = editor.encode_between(value, encoding, base=name)
    if handed_out:
        dequantized.name = name
        outputs = editor.graph.outputs
        outputs[outputs.index(value)] = dequantized
