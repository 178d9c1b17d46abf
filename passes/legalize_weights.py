"""Rewrites of legalize-target: constant weights of MatMul."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.block_scales import whole_scales
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.operands import DEQUANTIZE, Operand, Operation
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of, spec_of
from qnpu.compiler.quant_types import Encoding, PerBlock, widened
from qnpu.compiler.target import OpRule
from qnpu.compiler.target_faults import channel_axis
from qnpu.compiler.target_rules import RescaledBlocks

# Codes of eight bits to one of four.
_FINER = 16


@dataclass(frozen=True, slots=True, eq=False)
class Lpbq:
    """A weight of shape (K, N) in blocks of K/B rows, w = (code - zero) · block_code · scale.

    Attributes:
        codes: int64, (K, N).
        block_codes: uint8, (B, N), 1 up to the highest code of the block scales' type.
        scale: float32, (N,): real units per LSB of a block scale of 1.
        sqnr: signal over error against the weight before, dB; infinite where nothing changed.
    """

    codes: NDArray[np.int64]
    block_codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    sqnr: float


def to_lpbq(
    codes: NDArray[np.int64], scales: NDArray[np.float32], low: int, high: int, top: int
) -> Lpbq:
    """Rounds block scales to integers over one float scale per channel, and the codes with them.

    See ``qnpu.compiler.block_scales.whole_scales``.

    Args:
        codes: (K, N), zero point taken off.
        scales: (B, N), B divides K.
        low, high: codes that the weight's type has, zero point taken off.
        top: highest block scale.
    """
    size = len(codes) // len(scales)
    blocks = codes.reshape(len(scales), size, -1)
    real: NDArray[np.float64] = blocks.astype(np.float64) * scales[:, None].astype(np.float64)
    whole = whole_scales(real, scales, low, high, top)
    error, signal = whole.error.sum(), np.square(real).sum()
    sqnr = float(10 * np.log10(signal / error)) if error and signal else float("inf")
    new = whole.codes.reshape(codes.shape).astype(np.int64)
    return Lpbq(new, whole.multiples, whole.scale, sqnr)


def lpbq(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Gives blocks with float scales integer ones over a float scale per channel.

    Before → after, weight codes int4 (K, N), B blocks along K::

        MatMul(x, DQ(codes, s[B, N]))
        MatMul(x, DQ(codes', DQ(block_codes[B, N], S[N])))      block_codes uint8

    ``to_lpbq`` has the formula. Nodes that share the weight share the result. QN526 states the
    error. Both zero points are explicit.

    Must not fire unless the weight is the second operand of a MatMul, of 4 bits, blocked along
    the summed axis with blocks of one size, its zero point at the middle code.
    """
    weight = operation.inputs[1] if len(operation.inputs) > 1 else None
    if operation.op_type != "MatMul" or weight is None or not _blocked(weight):
        return False
    codes, scales = constant_array(weight.codes), weight.scale
    if codes is None or scales is None or weight.codes is None:
        return False
    spec, middle = spec_of(weight.dtype), 8 if weight.dtype == "u4" else 0
    result = to_lpbq(
        codes.astype(np.int8).astype(np.int64) - middle,
        scales,
        spec.q_min - middle,
        spec.q_max - middle,
        spec_of(rule.to).q_max,
    )
    value = _double_dequantize(editor, weight, result, middle, operation.node)
    for user, index in list(weight.value.uses()):
        if user.op_type == "MatMul" and index == 1:
            user.replace_input_with(index, value)
    note = RescaledBlocks(round(result.sqnr, 1), rule.to)
    editor.diagnostics.append(note.at(node=name_of(operation.node), value=name_of(weight.codes)))
    return True


def _blocked(weight: Operand) -> bool:
    """4-bit blocks along the first of two axes, symmetric, none shorter than the others."""
    if weight.granularity != "block" or weight.axis != 0 or weight.rank != 2:
        return False
    if weight.dtype not in ("s4", "u4") or weight.shape is None or weight.zero_point is None:
        return False
    middle = 8 if weight.dtype == "u4" else 0
    return weight.shape[0] % weight.block == 0 and bool((weight.zero_point == middle).all())


def _double_dequantize(
    editor: QdqEditor, weight: Operand, result: Lpbq, middle: int, node: ir.Node
) -> ir.Value:
    name = name_of(weight.value)
    spec = replace(spec_of(weight.dtype), granularity=PerBlock(0, weight.block))
    zero = np.full(result.scale.shape, middle, np.int32)
    encoding = Encoding(spec, result.scale, zero, result.block_codes)
    first = min(
        (user for user in weight.value.consumers() if user.op_type == "MatMul"),
        key=_positions(node).__getitem__,
    )
    codes = _narrow(result.codes + middle, spec.dtype)
    stored = editor.constant(f"{name}_quantized", codes, spec.dtype)
    return editor.dequantize_blocks(stored, name, encoding, before=first)


def _positions(node: ir.Node) -> dict[ir.Node, int]:
    return {other: index for index, other in enumerate(node.graph or ())}


def symmetric_weight(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Takes the zero point off the codes of a weight.

    Before → after::

        MatMul(x, DQ(codes u4, s, z))       MatMul(x, DQ(codes - z as s8, s, 0))
        MatMul(x, DQ(codes s4, s))          MatMul(x, DQ(codes s4, s, 0))

    The new codes are s4 where those of a 4-bit weight still fit, else s8, and hold the same
    numbers.

    Must not fire where they fit neither (a u8 weight that uses its range), on blocks, or on scales
    along another axis than the output channels.
    """
    index = next((i for i, o in enumerate(operation.inputs[:2]) if o is not None and o.constant), 0)
    weight = operation.inputs[index]
    codes = constant_array(weight.codes) if weight is not None else None
    if weight is None or codes is None or weight.scale is None or weight.zero_point is None:
        return False
    per_channel = weight.granularity == "channel"
    if weight.block or (per_channel and weight.axis != channel_axis(operation, weight)):
        return False
    shape = [1] * codes.ndim
    shape[weight.axis] = -1
    zero = weight.zero_point.reshape(shape if per_channel else ())
    numbers = widened(codes).astype(np.int64) - zero
    narrow = weight.dtype[1:] == "4" and numbers.min() >= -8 and numbers.max() <= 7
    spec = spec_of("s4" if narrow else "s8")
    stated = weight.has_zero_point and not zero.any()
    if numbers.min() < spec.q_min or numbers.max() > spec.q_max or (stated and narrow):
        return False
    _replace_weight(editor, operation, index, (numbers, weight.scale, spec.dtype), "symmetric")
    return True


def finer_weight(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Writes 4-bit codes of a weight as 8-bit ones of the same numbers.

    Before → after::

        MatMul(x, DQ(codes s4, s, 0))       MatMul(x, DQ(16 · codes as s8, s / 16, 0))

    Must not fire on a weight that is not s4 with zero points of 0, or has blocks.
    """
    weight = operation.inputs[1] if len(operation.inputs) > 1 else None
    codes = constant_array(weight.codes) if weight is not None else None
    if weight is None or codes is None or weight.scale is None or weight.zero_point is None:
        return False
    if weight.dtype != "s4" or weight.block or weight.zero_point.any():
        return False
    numbers = widened(codes).astype(np.int64) * _FINER
    finer = (numbers, (weight.scale / np.float32(_FINER)).astype(np.float32), ir.DataType.INT8)
    _replace_weight(editor, operation, 1, finer, "finer")
    return True


def _replace_weight(
    editor: QdqEditor,
    operation: Operation,
    index: int,
    new: tuple[NDArray[np.int64], NDArray[np.float32], ir.DataType],
    label: str,
) -> None:
    """Gives a node a weight of other codes, scale and type, along the same axis, zero point 0."""
    weight, (numbers, scale, dtype) = operation.inputs[index], new
    if weight is None:
        return
    name = name_of(weight.value)
    attributes: dict[str, Any] = {"axis": weight.axis} if scale.ndim else {}
    inputs = [
        editor.constant(f"{name}_quantized", _narrow(numbers, dtype), dtype),
        editor.constant(f"{name}_scale", scale),
        editor.constant(f"{name}_zero_point", _narrow(np.zeros(scale.shape), dtype), dtype),
    ]
    value = editor.node(
        DEQUANTIZE, inputs, f"{name}_{label}", numbers.shape, before=operation.node, **attributes
    )
    operation.node.replace_input_with(index, value)


def _narrow(codes: NDArray[Any], dtype: ir.DataType) -> NDArray[Any]:
    """Codes of at most eight bits; ml_dtypes' 4-bit ones are made of int8."""
    return codes.astype(np.int8).astype(dtype.numpy())


def conv_1x1(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Writes a MatMul by a constant weight as a convolution.

    Before → after, x of shape (…, K), weight (K, N), M the product of the leading dimensions::

        MatMul(x, w)

        Reshape(x, (1, M, 1, K)) → Transpose → (1, K, M, 1)
        Conv(·, w as (N, K, 1, 1)) → (1, N, M, 1)
        Transpose → Reshape (…, N)

    Around Reshape and Transpose the encodings are those of x and of the result, so the numbers stay
    the same.

    Must not fire unless the second operand is the weight, with one scale or one per column.
    """
    if operation.op_type != "MatMul" or len(operation.inputs) != 2 or not operation.outputs:
        return False
    first, weight = operation.inputs
    if first is None or weight is None or first.constant or weight.rank != 2 or not first.shape:
        return False
    before, after = encoding_of(first), encoding_of(operation.outputs[0])
    codes = constant_array(weight.codes)
    per_column = weight.granularity == "channel" and weight.axis == 1
    if before is None or after is None or codes is None:
        return False
    if weight.granularity != "tensor" and not per_column:
        return False
    node, name = operation.node, name_of(operation.node) or name_of(operation.outputs[0].value)
    k, n = codes.shape
    rows = int(np.prod(first.shape[:-1]))
    lead = list(first.shape[:-1])
    flat = editor.reshape(first.value, (1, rows, 1, k), before, f"{name}_rows", node)
    order: dict[str, Any] = {"perm": [0, 3, 1, 2]}
    image = editor.node("Transpose", [flat], f"{name}_image", (1, k, rows, 1), before=node, **order)
    kernel = _kernel(editor, weight, codes, node, name)
    inputs = [editor.pair(image, before), kernel]
    convolved = editor.node("Conv", inputs, f"{name}_conv", (1, n, rows, 1), before=node)
    order = {"perm": [0, 2, 3, 1]}
    turned = editor.node(
        "Transpose",
        [editor.pair(convolved, after)],
        f"{name}_turned",
        (1, rows, 1, n),
        before=node,
        **order,
    )
    shape = editor.constant(f"{name}_shape", np.array([*lead, n], np.int64))
    inputs = [editor.pair(turned, after), shape]
    editor.replace(node, editor.node("Reshape", inputs, f"{name}_result", [*lead, n], before=node))
    return True


def _kernel(
    editor: QdqEditor, weight: Operand, codes: NDArray[Any], node: ir.Node, name: str
) -> ir.Value:
    """The weight as (N, K, 1, 1), scales along the first axis."""
    dtype = spec_of(weight.dtype).dtype
    zero = np.asarray(weight.zero_point)
    narrow = (zero.astype(np.int8) if dtype.bitwidth < 8 else zero).astype(dtype.numpy())
    per_column = weight.granularity == "channel"
    shape = (-1,) if per_column else ()
    inputs = [
        editor.constant(f"{name}_kernel_quantized", codes.T[:, :, None, None].copy(), dtype),
        editor.constant(f"{name}_kernel_scale", np.asarray(weight.scale).reshape(shape)),
        editor.constant(f"{name}_kernel_zero_point", narrow.reshape(shape), dtype),
    ]
    attributes: dict[str, Any] = {"axis": 0} if per_column else {}
    k, n = codes.shape
    return editor.node(
        DEQUANTIZE, inputs, f"{name}_kernel", (n, k, 1, 1), before=node, **attributes
    )
