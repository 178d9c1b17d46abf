"""search-bit-widths: choose the bits of each linear and cache under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import TYPE_CHECKING, ClassVar

from qnpu.compiler.bit_budget import (
    DEFAULT_WORKLOAD,
    LATENCY,
    PERPLEXITY,
    SIZE,
    parse_budget,
    parse_workload,
)
from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.bit_items import find_items
from qnpu.compiler.bit_options import BitOptions, Plan, cache_key, group_key
from qnpu.compiler.bit_plan import SCHEMES, Scheme
from qnpu.compiler.bit_search import KL, BitSearch, MeasuredPlan, TensorBits, unbeaten
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import non_finite_weights
from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.roles import separate_roles
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.learning_record import fingerprint
from qnpu.runtime_check.loss_record import LossRecord
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.sensitivity import most_sensitive
from qnpu.runtime_check.session import Feeds

if TYPE_CHECKING:
    from qnpu.compiler.allocation import Budget
    from qnpu.runtime_check.tensor_losses import TensorLosses

LOGITS = "logits"
_STRIDE = 2
_PROMOTED = 0.1


@dataclass(frozen=True)
class SearchBitWidths(Pass):
    """Chooses bits for assign-bit-widths; the graph is not changed, but for names of constants.

    1. What each tensor loses by itself: KL of the logits from the float graph's, nats per token,
       with that tensor alone quantized; weights of 4 bits with codes by GPTQ. Weights of 8 bits
       lose too little for that, and those in blocks a part of the same: each kind is measured all
       at once, and shares that as it shares the loss of 4 bits with a scale per channel. With
       another ``sensitivity`` single tensors are measured by it, and their losses scaled so that
       those of a kind add up to the KL of all of that kind at once.
    2. What each choice costs: ``qnpu.compiler.cost_model``, modelled.
    3. The plan with the least sum within the budget (``qnpu.compiler.allocation``); with a budget
       of perplexity alone, the fastest plan that keeps it.
    4. That plan is measured; where its loss is not the sum, losses are corrected and it is solved
       again, ``rounds`` times at most. The best of the plans measured is taken.

    Beside it plans of least loss at growing latency, and those of the plain schemes, are measured.

    Choices: of weights 4 and 8 bits, with ``block`` 4 in blocks too; of what linears take 8, 16
    and, where a rotation has spread its outliers, 4; of keys and values 8 and 16; of these what the
    target's profile lists.

    Of several processes (torchrun) each measures a share of the tensors; the first one's plan is
    every one's.

    Must not fire where bits were chosen before.

    Attributes:
        budget: as in ``qnpu.compiler.bit_budget``.
        ranges: to take ranges of activations from.
        rounding: to choose codes of 4-bit weights on.
        data: to measure losses on; best none that the others hold.
        workload: ``PROMPT/DECODE`` that latency is modelled for, tokens.
        sensitivity: one of ``qnpu.compiler.bit_search.SENSITIVITIES``.
        method: how ranges are taken.
        record: keeps losses, on disk if it has a folder.
        rounds: plans measured for the budget, 1 or more.
        points: plans measured at growing latency, 2 or more.
        block: input features of a block of 4-bit weights (LPBQ); 0: no weight may have blocks.
        progress: called with fraction done.

    Raises:
        DiagnosticError: QN503 budget or workload, QN508 the target's profile has no figures, QN509
            no choice keeps the budget, QN541 the graph is no decoder; QN107 a weight, QN304 an
            activation is NaN or infinite; QN301, QN305 the data do not fit the graph's inputs.
    """

    name: ClassVar[str] = "search-bit-widths"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    budget: str
    ranges: FeedSource
    rounding: FeedSource
    data: FeedSource
    workload: str = DEFAULT_WORKLOAD
    sensitivity: str = KL
    method: RangeMethod = RangeMethod.MSE
    record: LossRecord = field(default_factory=LossRecord)
    rounds: int = 4
    points: int = 8
    block: int = 0
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        from qnpu.runtime_check import processes  # noqa: PLC0415  (imports torch)

        if compilation.bit_choices.linears:
            return 0
        limits, workload = parse_budget(self.budget), parse_workload(self.workload)
        separate_roles(compilation.graph)
        items = find_items(compilation.model)
        options = BitOptions(items, compilation.target, workload, self.block)
        _check_costs(options, limits)
        faults = non_finite_weights(compilation.graph)
        if faults:
            raise DiagnosticError(faults)
        losses = self._losses(compilation, options)
        plan, compilation.bit_search = self._search(compilation, options, losses, limits)
        compilation.bit_choices = processes.agreed(options.choices(plan))
        return len(compilation.bit_choices.linears) + len(compilation.bit_choices.caches)

    def _losses(self, compilation: Compilation, options: BitOptions) -> TensorLosses:
        from qnpu.runtime_check import tensor_losses  # noqa: PLC0415  (imports torch)
        from qnpu.runtime_check.bit_changes import ROUNDING, BitChanges  # noqa: PLC0415
        from qnpu.runtime_check.bit_losses import LossMeter, Measure  # noqa: PLC0415

        model, target = compilation.model, compilation.target
        data, ranges, rounding = (
            [turn_caches(model, run) for run in source.feeds(model.graph.inputs)]
            for source in (self.data, self.ranges, self.rounding)
        )
        way = f"{self.method.value} {_STRIDE} {ROUNDING}"
        self.record.open(_fingerprint(compilation, way, [*data, *ranges, *rounding]))
        changes = BitChanges(
            model, options.items, target, ranges, rounding, self.method, self.progress
        )
        tokens = (static_shape(model.graph.inputs[0]) or (_STRIDE,))[-1]
        meter = LossMeter(model, data, logits=LOGITS, stride=min(_STRIDE, tokens))
        measure = Measure(self.sensitivity)
        return tensor_losses.TensorLosses(
            options, changes, meter, measure, self.record, self.progress
        )

    def _search(
        self,
        compilation: Compilation,
        options: BitOptions,
        losses: TensorLosses,
        limits: Mapping[str, float],
    ) -> tuple[Plan, BitSearch]:
        """The best plan, and all that was found on the way."""
        from qnpu.compiler import allocation  # noqa: PLC0415  (imports scipy)

        problem = options.problem(losses.of)
        budget = _budget(limits)
        repaired = allocation.repaired(
            problem, budget, lambda plan: losses.of_plan(plan).divergence, self.rounds
        )

        def measured(label: str, plan: Plan) -> MeasuredPlan:
            summed, found = allocation.priced(problem, plan), losses.of_plan(plan)
            costs = summed.costs[LATENCY], summed.costs[SIZE]
            return MeasuredPlan(label, *costs, summed.loss, found.divergence, exp(found.nll))

        best = repaired.best.allocation.chosen
        trials = [trial.allocation.chosen for trial in repaired.history]
        front = [plan.chosen for plan in allocation.pareto(problem, LATENCY, self.points)]
        others = dict(_plain_plans(options, losses))
        others["greedy"] = allocation.greedy(problem, budget).chosen
        found = BitSearch(
            target=compilation.target.id,
            workload=self.workload,
            budget=self.budget,
            sensitivity=self.sensitivity,
            float_perplexity=exp(losses.of_nothing().nll),
            gap=repaired.history[0].allocation.gap or 0.0,
            tensors=tuple(_tensors(options, losses, best)),
            chosen=measured("chosen", best),
            trials=tuple(measured(f"trial {i}", plan) for i, plan in enumerate(trials, start=1)),
            front=unbeaten(measured(f"front {i}", plan) for i, plan in enumerate(front, start=1)),
            others=tuple(measured(label, plan) for label, plan in others.items()),
        )
        return best, found


def _fingerprint(compilation: Compilation, way: str, feeds: list[Feeds]) -> str:
    """Of all that losses depend on; ``way`` is how they are measured."""
    graph, target = compilation.graph, compilation.target
    kinds = [str(kind(8)) for kind in (target.activation_spec, target.key_value_spec)]
    nodes = [f"{n.op_type} {[v and v.name for v in n.inputs]} {n.attributes}" for n in graph]
    arrays = [array for run in feeds for array in run.values()]
    constants = (constant_array(value) for value in graph.initializers.values())
    arrays += [array for array in constants if array is not None]
    return fingerprint(way, *kinds, *nodes, arrays=arrays)


def _budget(limits: Mapping[str, float]) -> Budget:
    """As the solver takes it: perplexity as nats per token."""
    from qnpu.compiler.allocation import LOSS, Budget  # noqa: PLC0415  (imports scipy)

    costs = {name: limit for name, limit in limits.items() if name != PERPLEXITY}
    if PERPLEXITY not in limits:
        return Budget(costs)
    return Budget({**costs, LOSS: log(limits[PERPLEXITY])}, least=LATENCY)


def _check_costs(options: BitOptions, limits: Mapping[str, float]) -> None:
    """Whether anything is so cheap: before losses are measured.

    Raises:
        DiagnosticError: QN509.
    """
    from qnpu.compiler.allocation import Budget, greedy  # noqa: PLC0415  (imports scipy)

    costs = {name: limit for name, limit in limits.items() if name != PERPLEXITY}
    greedy(options.problem(lambda key, option: 0.0), Budget(costs))


def _tensors(options: BitOptions, losses: TensorLosses, plan: Plan) -> Iterator[TensorBits]:
    """All whose bits were chosen, in graph order."""
    known = losses.tensors()

    def at(key: str, widths: set[WeightBits]) -> dict[str, float]:
        return {str(bits): known.get(f"{key} {bits}", 0.0) for bits in sorted(widths)}

    for group in options.items.groups:
        key = group_key(group)
        chosen, all_options = options.known[key][plan[key]], options.known[key].values()
        role = f"input of {group.linears[0].shape.role}"
        widths = at(key, {WeightBits(option.bits) for option in all_options})
        yield TensorBits(group.name, group.layer, role, chosen.bits, widths)
        for index, (item, weight) in enumerate(zip(group.linears, chosen.weights, strict=True)):
            name, role = item.shape.name, item.shape.role
            widths = at(f"weight {name}", {option.weights[index] for option in all_options})
            yield TensorBits(name, group.layer, role, weight.bits, widths, weight.block)
    for cache in options.items.caches:
        key = cache_key(cache)
        widths = at(key, {WeightBits(option.bits) for option in options.known[key].values()})
        bits = options.known[key][plan[key]].bits
        yield TensorBits(cache.name, cache.layer, cache.role, bits, widths)


def _plain_plans(options: BitOptions, losses: TensorLosses) -> Iterator[tuple[str, Plan]]:
    """Those of the schemes that the target has, and the paper's: a few down inputs promoted."""
    for name in SCHEMES:
        plan = options.by_scheme(Scheme.parse(name))
        if plan is not None:
            yield name, plan
        in_blocks = options.by_scheme(replace(Scheme.parse(name), block=options.block))
        if in_blocks is not None and in_blocks != plan:
            yield f"{name}, blocks of {options.block}", in_blocks
    down = [group_key(g) for g in options.items.groups if g.linears[0].shape.role == "down"]
    known = losses.tensors()
    promoted = most_sensitive({key: known.get(f"{key} 8", 0.0) for key in down}, _PROMOTED)
    plan = options.by_scheme(replace(Scheme.parse("w4a8"), down_bits=8), promoted)
    if plan is not None:
        yield f"w4a8, {_PROMOTED:.0%} of down inputs at 16", plan
