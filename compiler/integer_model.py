"""From a Q/DQ graph to one that computes on integers alone: the end of a compile."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.integer_cpu import Cpu, mark_cpu
from qnpu.compiler.output import Writer, write_json
from qnpu.compiler.pass_base import (
    Compilation,
    Pass,
    ProgressCallback,
    Stage,
    no_progress,
    run_passes,
)
from qnpu.compiler.rules import IntegerDiffers
from qnpu.compiler.verify import verify_stage
from qnpu.passes.fold_conversions import FoldConversions
from qnpu.passes.fold_requantize import FoldRequantize
from qnpu.passes.fold_reshapes import FoldReshapes
from qnpu.passes.join_halves import JoinHalves
from qnpu.passes.lower_attention import LowerAttention
from qnpu.passes.lower_io import LowerIo
from qnpu.passes.lower_nonlinear import LowerNonlinear
from qnpu.passes.lower_rotary import LowerRotary
from qnpu.passes.raise_sums import RaiseSums
from qnpu.passes.widen_sums import WidenSums
from qnpu.runtime_check.session import Feeds

if TYPE_CHECKING:
    from qnpu.runtime_check.parity import ParityCertificate

INTEGER_NAME = "model.int.onnx"
PARITY_NAME = "parity.json"


def integer_passes(cpu: Cpu) -> list[Pass]:
    """Every pass from Q/DQ to integers, in the order they run."""
    return [
        LowerIo(),
        FoldConversions(),
        LowerRotary(),
        LowerAttention(cpu),
        LowerNonlinear(cpu),
        FoldRequantize(cpu),
        FoldReshapes(),
        JoinHalves(),
        WidenSums(),
        RaiseSums(),
    ]


def lower_model(model: ir.Model, cpu: Cpu = Cpu.ANY) -> ir.Model:
    """The same function on codes; inputs and outputs that have an encoding are codes, too.

    Args:
        model: Q/DQ, typed, in topological order; not changed.
        cpu: that the result must be right on.

    Returns:
        A copy that shares weights; ``with_real_io`` gives it real inputs and outputs again.

    Raises:
        DiagnosticError: QN401 an operator has no integer form.
    """
    compilation = Compilation(model.clone(), stage=Stage.QDQ)
    run_passes(integer_passes(cpu), compilation, after_pass=lambda _: verify_stage(compilation))
    mark_cpu(compilation.model, cpu)
    return compilation.model


def certify(
    qdq: ir.Model,
    integer: ir.Model,
    batch: Feeds,
    diagnostics: list[Diagnostic],
    progress: ProgressCallback = no_progress,
) -> ParityCertificate:
    """The parity certificate on one batch; QN402 for what breaks a limit joins the diagnostics."""
    from qnpu.runtime_check.parity import parity_certificate  # noqa: PLC0415  (imports torch)

    certificate = parity_certificate(qdq, integer, [batch], progress)
    diagnostics += [
        IntegerDiffers(tensor.max_lsb, tensor.limit).at(node=tensor.node, value=tensor.name)
        for tensor in certificate.tensors
        if not tensor.passed
    ]
    return certificate


def parity_summary(parity: ParityCertificate | None) -> list[dict[str, object]]:
    """Rows of a report, one for each kind of operator; parity.json has the rest."""
    return [asdict(item) for item in parity.summary()] if parity is not None else []


def parity_writers(parity: ParityCertificate | None) -> dict[str, Writer]:
    """What writes parity.json, where there is a certificate."""
    if parity is None:
        return {}
    return {PARITY_NAME: lambda path: write_json(parity.to_json(), path)}
