"""From a Q/DQ graph to one that computes on integers alone: the end of a compile."""

from __future__ import annotations

import onnx_ir as ir

from qnpu.compiler.pass_base import Compilation, Pass, Stage, run_passes
from qnpu.compiler.verify import verify_stage
from qnpu.passes.fold_conversions import FoldConversions
from qnpu.passes.fold_requantize import FoldRequantize
from qnpu.passes.lower_io import LowerIo
from qnpu.passes.lower_nonlinear import LowerNonlinear
from qnpu.passes.lower_rotary import LowerRotary

INTEGER_NAME = "model.int.onnx"
PASSES: tuple[Pass, ...] = (
    LowerIo(),
    FoldConversions(),
    LowerRotary(),
    LowerNonlinear(),
    FoldRequantize(),
)


def lower_model(model: ir.Model) -> ir.Model:
    """The same function on codes; inputs and outputs that have an encoding are codes, too.

    Args:
        model: Q/DQ, typed, in topological order; not changed.

    Returns:
        A copy that shares weights; ``with_real_io`` gives it real inputs and outputs again.

    Raises:
        DiagnosticError: QN401 an operator has no integer form.
    """
    compilation = Compilation(model.clone(), stage=Stage.QDQ)
    run_passes(PASSES, compilation, after_pass=lambda done: verify_stage(compilation))
    return compilation.model
