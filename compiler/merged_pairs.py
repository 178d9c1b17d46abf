"""Two Q/DQ pairs that follow each other: ONNX Runtime makes one of them, ahead of any compiler.

Source: read off graphs compiled through onnxruntime 1.32.0; its pass is DoubleQDQPairsRemover.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.op_traits import layout_inputs
from qnpu.compiler.operands import QUANTIZE, Operand, input_operand, output_operand

# Of the operators that move codes those that need one scale on both sides; Slice, Split and
# Concat do not.
_MOVERS = frozenset(
    ["Expand", "Flatten", "Gather", "GatherElements", "MaxPool", "Reshape", "Resize", "Squeeze",
     "Tile", "Transpose", "Unsqueeze"]
)  # fmt: skip
_BITS = {"u8": 8, "s8": 8, "u16": 16, "s16": 16}


def merge_splits_a_move(before: Operand, after: Operand) -> bool:
    """Whether two pairs become one whose scale a neighbour that only moves codes has not.

    Such a neighbour had one scale on both sides, and has two then.

    Args:
        before: what a change of encoding reads.
        after: what it writes.
    """
    if not _are_merged(before, after):
        return False
    scale = _scale_of_both(_range(before), _range(after), 2 ** _BITS[before.dtype] - 1)
    return any(_only(held.scale) != scale for held in _across_moves(before, after))


def _are_merged(before: Operand, after: Operand) -> bool:
    """Both of one type, per tensor, with zero points, and nobody else reads between."""
    if before.dtype not in _BITS or before.dtype != after.dtype:
        return False
    quantize = before.codes.producer() if before.codes is not None else None
    if quantize is None or quantize.op_type != QUANTIZE:
        return False
    stated = all(
        o.granularity == "tensor" and o.scale is not None and o.has_zero_point
        for o in (before, after)
    )
    return stated and all(map(_has_one_reader, (before.codes, before.value, after.codes)))


def _has_one_reader(value: ir.Value | None) -> bool:
    return value is not None and len(list(value.uses())) == 1 and not value.is_graph_output()


def _range(operand: Operand) -> tuple[np.float32, np.float32]:
    """The lowest and the highest number that the codes of a tensor stand for."""
    bits = _BITS[operand.dtype]
    lowest = 0 if operand.dtype[0] == "u" else -(2 ** (bits - 1))
    zero, scale = _only(operand.zero_point), np.float32(_only(operand.scale))
    return np.float32(lowest - zero) * scale, np.float32(lowest + 2**bits - 1 - zero) * scale


def _only(number: NDArray[Any] | None) -> Any:
    """The number in an array of one; NaN where there is none, or several."""
    return number.item() if number is not None and number.size == 1 else math.nan


def _scale_of_both(
    first: tuple[np.float32, np.float32], second: tuple[np.float32, np.float32], codes: int
) -> np.float32:
    """Of what two ranges share, in the float32 steps of ONNX Runtime: equal means bit by bit."""
    shared = min(first[1], second[1]) - max(first[0], second[0])
    return np.float32(shared / np.float32(codes))


def _across_moves(before: Operand, after: Operand) -> list[Operand]:
    """What neighbours that move codes hold on their other side."""
    found: list[Operand] = []
    quantize = before.codes.producer() if before.codes is not None else None
    source = quantize.inputs[0] if quantize is not None else None
    maker = source.producer() if source is not None else None
    if maker is not None and _moves(maker) and maker.inputs[0] is not None:
        found.append(input_operand(maker.inputs[0]))
    dequantizes = after.codes.consumers() if after.codes is not None else ()
    for dequantize in dequantizes:
        readers = [user for output in dequantize.outputs for user in output.consumers()]
        found += [output_operand(reader.outputs[0]) for reader in readers if _moves(reader)]
    return found


def _moves(node: ir.Node) -> bool:
    return node.op_type in _MOVERS and bool(layout_inputs(node))
