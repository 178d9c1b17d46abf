"""assign-bit-widths: decide what every tensor is to be encoded as."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.bit_choices import BLOCK_BITS, BitChoices, LinearBits, WeightBits
from qnpu.compiler.bit_plan import BitPlan, Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import non_finite_weights
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import (
    Linear,
    as_linear,
    encoding_groups,
    is_dynamic_matmul,
    is_layout_copy,
    layout_inputs,
)
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.quant_types import PerChannel, PerTensor, QuantSpec
from qnpu.compiler.roles import (
    activations,
    can_have_blocks,
    computing_uses,
    copies,
    gate_values,
    is_down_projection,
    is_online_rotation,
    is_requantize_point,
    joins_residual,
    makes_scores,
    separate_roles,
)
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.compiler.rotated_weights import rotated_weights
from qnpu.compiler.rules import (
    ActivationsTooNarrow,
    InputNotRotated,
    InvalidPlan,
    NothingToPromote,
    WeightsWithoutBlocks,
)
from qnpu.compiler.target import check_blocks
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.sensitivity import most_sensitive, relative_errors

# What an input gets where no rotation makes 4 bits bearable.
_UNROTATED_BITS = 8

SIGNS = QuantSpec(8, True, True, PerTensor())
"""Of the matrix of an online rotation."""


@dataclass(frozen=True)
class AssignBitWidths(Pass):
    """Gives each float tensor a ``QuantSpec`` by its role, and puts in requantize points.

    Before → after, scheme w8a8::

        y = RMSNormalization(x); q = MatMul(y, Wq); k = MatMul(y, Wk)

        y = RMSNormalization(x)           16 bits, asymmetric
        y_requantized = Identity(y)        8 bits
        q = MatMul(y_requantized, Wq)     Wq: s8 per output channel; q: 8 bits
        k = MatMul(y_requantized, Wk)

    A requantize point is an Identity: the same tensor at another width, one for all consumers that
    want that width. It keeps the table of encodings keyed by value name alone.

    Roles (quantnpu.md §Setting): inputs of linears ``input_bits``, but ``down_bits`` for those of
    down projections, where massive activations arise, ``head_input_bits`` for that of the last
    linear, and 8 instead of 4 where no rotation has spread their outliers (§2; QN506) or where the
    target has no 4-bit activations (QN507); outputs of linears ``output_bits``; an output that is
    added to another activation (the residual stream) or leaves the graph, and everything else,
    ``other_bits``, but queries ``query_bits`` where scores are computed, logits ``logits_bits``,
    and what activation functions make for down projections ``gate_bits``; the second operand of an
    activation-by-activation MatMul (keys, values) ``kv_bits``, from where it is computed, so that a
    cache holds the narrow form, in and out.
    An online rotation (a MatMul by a Hadamard matrix) takes ``other_bits``, since it is there to
    take what 8 bits cannot hold, and hands out what its consumer asks for; its matrix is signed,
    8 bits, one scale for all of it, so that its codes are ±1.
    Weights are signed, symmetric, per output channel, or at 4 bits in blocks of input features
    (LPBQ) where a MatMul takes them and the block divides their features (else QN544); the last
    linear's at ``head_bits``. Biases are 32 bits, derived from input and weight. An initializer
    used in two roles is given a second name; the data is not copied.

    Where bits were chosen linear by linear (``choices``, or an earlier pass), a weight and an input
    get what was chosen, and the linear's result as many as its input, 8 at least, unless it joins
    the residual stream; so do keys and values.

    With ``promote`` the graph runs on data first, and the inputs of down projections that lose most
    at ``down_bits`` get ``other_bits`` instead: the share of them with the greatest mean relative
    error (quantnpu.md §1, paper Eq. 4). So do the activation functions in front of those, and the
    same share of those that lose most at ``gate_bits``.

    Must not fire where an input already has the width its consumer wants.

    Raises:
        DiagnosticError: with ``promote``: QN107 a weight, QN304 such an input is NaN or infinite;
            QN301, QN305 the data do not fit the graph's inputs. QN543 the target has no such
            blocks. QN540 something was chosen for a
            linear or cache that is not there.

    Attributes:
        scheme: bits by role.
        promote: share of the down projections, 0 to 1, that get wide inputs all the same, and of
            those that activation functions stay wide for.
        data: what to measure on; None: nothing is promoted.
        progress: called with fraction done.
        choices: bits of linears and caches; None: those of the compilation.
    """

    name: ClassVar[str] = "assign-bit-widths"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.PLANNED

    scheme: Scheme
    promote: float = 0.0
    data: FeedSource | None = None
    progress: ProgressCallback = no_progress
    choices: BitChoices | None = None

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        count = separate_roles(graph)
        linears = {node: linear for node in graph if (linear := as_linear(node)) is not None}
        ratios = self._sensitivities(compilation, linears)
        gates = {name_of(value) for item in linears.values() for value in _nearest_gate(item)}
        promoted = most_sensitive({k: r for k, r in ratios.items() if k not in gates}, self.promote)
        promoted += most_sensitive({k: r for k, r in ratios.items() if k in gates}, self.promote)
        scheme = self._scheme_of(compilation)
        choices = self.choices or compilation.bit_choices
        _check_choices(choices, graph, linears)
        wanted = _Widths(compilation.model, scheme, linears, promoted, choices)
        count += wanted.insert_requantize_points()
        if wanted.refused:
            fault = InputNotRotated(len(wanted.refused), min(wanted.refused.values()))
            compilation.diagnostics.append(fault.at(value=next(iter(wanted.refused))))
        previous = compilation.bit_plan
        plan = BitPlan(self.scheme.name, {}, ratios, promoted, wanted.choices())
        for size in {bits.block for bits in plan.choices.linears.values() if bits.block}:
            check_blocks(size, compilation.target)
        if wanted.without_blocks:
            first, size = next(iter(wanted.without_blocks.items()))
            note = WeightsWithoutBlocks(len(wanted.without_blocks), size)
            compilation.diagnostics.append(note.at(value=first))
        self._fill(plan, compilation, wanted, linears)
        compilation.bit_plan = plan
        return count + int(previous.specs != plan.specs)

    def _scheme_of(self, compilation: Compilation) -> Scheme:
        """The scheme, with inputs of linears as wide as the target needs them."""
        target, bits = compilation.target, self.scheme.input_bits
        if bits >= target.activation_bits_min:
            return self.scheme
        fault = ActivationsTooNarrow(target.id, bits, target.activation_bits_min)
        compilation.diagnostics.append(fault.at())
        return replace(self.scheme, input_bits=target.activation_bits_min)

    def _sensitivities(
        self, compilation: Compilation, linears: dict[ir.Node, Linear]
    ) -> dict[str, float]:
        """Input of each down projection, and its gate → relative error; empty where none asks."""
        scheme, downs = self.scheme, list(filter(is_down_projection, linears.values()))
        narrowest = min(scheme.down_bits, scheme.gate_bits)
        if not self.promote or self.data is None or narrowest >= scheme.other_bits:
            return {}
        asked: dict[str, int] = {}  # name → bits
        if scheme.down_bits < scheme.other_bits:
            asked |= {name_of(_wide(item.activation)): scheme.down_bits for item in downs}
        if scheme.gate_bits < scheme.other_bits:
            gates = [value for item in downs for value in _nearest_gate(item)]
            asked |= {name_of(value): scheme.gate_bits for value in gates}
        names = list(asked)
        known = compilation.bit_plan.sensitivities
        if not names:
            compilation.diagnostics.append(NothingToPromote(self.promote).at())
        if not names or set(known) == set(names):  # measured by an earlier run
            return dict(known)
        model = compilation.model
        faults = non_finite_weights(model.graph)
        if faults:
            raise DiagnosticError(faults)
        batches = [turn_caches(model, feeds) for feeds in self.data.feeds(model.graph.inputs)]
        specs = {name: compilation.target.activation_spec(bits) for name, bits in asked.items()}
        return relative_errors(model, batches, specs, progress=self.progress)

    def _fill(
        self,
        plan: BitPlan,
        compilation: Compilation,
        wanted: _Widths,
        linears: dict[ir.Node, Linear],
    ) -> None:
        roles: dict[str, QuantSpec] = {}
        for linear in linears.values():
            weight = wanted.weight(linear).spec(linear.channel_axis)
            roles[name_of(linear.weight)] = SIGNS if is_online_rotation(linear) else weight
            if linear.bias is not None:
                roles[name_of(linear.bias)] = QuantSpec(32, True, True, PerChannel(0))
        for group in encoding_groups(compilation.graph):
            bits = max(wanted.bits(value) for value in group)
            kind = compilation.target.activation_spec
            if any(_is_second_operand(value) for value in group):
                kind = compilation.target.key_value_spec
            for value in group:
                spec = kind(bits)
                plan.specs[name_of(value)] = roles.get(name_of(value), spec)


class _Widths:
    """Activation widths by role, and the requantize points that keep them apart.

    Attributes:
        head: the last linear, lm_head; None where no result is a linear's.
        refused: linears' inputs that were to have fewer bits than an unrotated one can, by name:
            how many those were.
        without_blocks: weights that were to have blocks and cannot, by name: of which size.
    """

    def __init__(
        self,
        model: ir.Model,
        scheme: Scheme,
        linears: dict[ir.Node, Linear],
        promoted: Collection[str],
        choices: BitChoices,
    ) -> None:
        graph = model.graph
        self.head = next((n for n in reversed(list(linears)) if _reaches_output(n)), None)
        self.refused: dict[str, int] = {}
        self.without_blocks: dict[str, int] = {}
        self._rotated = rotated_weights(model)
        self._graph = graph
        self._scheme = scheme
        self._linears = linears
        self._promoted = promoted
        self._choices = choices
        self._bits: dict[ir.Value, int] = {}
        self._group_bits: dict[ir.Value, int] = {}
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}
        for value in [*graph.inputs, *graph.initializers.values()]:
            if _is_keys_or_values(value):
                self._bits[value] = self._cache_bits(value)
        for node, linear in linears.items():
            result = node.outputs[0]
            self._bits[result] = self._output_bits(linear)
            if _joins_residual_or_output(result):
                is_logits = node is self.head and not joins_residual(result)
                self._bits[result] = scheme.logits_bits if is_logits else scheme.other_bits
            if is_online_rotation(linear):
                self._bits[result] = self._asked_by_consumers(result)
            elif is_down_projection(linear) and not self._has_wide_gate(linear):
                self._bits |= dict.fromkeys(gate_values(linear), scheme.gate_bits)
        for node in graph:
            if is_requantize_point(node):
                self._bits[node.outputs[0]] = self._asked_by_consumers(node.outputs[0])

    def choices(self) -> BitChoices:
        """Bits of each linear and cache, as the graph is to have them."""
        linears = {
            name_of(linear.weight): LinearBits(
                self.weight_bits(linear), self._input_bits(linear), self._block(linear)
            )
            for linear in self._linears.values()
            if not is_online_rotation(linear)
        }
        caches = {name_of(n): self._kv_bits(n) for n in self._graph if is_dynamic_matmul(n)}
        return BitChoices(linears, caches)

    def weight_bits(self, linear: Linear) -> int:
        """Bits of a linear's weight."""
        known = self._choices.linears.get(name_of(linear.weight))
        if known is not None:
            return known.weight
        return self._scheme.head_bits if linear.node is self.head else self._scheme.weight_bits

    def weight(self, linear: Linear) -> WeightBits:
        """In blocks along the features where they are wanted and fit."""
        return WeightBits(self.weight_bits(linear), self._block(linear))

    def _block(self, linear: Linear) -> int:
        """Features of a linear's weight that share a block scale; 0 for none."""
        known = self._choices.linears.get(name_of(linear.weight))
        size = self._scheme.block if known is None else known.block
        if not size or self.weight_bits(linear) != BLOCK_BITS or is_online_rotation(linear):
            return 0
        if can_have_blocks(linear.weight, size):
            return size
        self.without_blocks[name_of(linear.weight)] = size
        return 0

    def _output_bits(self, linear: Linear) -> int:
        known = self._choices.linears.get(name_of(linear.weight))
        return self._scheme.output_bits if known is None else max(known.input, _UNROTATED_BITS)

    def _kv_bits(self, node: ir.Node) -> int:
        return self._choices.caches.get(name_of(node), self._scheme.kv_bits)

    def _cache_bits(self, value: ir.Value) -> int:
        """Bits of keys or values: the most that one of those who take them wants."""
        return max(self._kv_bits(node) for node, _ in computing_uses(value))

    def bits(self, value: ir.Value) -> int:
        """Width a value asks for; a layout copy asks for nothing, its group decides."""
        if is_layout_copy(value):
            return 0
        return self._bits.get(value, self._scheme.other_bits)

    def insert_requantize_points(self) -> int:
        """Puts an Identity wherever a consumer wants fewer bits than the value has."""
        self._measure_groups()
        count = 0
        for node in list(self._graph):
            if is_dynamic_matmul(node):
                count += self._narrow_sources(node, 1, self._kv_bits(node))
            if makes_scores(node):
                count += self._narrow_queries(node, 0)
        self._measure_groups()  # keys and values have left the groups they were in
        for node, linear in self._linears.items():
            index = list(node.inputs).index(linear.activation)
            count += self._narrow(node, index, self._input_bits(linear))
        return count

    def _input_bits(self, linear: Linear) -> int:
        known = self._choices.linears.get(name_of(linear.weight))
        bits = self._input_bits_by_role(linear) if known is None else known.input
        if bits < _UNROTATED_BITS and not self._rotated.takes_rotated(linear):
            self.refused[name_of(_wide(linear.activation))] = bits
            return _UNROTATED_BITS
        return bits

    def _input_bits_by_role(self, linear: Linear) -> int:
        scheme = self._scheme
        if is_online_rotation(linear) or self._is_promoted(linear):
            return scheme.other_bits
        if is_down_projection(linear):
            return scheme.down_bits
        return scheme.head_input_bits if linear.node is self.head else scheme.input_bits

    def _is_promoted(self, linear: Linear) -> bool:
        return name_of(_wide(linear.activation)) in self._promoted

    def _has_wide_gate(self, linear: Linear) -> bool:
        gates = map(name_of, _nearest_gate(linear))
        return self._is_promoted(linear) or any(name in self._promoted for name in gates)

    def _measure_groups(self) -> None:
        for group in encoding_groups(self._graph):
            bits = max(self.bits(value) for value in group)
            self._group_bits.update(dict.fromkeys(group, bits))

    def _narrow_sources(self, node: ir.Node, index: int, bits: int) -> int:
        """Narrows an operand where it is computed, before reshapes, transposes and concats.

        Only as far up as nothing but keys and values is made of the source: not above the Split of
        a joint query, key and value projection.
        """
        operand = node.inputs[index]
        producer = operand.producer() if operand is not None else None
        tied = layout_inputs(producer) if producer is not None else []
        if operand is None or operand.is_initializer():  # a constant is written as narrow as it is
            return 0
        if producer is not None and tied and all(_is_keys_or_values(v) for v in tied):
            return sum(
                self._narrow_sources(producer, list(producer.inputs).index(value), bits)
                for value in tied
            )
        if operand.is_graph_input() and self.bits(operand) <= bits:
            return 0  # a cache that comes in: wide only by what it is joined to, narrowed as well
        count = self._narrow(node, index, bits)
        narrow = self._made.get((operand, bits))
        if narrow is not None:
            if _is_keys_or_values(operand):
                for user, position in list(operand.uses()):
                    if user is not narrow.producer():
                        user.replace_input_with(position, narrow)
            if operand.is_graph_output():
                _hand_out(self._graph, operand, narrow)
        return count

    def _narrow_queries(self, node: ir.Node, index: int) -> int:
        """As ``_narrow_sources``: both halves before they are put together again."""
        operand = node.inputs[index]
        producer = operand.producer() if operand is not None else None
        tied = layout_inputs(producer) if producer is not None else []
        if producer is not None and tied and all(_is_queries(value) for value in tied):
            places = [list(producer.inputs).index(value) for value in tied]
            return sum(self._narrow_queries(producer, place) for place in places)
        return self._narrow(node, index, self._scheme.query_bits)

    def _narrow(self, node: ir.Node, index: int, bits: int) -> int:
        value = node.inputs[index]
        if value is None or self._group_bits.get(value, self.bits(value)) <= bits:
            return 0
        count = 0
        if (value, bits) not in self._made:
            self._made[value, bits] = self._insert(value, bits)
            count = 1
        node.replace_input_with(index, self._made[value, bits])
        return count

    def _insert(self, value: ir.Value, bits: int) -> ir.Value:
        name = f"{value.name}_requantized"
        if any(wide is value for wide, _ in self._made):  # at another width
            name = f"{name}_{bits}"
        point = ir.node("Identity", [value], name=name)
        output = point.outputs[0]
        output.name, output.type, output.shape = name, value.type, value.shape
        producer = value.producer()
        if producer is None:
            first = next(iter(self._graph))
            self._graph.insert_before(first, point)
        else:
            self._graph.insert_after(producer, point)
        self._bits[output] = bits
        return output

    def _asked_by_consumers(self, value: ir.Value) -> int:
        """The least width that a consumer of a requantize point or online rotation asks for."""
        asked = [self._scheme.other_bits]
        for node, index in computing_uses(value):
            if node in self._linears:
                asked.append(self._input_bits(self._linears[node]))
            elif is_dynamic_matmul(node) and index == 1:
                asked.append(self._kv_bits(node))
            elif makes_scores(node):
                asked.append(self._scheme.query_bits)
        return min(asked)


def _check_choices(choices: BitChoices, graph: ir.Graph, linears: dict[ir.Node, Linear]) -> None:
    weights = {name_of(item.weight) for item in linears.values() if not is_online_rotation(item)}
    caches = {name_of(node) for node in graph if is_dynamic_matmul(node)}
    faults = [
        InvalidPlan(f"the graph has no {kind} `{name}`").at()
        for kind, names, known in (
            ("linear with weight", choices.linears, weights),
            ("product of two activations", choices.caches, caches),
        )
        for name in names
        if name not in known
    ]
    if faults:
        raise DiagnosticError(faults)


def _nearest_gate(linear: Linear) -> list[ir.Value]:
    """What an activation function makes right in front of a down projection's input, if it does."""
    return list(islice(gate_values(linear), 1)) if is_down_projection(linear) else []


def _wide(value: ir.Value) -> ir.Value:
    """What a requantize point narrows; any other value itself."""
    producer = value.producer()
    if producer is None or not is_requantize_point(producer) or producer.inputs[0] is None:
        return value
    return _wide(producer.inputs[0])


def _hand_out(graph: ir.Graph, wide: ir.Value, narrow: ir.Value) -> None:
    """Lets the graph return the narrow form of a cache, under the name the wide one had."""
    for index, output in enumerate(graph.outputs):
        if output is wide:
            graph.outputs[index] = narrow
    name, narrow_name = wide.name, narrow.name
    wide.name = None
    narrow.name = name
    wide.name = f"{narrow_name}_from"


def _is_second_operand(value: ir.Value) -> bool:
    return any(is_dynamic_matmul(node) and index == 1 for node, index in value.uses())


def _is_keys_or_values(value: ir.Value) -> bool:
    """True where a value is the second operand of attention's MatMuls and nothing else."""
    uses = computing_uses(value)
    return bool(uses) and all(is_dynamic_matmul(node) and index == 1 for node, index in uses)


def _is_queries(value: ir.Value) -> bool:
    """True where a value is the first operand of MatMuls that make scores and nothing else."""
    uses = computing_uses(value)
    return bool(uses) and all(makes_scores(node) and index == 0 for node, index in uses)


def _joins_residual_or_output(value: ir.Value) -> bool:
    """True where a value is added to an activation, or leaves the graph other than as a cache."""
    leaves = any(v.is_graph_output() and not _is_keys_or_values(v) for v in copies(value))
    return leaves or joins_residual(value)


def _reaches_output(node: ir.Node) -> bool:
    """True where only operators of one activation, and no further linear, lie behind a node."""
    return any(
        value.is_graph_output()
        or any(
            activations(user) == 1 and as_linear(user) is None and _reaches_output(user)
            for user in value.consumers()
        )
        for value in node.outputs
    )
