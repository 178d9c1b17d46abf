"""A graph that is quantized already, from any tool: what the target asks for, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.handout import Handout
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.integer_model import certify, lower_model, parity_summary, parity_writers
from qnpu.compiler.output import Writer
from qnpu.compiler.pass_base import Compilation, Legalized, Pass, run_passes
from qnpu.compiler.pipeline import write_files
from qnpu.compiler.rules import QuantizedInput
from qnpu.compiler.target import load_target
from qnpu.compiler.target_check import verdict_counts
from qnpu.passes.freeze_shapes import FreezeShapes
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.compare import lsb_difference
from qnpu.runtime_check.htp import output_scales
from qnpu.runtime_check.session import Feeds, Mode, open_session, run

if TYPE_CHECKING:
    from qnpu.runtime_check.parity import ParityCertificate


@dataclass(frozen=True, slots=True)
class OutputChange:
    """What a rewrite of a quantized graph changed in one output, on one batch.

    Attributes:
        name: of the output.
        max_abs_error: real units.
        max_lsb, mean_lsb: in LSB of the output's encoding before; None where it has none.
    """

    name: str
    max_abs_error: float
    max_lsb: int | None
    mean_lsb: float | None


@dataclass(frozen=True, slots=True)
class LegalizeResult:
    """What became of a graph that was quantized already.

    Attributes:
        model: the graph, rewritten.
        diagnostics, rewrites, legalized: as in ``CompileResult``.
        before, after: verdict of the target → how many nodes.
        changes: of each output.
        integer_model: as in ``CompileResult``.
        parity: as in ``CheckResult``.
    """

    model: ir.Model
    diagnostics: list[Diagnostic]
    rewrites: dict[str, int]
    legalized: list[Legalized]
    before: dict[str, int]
    after: dict[str, int]
    changes: list[OutputChange]
    integer_model: ir.Model | None = None
    parity: ParityCertificate | None = None


def legalize_model(
    model: ir.Model, config: CompileConfig, feeds: Callable[[ir.Graph], Feeds]
) -> LegalizeResult:
    """Q/DQ graph in, one that the target takes out: the end of a compile alone.

    Args:
        model: from any quantizer; changed in place.
        config: of it, shapes, target, ``integer_io`` and ``integer`` count.
        feeds: one batch for the graph once its shapes are fixed.

    Raises:
        DiagnosticError: QN101 and the like, of shapes; QN116 ONNX Runtime does not run it.
    """
    compilation = Compilation(model, load_target(config.target))
    freeze = FreezeShapes(config.freeze_dims, config.seq_len, keep_inputs=config.keep_inputs)
    last: list[Pass] = [LegalizeTarget(), *([LowerIo()] if config.integer_io else [])]
    names = " and ".join(item.name for item in last)
    compilation.diagnostics.append(QuantizedInput(names).at())
    rewrites = {freeze.name: freeze.run(compilation)}
    source, before = model.clone(), verdict_counts(model, compilation.target)
    rewrites |= run_passes(last, compilation, after_pass=lambda done: None)
    batch = feeds(source.graph)
    integer = lower_model(model, Cpu(config.cpu)) if config.integer else None
    parity = None
    if integer is not None:
        parity = certify(with_real_io(model), integer, batch, compilation.diagnostics)
    return LegalizeResult(
        model=model,
        diagnostics=compilation.diagnostics,
        rewrites=rewrites,
        legalized=compilation.legalized,
        before=before,
        after=verdict_counts(model, compilation.target),
        changes=_output_changes(source, with_real_io(model), batch),
        integer_model=integer,
        parity=parity,
    )


def write_legalized(
    folder: Path,
    result: LegalizeResult,
    handout: Handout,
    about: dict[str, object],
    more: Mapping[str, Writer] = MappingProxyType({}),
) -> dict[str, object]:
    """Writes the graphs, encodings.json, more and report.json: as a compile does."""
    found: dict[str, object] = {
        "verdicts": {"before": result.before, "after": result.after},
        "changes": [asdict(change) for change in result.changes],
        "parity": parity_summary(result.parity),
    }
    more = parity_writers(result.parity) | dict(more)
    return write_files(folder, result, handout, about | found, more)


def _output_changes(before: ir.Model, after: ir.Model, feeds: Feeds) -> list[OutputChange]:
    scales, names = output_scales(before), [name_of(value) for value in before.graph.outputs]
    first, second = (
        run(open_session(model, Mode.REFERENCE), names, feeds) for model in (before, after)
    )
    changes: list[OutputChange] = []
    for name, old, new in zip(names, first, second, strict=True):
        lsb = np.abs(lsb_difference(old, new, scales.get(name, 1.0)))
        error = float(np.abs(new.astype(np.float64) - old.astype(np.float64)).max(initial=0))
        known = name in scales and lsb.size > 0
        largest, mean = (int(lsb.max()), float(lsb.mean())) if known else (None, None)
        changes.append(OutputChange(name, error, largest, mean))
    return changes
