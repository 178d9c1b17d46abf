"""What is handed out: a Q/DQ graph, and a float graph with encodings that say the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import (
    constant_array,
    keeps_name,
    name_of,
    register_tensor,
    replace_value,
    shape_of,
)
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE, Operand, input_operand
from qnpu.compiler.qdq_edit import QdqEditor, block_encoding_of
from qnpu.compiler.quant_types import Encoding, PerChannel, PerTensor, QuantSpec

_SUFFIX = "_quantized"


@dataclass(frozen=True, slots=True)
class Handout:
    """One quantized model in two forms.

    Attributes:
        model: the Q/DQ graph.
        float_model: the same without Q/DQ pairs; constants are what their codes stand for, so that
            any tool rounds them to these codes (biases do as far as float32 holds their codes,
            below 2²⁴). Shares no tensor that it changes.
        encodings: of every tensor of the float graph that has one in the Q/DQ graph.
    """

    model: ir.Model
    float_model: ir.Model
    encodings: EncodingTable


def make_handout(model: ir.Model) -> Handout:
    """Takes Q/DQ pairs out of a copy of a graph and notes their encodings.

    Before → after, a, b, c, w encodings::

        x → Q(a) → DQ(a) → MatMul(DQ(W_quantized, w)) → h → Q(b) → DQ(b) → Q(c) → DQ(c) → y
        x → MatMul(W) → h → Identity → y                                    x: a, W: w, h: b, y: c

    A pair behind a pair changes the encoding, so an Identity stands there. What has no single
    scale, one per channel, or blocks with whole scales over one per channel (LPBQ), stays behind
    its DequantizeLinear, without an encoding.
    Inputs and outputs that are codes become real.

    Args:
        model: Q/DQ, typed, in topological order; not changed.
    """
    real = with_real_io(model)
    splitter = _Splitter(model.clone() if real is model else real)
    for node in list(splitter.graph):
        if node.op_type == DEQUANTIZE and not _makes_scales(node):
            splitter.constant(node)
    for node in list(splitter.graph):
        if node.op_type == QUANTIZE:
            splitter.pair(node)
    for node in splitter.graph:
        if node.op_type == DEQUANTIZE:
            splitter.note(input_operand(node.outputs[0]))
    common.RemoveUnusedNodesPass()(splitter.model)
    return Handout(model, splitter.model, splitter.table())


class _Splitter:
    """The copy that is taken apart, and encodings by value: names still change."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self._editor = QdqEditor(model.graph)
        self._encodings: dict[ir.Value, Encoding] = {}
        self._constants: dict[tuple[str, bytes, bytes, str], ir.Value] = {}

    def table(self) -> EncodingTable:
        """Encodings by name: inputs, constants, then results in graph order."""
        values = [*self.graph.inputs, *self.graph.initializers.values()]
        values += [value for node in self.graph for value in node.outputs]
        table = EncodingTable()
        for value in values:
            if value in self._encodings:
                table[name_of(value)] = self._encodings[value]
        return table

    def note(self, operand: Operand) -> None:
        """The encoding of codes that nothing here quantized."""
        encoding = _encoding(operand)
        if encoding is not None and not operand.constant:
            self._encodings.setdefault(operand.value, encoding)

    def constant(self, dequantize: ir.Node) -> None:
        """A float constant in the place of codes and their DequantizeLinear."""
        result = dequantize.outputs[0]
        operand = input_operand(result)
        encoding = _encoding(operand)
        if operand.codes is None or encoding is None or result.dtype is None:
            return
        tensor = operand.codes.const_value
        if tensor is None or not operand.constant:
            return
        blocks = b"" if encoding.block_scales is None else encoding.block_scales.tobytes()
        parts = encoding.scale.tobytes() + blocks, encoding.zero_point.tobytes(), str(encoding.spec)
        key = (name_of(operand.codes), *parts)
        if key not in self._constants:
            name = self._name(operand.codes, result)
            real = _dequantized(tensor, encoding, result.dtype, name)
            self._constants[key] = register_tensor(self.graph, real)
            self._encodings[self._constants[key]] = encoding
        self._replace(dequantize, self._constants[key], encoding)

    def pair(self, quantize: ir.Node) -> None:
        """Whoever reads what a pair makes reads what goes into it."""
        source, codes = quantize.inputs[0], quantize.outputs[0]
        readers = [node for node in codes.consumers() if _undoes(node, quantize)]
        encoding = _encoding(input_operand(readers[0].outputs[0])) if readers else None
        if source is None or encoding is None:
            return
        if source.const_value is not None and source not in self._encodings:
            source.const_value = _rounded(source.const_value, encoding)
        if not self._encodings.setdefault(source, encoding).same_as(encoding):
            source = self._copy(source, encoding, self._name(codes, readers[0].outputs[0]))
        for node in readers:
            self._replace(node, source, encoding)
        if not codes.uses() and not codes.is_graph_output():
            self.graph.remove(quantize, safe=True)

    def _replace(self, dequantize: ir.Node, source: ir.Value, encoding: Encoding) -> None:
        """Whoever reads the DequantizeLinear reads the source; an output keeps its name."""
        result = dequantize.outputs[0]
        if result.is_graph_output() and keeps_name(source):
            source = self._copy(source, encoding, name_of(result))
        replace_value(self.graph, result, source)
        self.graph.remove(dequantize, safe=True)

    def _copy(self, source: ir.Value, encoding: Encoding, name: str) -> ir.Value:
        label = self._editor.free_name(f"Identity_{name}")
        node = ir.node("Identity", [source], name=label)
        copy = node.outputs[0]
        copy.name, copy.type, copy.shape = name, source.type, source.shape
        self._editor.insert_behind(source, node)
        self._encodings[copy] = encoding
        return copy

    def _name(self, codes: ir.Value, result: ir.Value) -> str:
        """The name that a tensor had before it was quantized, as far as names tell."""
        whole, going = name_of(codes), name_of(result)
        name = whole.removesuffix(_SUFFIX) if whole.endswith(_SUFFIX) else going
        return name if name == going else self._editor.free_name(name)


def _makes_scales(dequantize: ir.Node) -> bool:
    """What it gives is the scale of other codes, and nothing else."""
    uses = list(dequantize.outputs[0].uses())
    return bool(uses) and all(node.op_type == DEQUANTIZE and index == 1 for node, index in uses)


def _undoes(node: ir.Node, quantize: ir.Node) -> bool:
    """A DequantizeLinear with the very numbers of the QuantizeLinear before it."""
    return node.op_type == DEQUANTIZE and all(
        first is second or np.array_equal(_numbers(first), _numbers(second))
        for first, second in zip_longest(node.inputs[1:], quantize.inputs[1:])
    )


def _numbers(value: ir.Value | None) -> NDArray[Any]:
    array = constant_array(value)
    return np.zeros(0) if array is None else array


def _encoding(operand: Operand) -> Encoding | None:
    """The encoding of an operand: per tensor, channel, or block (LPBQ); None for any other.

    Signed codes with every zero point 0 are called symmetric, as in ``read_encodings``.
    """
    if operand.granularity == "lpbq":
        return block_encoding_of(operand)
    scale, zero = operand.scale, operand.zero_point
    if scale is None or zero is None or operand.granularity not in ("tensor", "channel"):
        return None
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return None
    signed, bits = operand.dtype[:1] == "s", operand.dtype[1:]
    if operand.dtype not in ("u4", "s4", "u8", "s8", "u16", "s16", "s32"):
        return None
    channels = operand.granularity == "channel"
    granularity = PerChannel(operand.axis) if channels else PerTensor()
    shape = (-1,) if channels else ()
    spec = QuantSpec(int(bits), signed, signed and not zero.any(), granularity)
    zeros = np.broadcast_to(
        zero.reshape(shape if zero.size > 1 else ()), scale.reshape(shape).shape
    )
    return Encoding(spec, scale.reshape(shape).astype(np.float32), zeros.astype(np.int32))


def _dequantized(
    codes: ir.TensorProtocol, encoding: Encoding, dtype: ir.DataType, name: str
) -> ir.LazyTensor:
    """What constant codes stand for; computed when it is written."""

    def compute() -> ir.TensorProtocol:
        real = encoding.dequantize(codes.numpy())
        return ir.tensor(real.astype(dtype.numpy()), name=name)

    return ir.LazyTensor(compute, dtype, shape_of(codes), name=name)


def _rounded(real: ir.TensorProtocol, encoding: Encoding) -> ir.LazyTensor:
    """A constant that the graph itself quantizes, as what its codes stand for."""
    whole = replace(encoding, spec=replace(encoding.spec, symmetric=False))  # -128 is in use too

    def compute() -> ir.TensorProtocol:
        array = real.numpy()
        rounded = whole.dequantize(whole.quantize(array)).astype(array.dtype)
        return ir.tensor(rounded, name=real.name)

    return ir.LazyTensor(compute, real.dtype, shape_of(real), name=real.name)
