"""legalize-target: rewrite what the target's profile does not take as written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.operands import Operation, operation_of
from qnpu.compiler.pass_base import Compilation, Legalized, Pass, Stage
from qnpu.compiler.qdq_edit import QdqEditor
from qnpu.compiler.target import Legalization, OpRule, TargetProfile, Verdict, load_target
from qnpu.compiler.target_check import NodeVerdict, judge
from qnpu.compiler.target_faults import bias_factor
from qnpu.passes.legalize_layout import keep_apart, requantize_before
from qnpu.passes.legalize_operators import decompose_rotary, pow_to_mul
from qnpu.passes.legalize_rank import reduce_rank
from qnpu.passes.legalize_types import (
    DerivedBias,
    Retyping,
    derive_bias,
    forced_encoding,
    one_type,
    second_operand,
    unsigned,
)
from qnpu.passes.legalize_weights import conv_1x1, finer_weight, lpbq, symmetric_weight

Rewrite = Callable[[QdqEditor, Operation, OpRule], bool]
Plan = Callable[[Operation, OpRule], Retyping | DerivedBias]

_REWRITES: dict[Legalization, Rewrite] = {
    Legalization.REQUANTIZE_BEFORE: requantize_before,
    Legalization.KEEP_APART: keep_apart,
    Legalization.FORCED_ENCODING: forced_encoding,
    Legalization.SYMMETRIC_WEIGHT: symmetric_weight,
    Legalization.FINER_WEIGHT: finer_weight,
    Legalization.LPBQ: lpbq,
    Legalization.CONV_1X1: conv_1x1,
    Legalization.DECOMPOSE_ROTARY: decompose_rotary,
    Legalization.POW_TO_MUL: pow_to_mul,
    Legalization.REDUCE_RANK: reduce_rank,
}
# The node stays and only its operands and results change, so what becomes of it is known before.
_RETYPINGS: dict[Legalization, Plan] = {
    Legalization.SECOND_OPERAND: second_operand,
    Legalization.ONE_TYPE: one_type,
    Legalization.UNSIGNED: unsigned,
    Legalization.DERIVE_BIAS: derive_bias,
}
_MOST_SWEEPS = 32


@dataclass(frozen=True)
class LegalizeTarget(Pass):
    """Applies to each node the rewrite that the row of the profile names which decided on it.

    Before → after, on a target that multiplies two activations only where the second has 8 bits::

        MatMul(DQ(u16), DQ(u16))                    row: legalize = "second-operand", to = "u8"
        MatMul(DQ(u16), DQ(Q(DQ(u16), u8)))

    Each rewrite states in its own docstring what it leaves equal and what it rounds. A rewritten
    node may fit another row with a rewrite of its own, so all nodes are judged again until nothing
    changes.

    Must not fire on a node that is taken as written, that no row decides, or whose row names no
    rewrite; on a target without rules it does nothing. Where a rewrite does not apply, the node
    stays, and the checks of the target report it.
    """

    target: str = ""
    """Profile to rewrite for; the compilation's where empty."""

    name: ClassVar[str] = "legalize-target"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        profile = load_target(self.target) if self.target else compilation.target
        if not any(rule.legalize for rule in profile.rules):
            return 0
        total = 0
        for _ in range(_MOST_SWEEPS):
            count = _sweep(compilation, profile)
            total += count
            if not count:
                break
        return total


def _sweep(compilation: Compilation, profile: TargetProfile) -> int:
    """One rewrite for each node that asks for one; what is left unused goes."""
    editor = QdqEditor(compilation.graph)
    done = [_legalize(editor, node, profile) for node in list(compilation.graph)]
    changes = [change for change in done if change is not None]
    compilation.diagnostics += editor.diagnostics
    compilation.legalized += changes
    if changes:
        common.RemoveUnusedNodesPass()(compilation.model)
        common.TopologicalSortPass()(compilation.model)
        common.ShapeInferencePass(strict_mode=False, check_type=False)(compilation.model)
    return len(changes)


def _legalize(editor: QdqEditor, node: ir.Node, profile: TargetProfile) -> Legalized | None:
    """Rewrites one node; None where it stays."""
    operation = operation_of(node) if node.graph is editor.graph else None
    if operation is None or not operation.outputs:
        return None
    rule, place = judge(operation, profile).rule, name_of(node) or name_of(node.outputs[0])
    kind = rule.legalize if rule is not None else None
    if rule is not None and kind in _REWRITES:
        done = _REWRITES[kind](editor, operation, rule)
        return Legalized(place, operation.op_type, kind.value) if done else None
    if rule is not None and kind in _RETYPINGS:
        plan = _RETYPINGS[kind](operation, rule)
        wanted = plan.changes and _helps(judge(plan.expected(operation), profile))
    else:
        ignored = profile.bias.derived and bias_factor(operation) is not None
        plan = derive_bias(operation) if ignored else DerivedBias()
        wanted, kind = plan.changes, Legalization.DERIVE_BIAS
    if not wanted or kind is None:
        return None
    plan.apply(editor, operation)
    return Legalized(place, operation.op_type, kind.value)


def _helps(after: NodeVerdict) -> bool:
    """The node is taken, or there is a rewrite for what is still wrong."""
    return after.verdict is Verdict.INT or (after.rule is not None and bool(after.rule.legalize))
