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
from qnpu.compiler.op_traits import layout_inputs
from qnpu.compiler.operands import Operand

_ABSENT = "-"
_GRANULARITIES = frozenset({"tensor", "channel", "block", "lpbq"})
_UNSIGNED = frozenset({"u2", "u4", "u8", "u16"})
# Of the operators that move codes those that need one encoding on both sides; Slice, Split and
# Concat do not.
_MOVERS = frozenset(
    ["Expand", "Flatten", "Gather", "GatherElements", "MaxPool", "Reshape", "Resize", "Squeeze",
     "Tile", "Transpose", "Unsqueeze"]
)  # fmt: skip
_WORD = re.compile(
    r"const|var|ones|given|no-zero|alone|moved|batched|spread|pointwise|(axis|rank|block|last|value)=\d+|z=0|z!=(0|mid)"
)


@dataclass(frozen=True, slots=True)
class OperandPattern:
    """What a row says of one operand.

    Written as words: the types first (``u8|s8``, or ``*`` for any), then any of

    - ``const``, ``var``, ``ones`` (a constant of ones alone), ``given`` (its codes are an input or
      output of the graph);
    - granularities: ``tensor``, ``channel``, ``block``, ``lpbq``, or ``tensor|channel`` for either;
    - ``z=0``, ``z!=0``, ``z!=mid``: zero points; ``no-zero``: the file states none;
    - ``rank=N``, ``last=N`` (size of the last dimension), ``block=N`` (elements of one), ``axis=N``
      (of channels or blocks);
    - ``alone``: a QuantizeLinear writes it, and one node reads it;
    - ``moved``: an operator that moves codes made it, or reads it;
    - ``batched``: dimensions before the last two hold more than one element;
    - ``spread``: those from the third on do, as in a kernel wider than 1x1; ``pointwise``: they do
      not;
    - ``value=N``: a constant of one element, which is that number.

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


def _is_alone(operand: Operand) -> bool:
    codes = operand.codes
    if codes is None or codes.producer() is None or codes.is_graph_output():
        return False
    readers = list(codes.consumers())
    return len(readers) == 1 and len(list(readers[0].outputs[0].uses())) == 1


def _is_moved(operand: Operand) -> bool:
    codes = operand.codes
    quantize = codes.producer() if codes is not None else None
    value = quantize.inputs[0] if quantize is not None else None
    maker = value.producer() if value is not None else None
    readers = [] if codes is None else [node for dq in codes.consumers() for node in _users(dq)]
    nodes = readers if maker is None else [maker, *readers]
    return any(node.op_type in _MOVERS and layout_inputs(node) for node in nodes)


def _users(node: ir.Node) -> list[ir.Node]:
    return [user for output in node.outputs for user in output.consumers()]


_WORDS: dict[str, Callable[[Operand, str], bool]] = {
    "const": lambda operand, _: operand.constant,
    "var": lambda operand, _: not operand.constant,
    "ones": lambda operand, _: _is_all_ones(operand.value),
    "given": lambda operand, _: _crosses_border(operand.codes),
    "no-zero": lambda operand, _: not operand.has_zero_point,
    "alone": lambda operand, _: _is_alone(operand),
    "moved": lambda operand, _: _is_moved(operand),
    "batched": lambda operand, _: _elements(operand, slice(None, -2)) > 1,
    "spread": lambda operand, _: _elements(operand, slice(2, None)) > 1,
    "pointwise": lambda operand, _: _elements(operand, slice(2, None)) == 1,
    "last": lambda operand, number: _elements(operand, slice(-1, None)) == int(number),
    "axis": lambda operand, number: operand.axis == int(number),
    "rank": lambda operand, number: operand.rank == int(number),
    "block": lambda operand, number: operand.block == int(number),
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
