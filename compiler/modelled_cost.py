"""What the latency model says of a compiled decoder. Modelled, not measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import onnx_ir as ir

from qnpu.compiler.bit_budget import parse_workload
from qnpu.compiler.bit_choices import BitChoices
from qnpu.compiler.bit_items import BitItems, items_of
from qnpu.compiler.cost_model import CostModel, Workload
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import NoCostModel
from qnpu.compiler.target import TargetProfile


@dataclass(frozen=True, slots=True)
class ModelledCost:
    """Time and size on a target.

    Attributes:
        target: name of its profile.
        workload: ``PROMPT/DECODE``, tokens.
        prefill_s: time of reading the prompt, s.
        decode_s: time of generating, s.
        bytes: of weights with their scales, and of keys and values of the longest run.
    """

    target: str
    workload: str
    prefill_s: float
    decode_s: float
    bytes: float

    @property
    def seconds(self) -> float:
        """Of both phases."""
        return self.prefill_s + self.decode_s

    def to_json(self) -> dict[str, object]:
        """A plain dictionary that says what it is."""
        return {"kind": "modelled", **asdict(self), "seconds": self.seconds}


def modelled_cost(
    model: ir.Model, choices: BitChoices, target: TargetProfile, workload: str
) -> ModelledCost | None:
    """What a decoder takes with the bits that it has.

    Args:
        model: float graph, as before Q/DQ pairs go in.
        choices: bits of its linears and caches.
        target: whose time it is.
        workload: ``PROMPT/DECODE``, tokens.

    Returns:
        None where the profile has no figures for the target or for some bits, or the graph is no
        decoder that is understood.
    """
    tokens, items = parse_workload(workload), items_of(model)
    if items is None:
        return None
    try:
        cost = CostModel.of(target)
        whole = _seconds(items, choices, cost, tokens)
        prefill = _seconds(items, choices, cost, Workload(tokens.prompt, 0))
        size = _bytes(items, choices, cost, tokens)
    except DiagnosticError as error:
        if error.codes == [NoCostModel.code]:
            return None
        raise
    return ModelledCost(target.id, workload, prefill, whole - prefill, size)


def _seconds(items: BitItems, choices: BitChoices, cost: CostModel, workload: Workload) -> float:
    linears = (
        cost.linear_seconds(shape, choices.linears[shape.name], workload)
        for shape in items.shape.linears
    )
    caches = (
        cost.cache_seconds(items.shape, choices.caches[cache.name], workload)
        for cache in items.caches
    )
    return sum(linears) + sum(caches) + cost.other_seconds(items.shape, workload)


def _bytes(items: BitItems, choices: BitChoices, cost: CostModel, workload: Workload) -> float:
    linears = (cost.linear_bytes(s, choices.linears[s.name]) for s in items.shape.linears)
    caches = (cost.cache_bytes(items.shape, choices.caches[c.name], workload) for c in items.caches)
    return sum(linears) + sum(caches) + cost.embedding_bytes(items.shape)
