"""Which bits each layer gets under a budget: a multiple-choice knapsack, solved to a proven gap.

Of every item (a linear, linears that share their input, a cache) one choice is taken. Losses add
up, and so do costs (quantnpu.md §1 **D**):

    least Σ_i loss[i, c_i]    where    fixed[u] + Σ_i cost[u][i, c_i] ≤ limit[u] for every unit u

The loss is a unit as any other, so it may have the limit and a cost be what is to be least.
Terms and the greedy rule: Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context
from math import fsum, inf, isfinite
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.rules import InfeasibleBudget
from qnpu.runtime_check.sensitivity import most_sensitive

LOSS = "loss"
"""The unit of losses, beside those of costs."""

TOLERANCE = 1e-9
"""A limit counts as kept up to this share of itself: sums are rounded."""

GAP = 1e-6
"""A plan is good enough when it is proven to be so near to the best: losses are known to 1e-2."""

_NODES = 5_000
"""Of branch and bound. A limit of time would make the answer depend on the machine."""

_SCALE = 1e4
"""What the solver sees as the whole of a limit, and as the loss of the greedy plan: its tolerances,
all about 1e-6, are then 1e-10 of these."""

_SHARED = 0.25
"""Part of a measured deviation that is taken to be every choice's, see ``repaired``."""

_DIGITS = 6

_Plan = NDArray[np.intp]
_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to quantize an item.

    Attributes:
        name: within the item.
        loss: what it costs in quality, nats per token; an estimate that is added to others'.
        costs: unit → amount, such as seconds or bytes.

    Raises:
        ValueError: a number is negative, infinite or NaN, or a unit is called ``loss``.
    """

    name: str
    loss: float
    costs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if LOSS in self.costs:
            raise ValueError(f"choice {self.name!r}: `{LOSS}` is no unit of a cost")
        _check_amounts(f"choice {self.name!r}", {LOSS: self.loss, **self.costs})


@dataclass(frozen=True, slots=True)
class Item:
    """What gets one choice.

    Attributes:
        name: of the item.
        choices: in order of preference where nothing else decides.

    Raises:
        ValueError: there are no choices, or two of one name.
    """

    name: str
    choices: Sequence[Choice]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(f"item {self.name!r} has no choices")
        _check_unique(f"choices of item {self.name!r}", [c.name for c in self.choices])


@dataclass(frozen=True, slots=True)
class Problem:
    """What there is to choose.

    Attributes:
        items: each gets one of its choices.
        fixed: unit → what everything else costs; 0 where it is not given.

    Raises:
        ValueError: there are no items, or two of one name; a choice has other units than the first;
            ``fixed`` has a unit that choices have not, or an amount as ``Choice`` refuses it.
    """

    items: Sequence[Item]
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("there are no items")
        _check_unique("items", [item.name for item in self.items])
        for item in self.items:
            for choice in item.choices:
                if {LOSS, *choice.costs} != set(self.units):
                    raise ValueError(
                        f"choice {choice.name!r} of item {item.name!r} has costs in "
                        f"{sorted(choice.costs)}, others in {sorted(self.units[1:])}"
                    )
        self.check_units(self.fixed)
        _check_amounts("fixed", self.fixed)

    @property
    def units(self) -> tuple[str, ...]:
        """``loss`` and the units of costs."""
        return (LOSS, *self.items[0].choices[0].costs)

    def check_units(self, units: Sequence[str] | Mapping[str, float]) -> None:
        """Refuses what is no unit of this problem.

        Raises:
            ValueError: naming the first.
        """
        for unit in units:
            if unit not in self.units:
                raise ValueError(f"unit {unit!r} is none of {', '.join(self.units)}")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan is to keep to, and what is to be least.

    Attributes:
        limits: unit → the most that all choices and what is fixed may come to. ``loss`` may be
            among them.
        least: unit to minimise.

    Raises:
        ValueError: a limit is NaN or infinite.
    """

    limits: Mapping[str, float]
    least: str = LOSS

    def __post_init__(self) -> None:
        for unit, limit in self.limits.items():
            if not isfinite(limit):
                raise ValueError(f"the limit of {unit!r} is {limit}")


@dataclass(frozen=True, slots=True)
class Allocation:
    """A plan.

    Attributes:
        chosen: item → name of its choice.
        loss: sum of its losses, as estimated.
        costs: unit → sum, what is fixed included.
        bound: no plan within the budget has less of what was to be least; None: not proven.
        gap: how far the plan may be from the best, (value - bound) / value; None: not proven.
        seconds: that it took.
        method: ``exact``, ``greedy``, ``top-share``, ``uniform`` or ``priced``.
    """

    chosen: Mapping[str, str]
    loss: float
    costs: Mapping[str, float]
    bound: float | None
    gap: float | None
    seconds: float
    method: str

    def amount(self, unit: str) -> float:
        """The loss, or the cost in a unit."""
        return self.loss if unit == LOSS else self.costs[unit]


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was measured.

    Attributes:
        allocation: its ``loss`` is what the model of that round said.
        measured: its true loss.
    """

    allocation: Allocation
    measured: float


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a few measurements made of a plan.

    Attributes:
        best: of those measured.
        history: all that were measured, in order.
    """

    best: Trial
    history: tuple[Trial, ...]


def solve(problem: Problem, budget: Budget) -> Allocation:
    """The best plan within a budget, by branch and bound (HiGHS).

    The same input gives the same plan. A choice that another of its item beats or equals in all
    that the budget speaks of is not taken; of equal choices the earlier is. The search ends with a
    gap of ``GAP`` or less, or after a fixed number of nodes: ``gap`` says what is open then.

    Raises:
        DiagnosticError: QN509 no plan keeps the limits; one diagnostic for each limit that has to
            be raised, in their order.
        ValueError: the budget has a unit that the problem has not.
    """
    started = perf_counter()
    table = _Table.of(problem, budget)
    plan, bound = _minimised(table, budget.least, budget.limits, _start(table, budget.limits))
    value = table.total(plan, budget.least)
    bound = min(bound, value)
    gap = (value - bound) / value if value > bound else 0.0
    return replace(table.allocation(plan, "exact", started), bound=bound, gap=gap)


def greedy(problem: Problem, budget: Budget) -> Allocation:
    """A good plan within a budget, step by step.

    From the plan of least cost on, the change of one item that saves most per cost is made, as long
    as one fits that saves anything. With several limits, cost stands for the sum of the shares of
    what each leaves above the least possible.

    Raises:
        DiagnosticError, ValueError: as ``solve``.
    """
    started = perf_counter()
    table = _Table.of(problem, budget)
    plan = _improved(table, budget.least, budget.limits, _start(table, budget.limits))
    return table.allocation(plan, "greedy", started)


def top_share(
    problem: Problem,
    share: float,
    promote: Mapping[str, tuple[str, str]],
    others: Mapping[str, str] | None = None,
) -> Allocation:
    """The paper's rule (quantnpu.md §1): the most sensitive items get many bits, the rest few.

    Args:
        problem: what there is to choose.
        share: of the items in ``promote``, 0 to 1; half an item counts as one.
        promote: item → its choices of few and of many bits. It is the more sensitive the more the
            second saves of the first one's loss; of equal ones the earlier.
        others: item → choice, for those that are not in ``promote``.

    Raises:
        ValueError: an item is in neither, in both, or unknown; or has no such choice.
    """
    started = perf_counter()
    others = others or {}
    names = [item.name for item in problem.items]
    if sorted([*promote, *others]) != sorted(names):
        raise ValueError("`promote` and `others` have to name every item once")
    items = {item.name: item for item in problem.items}
    saved = {
        name: _named(items[name], promote[name][0]).loss
        - _named(items[name], promote[name][1]).loss
        for name in names
        if name in promote
    }
    most = set(most_sensitive(saved, share))
    chosen = dict(others) | {name: promote[name][name in most] for name in promote}
    return _by_name(problem, chosen, "top-share", started)


def uniform(problem: Problem, *names: str) -> Allocation:
    """The same choice everywhere.

    Args:
        problem: what there is to choose.
        names: of choices; an item takes the first that it has.

    Raises:
        ValueError: an item has none of them.
    """
    started = perf_counter()
    chosen: dict[str, str] = {}
    for item in problem.items:
        known = {choice.name for choice in item.choices}
        found = [name for name in names if name in known]
        if not found:
            raise ValueError(f"item {item.name!r} has none of the choices {', '.join(names)}")
        chosen[item.name] = found[0]
    return _by_name(problem, chosen, "uniform", started)


def priced(problem: Problem, chosen: Mapping[str, str]) -> Allocation:
    """A plan that came from elsewhere, with its loss and costs.

    Args:
        problem: what there is to choose.
        chosen: item → choice, for every item.

    Raises:
        ValueError: an item is missing, or has no such choice.
    """
    for item in problem.items:
        if item.name not in chosen:
            raise ValueError(f"nothing is chosen for item {item.name!r}")
    return _by_name(problem, chosen, "priced", perf_counter())


def pareto(problem: Problem, unit: str, points: int) -> list[Allocation]:
    """Plans of least loss at evenly spaced limits of one cost.

    Args:
        problem: what there is to choose.
        unit: of the limits. They go from the least cost that is possible to that of the cheapest
            plan with the least loss: beyond it nothing is gained.
        points: limits, 2 or more.

    Returns:
        By cost, each with less loss than the one before; so there may be fewer than ``points``.

    Raises:
        ValueError: there are fewer than 2 points, or the unit is none of a cost.
    """
    if points < 2:
        raise ValueError(f"{points} points are no front")
    if unit == LOSS:
        raise ValueError(f"`{LOSS}` is no unit of a cost")
    table = _Table.of(problem, Budget({unit: 0.0}))
    costs = table.values[unit]
    least = table.total(table.lowest(costs), unit)
    best = table.lowest(np.where(table.excess(LOSS) == 0, costs, inf))
    limits = np.linspace(least, table.total(best, unit), points)
    plans = [solve(problem, Budget({unit: float(limit)})) for limit in limits]
    front: list[Allocation] = []
    for plan in sorted(plans, key=lambda plan: (plan.costs[unit], plan.loss)):
        if not front or plan.loss < front[-1].loss:
            front.append(plan)
    return front


def repaired(
    problem: Problem,
    budget: Budget,
    measure: Callable[[Mapping[str, str]], float],
    rounds: int,
    *,
    tolerance: float = 0.05,
) -> Repaired:
    """Measures the solved plan; where losses do not add up, corrects them and solves again.

    Whole plans are all that is measured, as one takes minutes. Losses are corrected by the least
    change, relative to themselves, with which the sums of all plans measured so far are right, that
    is Gaussian conditioning with C the covariance of losses l, plans as rows of A, measured sums m:

        l + C Aᵀ (A C Aᵀ)⁺ (m - A l),    C = ¼·l lᵀ + ¾·p·diag(l),    p the sum of the first plan

    So of what the first plan is off, a quarter is put down to all choices alike, the rest to those
    that it has, each in proportion to its loss. It ends with a plan whose sum was right and keeps
    the limit of losses, if there is one; with a plan that was measured before, as no other is
    thought better then; or after the last round.

    Args:
        problem: what there is to choose.
        budget: as for ``solve``. Costs are taken to add up.
        measure: item → choice → the plan's true loss, in the unit of the estimates.
        rounds: measurements at most, 1 or more.
        tolerance: share of a predicted loss that the measured one may differ by.

    Returns:
        The best of the plans measured, the first one included: that of least true loss. Where
        ``loss`` has a limit, of those that truly keep it the one with the least of what is to be
        least; if none does, that of least true loss.

    Raises:
        DiagnosticError, ValueError: as ``solve``; also for fewer than 1 round, and for a measured
            loss that is NaN or infinite.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing")
    limit = budget.limits.get(LOSS, inf) * (1 + TOLERANCE)
    trials: list[Trial] = []
    plan = solve(problem, budget)
    while all(plan.chosen != trial.allocation.chosen for trial in trials):
        trial = Trial(plan, measure(plan.chosen))
        trials.append(trial)
        if not isfinite(trial.measured):
            raise ValueError(f"the measured loss is {trial.measured}")
        is_right = abs(trial.measured - plan.loss) <= tolerance * plan.loss
        if len(trials) == rounds or (is_right and trial.measured <= limit):
            break
        plan = _solve_again(_corrected(problem, trials), budget)

    def rank(trial: Trial) -> tuple[float, float]:
        of_plan = trial.allocation.amount(budget.least)
        value = trial.measured if budget.least == LOSS else of_plan
        return max(trial.measured, limit), value

    return Repaired(min(trials, key=rank), tuple(trials))


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """A problem as arrays, one column per choice; a plan holds the column of each item.

    Attributes:
        problem: what it is made of.
        first: first column of each item.
        item: item of each column.
        values: unit → amount of each column.
    """

    problem: Problem
    first: NDArray[np.intp]
    item: NDArray[np.intp]
    values: Mapping[str, _Numbers]

    @classmethod
    def of(cls, problem: Problem, budget: Budget) -> _Table:
        problem.check_units([budget.least, *budget.limits])
        counts = [len(item.choices) for item in problem.items]
        choices = [choice for item in problem.items for choice in item.choices]
        values = {LOSS: np.array([choice.loss for choice in choices], np.float64)}
        for unit in problem.units[1:]:
            values[unit] = np.array([choice.costs[unit] for choice in choices], np.float64)
        first = np.cumsum([0, *counts[:-1]])
        return cls(problem, first, np.repeat(np.arange(len(counts)), counts), values)

    def total(self, plan: _Plan, unit: str) -> float:
        return fsum([self.problem.fixed.get(unit, 0.0), *self.values[unit][plan]])

    def fits(self, plan: _Plan, limits: Mapping[str, float]) -> bool:
        return all(
            self.total(plan, unit) <= limit + TOLERANCE * abs(limit)
            for unit, limit in limits.items()
        )

    def lowest(self, numbers: _Numbers) -> _Plan:
        """Per item the column with the least number; of equal ones the first."""
        within = [int(part.argmin()) for part in np.split(numbers, self.first[1:])]
        return self.first + np.array(within, np.intp)

    def excess(self, unit: str) -> _Numbers:
        """What each column has more than the least of its item."""
        values = self.values[unit]
        return values - np.minimum.reduceat(values, self.first)[self.item]

    def shares(self, limits: Mapping[str, float]) -> _Numbers:
        """Excess relative to what the limits leave for it; infinite where that is nothing.

        Half of the tolerance is given away here, the other half is the solver's.

        Returns:
            One row per limit.
        """
        rows = np.zeros((len(limits), self.item.size))
        for row, (unit, limit) in zip(rows, limits.items(), strict=True):
            excess = self.excess(unit)
            least = self.total(self.lowest(self.values[unit]), unit)
            left = max(limit + TOLERANCE / 2 * abs(limit) - least, 0.0)
            with np.errstate(divide="ignore", over="ignore"):
                np.divide(excess, left, out=row, where=excess > 0)
        return rows

    def undominated(self, units: Sequence[str]) -> NDArray[np.bool_]:
        """Columns that no other of their item beats or, being earlier, equals in all units."""
        parts = np.split(np.stack([self.values[unit] for unit in units]), self.first[1:], axis=1)
        beaten: list[NDArray[np.bool_]] = []
        for part in parts:
            no_worse = np.all(part[:, :, None] <= part[:, None, :], axis=0)  # [one, other]
            earlier = np.triu(np.ones_like(no_worse), 1)
            beaten.append(np.any(no_worse & (~no_worse.T | earlier), axis=0))
        return ~np.concatenate(beaten)

    def allocation(self, plan: _Plan, method: str, started: float) -> Allocation:
        """With nothing proven."""
        chosen = {
            item.name: item.choices[column - first].name
            for item, column, first in zip(self.problem.items, plan, self.first, strict=True)
        }
        costs = {unit: self.total(plan, unit) for unit in self.problem.units[1:]}
        loss, seconds = self.total(plan, LOSS), perf_counter() - started
        return Allocation(chosen, loss, costs, None, None, seconds, method)


def _start(table: _Table, limits: Mapping[str, float]) -> _Plan:
    """Some plan within the limits, the cheapest where there is one limit.

    Raises:
        DiagnosticError: QN509. The limits are taken in order, each beside those before it.
    """
    plan = table.lowest(table.shares(limits).sum(axis=0))
    if table.fits(plan, limits):
        return plan
    kept: dict[str, float] = {}
    faults: list[Diagnostic] = []
    for unit, asked in limits.items():
        limit = asked
        if not table.fits(plan, {unit: limit}):
            plan, _ = _minimised(table, unit, kept, plan)
        if not table.fits(plan, {unit: limit}):
            limit = _rounded_up(table.total(plan, unit))
            beside = ", ".join(f"{name} ≤ {number:g}" for name, number in kept.items())
            faults.append(InfeasibleBudget(unit, asked, limit, beside).at())
        kept[unit] = limit
    if faults:
        raise DiagnosticError(faults)
    return plan


def _rounded_up(number: float) -> float:
    """To as many digits as a message shows, so that what it shows is possible."""
    return float(Context(prec=_DIGITS, rounding=ROUND_CEILING).create_decimal_from_float(number))


def _improved(table: _Table, least: str, limits: Mapping[str, float], start: _Plan) -> _Plan:
    """The greedy rule from a plan within the limits on."""
    values, shares = table.values[least], table.shares(limits)
    use = shares.sum(axis=0)
    plan = start.copy()
    while True:
        now = plan[table.item]
        saved, more = values[now] - values, use - use[now]
        left = 1 - shares[:, plan].sum(axis=1, keepdims=True)
        fitting = (saved > 0) & (shares - shares[:, now] <= left).all(axis=0)
        gain = np.where(fitting, inf, 0.0)
        with np.errstate(over="ignore"):
            np.divide(saved, more, out=gain, where=fitting & (more > 0))
        best = int(gain.argmax())
        if not fitting[best]:
            return plan
        plan[table.item[best]] = best


def _minimised(
    table: _Table, least: str, limits: Mapping[str, float], start: _Plan
) -> tuple[_Plan, float]:
    """The plan with the least of a unit within limits that ``start`` keeps, and a lower bound.

    Columns that are in no better plan than the greedy one are left out, and so are dominated ones.
    """
    best = _improved(table, least, limits, start)
    excess, shares = table.excess(least), table.shares(limits)
    above = fsum(excess[best])
    if above <= 0:
        return best, table.total(best, least)
    kept = (excess <= above) & (shares <= 1).all(axis=0) & table.undominated([least, *limits])
    columns = np.flatnonzero(kept)
    result = _branch_and_bound(
        excess[columns] / above * _SCALE, shares[:, columns] * _SCALE, table.item[columns]
    )
    lowest = table.total(table.lowest(table.values[least]), least)
    bound = result.mip_dual_bound
    bound = lowest if bound is None else lowest + max(float(bound), 0.0) / _SCALE * above
    if result.x is None:
        return best, bound
    found = columns[result.x > 0.5]
    is_plan = np.array_equal(table.item[found], np.arange(table.first.size))
    if is_plan and table.fits(found, limits) and fsum(excess[found]) <= above:
        return found, bound
    return best, bound


def _branch_and_bound(values: _Numbers, shares: _Numbers, item: NDArray[np.intp]) -> Any:
    """The binary program: least values·x, shares·x ≤ ``_SCALE``, one x of each item is 1.

    Returns:
        A ``scipy.optimize.OptimizeResult``.
    """
    columns = np.arange(item.size)
    one_of_each = csr_array((np.ones(item.size), (item, columns)))
    rules = [LinearConstraint(one_of_each, 1, 1)]
    if shares.size:
        rules.append(LinearConstraint(csr_array(shares), -np.inf, _SCALE))
    options = {"mip_rel_gap": GAP, "node_limit": _NODES}
    return milp(values, constraints=rules, integrality=1, bounds=Bounds(0, 1), options=options)


def _solve_again(problem: Problem, budget: Budget) -> Allocation:
    """As ``solve``; where no plan keeps the limit of losses, the plan that loses least."""
    try:
        return solve(problem, budget)
    except DiagnosticError:
        costs = {unit: limit for unit, limit in budget.limits.items() if unit != LOSS}
        return solve(problem, Budget(costs))


def _corrected(problem: Problem, trials: Sequence[Trial]) -> Problem:
    """The problem with losses that explain what was measured (``repaired`` has the formula)."""
    table = _Table.of(problem, Budget({}))
    columns = {
        (item.name, choice.name): column
        for column, (item, choice) in enumerate(
            (item, choice) for item in problem.items for choice in item.choices
        )
    }
    plans = np.zeros((len(trials), len(columns)))
    for row, trial in zip(plans, trials, strict=True):
        row[[columns[pair] for pair in trial.allocation.chosen.items()]] = 1
    losses = table.values[LOSS]
    fixed = problem.fixed.get(LOSS, 0.0)
    missing = np.array([trial.measured for trial in trials]) - fixed - plans @ losses
    # A loss of 0 would never be corrected.
    scale = np.maximum(losses, (losses.max() or 1.0) * 1e-6)
    sums = plans @ scale
    covariance = _SHARED * np.outer(scale, sums)
    covariance += (1 - _SHARED) * sums[0] * scale[:, None] * plans.T
    weights = np.linalg.lstsq(plans @ covariance, missing)[0]
    corrected = iter(np.maximum(losses + covariance @ weights, 0.0))
    items = [
        Item(item.name, [replace(choice, loss=float(next(corrected))) for choice in item.choices])
        for item in problem.items
    ]
    return replace(problem, items=items)


def _by_name(
    problem: Problem, chosen: Mapping[str, str], method: str, started: float
) -> Allocation:
    table = _Table.of(problem, Budget({}))
    within = [item.choices.index(_named(item, chosen[item.name])) for item in problem.items]
    return table.allocation(table.first + np.array(within, np.intp), method, started)


def _named(item: Item, name: str) -> Choice:
    for choice in item.choices:
        if choice.name == name:
            return choice
    raise ValueError(f"item {item.name!r} has no choice {name!r}")


def _check_amounts(owner: str, amounts: Mapping[str, float]) -> None:
    for unit, amount in amounts.items():
        if not (isfinite(amount) and amount >= 0):
            raise ValueError(f"{owner}: {unit} is {amount}, not a finite number from 0 up")


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"two {what} have one name")
