"""What each node of a quantized graph computes on, as an NPU compiler sees it.

Q/DQ pairs are no operations to such a compiler: they say that a tensor is held in integers. So an
operand is described by the type of its codes, and a node by those of its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.quant_types import widened

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

_CODES = {
    ir.DataType.INT2: "s2",
    ir.DataType.INT4: "s4",
    ir.DataType.INT8: "s8",
    ir.DataType.INT16: "s16",
    ir.DataType.INT32: "s32",
    ir.DataType.UINT2: "u2",
    ir.DataType.UINT4: "u4",
    ir.DataType.UINT8: "u8",
    ir.DataType.UINT16: "u16",
}


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One input or output of a node.

    Attributes:
        value: at the node itself, behind the DequantizeLinear or before the QuantizeLinear.
        dtype: ``u8``, ``s16`` … for codes with an encoding; ONNX's name (``float``, ``int64``) for
            a tensor without one.
        shape: None where it is not static.
        constant: its codes, or numbers, are an initializer.
        granularity: ``tensor``, ``channel``, ``block``, or ``lpbq`` (a block whose scales are
            themselves quantized); empty without an encoding.
        axis: of the channels or blocks, never negative; 0 per tensor.
        block: elements per block along ``axis``; 0 where there are none.
        codes: the integer tensor; None where there is no encoding.
        scale: real units per LSB; None where it is computed (``lpbq``) or there is no encoding.
        zero_point: LSB, as ``scale``; zeros where the node leaves it out.
        has_zero_point: the node states one.
    """

    value: ir.Value
    dtype: str
    shape: tuple[int, ...] | None
    constant: bool
    granularity: str = ""
    axis: int = 0
    block: int = 0
    codes: ir.Value | None = None
    scale: NDArray[np.float32] | None = None
    zero_point: NDArray[np.int64] | None = None
    has_zero_point: bool = False

    @property
    def quantized(self) -> bool:
        """It has an encoding."""
        return bool(self.granularity)

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def same_encoding(self, other: Operand) -> bool:
        """Both give every real number the same code."""
        return self.same_scale(other) and np.array_equal(
            _flat(self.zero_point), _flat(other.zero_point)
        )

    def same_scale(self, other: Operand) -> bool:
        """Both have one type and one size of an LSB; zero points may differ."""
        return (
            self.dtype == other.dtype
            and self.granularity == other.granularity
            and np.array_equal(_flat(self.scale), _flat(other.scale))
        )

    def __str__(self) -> str:
        kind = {"": "", "tensor": ""}.get(self.granularity, f" per {self.granularity}")
        return f"{'constant ' if self.constant else ''}{self.dtype}{kind}"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A node with what it computes on.

    Attributes:
        node: neither QuantizeLinear nor DequantizeLinear, unless a Q/DQ pair changes an encoding:
            then its QuantizeLinear, and ``op_type`` is ``Convert``.
        op_type: as in the profiles; with the domain in front where it is not the standard one.
        inputs: one per input of the node, None where it is left out.
        outputs: those in use.
    """

    node: ir.Node
    op_type: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]

    @property
    def present(self) -> list[Operand]:
        """Inputs that are not left out."""
        return [operand for operand in self.inputs if operand is not None]

    @property
    def rank(self) -> int | None:
        """The largest rank among inputs and outputs, of those that are known; None for none."""
        ranks = [operand.rank for operand in (*self.present, *self.outputs)]
        return max((rank for rank in ranks if rank is not None), default=None)

    def __str__(self) -> str:
        inputs = ", ".join("-" if operand is None else str(operand) for operand in self.inputs)
        return f"{self.op_type}({inputs}) -> {', '.join(map(str, self.outputs))}"


def operations(graph: ir.Graph) -> Iterator[Operation]:
    """Every node that does something, in graph order."""
    for node in graph:
        operation = operation_of(node)
        if operation is not None:
            yield operation


def operation_of(node: ir.Node) -> Operation | None:
    """A node with what it computes on; None for one that only says how a tensor is held."""
    if _is(node, DEQUANTIZE):
        return None
    if _is(node, QUANTIZE):
        return _change_of_encoding(node)
    return Operation(
        node,
        node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}",
        tuple(None if value is None else input_operand(value) for value in node.inputs),
        tuple(output_operand(v) for v in node.outputs if v.uses() or v.is_graph_output()),
    )


def input_operand(value: ir.Value) -> Operand:
    """How a node's input is held."""
    producer = value.producer()
    if producer is not None and _is(producer, DEQUANTIZE) and producer.inputs[0] is not None:
        return _encoded(value, producer, producer.inputs[0])
    return _plain(value)


def output_operand(value: ir.Value) -> Operand:
    """How a node's output is held: encoded where each user quantizes it, and all alike."""
    users = list(value.consumers())
    if value.is_graph_output():
        return _plain(value)
    if not users or any(not _is(user, QUANTIZE) for user in users):
        return _plain(value)
    found = [_encoded(value, user, user.outputs[0]) for user in users]
    return found[0] if all(other.same_encoding(found[0]) for other in found) else _plain(value)


def _is(node: ir.Node, op_type: str) -> bool:
    """The operator of either domain that has it."""
    return node.op_type == op_type and node.domain in ("", "ai.onnx", "com.microsoft")


def _change_of_encoding(quantize: ir.Node) -> Operation | None:
    """DequantizeLinear → QuantizeLinear with other numbers: the tensor is requantized."""
    source = quantize.inputs[0]
    if source is None:
        return None
    before = input_operand(source)
    if not before.quantized or before.constant:
        return None
    after = _encoded(source, quantize, quantize.outputs[0])
    return (
        None if before.same_encoding(after) else Operation(quantize, "Convert", (before,), (after,))
    )


def _plain(value: ir.Value) -> Operand:
    dtype = "?" if value.dtype is None else value.dtype.name.lower()
    return Operand(value, dtype, static_shape(value), value.const_value is not None)


def _encoded(value: ir.Value, node: ir.Node, codes: ir.Value) -> Operand:
    """An operand as a QuantizeLinear or DequantizeLinear says it is held."""
    shape = static_shape(value) or static_shape(codes)
    scale_value = node.inputs[1]
    scale = constant_array(scale_value)
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = _integers(constant_array(zero_value))
    if zero is None and scale is not None:
        zero = np.zeros(scale.shape, np.int64)
    block = node.attributes.get_int("block_size", 0)
    producer = scale_value.producer() if scale_value is not None else None
    granularity = "tensor"
    if producer is not None and _is(producer, DEQUANTIZE):
        granularity = "lpbq"
    elif block:
        granularity = "block"
    elif scale is not None and scale.size > 1:  # a vector of one counts as per tensor
        granularity = "channel"
    axis = node.attributes.get_int("axis", 1)
    if axis < 0 and shape is not None:
        axis += len(shape)
    return Operand(
        value,
        _code_type(codes, zero_value),
        shape,
        codes.const_value is not None and not codes.is_graph_input(),
        granularity,
        0 if granularity == "tensor" else axis,
        block,
        codes,
        scale,
        zero,
        zero_value is not None,
    )


def _code_type(codes: ir.Value, zero_point: ir.Value | None) -> str:
    dtype = codes.dtype or (zero_point.dtype if zero_point is not None else None)
    if dtype is None:
        return "?"
    return _CODES.get(dtype, dtype.name.lower())


def _integers(array: NDArray[Any] | None) -> NDArray[np.int64] | None:
    return None if array is None else widened(array).astype(np.int64)


def _flat(array: NDArray[Any] | None) -> NDArray[Any]:
    return np.zeros(0) if array is None else array.reshape(-1)
