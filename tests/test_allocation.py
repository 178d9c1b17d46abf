"""Bits under a budget: against every plan tried, greedy and the paper's rule, pareto, repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from math import fsum, inf, isclose, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.allocation_speed import budgets, eight_billion
from qnpu.compiler import allocation
from qnpu.compiler.allocation import (
    GAP,
    LOSS,
    Allocation,
    Budget,
    Choice,
    Item,
    Problem,
    greedy,
    pareto,
    priced,
    repaired,
    solve,
    top_share,
    uniform,
)
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InfeasibleBudget

Plan = Mapping[str, str]

UNITS = {LOSS: 1e-3, "size": 1e6, "latency": 1e-2, "energy": 1.0}
"""Unit → size of a step. Amounts are few steps, so that there are many ties and zeros."""


@st.composite
def problems(draw: st.DrawFn, most_items: int = 5) -> Problem:
    units = list(UNITS)[1 : draw(st.integers(2, len(UNITS)))]
    steps = st.integers(0, 6)

    def amount(unit: str) -> float:
        return draw(steps) * UNITS[unit]

    def choice(name: str) -> Choice:
        return Choice(name, amount(LOSS), {unit: amount(unit) for unit in units})

    items = [
        Item(f"item{i}", [choice(f"choice{j}") for j in range(draw(st.integers(1, 4)))])
        for i in range(draw(st.integers(1, most_items)))
    ]
    fixed = draw(st.sets(st.sampled_from(units)))
    return Problem(items, {unit: amount(unit) for unit in units if unit in fixed})


@st.composite
def tasks(draw: st.DrawFn, factors: tuple[float, ...] = (1.0, 1.3)) -> tuple[Problem, Budget]:
    """Limits that some plan keeps, just or well; with lower factors often none does."""
    problem = draw(problems())
    least = draw(st.sampled_from([LOSS, *problem.units]))
    others = [unit for unit in problem.units if unit != least]
    limited = draw(st.lists(st.sampled_from(others), min_size=1, unique=True))
    plan = {item.name: draw(st.sampled_from(item.choices)).name for item in problem.items}
    found = amounts(problem, plan)
    limits = {unit: found[unit] * draw(st.sampled_from(factors)) for unit in limited}
    return problem, Budget(limits, least)


def amounts(problem: Problem, plan: Plan) -> dict[str, float]:
    taken = [
        next(choice for choice in item.choices if choice.name == plan[item.name])
        for item in problem.items
    ]
    found = {unit: [problem.fixed.get(unit, 0.0)] for unit in problem.units}
    for choice in taken:
        for unit, amount in {LOSS: choice.loss, **choice.costs}.items():
            found[unit].append(amount)
    return {unit: fsum(parts) for unit, parts in found.items()}


def keeps(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(found[unit] <= limit + 1e-9 * abs(limit) for unit, limit in limits.items())


def every_plan(problem: Problem) -> list[Plan]:
    names = [[choice.name for choice in item.choices] for item in problem.items]
    items = [item.name for item in problem.items]
    return [dict(zip(items, chosen, strict=True)) for chosen in product(*names)]


def least_possible(problem: Problem, unit: str, limits: Mapping[str, float]) -> float:
    """Infinite where no plan keeps the limits."""
    found = [amounts(problem, plan) for plan in every_plan(problem)]
    return min((each[unit] for each in found if keeps(each, limits)), default=inf)


def agrees(problem: Problem, plan: Allocation) -> None:
    """A plan's sums are those of what it chose."""
    found = amounts(problem, plan.chosen)
    assert {LOSS: plan.loss, **plan.costs} == pytest.approx(found)


@given(tasks())
@settings(max_examples=120, deadline=None)
def test_as_good_as_the_best_of_all_plans(task: tuple[Problem, Budget]) -> None:
    problem, budget = task
    best = least_possible(problem, budget.least, budget.limits)
    plan = solve(problem, budget)
    agrees(problem, plan)
    assert keeps(amounts(problem, plan.chosen), budget.limits)
    value = plan.amount(budget.least)
    assert value == pytest.approx(best, rel=1e-9)
    assert plan.bound is not None
    assert plan.bound <= value
    assert plan.bound == pytest.approx(value, rel=GAP)
    assert plan.gap is not None
    assert 0 <= plan.gap <= GAP
    assert solve(problem, budget).chosen == plan.chosen


@given(tasks(factors=(0.5, 0.9, 1.0)))
@settings(max_examples=80, deadline=None)
def test_a_budget_is_infeasible_where_no_plan_keeps_it(task: tuple[Problem, Budget]) -> None:
    """And then every limit named is the least that those before it leave."""
    problem, budget = task
    if least_possible(problem, budget.least, budget.limits) < inf:
        assert keeps(amounts(problem, solve(problem, budget).chosen), budget.limits)
        return
    with pytest.raises(DiagnosticError) as caught:
        solve(problem, budget)
    raised = dict(budget.limits)
    units = list(raised)
    for diagnostic in caught.value.diagnostics:
        rule = diagnostic.rule
        assert isinstance(rule, InfeasibleBudget)
        before = {unit: raised[unit] for unit in units[: units.index(rule.unit)]}
        least = least_possible(problem, rule.unit, before)
        assert rule.limit < least <= rule.nearest <= least * (1 + 1e-5)
        raised[rule.unit] = rule.nearest
    assert keeps(amounts(problem, solve(problem, Budget(raised, budget.least)).chosen), raised)


@given(tasks())
@settings(max_examples=50, deadline=None)
def test_greedy_keeps_the_budget_and_is_never_better(task: tuple[Problem, Budget]) -> None:
    problem, budget = task
    plan = greedy(problem, budget)
    agrees(problem, plan)
    assert keeps(amounts(problem, plan.chosen), budget.limits)
    best = solve(problem, budget).amount(budget.least)
    assert plan.amount(budget.least) >= best * (1 - 1e-9)
    assert plan.bound is None
    assert plan.gap is None


def item(name: str, *choices: tuple[float, float]) -> Item:
    """Choices a, b, … of a loss and a size."""
    named = zip("abcdef", choices, strict=False)
    return Item(name, [Choice(letter, loss, {"size": size}) for letter, (loss, size) in named])


def letters(plan: Allocation) -> str:
    return "".join(plan.chosen.values())


def test_greedy_takes_the_steepest_step_first() -> None:
    """6 per unit of y, then 5 of x, then nothing fits; the best plan spends all on x."""
    problem = Problem([item("x", (20, 0), (5, 3)), item("y", (6, 0), (0, 1))])
    assert letters(greedy(problem, Budget({"size": 1.0}))) == "ab"
    assert letters(greedy(problem, Budget({"size": 3.0}))) == "ab"
    assert letters(solve(problem, Budget({"size": 3.0}))) == "ba"
    assert letters(greedy(problem, Budget({"size": 4.0}))) == "bb"


def test_greedy_goes_up_one_item_in_steps() -> None:
    problem = Problem([item("x", (10, 0), (4, 2), (0, 5)), item("y", (3, 0), (0, 2))])
    by_limit = [letters(greedy(problem, Budget({"size": float(limit)}))) for limit in range(8)]
    assert by_limit == ["aa", "aa", "ba", "ba", "bb", "bb", "bb", "cb"]


def test_greedy_takes_what_costs_nothing() -> None:
    problem = Problem([item("x", (5, 1), (2, 1)), item("y", (6, 0), (0, 1))])
    assert letters(greedy(problem, Budget({"size": 1.0}))) == "ba"


def test_of_equal_choices_the_earlier_and_no_beaten_one() -> None:
    same = item("same", (2, 1), (2, 1), (2, 1))
    beaten = item("beaten", (3, 1), (2, 1), (2, 1), (3, 2))
    assert letters(solve(Problem([same, beaten]), Budget({"size": 9.0}))) == "ab"
    assert letters(solve(Problem([same, beaten]), Budget({LOSS: 9.0}, "size"))) == "ab"
    harder = [item("x", (20, 0), (5, 3)), item("y", (6, 0), (0, 1))]
    assert letters(solve(Problem([same, beaten, *harder]), Budget({"size": 5.0}))) == "abba"


def test_a_limit_that_a_plan_just_keeps() -> None:
    """However the sum is rounded, and however large what is fixed is beside it."""
    problem = Problem([item(str(i), (1.0, 0.1), (0.0, 0.3)) for i in range(7)], {"size": 1e3})
    for wide in range(8):
        limit = sum([0.3] * wide + [0.1] * (7 - wide)) + 1e3
        assert solve(problem, Budget({"size": limit})).loss == 7 - wide


def test_the_least_cost_at_a_limit_of_the_loss() -> None:
    problem = Problem([item("x", (4, 1), (1, 2)), item("y", (5, 1), (0, 7))], {LOSS: 1.0})
    found = [letters(solve(problem, Budget({LOSS: loss}, "size"))) for loss in (10, 9, 7, 6, 5, 2)]
    assert found == ["aa", "ba", "ba", "ab", "ab", "bb"]


def test_a_plan_from_elsewhere() -> None:
    problem = Problem([item("x", (4, 1), (1, 2)), item("y", (5, 1), (0, 7))], {"size": 10.0})
    found = priced(problem, {"y": "a", "x": "b"})
    assert (found.loss, found.costs, found.method) == (6.0, {"size": 13.0}, "priced")
    for chosen in ({"x": "a"}, {"x": "a", "y": "c"}):
        with pytest.raises(ValueError, match="'y'"):
            priced(problem, chosen)


def test_an_infeasible_budget_names_the_nearest() -> None:
    problem = Problem([item("x", (1, 1 / 3), (0, 1)), item("y", (1, 1), (0, 2))], {"size": 10.0})
    with pytest.raises(DiagnosticError) as caught:
        solve(problem, Budget({"size": 11.25}))
    assert caught.value.codes == ["QN509"]
    rule = caught.value.diagnostics[0].rule
    assert rule == InfeasibleBudget("size", 11.25, 11.3334, "")
    assert letters(solve(problem, Budget({"size": 11.3334}))) == "aa"
    with pytest.raises(DiagnosticError) as caught:
        greedy(problem, Budget({"size": 11.25}))
    assert caught.value.codes == ["QN509"]


def test_limits_that_cannot_be_kept_together() -> None:
    """Each alone can: a is small, b is fast."""
    choices = [
        Choice("a", 0.0, {"size": 1.0, "latency": 4.0}),
        Choice("b", 0.0, {"size": 3.0, "latency": 1.0}),
    ]
    problem = Problem([Item("x", choices), Item("y", choices)])
    assert solve(problem, Budget({"size": 4.0, "latency": 5.0})).loss == 0
    with pytest.raises(DiagnosticError) as caught:
        solve(problem, Budget({"size": 4.0, "latency": 4.5}))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.rule == InfeasibleBudget("latency", 4.5, 5.0, "size ≤ 4")
    with pytest.raises(DiagnosticError) as caught:
        solve(problem, Budget({"latency": 1.0, "size": 1.0}))
    assert [diagnostic.rule for diagnostic in caught.value.diagnostics] == [
        InfeasibleBudget("latency", 1.0, 2.0, ""),
        InfeasibleBudget("size", 1.0, 6.0, "latency ≤ 2"),
    ]


def sensitive(*losses: float) -> Problem:
    """Items 0, 1, … that lose so much at few bits (a), and a tenth of that at many (b)."""
    return Problem([item(str(i), (loss, 1), (loss / 10, 2)) for i, loss in enumerate(losses)])


@pytest.mark.parametrize(
    ("share", "chosen"), [(0, "aaaa"), (0.25, "aaba"), (0.5, "abba"), (0.75, "abbb"), (1, "bbbb")]
)
def test_the_most_sensitive_get_many_bits(share: float, chosen: str) -> None:
    """Of equal ones the earlier."""
    problem = sensitive(1.0, 3.0, 4.0, 3.0)
    plan = top_share(problem, share, {each.name: ("a", "b") for each in problem.items})
    assert letters(plan) == chosen
    assert plan.costs["size"] == 4 + chosen.count("b")
    agrees(problem, plan)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_a_share_of_items(losses: list[float], share: float) -> None:
    problem = sensitive(*losses)
    plan = top_share(problem, share, {each.name: ("a", "b") for each in problem.items})
    many = [loss for loss, name in zip(losses, plan.chosen.values(), strict=True) if name == "b"]
    few = [loss for loss, name in zip(losses, plan.chosen.values(), strict=True) if name == "a"]
    assert len(many) == int(share * len(losses) + 0.5)
    assert not many or not few or min(many) >= max(few)


def test_sensitivity_is_what_more_bits_save() -> None:
    """Not the loss alone, in which weights may have a part that stays."""
    problem = Problem([item("x", (9, 1), (8, 2)), item("y", (5, 1), (0, 2)), item("z", (7, 1))])
    promote = {"x": ("a", "b"), "y": ("a", "b")}
    assert letters(top_share(problem, 0.5, promote, {"z": "a"})) == "aba"
    with pytest.raises(ValueError, match="every item once"):
        top_share(problem, 0.5, promote)
    with pytest.raises(ValueError, match="no choice 'b'"):
        top_share(problem, 0.5, promote, {"z": "b"})


def test_the_same_everywhere() -> None:
    problem = Problem([item("x", (9, 1), (8, 2)), item("y", (5, 1))], {"size": 3.0})
    assert letters(uniform(problem, "a")) == "aa"
    plan = uniform(problem, "b", "a")
    assert letters(plan) == "ba"
    assert (plan.loss, plan.costs, plan.method) == (13, {"size": 6.0}, "uniform")
    with pytest.raises(ValueError, match="'y' has none of the choices b"):
        uniform(problem, "b")


@given(problems(), st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_a_front_falls_from_the_cheapest_plan_to_the_best(problem: Problem, points: int) -> None:
    front = pareto(problem, "size", points)
    assert 1 <= len(front) <= points
    for one, other in pairwise(front):
        assert one.costs["size"] < other.costs["size"]
        assert one.loss > other.loss
    least = least_possible(problem, "size", {})
    assert front[0].loss == pytest.approx(least_possible(problem, LOSS, {"size": least}))
    best = least_possible(problem, LOSS, {})
    assert front[-1].loss == pytest.approx(best)
    assert front[-1].costs["size"] == pytest.approx(least_possible(problem, "size", {LOSS: best}))
    for plan in front:
        within = least_possible(problem, LOSS, {"size": plan.costs["size"]})
        assert plan.loss == pytest.approx(within, rel=1e-9)


def test_a_front_of_rough_plans_falls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where searches end early, a higher limit may find a plan that is no better."""
    rng = np.random.default_rng(49)
    draws = rng.integers(0, 9, (8, 4, 2)).astype(float).tolist()
    problem = Problem([item(str(i), *choices) for i, choices in enumerate(draws)])
    monkeypatch.setattr(allocation, "GAP", 1.0)
    for one, other in pairwise(pareto(problem, "size", 25)):
        assert one.costs["size"] < other.costs["size"]
        assert one.loss > other.loss


FINE = Choice("a", 1.0, {"size": 1.0})
ONE = Problem([Item("x", [FINE])])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: Choice("a", -1.0), "loss is -1.0"),
        (lambda: Choice("a", nan), "loss is nan"),
        (lambda: Choice("a", 0.0, {"size": inf}), "size is inf"),
        (lambda: Choice("a", 0.0, {"size": -0.5}), "size is -0.5"),
        (lambda: Choice("a", 0.0, {LOSS: 1.0}), "no unit of a cost"),
        (lambda: Item("x", []), "'x' has no choices"),
        (lambda: Item("x", [FINE, FINE]), "two choices of item 'x'"),
        (lambda: Problem([]), "no items"),
        (lambda: Problem([Item("x", [FINE]), Item("x", [FINE])]), "two items"),
        (lambda: Problem([Item("x", [FINE, Choice("b", 0.0, {"s": 1.0})])]), "costs in"),
        (lambda: Problem([Item("x", [FINE])], {"latency": 1.0}), "'latency' is none of loss, size"),
        (lambda: Problem([Item("x", [FINE])], {"size": nan}), "fixed: size is nan"),
        (lambda: Budget({"size": nan}), "'size' is nan"),
        (lambda: solve(ONE, Budget({"latency": 1.0})), "'latency' is none of loss, size"),
        (lambda: solve(ONE, Budget({LOSS: 1.0}, "latency")), "'latency' is none of loss, size"),
        (lambda: pareto(ONE, "size", 1), "1 points"),
        (lambda: pareto(ONE, LOSS, 3), "no unit of a cost"),
        (lambda: pareto(ONE, "latency", 3), "'latency' is none of loss, size"),
        (lambda: repaired(ONE, Budget({}), lambda plan: 0.0, 0), "0 rounds"),
        (lambda: repaired(ONE, Budget({}), lambda plan: nan, 1), "measured loss is nan"),
    ],
)
def test_what_is_no_problem(wrong: Callable[[], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        wrong()


def lagrangian(problem: Problem, unit: str, limit: float) -> float:
    """A lower bound by weak duality: max over λ ≥ 0 of Σ min(loss + λ·cost) + λ·(fixed - limit)."""
    pairs = [
        np.array([(choice.loss, choice.costs[unit]) for choice in each.choices])
        for each in problem.items
    ]
    fixed = problem.fixed.get(unit, 0.0)

    def value(price: float) -> float:
        return fsum([*(float(min(p @ (1, price))) for p in pairs), price * (fixed - limit)])

    scale = fsum(float(p[:, 0].max()) for p in pairs) / limit
    return max(value(float(price)) for price in scale * np.geomspace(1e-4, 1e4, 300))


@pytest.mark.parametrize("name", ["size 25%", "latency 50%", "both 25%", "loss 1%"])
def test_an_8b_model(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The bound is checked by duality, which needs no solver."""
    problem = eight_billion(0)
    budget = budgets(problem)[name]
    plan = solve(problem, budget)
    agrees(problem, plan)
    assert keeps(amounts(problem, plan.chosen), budget.limits)
    assert plan.gap is not None
    assert plan.gap <= GAP
    assert plan.seconds < 60
    assert plan.amount(budget.least) <= greedy(problem, budget).amount(budget.least)
    if budget.least == LOSS and len(budget.limits) == 1:
        ((unit, limit),) = budget.limits.items()
        below = lagrangian(problem, unit, limit)
        assert plan.bound is not None
        assert below * (1 - 1e-9) <= plan.bound
        assert isclose(below, plan.loss, rel_tol=1e-2)
    assert capfd.readouterr().out == ""  # nor may the solver print


@pytest.mark.parametrize("nodes", [0, 1])
def test_a_search_that_is_cut_short_says_so(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step saves about as much per size, so that near-best plans are many."""
    sizes = np.random.default_rng(0).uniform(1, 2, 30)
    problem = Problem([item(str(i), (2 + s**1.01, 0), (2, s)) for i, s in enumerate(sizes)])
    budget = Budget({"size": float(sizes.sum()) / 3})
    monkeypatch.setattr(allocation, "_NODES", nodes)
    monkeypatch.setattr(allocation, "GAP", 0.0)
    short = solve(problem, budget)
    monkeypatch.undo()
    full = solve(problem, budget)
    assert short.bound is not None
    assert short.gap is not None
    assert short.gap > 1e-9
    assert short.gap == pytest.approx((short.loss - short.bound) / short.loss)
    assert short.bound <= full.loss <= short.loss * (1 + GAP)
    assert short.loss <= greedy(problem, budget).loss
    assert keeps(short.costs, budget.limits)


def in_pairs(problem: Problem, strengths: list[float]) -> Callable[[Plan], float]:
    """Losses of neighbours make each other worse: Σ l_i + Σ strength·√(l_i·l_i+1)."""

    def measure(plan: Plan) -> float:
        losses = [
            next(choice.loss for choice in each.choices if choice.name == plan[each.name])
            for each in problem.items
        ]
        pairs = zip(strengths, pairwise(losses), strict=False)
        return fsum(losses) + fsum(s * sqrt(a * b) for s, (a, b) in pairs)

    return measure


@given(tasks(), st.lists(st.floats(0, 5), min_size=4, max_size=4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_repair_never_ends_worse(
    task: tuple[Problem, Budget], strengths: list[float], rounds: int
) -> None:
    problem, budget = task
    measure = in_pairs(problem, strengths)
    found = repaired(problem, budget, measure, rounds)
    plans = [trial.allocation.chosen for trial in found.history]
    assert 1 <= len(plans) <= rounds
    assert len({tuple(plan.items()) for plan in plans}) == len(plans)
    assert plans[0] == solve(problem, budget).chosen
    assert found.best in found.history
    costs = {unit: limit for unit, limit in budget.limits.items() if unit != LOSS}
    for trial in found.history:
        assert trial.measured == measure(trial.allocation.chosen)
        assert keeps(amounts(problem, trial.allocation.chosen), costs)
    limit = budget.limits.get(LOSS, inf) * (1 + 1e-9)
    kept = [trial for trial in found.history if trial.measured <= limit]
    if kept and budget.least != LOSS:
        least = min(trial.allocation.costs[budget.least] for trial in kept)
        assert found.best.allocation.costs[budget.least] == least
        assert found.best in kept
    else:
        assert found.best.measured == min(trial.measured for trial in found.history)


def test_one_measurement_where_losses_add_up() -> None:
    problem = sensitive(1.0, 3.0, 4.0, 3.0)
    found = repaired(problem, Budget({"size": 6.0}), in_pairs(problem, [0.0] * 3), 5)
    assert len(found.history) == 1
    assert found.best.measured == pytest.approx(found.best.allocation.loss)


def test_repair_finds_what_the_sum_did_not_see() -> None:
    """Two of four items may have many bits. By the sum 0 and 1 get few; together these are bad."""
    problem = replace(sensitive(1.0, 1.1, 1.5, 2.0), fixed={LOSS: 0.5})
    budget = Budget({"size": 6.0})

    def measure(plan: Plan) -> float:
        together = plan["0"] == plan["1"] == "a"
        return amounts(problem, plan)[LOSS] + 1.5 * together

    found = repaired(problem, budget, measure, 4)
    first, second = found.history[:2]
    assert (letters(first.allocation), letters(second.allocation)) == ("aabb", "abab")
    # A quarter of what the first was off by is every choice's, the rest that of those it had.
    chosen = 1.5 / (1.0 + 1.1 + 0.15 + 0.2)
    predicted = (1.0 + 0.2) * (1 + chosen) + (0.11 + 1.5) * (1 + chosen / 4)
    assert second.allocation.loss == pytest.approx(0.5 + predicted)
    fitting = [p for p in every_plan(problem) if keeps(amounts(problem, p), budget.limits)]
    assert found.best.measured == min(map(measure, fitting))
    assert found.best.measured < 0.8 * first.measured


def test_repair_of_losses_that_are_all_0() -> None:
    """Nothing is known of the choices, but that what was measured is bad."""
    problem = Problem([item(str(i), (0, 1), (0, 2)) for i in range(3)])
    found = repaired(
        problem, Budget({"size": 5.0}), lambda plan: float(list(plan.values()).count("a")), 4
    )
    assert found.history[0].measured == 3
    assert found.best.measured == 1


@pytest.mark.parametrize("factor", [1.5, 1.03])
def test_repair_gets_below_a_limit_of_the_loss(factor: float) -> None:
    """The truth is more than the sum, so the first plan is over, even where it is nearly right."""
    rng = np.random.default_rng(0)
    problem = sensitive(*rng.lognormal(0, 1, 20))
    budget = Budget({LOSS: 12.0}, "size")
    found = repaired(problem, budget, lambda plan: factor * amounts(problem, plan)[LOSS], 5)
    assert found.history[0].measured > 12
    assert found.best.measured <= 12
    ideal = solve(problem, Budget({LOSS: 12 / factor}, "size"))
    assert found.best.allocation.costs["size"] <= ideal.costs["size"] + 1


def test_repair_where_no_plan_keeps_the_loss() -> None:
    """The plan of least loss is tried, and the least that was measured comes back."""
    problem = sensitive(1.0, 2.0, 3.0)
    budget = Budget({LOSS: 3.5, "size": 6.0}, "size")
    found = repaired(problem, budget, lambda plan: 10 + amounts(problem, plan)[LOSS], 4)
    assert letters(found.best.allocation) == "bbb"
    assert len(found.history) < 4
