"""bit_options: what may be chosen, what it costs, and what a scheme would give."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qnpu.compiler.allocation import priced
from qnpu.compiler.bit_choices import LinearBits
from qnpu.compiler.bit_items import HEAD, find_items
from qnpu.compiler.bit_options import BitOptions, Option, cache_key, group_key
from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.cost_model import CostModel, Workload
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.target import CostTable, Figure, Speed, TargetProfile, Throughput, load_target
from qnpu.passes.assign_bit_widths import AssignBitWidths
from tests.decoders import canonical
from tests.searching import TARGET, rotated, searched

WORKLOAD = Workload(512, 64)


def options_of(target: str = TARGET, block: int = 0) -> BitOptions:
    return BitOptions(searched()[1], load_target(target), WORKLOAD, block)


def nothing(key: str, option: Option) -> float:
    return 0.0


def test_what_a_target_has() -> None:
    options = options_of()
    for group in options.items.groups:
        known = options.known[group_key(group)].values()
        assert {option.bits for option in known} == {8, 16}
        assert len(known) == 2 * 2 ** len(group.linears)
    for cache in options.items.caches:
        assert list(options.known[cache_key(cache)]) == ["8", "16"]


def test_blocks_are_one_more_choice_for_each_weight() -> None:
    plain, options = options_of(), options_of(block=16)
    for group in options.items.groups:
        key, count = group_key(group), len(group.linears)
        known = options.known[key]
        assert len(known) == 2 * 3**count
        assert plain.known[key].items() <= known.items()
        few, blocks, many = (known[f"8 w{','.join([w] * count)}"] for w in ("4", "4b16", "8"))
        assert few.bytes < blocks.bytes < many.bytes
        assert few.seconds < blocks.seconds  # modelled: blocks cost the NPU time


def test_blocks_only_where_they_divide_the_features() -> None:
    """Of 64 features, and of 128 between gate and down projection."""
    options = options_of(block=128)
    for group in options.items.groups:
        names = " ".join(options.known[group_key(group)])
        assert ("4b128" in names) == (group.linears[0].shape.features % 128 == 0)
    features = {group.linears[0].shape.features % 128 == 0 for group in options.items.groups}
    assert features == {True, False}


def test_blocks_chosen() -> None:
    options = options_of(block=16)
    plan = options.by_scheme(replace(Scheme.parse("w4a8"), block=16))
    assert plan is not None
    linears = options.choices(plan).linears.values()
    assert {(bits.weight, bits.block) for bits in linears} == {(4, 16), (8, 0)}  # and the head


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8", "w4a8"])
def test_costs_are_those_of_the_whole_model(scheme: str) -> None:
    """Fixed ones and those of all items together."""
    options = options_of()
    plan = options.by_scheme(Scheme.parse(scheme))
    assert plan is not None
    whole = priced(options.problem(nothing), plan)
    model = CostModel.of(load_target(TARGET))
    choices = options.choices(plan)
    expected = model.total(options.items.shape, choices.linears, 8, WORKLOAD)
    assert whole.costs["latency"] == pytest.approx(expected.seconds)
    assert whole.costs["size"] == pytest.approx(expected.weight_bytes + expected.kv_bytes, rel=1e-6)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8", "w4a8"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_scheme_gives_what_assign_bit_widths_makes_of_it(scheme: str, architecture: str) -> None:
    model = canonical(architecture)
    options = BitOptions(find_items(model), load_target(TARGET), WORKLOAD)
    plan = options.by_scheme(Scheme.parse(scheme))
    assert plan is not None
    compilation = Compilation(model, load_target(TARGET))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    found = compilation.bit_plan.choices
    choices = options.choices(plan)
    assert {name: found.linears[name] for name in choices.linears} == choices.linears
    assert found.caches == choices.caches


def test_promoted_inputs_are_wide() -> None:
    options = options_of()
    key = next(group_key(g) for g in options.items.groups if g.linears[0].shape.role == "down")
    plan = options.by_scheme(Scheme("w4a8", 4, 8, 8, down_bits=8), [key])
    assert plan is not None
    wide = [k for k, name in plan.items() if name.startswith("16")]
    assert wide == [key]


def test_four_bits_where_a_rotation_has_spread_outliers() -> None:
    figure = Figure(value=1e9, source="made up")
    speeds = [
        Speed(input=i, weight=w, speed=1, source="made up") for i in (4, 8, 16) for w in (4, 8)
    ]
    cost = CostTable(
        bandwidth=figure,
        throughput=Throughput(value=1e12, source="made up", input=16, weight=8),
        on_chip=figure,
        speeds=tuple(speeds),
    )
    target = TargetProfile(cost=cost)
    options = BitOptions(find_items(rotated()), target, WORKLOAD)
    narrow = {
        group.linears[0].shape.role: any(
            o.bits == 4 for o in options.known[group_key(group)].values()
        )
        for group in options.items.groups
    }
    assert narrow == {"q": True, "o": True, "gate": True, "down": False, HEAD: True}
    assert [list(options.known[cache_key(c)]) for c in options.items.caches[:1]] == [["8"]]
    unrotated = BitOptions(find_items(canonical("llama")), target, WORKLOAD)
    assert not any(o.bits == 4 for known in unrotated.known.values() for o in known.values())
    eight = target.model_copy(update={"activation_bits_min": 8})
    wide = BitOptions(find_items(rotated()), eight, WORKLOAD)
    assert not any(o.bits == 4 for known in wide.known.values() for o in known.values())


def test_choices_name_every_linear_and_cache() -> None:
    options = options_of()
    plan = {key: list(known)[-1] for key, known in options.known.items()}
    choices = options.choices(plan)
    assert set(choices.linears) == {shape.name for shape in options.items.shape.linears}
    assert set(choices.linears.values()) == {LinearBits(8, 16)}
    assert set(choices.caches.values()) == {16}


def test_a_target_without_figures() -> None:
    with pytest.raises(DiagnosticError) as caught:
        options_of("onnxruntime")
    assert caught.value.codes == ["QN508"]
