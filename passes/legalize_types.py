"""Rewrites of legalize-target: types and encodings of operands and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, Operand, Operation, output_operand
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of, equal, finer, same_numbers, spec_of
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.target import OpRule

# Only the first operand of these has the type of the result; the others are weights and gains, or
# (of a MatMul of two activations) have a type of their own.
_FIRST_ONLY = frozenset(
    {
        "MatMul",
        "Gemm",
        "Conv",
        "ConvTranspose",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "LayerNormalization",
        "InstanceNormalization",
        "BatchNormalization",
    }
)


@dataclass(frozen=True, slots=True)
class Retyping:
    """Other encodings for operands and results of a node, by index.

    Attributes:
        inputs: per tensor.
        outputs: as ``inputs``; the old one follows behind.
    """

    inputs: dict[int, Encoding]
    outputs: dict[int, Encoding]

    @property
    def changes(self) -> bool:
        """There is something to do."""
        return bool(self.inputs or self.outputs)

    def expected(self, operation: Operation) -> Operation:
        """The node as it will be."""
        inputs, outputs = list(operation.inputs), list(operation.outputs)
        for index, encoding in self.inputs.items():
            operand = inputs[index]
            inputs[index] = operand if operand is None else _with_encoding(operand, encoding)
        for index, encoding in self.outputs.items():
            outputs[index] = _with_encoding(outputs[index], encoding)
        return replace(operation, inputs=tuple(inputs), outputs=tuple(outputs))

    def apply(self, editor: QdqEditor, operation: Operation) -> None:
        """Changes the graph."""
        for index, encoding in self.inputs.items():
            editor.requantize_input(operation.node, index, encoding)
        for index, encoding in self.outputs.items():
            editor.requantize_output(operation.outputs[index].value, encoding)


def _with_encoding(operand: Operand, encoding: Encoding) -> Operand:
    kind = f"{'s' if encoding.spec.signed else 'u'}{encoding.spec.bits}"
    zero = encoding.zero_point.astype(np.int64)
    return replace(
        operand,
        dtype=kind,
        scale=encoding.scale,
        zero_point=zero,
        has_zero_point=True,
        codes=None,  # new ones, which are no input or output of the graph
    )


def second_operand(operation: Operation, rule: OpRule) -> Retyping:
    """Converts the second operand of a MatMul of two activations to the row's type.

    Before → after::

        MatMul(DQ(u16), DQ(u16))
        MatMul(DQ(u16), DQ(s16))          DQ(u16) → Q(s16) → DQ(s16)

    The zero point becomes the middle code. To s16 this is exact from eight bits, at codes 64 times
    finer, and from 16 where it was in the middle before; elsewhere the new encoding is the
    symmetric one that holds the range of the old.

    Must not fire on a constant, or an operand with more than one scale.
    """
    operand = operation.inputs[1] if len(operation.inputs) > 1 else None
    encoding = encoding_of(operand) if operand is not None and not operand.constant else None
    if encoding is None:
        return Retyping({}, {})
    other = _in_type(encoding, spec_of(rule.to))
    return Retyping({} if equal(other, encoding) else {1: other}, {})


def _in_type(encoding: Encoding, spec: QuantSpec) -> Encoding:
    """A symmetric encoding of a type that holds what another one does."""
    middle = 0 if spec.signed else 1 << (spec.bits - 1)
    if spec.bits == encoding.spec.bits:
        moved = same_numbers(encoding, spec)
        if moved.zero_point == middle:
            return moved
    if spec.bits > encoding.spec.bits:  # |code - zero point| < 256
        scale = np.asarray(encoding.scale / 64, np.float32)
        return Encoding(spec, scale, np.asarray(middle, np.int32))
    symmetric = QuantSpec(spec.bits, spec.signed, symmetric=True)
    found = Encoding.from_range(symmetric, encoding.low, encoding.high)
    return Encoding(spec, found.scale, found.zero_point)


def one_type(operation: Operation, rule: OpRule) -> Retyping:
    """Gives operands and result of a node the widest type among them.

    Before → after::

        Add(DQ(u16), DQ(u8)) → Q(u16)      Add(DQ(u16), DQ(u16)) → Q(u16)    DQ(u8) → Q(u16) → DQ
        MatMul(DQ(u8), DQ(s8)) → Q(u16)    MatMul(DQ(u16), DQ(s8)) → Q(u16)
        Softmax(DQ(u16)) → Q(u8)           Softmax(DQ(u16)) → Q(u16) → DQ(u16) → Q(u8)

    Codes 256 times finer over the same range hold every number of the narrower type, so operands
    change exactly. (Codes of the old scale would too, but a multiplier of 16 by 8 bits rounds by
    the range of its input: on Hexagon's emulator 90 LSB off in the mean, against 1.) A result is
    rounded twice: within 1 LSB.

    Must not fire where an operand or result has more than one scale.
    """
    inputs = _encodings({index: operation.inputs[index] for index in _typed_alike(operation)})
    outputs = _encodings({k: o for k, o in enumerate(operation.outputs) if o.quantized})
    if not inputs or outputs is None:
        return Retyping({}, {})
    results, operands = [e.spec for e in outputs.values()], [e.spec for e in inputs.values()]
    spec = _widest(results, operands, operation.op_type)
    return Retyping(
        {i: finer(e, spec) for i, e in inputs.items() if e.spec.dtype != spec.dtype},
        {k: finer(e, spec) for k, e in outputs.items() if e.spec.dtype != spec.dtype},
    )


def _encodings(operands: dict[int, Operand | None]) -> dict[int, Encoding] | None:
    """All of them, or None where one is not known or has more than one scale."""
    found = {i: encoding_of(operand) for i, operand in operands.items() if operand is not None}
    known = {index: encoding for index, encoding in found.items() if encoding is not None}
    return known if len(known) == len(found) else None


def _typed_alike(operation: Operation) -> list[int]:
    """Operands that have the type of the result, unless they are to be made so."""
    quantized = [i for i, o in enumerate(operation.inputs) if o is not None and o.quantized]
    return quantized[:1] if operation.op_type in _FIRST_ONLY else quantized


def _widest(results: list[QuantSpec], inputs: list[QuantSpec], op_type: str) -> QuantSpec:
    """The first of the widest; a linear keeps the sign of its input, as its pairs depend on it."""
    order = [*inputs, *results] if op_type in _FIRST_ONLY else [*results, *inputs]
    return max(order, key=lambda spec: spec.bits)


def unsigned(operation: Operation, rule: OpRule) -> Retyping:
    """Computes in unsigned codes what the target has not in signed ones.

    Before → after::

        DQ(s8) → Neg → Q(s8)
        DQ(s8) → Q(u8) → DQ(u8) → Neg → Q(u8) → DQ(u8) → Q(s8)

    Codes and zero points move up by half the range: the numbers stay the same.

    Must not fire where nothing is signed, or an operand has more than one scale.
    """
    inputs = {i: _unsigned(operation.inputs[i]) for i in _typed_alike(operation)}
    outputs = {k: _unsigned(output) for k, output in enumerate(operation.outputs)}
    return Retyping(
        {index: encoding for index, encoding in inputs.items() if encoding is not None},
        {index: encoding for index, encoding in outputs.items() if encoding is not None},
    )


def _unsigned(operand: Operand | None) -> Encoding | None:
    """The encoding of a signed operand in unsigned codes; None for any other."""
    encoding = encoding_of(operand) if operand is not None else None
    if encoding is None or not encoding.spec.signed or encoding.spec.bits > 16:
        return None
    return same_numbers(encoding, QuantSpec(encoding.spec.bits, signed=False, symmetric=False))


def forced_encoding(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """States the encoding that the target uses for a result whatever the file says.

    Before → after::

        Sigmoid → Q(s, z) → DQ(s, z) → Reshape → Q(s, z)
        Sigmoid → Q(1/65536, 0) → DQ(1/65536, 0) → Reshape → Q(1/65536, 0)

    Operators that only move the codes follow; before others that must share encodings (Concat) the
    old one comes back. Where the codes are an output of the graph, they are converted to what the
    file promises. The numbers are within half an LSB of the old and half of the new encoding of
    what was computed, and old ones that were clipped no longer are.

    Must not fire on more than one result.
    """
    if rule.unless_forced is None or len(operation.outputs) != 1:
        return False
    output = operation.outputs[0]
    current = encoding_of(output)
    if current is None:
        return False
    scale = np.float32(rule.unless_forced.scale)
    zero = np.asarray(rule.unless_forced.zero_point, np.int32)
    encoding = Encoding(current.spec, np.asarray(scale), zero)
    if equal(encoding, current):
        return False
    if _only_dequantized(output.value):
        _carry_on(editor, output.value, current, encoding)
    else:
        editor.requantize_output(output.value, encoding)
    return True


def _only_dequantized(value: ir.Value) -> bool:
    """Nobody reads the codes of a result but DequantizeLinear nodes."""
    codes = [quantize.outputs[0] for quantize in value.consumers()]
    return not any(
        code.is_graph_output() or any(user.op_type != DEQUANTIZE for user in code.consumers())
        for code in codes
    )


def _carry_on(editor: QdqEditor, value: ir.Value, old: Encoding, new: Encoding) -> None:
    """Replaces the encoding of a value, and of what layout operators make of it."""
    editor.replace_encoding(value, new)
    readers = [node.outputs[0] for q in value.consumers() for node in q.outputs[0].consumers()]
    for reader in readers:
        for node, index in list(reader.uses()):
            tied = layout_inputs(node)
            if reader not in tied:
                continue
            if len(tied) == 1 and _follows(node.outputs, old):
                for output in node.outputs:
                    _carry_on(editor, output, old, new)
            else:
                editor.requantize_input(node, index, old)


def _follows(outputs: Sequence[ir.Value], old: Encoding) -> bool:
    """All results have the old encoding, and nobody outside knows their codes."""
    found = [encoding_of(output_operand(output)) for output in outputs]
    return all(encoding is not None and equal(encoding, old) for encoding in found) and all(
        map(_only_dequantized, outputs)
    )


def derive_bias(operation: Operation, rule: OpRule | None = None) -> DerivedBias:
    """Quantizes the bias of a linear, or a norm, in int32 at the scale of input times weight.

    Before → after, s the declared scale of codes b::

        Gemm(DQ(x), DQ(w), DQ(b, s, z))
        Gemm(DQ(x), DQ(w), DQ(round((b - z) · s / (s_x · s_w)), s_x · s_w, 0))      int32

    The bias stays within half an LSB of that scale.

    Must not fire on a bias that is computed, not quantized or too large for int32, or an input or
    weight with scales that are not known or not one per output channel.
    """
    inputs = operation.inputs
    if len(inputs) < 3 or inputs[0] is None or inputs[1] is None or inputs[2] is None:
        return DerivedBias()
    bias = inputs[2]
    codes = constant_array(bias.codes) if bias.constant else None
    if codes is None or bias.scale is None or bias.zero_point is None or bias.block:
        return DerivedBias()
    derived = _accumulator_scale(inputs[0], inputs[1], codes.size)
    if derived is None:
        return DerivedBias()
    real = (codes.astype(np.float64) - bias.zero_point) * bias.scale.astype(np.float64)
    new = np.rint(real / derived)
    if np.abs(new).max(initial=0) >= 2**31:
        return DerivedBias()
    return DerivedBias(new.astype(np.int32), derived.astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class DerivedBias:
    """A bias at the scale of its accumulator: int32 codes, and a scale of shape () or (N,).

    No codes stand for a bias that stays as it is.
    """

    codes: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    scale: NDArray[np.float32] = field(default_factory=lambda: np.zeros((), np.float32))

    @property
    def changes(self) -> bool:
        """There is something to do."""
        return bool(self.codes.size)

    def expected(self, operation: Operation) -> Operation:
        """The node as it will be."""
        inputs = list(operation.inputs)
        bias = inputs[2]
        if bias is not None:
            zero = np.zeros(self.scale.shape, np.int64)
            granularity = "channel" if self.scale.size > 1 else "tensor"
            inputs[2] = replace(
                bias, dtype="s32", scale=self.scale, zero_point=zero, granularity=granularity
            )
        return replace(operation, inputs=tuple(inputs))

    def apply(self, editor: QdqEditor, operation: Operation) -> None:
        """Changes the graph."""
        bias = operation.inputs[2]
        name = name_of(bias.value) if bias is not None else ""
        parameters = [
            editor.constant(f"{name}_quantized", self.codes),
            editor.constant(f"{name}_scale", self.scale),
            editor.constant(f"{name}_zero_point", np.zeros(self.scale.shape, np.int32)),
        ]
        value = editor.node(
            DEQUANTIZE,
            parameters,
            f"{name}_derived",
            list(self.codes.shape),
            before=operation.node,
            **({"axis": self.codes.ndim - 1} if self.scale.ndim else dict[str, Any]()),
        )
        operation.node.replace_input_with(2, value)


def _accumulator_scale(
    first: Operand, weight: Operand, channels: int
) -> NDArray[np.float64] | None:
    """s_x · s_w, of shape () or (channels,); None where it is not known or of another size."""
    if first.scale is None or weight.scale is None or first.scale.size != 1 or weight.block:
        return None
    product = first.scale.astype(np.float64).reshape(()) * weight.scale.astype(np.float64)
    if product.size == 1:
        return product.reshape(())
    return product.reshape(-1) if product.size == channels else None
