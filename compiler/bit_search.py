"""What a search for bits found: losses of single tensors, and the plans it weighed up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.output import Writer, write_json

SEARCH_FILES = ("pareto.json", "pareto.svg", "bits.svg")
"""Plans, their chart, and layers by tensors with bits and sensitivity; beside the graph."""

KL = "kl"
SENSITIVITIES = (KL, "block", "fisher", "noise", "ratio")
"""Names of ``qnpu.runtime_check.bit_losses.Measure``, which would import torch."""


@dataclass(frozen=True, slots=True)
class TensorBits:
    """A tensor whose bits were chosen.

    Attributes:
        name: of a weight, of a linear's input, or of the product that takes keys or values.
        layer: from 0; the head has one of its own, behind the last layer's.
        role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, ``head`` for weights, the same
            with ``input of`` in front (of the first linear that takes it), ``keys``, ``values``.
        bits: chosen.
        losses: bits as a plan writes them, fewest first → what quantizing this tensor alone to so
            many costs, nats per token.
        block: of a weight, features that share a block scale; 0 for none.
    """

    name: str
    layer: int
    role: str
    bits: int
    losses: Mapping[str, float]
    block: int = 0

    @property
    def label(self) -> str:
        """Bits as a plan writes them: 4, or 4b32 for 4 bits in blocks of 32."""
        return str(WeightBits(self.bits, self.block))

    @property
    def worst(self) -> float:
        """Loss at the fewest bits, nats per token; NaN where none was measured."""
        return next(iter(self.losses.values()), math.nan)

    @property
    def loss(self) -> float:
        """Loss at the chosen bits, nats per token; NaN where none was measured."""
        return self.losses.get(self.label, math.nan)

    @property
    def words(self) -> str:
        """Bits in words."""
        return f"{self.bits}, blocks of {self.block}" if self.block else str(self.bits)


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """Bits for all tensors, what they cost and what they lose.

    Attributes:
        label: what made it: ``chosen``, ``front 3``, ``w4a8``, ``w4a8, 10% promoted``.
        seconds: of the workload; modelled.
        bytes: of weights, and of keys and values of the longest run; modelled.
        expected: sum of its tensors' losses, nats per token.
        measured: KL of the graph with all of them quantized at once from the float one, nats per
            token.
        perplexity: of that graph, on the same text.
    """

    label: str
    seconds: float
    bytes: float
    expected: float
    measured: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class BitSearch:
    """A search and its result.

    Attributes:
        target: that times are modelled for.
        workload: ``PROMPT/DECODE``, tokens.
        budget: as asked for.
        sensitivity: how losses were measured (``qnpu.runtime_check.bit_losses.Measure``).
        float_perplexity: of the graph with nothing quantized, on the same text.
        gap: how far the first plan may be from the best by the sum of losses, proven; a share.
        tensors: in graph order.
        chosen: the plan that was taken.
        trials: plans measured for the budget, in order; ``chosen`` is one of them.
        front: of least loss at growing time, those that are better than every faster one.
        others: plans to compare with: those of schemes, the paper's, the greedy one.
    """

    target: str
    workload: str
    budget: str
    sensitivity: str
    float_perplexity: float
    gap: float
    tensors: tuple[TensorBits, ...]
    chosen: MeasuredPlan
    trials: tuple[MeasuredPlan, ...]
    front: tuple[MeasuredPlan, ...]
    others: tuple[MeasuredPlan, ...]

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as in report.json; seconds and bytes are modelled."""
        return {"kind": "modelled", **asdict(self)}


def unbeaten(plans: Iterable[MeasuredPlan]) -> tuple[MeasuredPlan, ...]:
    """Plans by time, each of less perplexity than every faster one."""
    found: list[MeasuredPlan] = []
    for plan in sorted(plans, key=lambda plan: (plan.seconds, plan.perplexity)):
        if not found or plan.perplexity < found[-1].perplexity:
            found.append(plan)
    return tuple(found)


def search_writers(search: BitSearch | None) -> dict[str, Writer]:
    """Writers of ``SEARCH_FILES``; none where no search was made."""
    if search is None:
        return {}

    def write_pareto(path: Path) -> None:
        from qnpu.compiler.bit_charts import write_front  # noqa: PLC0415

        write_front(search, path)

    def write_bits(path: Path) -> None:
        from qnpu.compiler.bit_charts import write_heat_map  # noqa: PLC0415

        write_heat_map(search, path)

    plans = {key: value for key, value in search.to_json().items() if key != "tensors"}
    writers: tuple[Writer, ...] = (lambda path: write_json(plans, path), write_pareto, write_bits)
    return dict(zip(SEARCH_FILES, writers, strict=True))
