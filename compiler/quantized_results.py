"""Nodes of a Q/DQ graph with the codes they take and the codes that become of their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE, Operand, input_operand
from qnpu.compiler.qdq_edit import encoding_of, equal, spec_of
from qnpu.compiler.quant_types import Encoding, FloatArray


def stored_type(kind: ir.DataType) -> ir.DataType:
    """The type of integers that hold codes of a type: a byte for those of four bits."""
    wide = {ir.DataType.UINT4: ir.DataType.UINT8, ir.DataType.INT4: ir.DataType.INT8}
    return wide.get(kind, kind)


def table_order(count: int, *, signed: bool) -> NDArray[np.int64]:
    """As many codes in the order of a table, which negative ones are read from the end of."""
    codes = np.arange(count)
    return np.where(codes >= count // 2, codes - count, codes) if signed else codes


@dataclass(frozen=True, slots=True, eq=False)
class CodedInput:
    """An input of a node, as codes under one scale.

    Attributes:
        codes: the integers.
        encoding: what they stand for.
        constant: they are an initializer.
    """

    codes: ir.Value
    encoding: Encoding
    constant: bool

    @property
    def scale(self) -> float:
        return float(self.encoding.scale)

    @property
    def zero_point(self) -> int:
        return int(self.encoding.zero_point)

    @property
    def reach(self) -> int:
        """Greatest distance of a code in use from the zero point, LSB."""
        return self.encoding.reach

    @property
    def table_order(self) -> NDArray[np.int64]:
        """All codes in the order of a table."""
        spec = self.encoding.spec
        return table_order(1 << spec.bits, signed=spec.signed)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """All codes less the zero point, LSB, in the order of a table."""
        return self.table_order - self.zero_point

    @property
    def single(self) -> int | None:
        """The one code of a constant that has no other, less its zero point."""
        array = constant_array(self.codes) if self.constant else None
        if array is None or array.size != 1:
            return None
        return int(array.reshape(())) - self.zero_point


def coded_input(value: ir.Value | None) -> CodedInput | None:
    """An input as codes; None where it is no dequantized tensor with one scale."""
    if value is None:
        return None
    operand = input_operand(value)
    encoding = encoding_of(operand)
    if encoding is None or operand.codes is None:
        return None
    return CodedInput(operand.codes, encoding, operand.constant)


@dataclass(frozen=True, slots=True, eq=False)
class CodedResult:
    """Codes that a QuantizeLinear makes of a node's result.

    Attributes:
        quantize: the QuantizeLinear.
        encoding: its own.
        codes: what it gives, or a part of that along the last axis.
    """

    quantize: ir.Node
    encoding: Encoding
    codes: ir.Value

    @property
    def scale(self) -> float:
        return float(self.encoding.scale)

    @property
    def zero_point(self) -> int:
        return int(self.encoding.zero_point)

    def rounded(self, real: FloatArray) -> NDArray[Any]:
        """Codes of numbers, float64, at the scale of the result: rounded half up, clipped.

        float64 is off by 2^-36 LSB at most, as results have 16 bits.
        """
        spec = self.encoding.spec
        nearest = np.floor(real + 0.5) + self.zero_point
        kind = stored_type(spec.dtype).numpy()
        codes: NDArray[Any] = np.clip(nearest, spec.q_min, spec.q_max).astype(kind)
        return codes


def coded_results(value: ir.Value) -> list[CodedResult] | None:
    """All that a result is read as; None where something reads it as a float."""
    found: list[CodedResult] = []
    for user in value.consumers():
        encoding = _own_encoding(user) if user.op_type == QUANTIZE else None
        if encoding is None:
            return None
        found.append(CodedResult(user, encoding, user.outputs[0]))
    return None if value.is_graph_output() else found


def only_user(value: ir.Value, op_type: str = "") -> ir.Node | None:
    """The node that alone reads a value, where it is of a type, if one is asked for."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output() or op_type not in ("", users[0].node.op_type):
        return None
    return users[0].node


@dataclass(frozen=True, slots=True, eq=False)
class NarrowedResult:
    """Codes that an operator may give at once.

    Attributes:
        result: what becomes of the operator's result in the end.
        layouts: operators that move its elements before that, in order.
    """

    result: CodedResult
    layouts: tuple[ir.Node, ...]

    @classmethod
    def of(cls, result: CodedResult, *, moved: bool = True) -> NarrowedResult:
        """The narrower codes where nothing else reads the wide ones; the result itself elsewhere.

        Args:
            result: the wide codes.
            moved: layout operators may lie between.
        """
        layouts: list[ir.Node] = []
        codes = result.codes
        while True:
            dequantize = only_user(codes, DEQUANTIZE)
            real = dequantize.outputs[0] if dequantize is not None else None
            found = coded_results(real) if real is not None and len(real.uses()) == 1 else None
            if found and found[0].encoding.spec.bits < result.encoding.spec.bits:
                return cls(found[0], tuple(layouts))
            user = only_user(real) if real is not None else None
            if user is None or list(layout_inputs(user)) != [real] or len(user.outputs) > 1:
                return cls(result, ())
            layouts.append(user)
            behind = coded_results(user.outputs[0]) if moved else None
            if not behind or len(behind) > 1 or not equal(behind[0].encoding, result.encoding):
                return cls(result, ())
            codes = behind[0].codes


def only_source(value: ir.Value | None) -> ir.Node | None:
    """The node behind a Q/DQ pair, where its result goes nowhere else."""
    for kind in (DEQUANTIZE, QUANTIZE):
        maker = value.producer() if value is not None and len(value.uses()) == 1 else None
        if maker is None or maker.op_type != kind:
            return None
        value = maker.inputs[0]
    return value.producer() if value is not None and len(value.uses()) == 1 else None


def conversions(graph: ir.Graph) -> Iterator[tuple[CodedInput, CodedResult]]:
    """Q/DQ pairs that change an encoding: codes before, codes after."""
    for node in list(graph):
        if node.op_type != QUANTIZE:
            continue
        before, encoding = coded_input(node.inputs[0]), _own_encoding(node)
        if before is not None and encoding is not None:
            yield before, CodedResult(node, encoding, node.outputs[0])


def real_constant(operand: Operand) -> np.ndarray | None:
    """What a constant's codes stand for, float64; None for any other operand."""
    codes = constant_array(operand.codes) if operand.constant else None
    if codes is None or operand.scale is None or operand.zero_point is None:
        return None
    shape = [1] * codes.ndim
    if operand.scale.size > 1:
        shape[operand.axis] = -1
    scale = operand.scale.astype(np.float64).reshape(shape if operand.scale.size > 1 else ())
    zero = operand.zero_point.reshape(shape if operand.scale.size > 1 else ())
    return (codes.astype(np.float64) - zero) * scale


def _own_encoding(quantize: ir.Node) -> Encoding | None:
    scale = constant_array(quantize.inputs[1])
    zero = constant_array(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    kind = quantize.outputs[0].dtype
    if scale is None or zero is None or kind is None or scale.size != 1:
        return None
    signed = not kind.name.startswith("U")
    spec = spec_of(f"{'s' if signed else 'u'}{kind.bitwidth}")
    return Encoding(spec, scale.reshape(()).astype(np.float32), zero.reshape(()).astype(np.int32))


def label(node: ir.Node) -> str:
    """What to call a node in a message."""
    return name_of(node) or name_of(node.outputs[0])
