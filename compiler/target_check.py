"""Judges every node of a graph against a target profile, as the vendor's compiler would."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qnpu.compiler.merged_pairs import merge_splits_a_move
from qnpu.compiler.op_traits import is_float, is_parameter
from qnpu.compiler.operand_pattern import pattern_of
from qnpu.compiler.operands import Operand, Operation, operations
from qnpu.compiler.target import Fault, OpRule, TargetProfile, Verdict

# A chip that multiplies 16 bits as two bytes drops the lower byte's last eight bits.
_PRODUCTS_CUT = 256
_FORCED_TOLERANCE = 1e-6
# These take float constants that steer them, or that a compiler quantizes itself (biases).
_STEERED = {
    "Clip": 1,
    "Pad": 1,
    "OneHot": 1,
    "Gemm": 2,
    "Conv": 2,
    "ConvTranspose": 2,
    "com.microsoft.MatMulNBits": 1,
    "QLinearMatMul": 1,
    "QLinearConv": 1,
}


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """What becomes of one node.

    Attributes:
        operation: the node with what it computes on.
        verdict: integer, silently changed, float, refused, or unknown.
        rule: the profile's row that decided; None where none fitted.
        fault: what is wrong, unless the verdict is ``int``.
    """

    operation: Operation
    verdict: Verdict
    rule: OpRule | None
    fault: Fault

    @property
    def does(self) -> str:
        """What the vendor's compiler does, half a sentence."""
        return self.rule.does if self.rule is not None and self.rule.does else _DOES[self.verdict]

    @property
    def fix(self) -> str:
        """What to do, half a sentence."""
        return self.rule.fix if self.rule is not None and self.rule.fix else _FIXES[self.fault]


@dataclass(frozen=True, slots=True)
class TargetReport:
    """All nodes of a graph, judged.

    Attributes:
        profile: the target.
        nodes: in graph order.
    """

    profile: TargetProfile
    nodes: tuple[NodeVerdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all nodes."""
        return max((n.verdict for n in self.nodes), key=lambda v: v.badness, default=Verdict.INT)


def verdict_counts(model: ir.Model, profile: TargetProfile) -> dict[str, int]:
    """How many nodes get which verdict, by its name; nothing where the profile has no rules."""
    if not profile.rules:
        return {}
    counts = Counter(node.verdict.value for node in check_target(model, profile).nodes)
    return dict(sorted(counts.items()))


def check_target(model: ir.Model, profile: TargetProfile) -> TargetReport:
    """Judges every node of a QDQ, QLinear or integer graph.

    Args:
        model: not changed.
        profile: what the target accepts.
    """
    return TargetReport(
        profile, tuple(judge(operation, profile) for operation in operations(model.graph))
    )


def judge(operation: Operation, profile: TargetProfile) -> NodeVerdict:
    """The verdict of the first row that fits a node, or the profile's word on what has none."""
    found = _first_fit(operation, profile)
    if found.verdict is Verdict.FLOAT and operation.op_type in profile.no_float:
        return replace(found, verdict=Verdict.REJECT)
    return found


def _first_fit(operation: Operation, profile: TargetProfile) -> NodeVerdict:
    island = is_island(operation)
    rules = profile.rules_for(operation.op_type)
    for rule in rules:
        if rule.island == island and fits(rule, operation):
            return NodeVerdict(operation, rule.verdict, rule, rule.fault)
    if island:
        return NodeVerdict(operation, profile.islands, None, Fault.ISLAND)
    if any(operation.op_type in rule.ops for rule in rules):
        return NodeVerdict(operation, profile.unmatched, None, Fault.TYPES)
    return NodeVerdict(operation, profile.unlisted, None, Fault.OPERATOR)


def is_island(operation: Operation) -> bool:
    """The node computes on a float, or makes one; constants that only steer it do not count."""
    if any(is_float(output.value) and not output.quantized for output in operation.outputs):
        return True
    return any(
        operand is not None
        and is_float(operand.value)
        and not operand.quantized
        and not is_parameter(operation.node, index)
        and not (operand.constant and index >= _STEERED.get(operation.op_type, index + 1))
        for index, operand in enumerate(operation.inputs)
    )


def fits(rule: OpRule, operation: Operation) -> bool:
    """Whether every condition of a row holds for a node."""
    return all(condition(rule, operation) for condition in _CONDITIONS)


def _inputs(rule: OpRule, operation: Operation) -> bool:
    if not rule.inputs:
        return True
    return any(
        all(
            pattern_of(text).fits(
                operation.inputs[index] if index < len(operation.inputs) else None
            )
            for index, text in enumerate(combination)
        )
        for combination in rule.inputs
    )


def _output(rule: OpRule, operation: Operation) -> bool:
    return not rule.output or all(
        _fits_output(rule.output, operation, output) for output in operation.outputs
    )


def _output_is_not(rule: OpRule, operation: Operation) -> bool:
    return not rule.output_is_not or not all(
        _fits_output(rule.output_is_not, operation, output) for output in operation.outputs
    )


def _fits_output(pattern: str, operation: Operation, output: Operand) -> bool:
    if pattern == "=":
        first = operation.inputs[0] if operation.inputs else None
        return first is not None and output.dtype == first.dtype
    return pattern_of(pattern).fits(output)


def _encodings(rule: OpRule, operation: Operation) -> bool:
    if not rule.encodings:
        return True
    first = operation.inputs[0] if operation.inputs else None
    if first is None:
        return False
    if rule.encodings == "scale-differs":
        return any(not first.same_scale(output) for output in operation.outputs)
    same = all(first.same_encoding(output) for output in operation.outputs)
    return same == (rule.encodings == "same")


def _types(rule: OpRule, operation: Operation) -> bool:
    if not rule.types:
        return True
    found = {operand.dtype for operand in (*operation.present, *operation.outputs)}
    return (len(found) <= 1) == (rule.types == "same")


def _all_encodings(rule: OpRule, operation: Operation) -> bool:
    if not rule.all_encodings:
        return True
    operands = [o for o in (*operation.present, *operation.outputs) if o.quantized]
    same = all(operand.same_encoding(operands[0]) for operand in operands)
    return same == (rule.all_encodings == "same")


def _batch(rule: OpRule, operation: Operation) -> bool:
    if not rule.batch:
        return True
    shapes = [operand.shape for operand in operation.present[:2]]
    first, second = (shape[:1] if shape is not None else None for shape in shapes)
    return first != second


def _shapes(rule: OpRule, operation: Operation) -> bool:
    if not rule.shapes:
        return True
    shapes = [operand.shape for operand in operation.present[:2]]
    return None not in shapes and len(shapes) == 2 and shapes[0] == shapes[1]


def _broadcast(rule: OpRule, operation: Operation) -> bool:
    if rule.broadcast is None:
        return True
    operand = operation.inputs[rule.broadcast]
    whole = operation.outputs[0].shape
    if operand is None or operand.shape is None or whole is None:
        return False
    return 1 < math.prod(operand.shape) < math.prod(whole)


def _merged(rule: OpRule, operation: Operation) -> bool:
    if not rule.merged:
        return True
    first = operation.inputs[0] if operation.inputs else None
    return first is not None and merge_splits_a_move(first, operation.outputs[0])


def _step_above(rule: OpRule, operation: Operation) -> bool:
    if rule.step_above is None:
        return True
    first, weight = (*operation.inputs, None, None)[:2]
    scales = [operand.scale for operand in (first, weight, *operation.outputs[:1]) if operand]
    known = [scale for scale in scales if scale is not None]
    if len(known) != 3:
        return False
    step = float(known[0].item() * np.median(known[1]) / known[2].item())
    return _PRODUCTS_CUT * step > rule.step_above


def _rank_above(rule: OpRule, operation: Operation) -> bool:
    rank = operation.rank
    return rule.rank_above is None or (rank is not None and rank > rule.rank_above)


def _rank_below(rule: OpRule, operation: Operation) -> bool:
    rank = operation.rank
    return rule.rank_below is None or (rank is not None and rank < rule.rank_below)


def _attributes(rule: OpRule, operation: Operation) -> bool:
    return all(
        _attribute_fits(operation, name, allowed) for name, allowed in rule.attributes.items()
    )


def _attribute_fits(
    operation: Operation, name: str, allowed: tuple[int | float | str, ...]
) -> bool:
    attribute = operation.node.attributes.get(name)
    if attribute is None:
        return "absent" in allowed
    value = attribute.value
    rank = operation.inputs[0].rank if operation.inputs and operation.inputs[0] else None
    if any(word in allowed and says(value, rank) for word, says in _ATTRIBUTE_WORDS.items()):
        return True
    if isinstance(value, list | tuple):
        return all(item in allowed for item in value)
    return value in allowed


def _moves_channels(permutation: Sequence[int]) -> bool:
    """Channels from the second dimension to the last, or back."""
    order = list(range(len(permutation)))
    to_last = [*order[:1], *order[2:], *order[1:2]]
    return len(order) > 2 and list(permutation) in (
        to_last,
        [*order[:1], *order[-1:], *order[1:-1]],
    )


_ATTRIBUTE_WORDS: dict[str, Callable[[Any, int | None], bool]] = {
    "not-one": lambda value, _: bool(value != 1),
    "last": lambda axis, rank: axis == -1 or (rank is not None and axis == rank - 1),
    "not-last": lambda axis, rank: axis != -1 and rank is not None and axis != rank - 1,
    "channels": lambda permutation, _: _moves_channels(permutation),
}


def _unless_forced(rule: OpRule, operation: Operation) -> bool:
    forced = rule.unless_forced
    return forced is None or any(
        not _has_encoding(output, forced.scale, forced.zero_point) for output in operation.outputs
    )


def _has_encoding(operand: Operand, scale: float, zero_point: int) -> bool:
    return (
        operand.scale is not None
        and operand.zero_point is not None
        and bool(np.allclose(operand.scale, scale, rtol=_FORCED_TOLERANCE, atol=0))
        and bool((operand.zero_point == zero_point).all())
    )


_CONDITIONS = (
    _inputs,
    _output,
    _output_is_not,
    _encodings,
    _types,
    _all_encodings,
    _batch,
    _shapes,
    _broadcast,
    _merged,
    _step_above,
    _rank_above,
    _rank_below,
    _attributes,
    _unless_forced,
)


_DOES = {
    Verdict.INT: "runs it in integers",
    Verdict.SILENT: "runs it in integers, other ones than the file says",
    Verdict.UNKNOWN: "is not known to accept it",
    Verdict.FLOAT: "runs it in floating point",
    Verdict.REJECT: "refuses the graph",
}

_FIXES = {
    Fault.OPERATOR: "replace the operator by ones that the target has",
    Fault.TYPES: "use a combination of types that the target has",
    Fault.GRANULARITY: "use one scale per tensor, or per channel for weights",
    Fault.OUTPUT_TYPE: "give the result the type of the first input",
    Fault.ATTRIBUTE: "use another axis or attribute",
    Fault.RANK: "reshape to fewer dimensions",
    Fault.ENCODINGS: "give input and output the same scale and zero point",
    Fault.ISLAND: "give every float input and output of the node an encoding",
    Fault.CHANGED: "use the encoding that the target forces",
}
