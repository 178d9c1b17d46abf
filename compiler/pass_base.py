"""Stages, passes and the one mutable object they work on."""

from __future__ import annotations

import abc
import enum
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.bit_choices import BitChoices
from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.bit_search import BitSearch
from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.target import TargetProfile

ProgressCallback = Callable[[str, float], None]
"""Called with a step's name and the fraction of it that is done, 0 to 1."""


def no_progress(step: str, fraction: float) -> None:
    """A progress callback that says nothing."""


class Stage(enum.Enum):
    """How far a graph has come; each pass consumes one stage and produces one."""

    FLOAT = "float"
    PLANNED = "planned"
    ENCODED = "encoded"
    QDQ = "qdq"
    INTEGER = "integer"


@dataclass(frozen=True, slots=True)
class Legalized:
    """What legalize-target did to a node.

    Attributes:
        node: its name, or that of its first output.
        operator: as in the profiles.
        rewrite: as in the profiles, ``second-operand``.
    """

    node: str
    operator: str
    rewrite: str


@dataclass(frozen=True, slots=True)
class LearningPoint:
    """A loss that learning came to.

    Attributes:
        what: ``block 3``, or ``model``.
        step: of the optimizer.
        loss: as the driver defines it.
    """

    what: str
    step: int
    loss: float


@dataclass(slots=True)
class Compilation:
    """All state of one compile: the only mutable object that passes share.

    Attributes:
        model: the graph, changed in place.
        target: what the NPU accepts.
        bit_choices: for assign-bit-widths, where a pass before it chose bits linear by linear.
        bit_search: how they were chosen; None where no search was made.
        bit_plan: filled by assign-bit-widths.
        encodings: filled by calibrate-ranges, empty again once Q/DQ pairs carry them.
        diagnostics: warnings and notes; errors are raised.
        learning: filled by learn-scales, in order.
        legalized: filled by legalize-target, in order.
        seconds: pass name → wall time, of those that ran.
        stage: what the last pass produced.
    """

    model: ir.Model
    target: TargetProfile = field(default_factory=TargetProfile)
    bit_choices: BitChoices = field(default_factory=BitChoices)
    bit_search: BitSearch | None = None
    bit_plan: BitPlan = field(default_factory=BitPlan)
    encodings: EncodingTable = field(default_factory=EncodingTable)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    learning: list[LearningPoint] = field(default_factory=list)
    legalized: list[Legalized] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stage: Stage = Stage.FLOAT

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph


class Pass(ir.passes.InPlacePass, abc.ABC):
    """A rewrite of the graph. Subclasses are frozen dataclasses; their fields are their options.

    A pass that needs only the graph also runs in any ``onnx_ir.passes.Sequential``.
    """

    name: ClassVar[str]
    consumes: ClassVar[Stage]
    produces: ClassVar[Stage]

    @abc.abstractmethod
    def run(self, compilation: Compilation) -> int:
        """Rewrites in place.

        Returns:
            How many places changed; 0 when run on its own result.

        Raises:
            DiagnosticError: the graph, data or target does not allow it.
        """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The onnx_ir entry point: runs on a bare model."""
        return ir.passes.PassResult(model, self.run(Compilation(model)) > 0)


def check_order(passes: Sequence[Pass]) -> None:
    """Checks that each pass consumes the stage before it.

    Raises:
        ValueError: the list is out of order.
    """
    for before, after in itertools.pairwise(passes):
        if after.consumes is not before.produces:
            raise ValueError(
                f"{after.name} consumes {after.consumes.value}, "
                f"but {before.name} produces {before.produces.value}"
            )


def run_passes(
    passes: Sequence[Pass], compilation: Compilation, *, after_pass: Callable[[Pass], None]
) -> dict[str, int]:
    """Runs passes in order.

    Args:
        passes: each must consume the stage that the one before it produces.
        compilation: changed in place.
        after_pass: called with each pass that is done, to verify the graph.

    Returns:
        Pass name → number of rewrites.

    Raises:
        ValueError: the list is out of order.
    """
    check_order(passes)
    counts: dict[str, int] = {}
    for item in passes:
        started = time.perf_counter()
        counts[item.name] = item.run(compilation)
        compilation.stage = item.produces
        after_pass(item)
        taken = time.perf_counter() - started
        compilation.seconds[item.name] = compilation.seconds.get(item.name, 0.0) + taken
    return counts
