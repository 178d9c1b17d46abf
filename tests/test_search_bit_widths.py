"""search-bit-widths: the plan keeps the budget, and nothing simple within it is better."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import pytest

from qnpu.compiler.bit_plan import AUTO, Scheme
from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, unbeaten
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.quant_types import PerBlock
from qnpu.compiler.target import load_target
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.search_bit_widths import SearchBitWidths
from qnpu.runtime_check.bit_losses import LossMeter
from qnpu.runtime_check.loss_record import LossRecord
from tests.conftest import parse
from tests.searching import HELD_OUT, TARGET, WINDOWS, rotated

PASS = SearchBitWidths("latency=340us", WINDOWS, WINDOWS, HELD_OUT, points=4)


def ran(item: SearchBitWidths = PASS, model: ir.Model | None = None) -> Compilation:
    compilation = Compilation(model or rotated(), load_target(TARGET))
    assert item.run(compilation) > 0
    return compilation


@lru_cache(maxsize=8)
def found(budget: str) -> BitSearch:
    search = ran(replace(PASS, budget=budget)).bit_search
    assert search is not None
    return search


@pytest.mark.parametrize("budget", ["latency=340us", "latency=380us", "size=170kB"])
def test_the_plan_keeps_the_budget_and_no_plain_scheme_within_it_is_better(budget: str) -> None:
    search = found(budget)
    unit, limit = ("size", 170e3) if "size" in budget else ("latency", float(budget[8:11]) / 1e6)
    amounts = {"size": search.chosen.bytes, "latency": search.chosen.seconds}
    assert amounts[unit] <= limit * (1 + 1e-6)
    assert amounts[unit] > limit * 0.9  # of nearly all of it something is made
    for plan in search.others:
        if (plan.bytes if unit == "size" else plan.seconds) <= limit:
            assert search.chosen.expected <= plan.expected * (1 + 1e-6)
    assert search.gap <= 1e-6
    assert search.chosen.measured == min(plan.measured for plan in search.trials)


def test_more_budget_loses_less() -> None:
    small, large = found("latency=340us"), found("latency=380us")
    assert large.chosen.expected < small.chosen.expected
    assert large.chosen.measured < small.chosen.measured


def test_a_budget_of_perplexity_is_kept_by_what_was_measured() -> None:
    search = found("ppl=1.1")
    assert search.chosen.measured <= 0.0953102 * (1 + 1e-6)  # ln 1.1
    wide = next(plan for plan in search.others if plan.label == "w8a16")
    assert search.chosen.seconds < wide.seconds


def test_assign_bit_widths_takes_what_was_chosen() -> None:
    compilation = ran()
    chosen = compilation.bit_choices
    AssignBitWidths(Scheme.parse(AUTO)).run(compilation)
    assert compilation.bit_plan.choices == chosen
    search = compilation.bit_search
    assert search is not None
    bits = {item.name: item.bits for item in search.tensors}
    for name, linear in chosen.linears.items():
        assert compilation.bit_plan[name].bits == linear.weight == bits[name]
    for name, cache in chosen.caches.items():
        assert bits[name] == cache


def test_blocks_are_taken_where_they_pay() -> None:
    compilation = ran(replace(PASS, budget="size=170kB", block=16))
    search = compilation.bit_search
    assert search is not None and search.chosen.bytes <= 170e3
    assert search.chosen.expected < found("size=170kB").chosen.expected
    labels = {item.name: item.label for item in search.tensors}
    assert "4b16" in labels.values()
    assert "w4a16, blocks of 16" in {plan.label for plan in search.others}
    chosen = compilation.bit_choices
    AssignBitWidths(Scheme.parse(AUTO)).run(compilation)
    for name, linear in chosen.linears.items():
        assert labels[name] == str(linear.weight_name)
        granularity = compilation.bit_plan[name].granularity
        assert isinstance(granularity, PerBlock) == (linear.block == 16)


def test_tensors_say_where_they_are_and_what_they_lose() -> None:
    search = found("latency=340us")
    roles = [item.role for item in search.tensors if item.layer == 0]
    assert roles[:4] == ["input of q", "q", "k", "v"]
    assert sorted(roles[-2:]) == ["keys", "values"]
    for item in search.tensors:
        assert item.label in item.losses
        assert all(loss >= 0 for loss in item.losses.values())
        assert item.worst == max(item.losses.values()) >= item.loss


def test_the_graph_is_not_changed_and_a_second_run_does_nothing() -> None:
    model = rotated()
    before = model_to_text(model)
    compilation = ran(PASS, model)
    assert model_to_text(model) == before
    chosen = compilation.bit_choices
    assert PASS.run(compilation) == 0
    assert compilation.bit_choices is chosen


def test_the_same_data_give_the_same_plan() -> None:
    assert ran().bit_search == found("latency=340us")


def test_another_budget_measures_no_tensor_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = replace(PASS, record=LossRecord(tmp_path))
    ran(item)
    measured: list[object] = []
    each = LossMeter.each

    def spied(self, changes, *args, **more):  # type: ignore[no-untyped-def]
        measured.extend(changes)
        return each(self, changes, *args, **more)

    monkeypatch.setattr(LossMeter, "each", spied)
    again = ran(replace(item, record=LossRecord(tmp_path), budget="latency=380us"))
    assert not measured
    assert again.bit_search == found("latency=380us")
    other = replace(item, record=LossRecord(tmp_path), data=WINDOWS)  # other data, other losses
    ran(other)
    assert measured


@pytest.mark.parametrize(
    ("budget", "help_text"),
    [("latency=1us", "latency=…"), ("size=1kB", "size=…")],
)
def test_an_infeasible_budget_is_told_before_anything_is_measured(
    budget: str, help_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossMeter, "__init__", None)
    with pytest.raises(DiagnosticError) as caught:
        ran(replace(PASS, budget=budget))
    assert caught.value.codes == ["QN509"]
    assert help_text in caught.value.diagnostics[0].rule.help()


def test_a_perplexity_that_nothing_keeps() -> None:
    with pytest.raises(DiagnosticError) as caught:
        ran(replace(PASS, budget="ppl=1.0000001"))
    assert caught.value.codes == ["QN509"]
    help_text = caught.value.diagnostics[0].rule.help()
    assert "ppl=…" in help_text
    least = float(help_text.split(" to ")[1].split(" ")[0])
    search = found(f"ppl={least}")
    assert search.chosen.expected <= 1e-4 + least - 1


def test_what_it_cannot_search() -> None:
    compilation = Compilation(rotated(), load_target("onnxruntime"))
    with pytest.raises(DiagnosticError) as caught:
        PASS.run(compilation)
    assert caught.value.codes == ["QN508"]
    plain = parse("""
        plain (float[1, 4] x) => (float[1, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        { y = MatMul(x, w) }
    """)
    with pytest.raises(DiagnosticError) as caught:
        PASS.run(Compilation(plain, load_target(TARGET)))
    assert caught.value.codes == ["QN541"]


def test_a_front_has_no_plan_that_a_faster_one_beats() -> None:
    def plan(seconds: float, perplexity: float) -> MeasuredPlan:
        return MeasuredPlan("", seconds, 0, 0, 0, perplexity)

    plans = [plan(3, 5), plan(1, 9), plan(2, 9.5), plan(3, 6), plan(4, 5), plan(5, 4)]
    assert unbeaten(plans) == (plan(1, 9), plan(3, 5), plan(5, 4))
    assert unbeaten([]) == ()
