"""Where attention happens in a Q/DQ graph: from the codes it takes to those it gives."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.integer_math import INT32_MAX
from qnpu.compiler.op_traits import is_standard, layout_inputs
from qnpu.compiler.operands import QUANTIZE
from qnpu.compiler.qdq_edit import equal
from qnpu.compiler.quantized_results import (
    CodedInput,
    coded_input,
    only_source,
)

_MOST_STEP = 2**16  # LSB of scores, which are finer than a step
_HIDDEN = -30.0  # real; a key with this in its mask has no weight: a mask means to hide it
_BLOCK = 128  # queries that are computed at a time where each sees few keys


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedAttention:
    """An attention whose inner results go nowhere else.

    Attributes:
        mix: the MatMul at its end.
        queries: (…, S, D)
        keys: (…, D, T)
        values: (…, T, E)
        scale: real units per LSB of a score, as the softmax takes it.
        mask: added to scores; None where there is none.
        mask_factor: that a mask is multiplied with before the softmax.
        mask_numbers: what each code of the mask is, LSB of the scores, in the order of a table.
        shape: of the scores.
    """

    mix: ir.Node
    queries: CodedInput
    keys: CodedInput
    values: CodedInput
    scale: Fraction
    mask: CodedInput | None
    mask_factor: Fraction
    mask_numbers: NDArray[np.int64]
    shape: tuple[int, ...]

    @classmethod
    def ending_at(cls, node: ir.Node) -> QuantizedAttention | None:
        """The attention of which a node is the last, where it can be lowered as one."""
        if node.op_type != "MatMul" or not is_standard(node):
            return None
        softmax, values = only_source(node.inputs[0]), coded_input(node.inputs[1])
        if softmax is None or softmax.op_type != "Softmax" or values is None or values.constant:
            return None
        shape = static_shape(softmax.outputs[0])
        if shape is None or softmax.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            return None
        above = _Scores.of(softmax.inputs[0], shape)
        if above is None or above.factor <= 0:
            return None
        queries, keys = (coded_input(value) for value in above.product.inputs)
        if queries is None or keys is None or keys.constant:
            return None
        scale = Fraction(queries.scale) * Fraction(keys.scale) * above.factor
        numbers = np.zeros(0, np.int64)
        if above.mask is not None:
            ratio = Fraction(above.mask.scale) * above.mask_factor / scale
            numbers = _rounded(above.mask.numbers, ratio)
        found = cls(
            node, queries, keys, values, scale, above.mask, above.mask_factor, numbers, shape
        )
        return found if found.fits else None

    @property
    def fits(self) -> bool:
        """Codes are of kinds that are multiplied, and no sum of theirs can leave int32."""
        queries = self.queries.encoding.spec
        if (queries.bits > 8 and queries.signed) or any(
            item.encoding.spec.bits > 8 for item in (self.keys, self.values)
        ):
            return False
        depth, keys, values = (
            static_shape(i.codes) for i in (self.queries, self.keys, self.values)
        )
        if depth is None or keys is None or values is None:
            return False
        mask = int(np.abs(self.mask_numbers).max(initial=0))
        reach = depth[-1] * self.queries.reach * self.keys.reach + mask
        return 2 * reach + _MOST_STEP <= INT32_MAX and self.shape[-1] * 255 * 255 <= INT32_MAX

    @property
    def shared(self) -> tuple[SharedHeads, SharedHeads] | None:
        """Keys and values before they are copied for each head of queries, where they are."""
        keys, values = (SharedHeads.behind(item) for item in (self.keys, self.values))
        if keys is None or values is None or values.transposed or keys.groups != values.groups:
            return None
        return keys, values

    def blocks(self) -> list[Block]:
        """Queries in groups, each with the keys that a constant mask lets one of them see."""
        queries, keys = self.shape[-2:]
        everything = [Block(0, queries, 0, keys)]
        held = constant_array(self.mask.codes) if self.mask and self.mask.constant else None
        if held is None or self.mask is None or held.shape[-2:] != (queries, keys):
            return everything
        real = self.mask.scale * float(self.mask_factor)
        numbers = (held.astype(np.int64) - self.mask.zero_point) * real
        seen_by_any = (numbers > _HIDDEN).reshape(-1, queries, keys)
        visible = np.asarray(seen_by_any.any(axis=0))
        found = [_block(visible, start) for start in range(0, queries, _BLOCK)]
        seen = sum(item.queries * item.keys for item in found)
        return found if seen <= 0.8 * queries * keys else everything


def _rounded(numbers: NDArray[np.int64], ratio: Fraction) -> NDArray[np.int64]:
    """⌊n·ratio + 1/2⌋ without any error, in Python's integers."""
    doubled = numbers.astype(object) * (2 * ratio.numerator) + ratio.denominator
    return np.asarray(doubled // (2 * ratio.denominator), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class SharedHeads:
    """Keys or values of which every head serves several heads of queries.

    Attributes:
        codes: before they are copied, shape (B, heads, T, D).
        groups: heads of queries that each serves.
        transposed: what takes them has them as (…, D, T).
    """

    codes: ir.Value
    groups: int
    transposed: bool

    @classmethod
    def behind(cls, operand: CodedInput) -> SharedHeads | None:
        """What Unsqueeze, Expand and Reshape make an operand of; None where it is not that."""
        node, codes = _moved_from(operand, operand.codes)
        rank = len(static_shape(operand.codes) or ())
        transposed = node is not None and node.op_type == "Transpose"
        if node is not None and transposed:
            perm = list(node.attributes.get_ints("perm", []))
            if perm != [*range(rank - 2), rank - 1, rank - 2]:
                return None
            node, codes = _moved_from(operand, codes)
        copied, shapes = ("Reshape", "Expand", "Unsqueeze"), [static_shape(codes)]
        whole = static_shape(node.outputs[0]) if node is not None else None
        for op_type in copied:
            if node is None or node.op_type != op_type:
                return None
            shapes.append(static_shape(codes))
            if op_type != copied[-1]:
                node, codes = _moved_from(operand, codes)
        wide, thin, base = shapes[1:]
        if whole is None or wide is None or thin is None or base is None or len(base) != 4:
            return None
        batch, heads, tokens, width = base
        groups = whole[1] // heads
        if thin != (batch, heads, 1, tokens, width) or whole[1] != groups * heads:
            return None
        if wide != (batch, heads, groups, tokens, width) or whole[2:] != (tokens, width):
            return None
        return cls(codes, groups, transposed)


def _moved_from(operand: CodedInput, codes: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """The layout operator behind codes, and the codes it moves; encodings are the operand's."""
    quantize = codes.producer()
    real = quantize.inputs[0] if quantize is not None and quantize.op_type == QUANTIZE else None
    node = real.producer() if real is not None else None
    data = layout_inputs(node) if node is not None else []
    before = coded_input(data[0]) if len(data) == 1 else None
    if before is None or before.constant or not equal(before.encoding, operand.encoding):
        return None, codes
    return node, before.codes


@dataclass(frozen=True, slots=True)
class Block:
    """Queries, first to end, and keys, first to end."""

    first_query: int
    end_query: int
    first_key: int
    end_key: int

    @property
    def queries(self) -> int:
        return self.end_query - self.first_query

    @property
    def keys(self) -> int:
        return self.end_key - self.first_key


def _block(visible: NDArray[np.bool_], start: int) -> Block:
    """All that the queries from ``start`` on see; everything where one of them sees nothing."""
    rows = visible[start : start + _BLOCK]
    keys = np.flatnonzero(rows.any(axis=0)) if rows.any(axis=1).all() else np.arange(rows.shape[1])
    return Block(start, start + len(rows), int(keys[0]), int(keys[-1]) + 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """What lies between a product and a softmax.

    Attributes:
        product: the MatMul.
        factor: that its results are multiplied with.
        mask: that is added.
        mask_factor: that the mask is multiplied with after that.
    """

    product: ir.Node
    factor: Fraction
    mask: CodedInput | None
    mask_factor: Fraction

    @classmethod
    def of(cls, value: ir.Value | None, shape: tuple[int, ...]) -> _Scores | None:
        factor, mask, mask_factor = Fraction(1), None, Fraction(1)
        node = only_source(value)
        while node is not None and is_standard(node) and static_shape(node.outputs[0]) == shape:
            if node.op_type == "MatMul":
                return cls(node, factor, mask, mask_factor)
            step = _Step.of(node, shape)
            if step is None or (step.mask is not None and mask is not None):
                return None
            if step.mask is not None:
                mask, mask_factor = step.mask, factor
            factor *= step.factor
            node = only_source(step.scores)
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A product with one number, or a sum with a mask.

    Attributes:
        scores: the operand that is neither.
        factor: 1 of a sum.
        mask: of a sum.
    """

    scores: ir.Value
    factor: Fraction
    mask: CodedInput | None

    @classmethod
    def of(cls, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
        if node.op_type not in ("Mul", "Div", "Add"):
            return None
        one, other = node.inputs
        first, second = coded_input(one), coded_input(other)
        if one is None or other is None or first is None or second is None:
            return None
        if node.op_type == "Add":
            if only_source(one) is None or static_shape(one) != shape:
                one, second = other, first
            return cls(one, Fraction(1), second)
        if node.op_type == "Mul" and first.single is not None:
            one, second = other, first
        if not second.single:
            return None
        factor = second.single * Fraction(second.scale)
        return cls(one, factor if node.op_type == "Mul" else 1 / factor, None)
