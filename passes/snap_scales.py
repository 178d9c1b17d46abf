"""snap-scales: scales of so few bits that integers requantize exactly in 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.integer_math import exact_ratios
from qnpu.compiler.integer_short import (
    BYTE,
    Term,
    exact_in_float,
    linear_terms,
    quotient_point,
    short_point,
    split_point,
)
from qnpu.compiler.op_traits import (
    FIXED_RANGES,
    Linear,
    as_linear,
    encoding_groups,
    is_standard,
    normalized_inputs,
)
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quant_types import Encoding, widened
from qnpu.compiler.roles import activations, computing_uses, copies, is_online_rotation
from qnpu.compiler.scale_grid import (
    FLOAT32_BITS,
    WEIGHT_BITS,
    few_bits_above,
    odd_part,
    weight_factor,
    with_larger_scale,
)
from qnpu.passes.unify_encodings import merged_encoding

_SUM_BITS = 1  # of the residual stream's scales: powers of two
_OPERAND_BITS = 4  # of what is added to it, where its own steps are the larger ones
_FACTOR_BITS = {8: 5, 16: 3}  # of the input of a linear that makes such an operand, by its bits
_INPUT_BITS = 10  # of other linears' inputs: room for t and for n in 24 bits
_RESULT_BITS = {8: 5, 16: 4}  # t of a result, by its own bits
_WEIGHT_BITS = (WEIGHT_BITS, 4, 3, 2, 1)  # n of a weight's channel: the most that can be
_INTEGER_CHOICES = 3  # of these: where all channels are to have less, 64 bits are better
_POINT_BITS = 31  # behind the point, and of a zero point before it
_NO_BITS = 64
_WIDE_BITS = 16
_LEAST_WEIGHT_BITS = 8
_LEAST_DIVISOR = 3  # steps grow by up to 40 %, those of an almost 7 that becomes 5
_MOST_DIVISOR = (1 << 14) - 1  # times a zero point it stays in 32 bits
_FLOAT_WHOLE = 1 << FLOAT32_BITS
_ROUNDED = 1 + 2.0**-23  # a scale for D, in float32, may be a little above that


@dataclass(frozen=True)
class SnapScales(Pass):
    """Rounds scales up to numbers of few bits, where an integer graph gains by it.

    Of a linear y = x·W, W of shape (features, channels)::

        s_y = s_x · t · 2^b                16 ≤ t < 32, or 8 ≤ t < 16 where y has 16 bits
        s_W[c] = n_c · t · 2^(j_c)         16 ≤ n_c < 32
        M_c = s_x · s_W[c] / s_y = n_c · 2^-k_c

    M is exact, and so few bits long that all of the requantization fits 32 bits
    (``qnpu.compiler.integer_short``), or float32 without error. Where y is added to the residual
    stream, s_y = t·2^b and s_x = X·2^a, 16 ≤ X < 32 or, where x has 16 bits, 4 ≤ X < 8, and
    M_c = X·n_c·2^-k_c. n has fewer bits where sums would leave 32 bits else; where three are too
    many the weight is left alone. Where y has 8 bits a channel has fewer where float32 would round
    else: one whose ratio is small.

    Scales of the residual stream are powers of two, so that either operand of its Adds is shifted,
    times t. What is added with 16 bits, and read by nothing else, takes the sum's scale where that
    is the larger one: the sum would round it to that all the same, so it is rounded once, and the
    Add multiplies nothing. Not so where a weight of less than 8 bits makes it, whose scales would
    have to follow.

    Where y has 16 bits and x and W have 8, without a bias, a channel's scale is rather::

        s_W[c] = s_y / (s_x · D_c)         D odd, or a power of two where that is exact
        M_c = 1 / D_c

    so that sums are divided by D, and not multiplied first. That needs sums of 3 steps at least,
    and a proof for each channel that float32's rounding of s_W changes no result.

    Scales only ever grow, and zero points stay, so nothing is clipped that was not before. A step
    grows by 6 % at the most, 3 % on average (a weight that few bits are left for: 12, 6; the
    16-bit residual stream: half of a bit on average; what is added to it: up to that stream's
    step; a weight whose sums are divided: 1/D on average; 16-bit inputs of linears that make what
    is added: 25, 12; inputs of other linears: 0.1 %).

    Of ratios of few bits one result in 2^k lies exactly halfway between two codes. A Q/DQ graph
    that is run on floats rounds such a one either way, by the order it sums in; integers do not.

    The graph is not changed. Values that layout operators tie together share a scale as they did.

    Must not fire on online rotations (their codes stand for ±1 exactly), on weights whose codes
    were chosen for their scales, or on scales that are so already.
    """

    name: ClassVar[str] = "snap-scales"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    def run(self, compilation: Compilation) -> int:
        graph, table = compilation.graph, compilation.encodings
        groups = _Groups(graph, table)
        linears = [linear for node in graph if (linear := _plain_linear(node)) is not None]
        sums = [n for n in _residual_adds(graph) if groups.bits(n.outputs[0]) == _WIDE_BITS]
        for node in sums:
            groups.ask(node.outputs[0], _SUM_BITS)
            for value in node.inputs:
                groups.ask(value, _OPERAND_BITS)
        for linear in linears:
            bits = _INPUT_BITS
            if groups.is_asked(linear.node.outputs[0]):
                bits = _FACTOR_BITS.get(groups.bits(linear.activation), bits)
            groups.ask(linear.activation, bits)
        count = groups.snap_asked()
        for node in sums:
            for value in node.inputs:
                if value is not None and _only_added(value) and _fine_weight(value, table):
                    count += groups.meet(value, node.outputs[0])
        for linear in linears:
            count += groups.snap_result(linear)
        seen: set[ir.Value] = set()
        for linear in linears:
            if linear.weight not in seen:
                count += _snap_weight(linear, groups, table)
            seen.add(linear.weight)
        return count


def _plain_linear(node: ir.Node) -> Linear | None:
    """A MatMul or Gemm y = x·W with a matrix W, other than an online rotation."""
    linear = as_linear(node)
    if linear is None or node.op_type not in ("MatMul", "Gemm") or is_online_rotation(linear):
        return None
    first = linear.activation is node.inputs[0] and not node.attributes.get_int("transA", 0)
    return linear if first and len(linear.weight.shape or ()) == 2 else None


def _residual_adds(graph: ir.Graph) -> list[ir.Node]:
    """Adds of an activation and what a linear made; a norm between (Gemma's) does not matter."""
    found: dict[ir.Node, None] = {}
    pending = [node.outputs[0] for node in graph if as_linear(node) is not None]
    while pending:
        for node, index in computing_uses(pending.pop()):
            if is_standard(node) and node.op_type == "Add" and activations(node) > 1:
                found[node] = None
            elif normalized_inputs(node) and index == 0:
                pending.append(node.outputs[0])
    return list(found)


def _only_added(value: ir.Value) -> bool:
    """True where one node takes a value, and it does not leave the graph."""
    handed_out = any(copy.is_graph_output() for copy in copies(value))
    return len(computing_uses(value)) == 1 and not handed_out


def _fine_weight(value: ir.Value, table: EncodingTable) -> bool:
    """False where a weight of few bits makes a value: its scales must not grow with those of y."""
    producer = value.producer()
    linear = as_linear(producer) if producer is not None else None
    if linear is None or name_of(linear.weight) not in table:
        return True
    return table[name_of(linear.weight)].spec.bits >= _LEAST_WEIGHT_BITS


class _Groups:
    """Values that share one scale per tensor, and what is asked of it.

    Args:
        graph: left as it is.
        table: changed.
    """

    def __init__(self, graph: ir.Graph, table: EncodingTable) -> None:
        self._table = table
        self._group: dict[ir.Value, list[ir.Value]] = {}
        self._asked: dict[ir.Value, int] = {}
        for group in encoding_groups(graph):
            fixed = any(node.op_type in FIXED_RANGES for node in _producers(group))
            encoding = None if fixed else merged_encoding(group, table)
            if encoding is not None and encoding.scale.size == 1:
                self._group.update(dict.fromkeys(group, group))

    def encoding(self, value: ir.Value | None) -> Encoding | None:
        """What a value shares; None where that is no scale per tensor, or a fixed one."""
        group = self._group.get(value) if value is not None else None
        return None if group is None else merged_encoding(group, self._table)

    def bits(self, value: ir.Value) -> int:
        """Bits of a value's codes; more than any where it has no encoding here."""
        encoding = self.encoding(value)
        return _NO_BITS if encoding is None else encoding.spec.bits

    def ask(self, value: ir.Value | None, bits: int) -> None:
        """Wants a scale of so many bits or fewer."""
        if value is not None and value in self._group:
            first = self._group[value][0]
            self._asked[first] = min(bits, self._asked.get(first, bits))

    def is_asked(self, value: ir.Value) -> bool:
        """True where something has been asked of a value's scale."""
        return value in self._group and self._group[value][0] in self._asked

    def snap_asked(self) -> int:
        """Gives all that was asked for; says how many encodings changed."""
        return sum(self._raise(value, bits) for value, bits in self._asked.items())

    def meet(self, value: ir.Value, sums: ir.Value) -> int:
        """Gives a 16-bit value the scale of what it is added up to, where that is larger."""
        own, goal = self.encoding(value), self.encoding(sums)
        if own is None or goal is None or own.spec.bits != _WIDE_BITS or goal.scale <= own.scale:
            return 0
        return self._set(value, with_larger_scale(own, goal.scale))

    def snap_result(self, linear: Linear) -> int:
        """Makes s_y = s_x · t · 2^b, unless something else is asked of y."""
        taken, result = self.encoding(linear.activation), linear.node.outputs[0]
        given = self.encoding(result)
        if taken is None or given is None or self.is_asked(result):
            return 0
        bits = _RESULT_BITS.get(given.spec.bits)
        if bits is None or bits + odd_part(taken.scale.item()).bit_length() > FLOAT32_BITS:
            return 0
        return self._raise(result, bits, taken.scale.item())

    def _raise(self, value: ir.Value, bits: int, factor: float = 1.0) -> int:
        encoding = self.encoding(value)
        if encoding is None:
            return 0
        scale = few_bits_above(encoding.scale, bits, factor)
        return self._set(value, with_larger_scale(encoding, scale))

    def _set(self, value: ir.Value, raised: Encoding) -> int:
        count = 0
        for name in map(name_of, self._group[value]):
            if name in self._table and not self._table[name].same_as(raised):
                self._table[name] = raised
                count += 1
        return count


def _producers(group: list[ir.Value]) -> Iterator[ir.Node]:
    yield from (node for value in group if (node := value.producer()) is not None)


def _snap_weight(linear: Linear, groups: _Groups, table: EncodingTable) -> int:
    taken, given = groups.encoding(linear.activation), groups.encoding(linear.node.outputs[0])
    name, array = name_of(linear.weight), constant_array(linear.weight)
    if taken is None or given is None or array is None:
        return 0
    if name not in table or table.has_codes(name) or not table[name].spec.symmetric:
        return 0
    factor, old = weight_factor(taken, given), table[name]
    if factor.bit_length() + max(_WEIGHT_BITS) > FLOAT32_BITS:
        return 0
    snapping = _Weight(linear, array, taken, old, given)
    new = snapping.for_float(factor) or snapping.for_quotients() or snapping.for_integers(factor)
    if new is None or new.same_as(old):
        return 0
    table[name] = new
    return 1


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A weight whose scales are chosen.

    Attributes:
        linear: that it belongs to.
        array: its real values.
        taken: encoding of x.
        old: its own.
        given: encoding of y.
    """

    linear: Linear
    array: np.ndarray
    taken: Encoding
    old: Encoding
    given: Encoding

    def for_float(self, factor: int) -> Encoding | None:
        """Scales with which float32 is exact; None where there are none, or it is not used.

        Each channel gets as many bits as that allows. Few are enough for a channel of small ratio:
        its weights are small against a step of y.
        """
        if self.given.spec.bits != 8 or self.taken.spec.bits > 8 or self.linear.bias is not None:
            return None
        scales = few_bits_above(self.old.scale, _WEIGHT_BITS[0], factor)
        for bits in (*_WEIGHT_BITS[1:], None):
            new = with_larger_scale(self.old, scales)
            bounds = np.abs(self._codes(new)).sum(axis=0, dtype=np.int64) * self.taken.reach
            ratios = exact_ratios([self.taken.scale, new.scale], self.given.scale)
            exact = np.array(exact_in_float(ratios, bounds.tolist(), self.given))
            if exact.all():
                return new
            if bits is not None:
                fewer = few_bits_above(self.old.scale, bits, factor)
                scales = np.where(exact if scales.size > 1 else exact.all(), scales, fewer)
        return None

    def for_quotients(self) -> Encoding | None:
        """Scales with which sums are only divided, by D; None where steps would grow too much.

        D is odd, or a power of two where s_y/s_x has so few bits that float32 holds s_y/(s_x·D).
        """
        if self.given.spec.bits <= 8 or self.taken.spec.bits > 8 or self.linear.bias is not None:
            return None
        if self.old.spec.bits < _LEAST_WEIGHT_BITS:
            return None
        (unit,) = exact_ratios([self.given.scale], self.taken.scale.item())
        divisors = np.floor(float(unit) / self.old.scale * _ROUNDED).astype(np.int64)
        divisors = np.minimum(divisors, _MOST_DIVISOR)
        if divisors.min() < _LEAST_DIVISOR:
            return None
        whole = unit.denominator & (unit.denominator - 1) == 0 and unit.numerator < _FLOAT_WHOLE
        kept = (divisors % 2 == 1) | (whole & (divisors & (divisors - 1) == 0))
        scales = (float(unit) / (divisors - ~kept)).astype(np.float32)
        new = with_larger_scale(self.old, np.maximum(scales, self.old.scale))
        return new if self._divides(new) else None

    def for_integers(self, factor: int) -> Encoding | None:
        """Scales with which sums fit 32 bits, of as many bits as that allows.

        A ratio with so many bits behind the point that the zero point alone fills 32 has fewer:
        its weights are small against a step of y.
        """
        for bits in _WEIGHT_BITS[:_INTEGER_CHOICES]:
            scales = few_bits_above(self.old.scale, bits, factor)
            for behind in (_POINT_BITS, _POINT_BITS - 1):
                grid = self._grid(factor, behind - int(self.given.zero_point).bit_length())
                coarse = np.ceil(self.old.scale / grid) * grid
                new = with_larger_scale(self.old, np.maximum(scales, coarse).astype(np.float32))
                if self._fits(new):
                    return new
        return None

    def _grid(self, factor: int, behind: int) -> float:
        """The scale of which multiples have ratios of no more bits behind the point."""
        (ratio,) = exact_ratios([self.taken.scale, np.float32(factor)], self.given.scale)
        own = ratio.denominator.bit_length() - (ratio.numerator & -ratio.numerator).bit_length()
        return float(np.ldexp(float(factor), own - behind))

    def _codes(self, weight: Encoding) -> np.ndarray:
        """Shape (features, channels); of blocks times their block scales."""
        codes = weight.quantize(self.array)
        whole = widened(codes) if weight.block_scales is None else weight.integers(codes)
        return np.moveaxis(whole, self.linear.channel_axis, 1)

    def _sums(self, weight: Encoding) -> tuple[Term, list[int]]:
        """What can come of a product, and what is added to it: z_x's share and the bias, LSB."""
        codes = self._codes(weight)
        ratios = exact_ratios([self.taken.scale, weight.scale], self.given.scale)
        added = -int(self.taken.zero_point) * codes.sum(axis=0, dtype=np.int64)
        bias = constant_array(self.linear.bias)
        if bias is not None:
            steps = self.taken.scale.astype(np.float64) * weight.scale
            added = added + np.rint(bias.astype(np.float64) / steps).astype(np.int64)
        spec = BYTE if self.taken.spec.bits > 8 else self.taken.spec
        return linear_terms(spec, codes, ratios)[0], added.tolist()

    def _fits(self, weight: Encoding) -> bool:
        """True where 32 bits are enough, with ratios of few bits."""
        sums, added = self._sums(weight)
        addends = [a * sums.ratios[c % len(sums.ratios)] for c, a in enumerate(added)]
        zero, spec = int(self.given.zero_point), self.given.spec
        if self.taken.spec.bits > 8:
            return split_point(sums, addends, zero, spec) is not None
        return short_point([sums], addends, zero, spec) is not None

    def _divides(self, weight: Encoding) -> bool:
        """True where 32 bits are enough, with ratios that are 1/D."""
        sums, added = self._sums(weight)
        zero, spec = int(self.given.zero_point), self.given.spec
        return quotient_point(sums, list(map(Fraction, added)), zero, spec) is not None
