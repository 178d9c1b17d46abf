"""All that ``qnpu-check`` has to say of a model, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_checks import check_graph
from qnpu.compiler.target import TargetProfile
from qnpu.compiler.target_check import TargetReport, check_target
from qnpu.compiler.target_faults import form_of, target_faults
from qnpu.compiler.target_rules import NotQuantized

_NO_ENCODING = "QN303"


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """What was found.

    Attributes:
        form: ``qdq``, ``qlinear``, ``integer``, or ``float``.
        diagnostics: of the graph itself, then on the target.
        report: verdicts on the nodes; None without a target, or for a float graph.
    """

    form: str
    diagnostics: list[Diagnostic]
    report: TargetReport | None


def check_model(model: ir.Model, target: TargetProfile) -> ModelCheck:
    """Checks a graph, and each node of a quantized one against a target's profile.

    Args:
        model: not changed.
        target: one without rules has nothing to say.
    """
    report = check_target(model, target)
    form = form_of(report) or "float"
    faults = check_graph(model)
    if not target.rules:
        return ModelCheck(form, faults, None)
    if form == "float":
        return ModelCheck(form, [*faults, NotQuantized(target.id).at()], None)
    # a tensor without encodings makes islands of the nodes on both sides, which say the same
    faults = [fault for fault in faults if fault.code != _NO_ENCODING]
    return ModelCheck(form, [*faults, *target_faults(model, report)], report)
