"""How a profile's rows describe one operand of a node."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE, Operand, input_operand

_ABSENT = "-"
_GRANULARITIES = frozenset({"tensor", "channel", "block", "lpbq"})
_UNSIGNED = frozenset({"u2", "u4", "u8", "u16"})
# Hexagon passes the layout of 16-bit rows on through these, where a second operand is constant.
_KEEP_ROWS = frozenset(
    ["Add", "Gelu", "Gemm", "Identity", "LpNormalization", "MatMul", "RMSNormalization", "Sigmoid",
     "SimplifiedLayerNormalization", "Slice", "Softmax", "Split", "Squeeze", "Unsqueeze"]
)  # fmt: skip
_WORD = re.compile(
    r"const|var|ones|given|fed|leaves|no-zero|batched|spread|pointwise|z=0|z!=(0|mid)"
    r"|(axis|rank|block|value|holds)=\d+|size=-\d:\d+\.\.\d*|(no-)?multiple=-\d:\d+"
    r"|from=\w+(/(\d:)?(\w+|\*))*"
)


@dataclass(frozen=True, slots=True)
class OperandPattern:
    """What a row says of one operand.

    Written as words: the types first (``u8|s8``, or ``*`` for any), then any of

    - ``const``, ``var``, ``ones`` (a constant of ones alone), ``given`` (its codes are an input or
      output of the graph);
    - granularities: ``tensor``, ``channel``, ``block``, ``lpbq``, or ``tensor|channel`` for either;
    - ``z=0``, ``z!=0``, ``z!=mid``: zero points; ``no-zero``: the file states none;
    - ``rank=N``, ``block=N`` (elements of one), ``axis=N``
      (of channels or blocks);
    - ``leaves``: its codes, or those that operators which keep Hexagon's layout of rows make of
      them, are an output of the graph;
    - ``from=A/B/1:C``: A made it, whose first input B made, whose second input (1) C made; ``*``
      is any operator;
    - ``fed``: it is computed from codes that are an input of the graph, or is them;
    - ``batched``: dimensions before the last two hold more than one element;
    - ``size=-K:LOW..HIGH``: of the K-th last dimension, ends included, no upper one where HIGH is
      left out; ``multiple=-K:N``, ``no-multiple=-K:N``: it is one of N, or is not;
    - ``spread``: those from the third on do, as in a kernel wider than 1x1; ``pointwise``: they do
      not;
    - ``value=N``: a constant of one element, which is that number; ``holds=N``: a constant without
      encoding, one of whose elements is.

    ``-`` alone is an input that is left out.

    Attributes:
        text: as written.
        dtypes: empty for any.
        granularities: empty for any.
        words: the rest, each parted at its equals sign.
    """

    text: str
    dtypes: frozenset[str]
    granularities: frozenset[str]
    words: tuple[tuple[str, str], ...]

    def fits(self, operand: Operand | None) -> bool:
        if operand is None or self.text == _ABSENT:
            return operand is None and self.text == _ABSENT
        if self.dtypes and operand.dtype not in self.dtypes:
            return False
        if self.granularities and operand.granularity not in self.granularities:
            return False
        return all(_WORDS[subject](operand, number) for subject, number in self.words)


def _has_zero_point(operand: Operand, zero_point: int) -> bool:
    return operand.zero_point is not None and bool((operand.zero_point == zero_point).all())


def _code(operand: Operand, number: str) -> int:
    """A code as a pattern names it; ``mid`` is the middle one: 0 of a signed type, 128 of u8."""
    if number != "mid":
        return int(number)
    return 1 << (int(operand.dtype[1:]) - 1) if operand.dtype in _UNSIGNED else 0


def _crosses_border(codes: ir.Value | None) -> bool:
    return codes is not None and (codes.is_graph_input() or codes.is_graph_output())


def _holds(value: ir.Value, number: int) -> bool:
    array = constant_array(value)
    return array is not None and bool((array == number).any())


def _is_all_ones(value: ir.Value) -> bool:
    array = constant_array(value)
    return array is not None and bool((array == 1).all())


def _elements(operand: Operand, part: slice) -> int:
    """Elements of some of the dimensions; 0 where the shape is not static."""
    return 0 if operand.shape is None else math.prod(operand.shape[part])


def is_number(operand: Operand, number: float) -> bool:
    """A constant of one element, which stands for the number within half an LSB."""
    codes = constant_array(operand.codes)
    if codes is None or codes.size != 1 or operand.scale is None or operand.zero_point is None:
        return False
    scale = operand.scale.astype(np.float64).item()
    real = scale * (int(codes.item()) - int(operand.zero_point.item()))
    return abs(real - number) <= scale / 2


def _size(operand: Operand, subject: str) -> tuple[int, str]:
    """ "-3:2..7" → size of the third last dimension (1 if none, 0 if unknown), "2..7"."""
    back, _, condition = subject.partition(":")
    shape = operand.shape
    if shape is None:
        return 0, condition
    return (shape[int(back)] if -int(back) <= len(shape) else 1), condition


def _in_range(size: int, ends: str) -> bool:
    low, _, high = ends.partition("..")
    return size >= int(low) and (not high or size <= int(high))


def _is_multiple(size: int, of: str) -> bool:
    return size % int(of) == 0


def _leaves(operand: Operand) -> bool:
    return operand.codes is not None and _codes_leave(operand.codes)


def _codes_leave(codes: ir.Value) -> bool:
    """The codes are a graph output, or what operators that keep the layout of rows make of them."""
    if codes.is_graph_output():
        return True
    readers = [user for dequantize in codes.consumers() for user in _users(dequantize)]
    quantizes = [reader for reader in readers if reader.op_type == QUANTIZE]
    for reader in readers:
        if reader.op_type in _KEEP_ROWS and _others_are_constant(reader):
            quantizes += [user for user in _users(reader) if user.op_type == QUANTIZE]
    return any(_codes_leave(quantize.outputs[0]) for quantize in quantizes)


def _others_are_constant(node: ir.Node) -> bool:
    return all(value is None or input_operand(value).constant for value in node.inputs[1:])


def _comes_from(operand: Operand, path: str) -> bool:
    """ "Softmax/MatMul/1:Transpose": made by a Softmax of a MatMul by something transposed."""
    first, *steps = path.split("/")
    node = _maker(operand.value)
    found = node is not None and node.op_type == first
    for step in steps:
        index, _, op_type = step.rpartition(":")
        taken = node.inputs[int(index or 0) :] if node is not None else ()
        node = _maker(taken[0]) if taken else None
        found = found and node is not None and op_type in ("*", node.op_type)
    return found


def _is_fed(operand: Operand) -> bool:
    waiting: list[ir.Value | None] = [operand.value]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input() and any(user.op_type == DEQUANTIZE for user in value.consumers()):
            return True
        node = value.producer()
        waiting += node.inputs if node is not None else ()
    return False


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The node that computed a value, behind the pairs that say how it is held."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in (QUANTIZE, DEQUANTIZE):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def _users(node: ir.Node) -> list[ir.Node]:
    return [user for output in node.outputs for user in output.consumers()]


_WORDS: dict[str, Callable[[Operand, str], bool]] = {
    "const": lambda operand, _: operand.constant,
    "var": lambda operand, _: not operand.constant,
    "ones": lambda operand, _: _is_all_ones(operand.value),
    "given": lambda operand, _: _crosses_border(operand.codes),
    "no-zero": lambda operand, _: not operand.has_zero_point,
    "fed": lambda operand, _: _is_fed(operand),
    "leaves": lambda operand, _: _leaves(operand),
    "from": _comes_from,
    "batched": lambda operand, _: _elements(operand, slice(None, -2)) > 1,
    "spread": lambda operand, _: _elements(operand, slice(2, None)) > 1,
    "pointwise": lambda operand, _: _elements(operand, slice(2, None)) == 1,
    "size": lambda operand, subject: _in_range(*_size(operand, subject)),
    "multiple": lambda operand, subject: _is_multiple(*_size(operand, subject)),
    "no-multiple": lambda operand, subject: not _is_multiple(*_size(operand, subject)),
    "axis": lambda operand, number: operand.axis == int(number),
    "rank": lambda operand, number: operand.rank == int(number),
    "block": lambda operand, number: operand.block == int(number),
    "holds": lambda operand, number: _holds(operand.value, int(number)),
    "value": lambda operand, number: is_number(operand, float(number)),
    "z": lambda operand, number: _has_zero_point(operand, _code(operand, number)),
    "z!": lambda operand, number: not _has_zero_point(operand, _code(operand, number)),
}


@lru_cache(maxsize=4096)
def pattern_of(text: str) -> OperandPattern:
    """Parses a pattern.

    Raises:
        ValueError: a word that is none of those known.
    """
    types, *rest = text.split()
    dtypes = frozenset[str]() if types in ("*", _ABSENT) else frozenset(types.split("|"))
    granularities = [w for w in rest if _GRANULARITIES.issuperset(w.split("|"))]
    words = [word for word in rest if word not in granularities]
    for word in words:
        if not _WORD.fullmatch(word):
            raise ValueError(f"`{word}` in `{text}` is no word of a pattern")
    parted = tuple((head, tail) for head, _, tail in (word.partition("=") for word in words))
    allowed = frozenset(name for word in granularities for name in word.split("|"))
    return OperandPattern(text, dtypes, allowed, parted)
