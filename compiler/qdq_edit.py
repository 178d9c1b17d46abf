"""Edits of a Q/DQ graph: other codes for an operand, new pairs, nodes with encoded results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import GraphEditor, constant_array, name_of
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE, Operand, input_operand, output_operand
from qnpu.compiler.quant_types import Encoding, PerBlock, PerTensor, QuantSpec

Parameters = tuple[ir.Value, ir.Value]
"""Scale and zero point."""


def spec_of(dtype: str) -> QuantSpec:
    """The per-tensor type of a short name, as ``u16``; every code of it may be in use.

    Raises:
        ValueError: it is the name of no integer type.
    """
    if dtype[:1] not in ("u", "s") or not dtype[1:].isdigit():
        raise ValueError(f"`{dtype}` is no type of codes")
    return QuantSpec(int(dtype[1:]), signed=dtype[0] == "s", symmetric=False)


def encoding_of(operand: Operand) -> Encoding | None:
    """The encoding of an operand with one known scale; None for any other."""
    if operand.scale is None or operand.zero_point is None or operand.scale.size != 1:
        return None
    zero = operand.zero_point.reshape(()).astype(np.int32)
    return Encoding(spec_of(operand.dtype), operand.scale.reshape(()).astype(np.float32), zero)


def block_encoding_of(operand: Operand) -> Encoding | None:
    """The encoding of a constant matrix in blocks whose scales are whole (LPBQ); None for others.

    Whole scales are unsigned codes with zero points of 0 over one float scale per channel.
    """
    maker, shape = operand.value.producer(), operand.shape
    value = maker.inputs[1] if maker is not None else None
    if operand.granularity != "lpbq" or value is None or shape is None or len(shape) != 2:
        return None
    if not operand.block or shape[operand.axis] % operand.block:
        return None
    granularity = PerBlock(operand.axis, operand.block)
    found = _whole_scales(input_operand(value), shape, granularity)
    zero = np.zeros(1, np.int64) if operand.zero_point is None else operand.zero_point
    middle = int(zero.flat[0])
    if found is None or bool((zero != middle).any()):
        return None
    blocks, scale = found
    spec = replace(spec_of(operand.dtype), granularity=granularity)
    spec = replace(spec, symmetric=spec.signed and middle == 0)
    return Encoding(spec, scale, np.full(len(scale), middle, np.int32), blocks)


def _whole_scales(
    scales: Operand, shape: tuple[int, ...], granularity: PerBlock
) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
    """Block scales of a matrix, and the scale of each channel that they are multiples of."""
    blocks, axis = constant_array(scales.codes), granularity.channel_axis
    if blocks is None or scales.scale is None or scales.zero_point is None:
        return None
    wanted = list(shape)
    wanted[granularity.axis] //= granularity.size
    of_channels = scales.granularity == "tensor" or (scales.axis == axis and not scales.block)
    if not of_channels or scales.dtype != "u8" or list(blocks.shape) != wanted:
        return None
    scale = np.broadcast_to(scales.scale.reshape(-1), (shape[axis],)).astype(np.float32)
    positive = (blocks > 0).all() and np.isfinite(scale).all() and (scale > 0).all()
    return None if scales.zero_point.any() or not positive else (blocks, scale)


def same_numbers(encoding: Encoding, spec: QuantSpec) -> Encoding:
    """The encoding of a type no narrower that gives each code the number it stood for.

    The scale stays. From signed to unsigned, codes and zero point move up by half the range of the
    narrower type; the other way they move down where the types are of one width.
    """
    before = encoding.spec
    shift = 0
    if before.signed and not spec.signed:
        shift = 1 << (before.bits - 1)
    elif spec.signed and not before.signed and spec.bits == before.bits:
        shift = -(1 << (before.bits - 1))
    return Encoding(spec, encoding.scale, np.asarray(encoding.zero_point + shift, np.int32))


def finer(encoding: Encoding, spec: QuantSpec) -> Encoding:
    """The encoding of a wider type over the same range: its codes are fractions of the old ones."""
    steps = 1 << (spec.bits - encoding.spec.bits)
    scale = np.asarray(encoding.scale / steps, np.float32)
    lowest = encoding.spec.q_min - encoding.zero_point.astype(np.int64)
    return Encoding(spec, scale, np.asarray(spec.q_min - lowest * steps, np.int32))


class QdqEditor(GraphEditor):
    """Changes a Q/DQ graph.

    Attributes:
        diagnostics: what a rewrite has to say of its result.
    """

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self.diagnostics: list[Diagnostic] = []

    def parameters(self, name: str, encoding: Encoding) -> Parameters:
        """Initializers of a scale and an explicit zero point."""
        return (
            self.constant(f"{name}_scale", encoding.scale),
            self.constant(f"{name}_zero_point", encoding.zero_point_codes, encoding.spec.dtype),
        )

    def quantize(self, value: ir.Value, base: str, parameters: Parameters) -> ir.Value:
        """Codes of a float, right behind what makes it; names begin with ``base``."""
        name = self.free_name(f"{base}_{QUANTIZE}")
        node = ir.node(QUANTIZE, [value, *parameters], name=name)
        codes = node.outputs[0]
        codes.name, codes.shape = self.free_name(f"{base}_quantized"), value.shape
        codes.type = parameters[1].type
        self.insert_behind(value, node)
        return codes

    def dequantize(
        self,
        codes: ir.Value,
        base: str,
        parameters: Parameters,
        dtype: ir.DataType = ir.DataType.FLOAT,
        *,
        before: ir.Node | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The real numbers of codes; names as in ``quantize``.

        Args:
            codes: integers.
            base: what names begin with.
            parameters: scale and zero point.
            dtype: of the real numbers.
            before: place of the node; right behind what makes the codes where None.
            attributes: of DequantizeLinear.
        """
        name = self.free_name(f"{base}_{DEQUANTIZE}")
        node = ir.node(DEQUANTIZE, [codes, *parameters], attributes or None, name=name)
        real = node.outputs[0]
        real.name, real.shape = self.free_name(f"{base}_dequantized"), codes.shape
        real.type = ir.TensorType(dtype)
        if before is None:
            self.insert_behind(codes, node)
        else:
            self.graph.insert_before(before, node)
        return real

    def dequantize_blocks(
        self,
        codes: ir.Value,
        base: str,
        encoding: Encoding,
        dtype: ir.DataType = ir.DataType.FLOAT,
        *,
        before: ir.Node,
    ) -> ir.Value:
        """The real numbers of a constant matrix in blocks.

        Codes (K, N), B blocks along K, uint8 block scales, S float32::

            DQ(codes, DQ(block_scales[B, N], S[N], 0), zeros[B, N])

        Both zero points are explicit.

        Args:
            codes: integers.
            base: what names begin with.
            encoding: per block.
            dtype: of the real numbers.
            before: place of the nodes.

        Raises:
            ValueError: the encoding is not per block.
        """
        blocks, granularity = encoding.block_scales, encoding.spec.granularity
        if blocks is None or not isinstance(granularity, PerBlock):
            raise ValueError(f"{encoding.spec} has no blocks")
        scale_inputs = [
            self.constant(f"{base}_block_scale", blocks),
            self.constant(f"{base}_channel_scale", encoding.scale),
            self.constant(f"{base}_channel_zero_point", np.zeros(encoding.scale.shape, np.uint8)),
        ]
        label = f"{base}_block_scale_dequantized"
        axis: dict[str, Any] = {"axis": granularity.channel_axis}
        scale = self.node(
            DEQUANTIZE, scale_inputs, label, list(blocks.shape), before=before, **axis
        )
        zero = self.constant(f"{base}_zero_point", encoding.zero_point_codes, encoding.spec.dtype)
        places = {"axis": granularity.axis, "block_size": granularity.size}
        return self.dequantize(codes, base, (scale, zero), dtype, before=before, **places)

    def pair(
        self, value: ir.Value, encoding: Encoding, *, reuse: bool = True, base: str = ""
    ) -> ir.Value:
        """The value behind a Q/DQ pair of an encoding.

        Args:
            value: a float.
            encoding: per tensor.
            reuse: take a pair of that encoding that the value already has.
            base: what names begin with; empty for the value's own name and the type.
        """
        found = _existing_pair(value, encoding) if reuse else None
        if found is not None:
            return found
        kind = f"{'s' if encoding.spec.signed else 'u'}{encoding.spec.bits}"
        base = base or f"{name_of(value)}_{kind}"
        parameters = self.parameters(base, encoding)
        codes = self.quantize(value, base, parameters)
        return self.dequantize(codes, base, parameters, value.dtype or ir.DataType.FLOAT)

    def requantize_input(self, node: ir.Node, index: int, encoding: Encoding) -> bool:
        """Lets a node read an operand at another encoding; a constant gets new codes.

        DQ(a) → node becomes DQ(a) → Q(b) → DQ(b) → node; see ``apart``.

        Returns:
            False where it has that encoding already.
        """
        value = node.inputs[index]
        if value is None:
            return False
        operand = input_operand(value)
        current = encoding_of(operand)
        if current is not None and equal(current, encoding):
            return False
        codes = constant_array(operand.codes) if operand.constant else None
        if codes is not None and current is not None:
            real = current.dequantize(codes)
            other = self.constant_operand(name_of(value), real, encoding, before=node)
        else:
            other = self.pair(self.apart(value, encoding), encoding)
        node.replace_input_with(index, other)
        return True

    def apart(self, value: ir.Value, encoding: Encoding) -> ir.Value:
        """The value ready for a pair of its own.

        Of two pairs in a row of one type ONNX Runtime makes one, over the range they have in common
        and with a scale of its own rounding, and an operator between pairs finds its encodings
        changed on one side. A pair of another type in between, with the numbers of the first, keeps
        them apart. It is left out where the first is no pair but codes from outside.
        """
        operand = input_operand(value)
        current = encoding_of(operand)
        quantize = operand.codes.producer() if operand.codes is not None else None
        if current is None or quantize is None or current.spec.dtype != encoding.spec.dtype:
            return value
        return self.pair(value, same_numbers(current, _other_type(current.spec)))

    def reshape(
        self, value: ir.Value, shape: Sequence[int], encoding: Encoding, name: str, before: ir.Node
    ) -> ir.Value:
        """A value in another shape, behind a pair of its own encoding; a constant is reshaped."""
        operand = input_operand(value)
        codes = constant_array(operand.codes) if operand.constant else None
        if codes is not None:
            tensor = codes.reshape(tuple(shape))
            inputs = [self.constant(f"{name}_quantized", tensor, encoding.spec.dtype)]
            inputs += self.parameters(name, encoding)
            return self.node(DEQUANTIZE, inputs, f"{name}_dequantized", shape, before=before)
        target = self.constant(f"{name}_shape", np.array(shape, np.int64))
        result = self.node("Reshape", [value, target], name, shape, before=before)
        return self.pair(result, encoding)

    def encode_between(self, value: ir.Value, encoding: Encoding, base: str = "") -> ir.Value:
        """Puts a pair, named as in ``pair``, between a value and every node that reads it."""
        users = list(value.uses())
        result = self.pair(value, encoding, reuse=False, base=base)
        for user, index in users:
            user.replace_input_with(index, result)
        return result

    def requantize_output(self, value: ir.Value, encoding: Encoding) -> None:
        """Lets a node write a result at another encoding, which is then converted to the old one.

        node → Q(b) becomes node → Q(a) → DQ(a) → Q(b); see ``apart``.
        """
        users, old = list(value.uses()), encoding_of(output_operand(value))
        result = self.pair(value, encoding, reuse=False)
        if old is not None:
            result = self.apart(result, old)
        for user, index in users:
            user.replace_input_with(index, result)

    def replace_encoding(self, value: ir.Value, encoding: Encoding) -> None:
        """Writes other numbers into the pairs of a result; whoever reads it reads those."""
        scale, zero = self.parameters(name_of(value), encoding)
        for quantize in list(value.consumers()):
            codes = quantize.outputs[0]
            codes.type = ir.TensorType(encoding.spec.dtype)
            for node in (quantize, *codes.consumers()):
                node.replace_input_with(1, scale)
                node.replace_input_with(2, zero)

    def constant_operand(
        self, name: str, real: NDArray[np.floating], encoding: Encoding, *, before: ir.Node
    ) -> ir.Value:
        """A constant, quantized, behind its DequantizeLinear."""
        codes = self.constant(f"{name}_quantized", encoding.quantize(real), encoding.spec.dtype)
        inputs, label = [codes, *self.parameters(name, encoding)], f"{name}_dequantized"
        return self.node(DEQUANTIZE, inputs, label, list(real.shape), before=before)


def _existing_pair(value: ir.Value, encoding: Encoding) -> ir.Value | None:
    """A pair of an encoding on a value: its result, the first of several."""
    for user in value.consumers():
        if user.op_type != QUANTIZE or user.outputs[0].is_graph_output():
            continue
        for reader in user.outputs[0].consumers():
            if reader.op_type != DEQUANTIZE:
                continue
            found = encoding_of(input_operand(reader.outputs[0]))
            if found is not None and equal(found, encoding):
                return reader.outputs[0]
    return None


def _other_type(spec: QuantSpec) -> QuantSpec:
    """A type that holds every code of an 8- or 16-bit one, moved where the sign is another."""
    return QuantSpec(16, signed=spec.signed ^ (spec.bits == 16), symmetric=False)


def equal(first: Encoding, second: Encoding) -> bool:
    """One type and the same numbers; whether a type is called symmetric says nothing here."""
    return (
        isinstance(first.spec.granularity, PerTensor)
        and first.spec.dtype == second.spec.dtype
        and np.array_equal(first.scale, second.scale)
        and np.array_equal(first.zero_point, second.zero_point)
    )
