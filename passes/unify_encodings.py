"""unify-encodings: tensors that layout operators tie together get one encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.integer_math import INT32_MAX
from qnpu.compiler.op_traits import FIXED_RANGES, Linear, as_linear, encoding_groups
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quant_types import Encoding


@dataclass(frozen=True)
class UnifyEncodings(Pass):
    """Merges encodings over Reshape, Transpose, Slice, Concat … and derives those of biases.

    Before → after (encodings as real ranges)::

        a: [-1, 2], b: [-3, 1], c = Concat(a, b): none
        a, b, c: [-3, 2]

    An NPU moves codes in these operators, it does not requantize (targets.md). A range fixed by
    the producing operator wins where it covers the others.

    Bias: scale s_x · s_w of shape (channels,), zero point 0, so that codes add to the int32
    accumulator. Where a bias would pass 2³¹ LSB, its weight's channel gets the larger scale that
    lets it fit.

    Must not fire on groups that agree already.
    """

    name: ClassVar[str] = "unify-encodings"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    def run(self, compilation: Compilation) -> int:
        table = compilation.encodings
        count = 0
        for group in encoding_groups(compilation.graph):
            merged = merged_encoding(group, table)
            if merged is None or len(group) == 1:
                continue
            for name in map(name_of, group):
                if name not in table or not table[name].same_as(merged):
                    table[name] = merged
                    count += 1
        found = (as_linear(node) for node in compilation.graph)
        biased = [linear for linear in found if linear is not None and linear.bias is not None]
        for linear in biased:  # all before the first bias: two linears may share a weight
            count += _make_room(linear, compilation)
        for linear in biased:
            count += _derive_bias(linear, compilation)
        return count


def merged_encoding(group: Sequence[ir.Value], table: EncodingTable) -> Encoding | None:
    """What a group of values is to share; None where none of them has an encoding."""
    encoded = [value for value in group if name_of(value) in table]
    if not encoded:
        return None
    fixed = [
        table[name_of(value)]
        for value in encoded
        if (node := value.producer()) is not None and node.op_type in FIXED_RANGES
    ]
    return _merge([table[name_of(value)] for value in encoded], fixed)


def _merge(known: list[Encoding], fixed: list[Encoding]) -> Encoding:
    if all(encoding.same_as(known[0]) for encoding in known):
        return known[0]
    low = min(float(encoding.low) for encoding in known)
    high = max(float(encoding.high) for encoding in known)
    for encoding in fixed:
        if float(encoding.low) <= low and float(encoding.high) >= high:
            return encoding
    return Encoding.from_range(known[0].spec, low, high)


def _make_room(linear: Linear, compilation: Compilation) -> int:
    """Raises scales of a weight's channels until the bias fits int32."""
    table = compilation.encodings
    weight, activation = name_of(linear.weight), name_of(linear.activation)
    array = constant_array(linear.bias)
    if array is None or not _all_in(table, weight, activation):
        return 0
    least = np.abs(array.astype(np.float64)) / INT32_MAX / float(table[activation].scale)
    old = table[weight]
    if not bool((least > old.scale).any()):
        return 0
    # a little more than the least, so that rounding the product s_x · s_w leaves it large enough
    raised = np.maximum(old.scale, (least * (1 + 2**-20)).astype(np.float32))
    table[weight] = Encoding(old.spec, raised, old.zero_point)
    return 1


def _derive_bias(linear: Linear, compilation: Compilation) -> int:
    table = compilation.encodings
    bias, weight, activation = (
        name_of(v) for v in (linear.bias, linear.weight, linear.activation) if v is not None
    )
    spec = compilation.bit_plan.specs.get(bias)
    if spec is None or not _all_in(table, weight, activation):
        return 0
    scale = (table[activation].scale * table[weight].scale).astype(np.float32)
    derived = Encoding(spec, scale, np.zeros(scale.shape, np.int32))
    if bias in table and table[bias].same_as(derived):
        return 0
    table[bias] = derived
    return 1


def _all_in(table: EncodingTable, *names: str) -> bool:
    return all(name in table for name in names)
