"""tensor_losses: every option's loss from few measurements, none of them made twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.bit_options import BitOptions, cache_key, group_key
from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.cost_model import Workload
from qnpu.compiler.pass_base import no_progress
from qnpu.compiler.target import load_target
from qnpu.runtime_check.bit_changes import joined
from qnpu.runtime_check.bit_losses import LossMeter, Measure
from qnpu.runtime_check.loss_record import LossRecord
from qnpu.runtime_check.tensor_losses import TensorLosses
from tests.searching import HELD_OUT, TARGET, feeds, searched

FOUR = WeightBits(4)


def losses_of(
    measure: Measure = Measure.KL,
    folder: Path | None = None,
    meter: LossMeter | None = None,
    block: int = 0,
) -> tuple[BitOptions, TensorLosses]:
    model, items, changes = searched()
    options = BitOptions(items, load_target(TARGET), Workload(512, 64), block)
    record = LossRecord(folder)
    record.open("c3" * 32)
    meter = meter or LossMeter(model, feeds(model, HELD_OUT), stride=2)
    return options, TensorLosses(options, changes, meter, measure, record, no_progress)


def test_an_option_loses_what_its_tensors_lose() -> None:
    options, losses = losses_of()
    model, items, changes = searched()
    meter = LossMeter(model, feeds(model, HELD_OUT), stride=2)
    group = items.groups[0]
    parts = [changes.of_input(group, 8), *(changes.of_weight(i, FOUR) for i in group.linears)]
    alone = dict(meter.each(parts, Measure.KL))
    option = options.known[group_key(group)]["8 w4,4,4"]
    assert losses.of(group_key(group), option) == pytest.approx(sum(alone.values()), rel=1e-6)
    wide = options.known[group_key(group)]["16 w4,4,4"]
    del alone[parts[0].name]
    assert losses.of(group_key(group), wide) == pytest.approx(sum(alone.values()), rel=1e-6)
    cache = items.caches[0]
    (narrow,) = dict(meter.each([changes.of_cache(cache, 8)], Measure.KL)).values()
    known = options.known[cache_key(cache)]
    assert losses.of(cache_key(cache), known["8"]) == pytest.approx(narrow, rel=1e-6)
    assert losses.of(cache_key(cache), known["16"]) == 0.0


@pytest.mark.parametrize(("bits", "most"), [(WeightBits(8), 0.05), (WeightBits(4, 16), 0.9)])
def test_wide_weights_share_what_they_lose_together(bits: WeightBits, most: float) -> None:
    _, losses = losses_of(block=bits.block)
    model, items, changes = searched()
    all_items = [item for group in items.groups for item in group.linears]
    meter = LossMeter(model, feeds(model, HELD_OUT), stride=2)
    whole = meter.together(joined("", [changes.of_weight(i, bits) for i in all_items])).divergence
    found = losses.tensors()
    few = [found[f"weight {i.shape.name} 4"] for i in all_items]
    wide = [found[f"weight {i.shape.name} {bits}"] for i in all_items]
    assert sum(wide) == pytest.approx(whole, rel=1e-6)
    assert 0 < sum(wide) < sum(few) * most
    ratios = [a / b for a, b in zip(wide, few, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize("measure", [Measure.BLOCK, Measure.FISHER, Measure.NOISE, Measure.RATIO])
def test_other_measures_add_up_to_the_divergence_of_each_kind(measure: Measure) -> None:
    _, losses = losses_of(measure)
    model, items, changes = searched()
    meter = LossMeter(model, feeds(model, HELD_OUT), stride=2)
    found = losses.tensors()
    inputs = [changes.of_input(group, 8) for group in items.groups]
    whole = meter.together(joined("", inputs)).divergence
    assert sum(found[change.name] for change in inputs) == pytest.approx(whole, rel=1e-5)
    weights = [changes.of_weight(item, FOUR) for group in items.groups for item in group.linears]
    whole = meter.together(joined("", weights)).divergence
    assert sum(found[change.name] for change in weights) == pytest.approx(whole, rel=1e-5)
    single = dict(meter.each(weights, measure))
    ratios = [found[name] / loss for name, loss in single.items() if loss > 0]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    options, first = losses_of(folder=tmp_path)
    plan = options.by_scheme(Scheme.parse("w4a8"))
    assert plan is not None
    before = dict(first.tensors()), first.of_plan(plan), first.of_nothing()
    _, second = losses_of(folder=tmp_path, meter=_Known())
    assert (dict(second.tensors()), second.of_plan(plan), second.of_nothing()) == before


class _Known(LossMeter):
    """Only ever asked for nothing."""

    def __init__(self) -> None:
        pass

    def each(self, changes, measure, *, progress=no_progress):  # type: ignore[no-untyped-def]
        assert not changes
        return iter(())

    def together(self, change):  # type: ignore[no-untyped-def]
        raise AssertionError("measured again")


def test_a_plan_loses_about_what_its_tensors_do() -> None:
    options, losses = losses_of()
    for scheme in ("w8a8", "w4a8"):
        plan = options.by_scheme(Scheme.parse(scheme))
        assert plan is not None
        summed = sum(losses.of(key, options.known[key][name]) for key, name in plan.items())
        assert losses.of_plan(plan).divergence == pytest.approx(summed, rel=0.7)
    assert losses.of_nothing().divergence == pytest.approx(0, abs=1e-9)
