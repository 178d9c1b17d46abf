"""cost_model: the roofline by hand, sums, order in bits, and what published runs took."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.modelled_workloads import LLAMA_3_2_3B, rows
from qnpu.compiler.bit_choices import LinearBits
from qnpu.compiler.cost_model import (
    CostModel,
    LinearShape,
    ModelShape,
    Run,
    Workload,
)
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.target import CostTable, TargetProfile, load_target

WITH_COST = ("qnn-htp-v75", "qnn-htp-v79", "qnn-htp-v81", "rknpu2-rk3588")
TINYLLAMA = ModelShape.llama(
    hidden=2048,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    intermediate=5632,
    vocabulary=32000,
)
SMALL = ModelShape.llama(
    hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=200
)


def speed(input_bits: int, weight: int, relative: float, block_scale: int = 0) -> dict[str, Any]:
    return {
        "input": input_bits,
        "weight": weight,
        "speed": relative,
        "block_scale_bits": block_scale,
        "source": "test",
    }


def chip(on_chip: float = 1e9) -> CostModel:
    """1000 bytes and 8000 operations of 16-bit inputs and 8-bit weights in a second."""
    table = {
        "bandwidth": {"value": 1000, "source": "test"},
        "throughput": {"value": 8000, "input": 16, "weight": 8, "source": "test"},
        "on_chip": {"value": on_chip, "source": "test"},
        "speeds": [
            speed(16, 8, 2),
            speed(16, 4, 2),
            speed(8, 8, 4),
            speed(8, 4, 4),
            speed(16, 4, 1, block_scale=4),
            speed(16, 16, 1),
        ],
    }
    return CostModel.of(TargetProfile.model_validate({"id": "test", "cost": table}))


SQUARE = LinearShape("w", features=40, channels=30)


def test_bytes_of_a_weight() -> None:
    model = chip()
    assert model.linear_bytes(SQUARE, LinearBits(8, 8)) == 40 * 30 + 30 * 4
    assert model.linear_bytes(SQUARE, LinearBits(4, 16)) == 40 * 30 // 2 + 30 * 4
    # 40 features are three blocks of 16, each with a scale of 4 bits
    assert model.linear_bytes(SQUARE, LinearBits(4, 16, 16)) == 600 + 120 + 30 * 3 // 2
    assert model.linear_bytes(LinearShape("w", 1, 1), LinearBits(4, 16, 16)) == 5


def test_pairs_that_a_profile_lists() -> None:
    model = chip()
    assert [(w, i) for w in (4, 8, 16) for i in (4, 8, 16) if model.has(w, i)] == [
        (4, 8),
        (4, 16),
        (8, 8),
        (8, 16),
        (16, 16),
    ]


def test_bytes_of_a_cache_and_of_a_table() -> None:
    """Of the longest run: 5 prompt tokens and 2 more."""
    model = chip()
    assert model.cache_bytes(SMALL, 8, Workload(5, 2, chunk=4)) == 8 * 2 * 16
    assert model.cache_bytes(SMALL, 16, Workload(5, 3, chunk=4)) == 8 * 2 * 16 * 2
    assert model.embedding_bytes(SMALL) == 200 * 64 * 2


def test_the_slower_of_reading_and_computing() -> None:
    model = chip()
    reading = (40 * 30 + 120) / 1000
    one, many = Workload(1, 0, chunk=1), Workload(100, 0, chunk=100)
    assert model.linear_seconds(SQUARE, LinearBits(8, 16), one) == reading
    computing = 2 * 100 * 40 * 30 / 8000
    assert model.linear_seconds(SQUARE, LinearBits(8, 16), many) == computing
    assert model.linear_seconds(SQUARE, LinearBits(8, 8), many) == computing / 2
    assert model.linear_seconds(SQUARE, LinearBits(4, 16, 8), many) == computing * 2


def test_each_run_is_counted() -> None:
    model = chip()
    reading = (40 * 30 + 120) / 1000
    chunk = 2 * 100 * 40 * 30 / 8000
    workload = Workload(250, 7, chunk=100)
    found = model.linear_seconds(SQUARE, LinearBits(8, 16), workload)
    assert found == pytest.approx(3 * chunk + 7 * reading)


def test_runs_of_a_workload() -> None:
    workload = Workload(5, 2, chunk=4)
    assert workload.runs == [Run(4, 4), Run(4, 8), Run(1, 6), Run(1, 7)]
    fixed = Workload(5, 2, chunk=4, context=16)
    assert fixed.runs == [Run(4, 16), Run(4, 16), Run(1, 16), Run(1, 16)]
    assert Workload(8, 0, chunk=4).decode_runs == []


def test_activations_that_do_not_fit_on_the_chip_are_moved() -> None:
    """Input, output and the wider codes that the input is made of."""
    workload = Workload(1, 0, chunk=1)
    weight = 40 * 30 + 120
    read, written = 40, 30
    wide = LinearShape("w", 40, 30, wide_output=True)
    for shape, bits, on_chip, moved in (
        (SQUARE, LinearBits(8, 8), 120, 0),
        (SQUARE, LinearBits(8, 8), 119, 80 + read),
        (SQUARE, LinearBits(8, 8), 69, 80 + read + read + written),
        (wide, LinearBits(8, 8), 99, 80 + read + read + 2 * written),
        (SQUARE, LinearBits(8, 16), 139, 80 + 60),
        (SQUARE, LinearBits(8, 16), 140, 0),
    ):
        found = chip(on_chip).linear_seconds(shape, bits, workload)
        assert found == pytest.approx((weight + moved) / 1000)


def test_caches() -> None:
    """Two heads of 16 at 8 bits, 4 heads that ask; the products grow with what is attended to."""
    model = chip()
    step = Workload(9, 1, chunk=9)
    reading = 10 * 2 * 16 / 1000
    computing = 2 * 9 * 9 * 4 * 16 / 8000
    assert model.cache_seconds(SMALL, 8, step) == pytest.approx(reading + computing)
    long = model.cache_seconds(SMALL, 8, Workload(9, 1, chunk=9, context=100))
    assert long == pytest.approx(100 * 2 * 16 / 1000 + 2 * 9 * 100 * 4 * 16 / 8000)
    wide = model.cache_seconds(SMALL, 16, step)
    assert wide == pytest.approx(2 * reading + 2 * computing)
    bits = dict.fromkeys((s.name for s in SMALL.linears), LinearBits(8, 8))
    cost = model.total(SMALL, bits, 8, step)
    assert cost.kv_bytes == 2 * 2 * 10 * 2 * 16
    assert cost.parts["attention"] == pytest.approx(2 * 2 * (reading + computing))


def test_the_rest_costs_only_what_does_not_fit() -> None:
    workload = Workload(1, 0, chunk=1)
    assert chip().other_seconds(SMALL, workload) == 0
    per_layer = (2 + 3) * 2 * 64 + 2 * (4 + 2) * 16 + 2 * 4 + (2 + 3) * 96
    found = chip(on_chip=1).other_seconds(SMALL, workload)
    assert found == pytest.approx(2 * per_layer * 2 / 1000)


def test_llama_has_the_published_number_of_weights() -> None:
    weights = sum(s.features * s.channels for s in LLAMA_3_2_3B.linears)
    assert round(weights / 1e9, 2) == 3.21  # the model card; its norms are too few to matter
    assert LLAMA_3_2_3B.embedding == 128256 * 3072
    tied = ModelShape.llama(
        hidden=64,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=96,
        vocabulary=9,
        tied=True,
    )
    assert tied.embedding == 0
    assert len({s.name for s in LLAMA_3_2_3B.linears}) == 28 * 7 + 1


CHOICES = st.sampled_from(
    [LinearBits(w, x) for w in (4, 8) for x in (8, 16)] + [LinearBits(4, 16, 32)]
)


@settings(max_examples=30, deadline=None)
@given(
    choices=st.lists(CHOICES, min_size=len(SMALL.linears), max_size=len(SMALL.linears)),
    kv_bits=st.sampled_from([8, 16]),
    workload=st.builds(Workload, st.integers(1, 300), st.integers(0, 9), st.integers(1, 200)),
)
def test_a_total_is_a_sum(choices: list[LinearBits], kv_bits: int, workload: Workload) -> None:
    """One number for each linear and cache, which depends on no other: a program can be linear."""
    model = CostModel.of(load_target("qnn-htp-v75"))
    bits = dict(zip((s.name for s in SMALL.linears), choices, strict=True))
    cost = model.total(SMALL, bits, kv_bits, workload)
    linears = sum(model.linear_seconds(s, bits[s.name], workload) for s in SMALL.linears)
    caches = 2 * SMALL.layers * model.cache_seconds(SMALL, kv_bits, workload)
    assert cost.seconds == pytest.approx(
        linears + caches + model.other_seconds(SMALL, workload), rel=1e-12
    )
    assert cost.seconds == pytest.approx(sum(cost.parts.values()), rel=1e-12)
    weights = sum(model.linear_bytes(s, bits[s.name]) for s in SMALL.linears)
    assert cost.weight_bytes == weights + 2 * SMALL.embedding


@settings(max_examples=60, deadline=None)
@given(
    shape=st.builds(
        LinearShape,
        st.just("w"),
        st.integers(2, 9000),
        st.integers(2, 9000),
        wide_output=st.booleans(),
    ),
    tokens=st.integers(1, 4096),
    name=st.sampled_from(WITH_COST[:3]),
)
def test_fewer_bits_cost_no_more_where_nothing_is_requantized(
    shape: LinearShape, tokens: int, name: str
) -> None:
    """Of weights always; of inputs where codes need not be made of wider ones in DRAM."""
    model, workload = CostModel.of(load_target(name)), Workload(tokens, 1, chunk=tokens)

    def seconds(weight: int, input_bits: int) -> float:
        return model.linear_seconds(shape, LinearBits(weight, input_bits), workload)

    for input_bits in (8, 16):
        assert seconds(4, input_bits) <= seconds(8, input_bits)
        narrow, wide = LinearBits(4, input_bits), LinearBits(8, input_bits)
        assert model.linear_bytes(shape, narrow) < model.linear_bytes(shape, wide)
    if tokens * shape.features * 3 <= model.table.on_chip.value:
        assert seconds(4, 8) <= seconds(4, 16)


@pytest.mark.parametrize("name", WITH_COST[:3])
def test_inputs_matter_to_a_prompt_and_weights_to_decoding(name: str) -> None:
    model = CostModel.of(load_target(name))
    layer = LLAMA_3_2_3B.linears[4]
    prompt, token = Workload(256, 0, chunk=256), Workload(1, 0, chunk=1)

    def seconds(weight: int, input_bits: int, workload: Workload) -> float:
        return model.linear_seconds(layer, LinearBits(weight, input_bits), workload)

    assert seconds(4, 8, token) == seconds(4, 16, token)
    assert seconds(8, 8, token) == pytest.approx(2 * seconds(4, 8, token), rel=0.01)
    assert seconds(4, 16, prompt) / seconds(4, 8, prompt) == pytest.approx(2 / 1.67)
    assert seconds(8, 8, prompt) == seconds(4, 8, prompt)


def test_bits_that_a_target_lacks_are_the_next_wider() -> None:
    rockchip = CostModel.of(load_target("rknpu2-rk3588"))
    workload = Workload(200, 3)
    for bits in (LinearBits(4, 4), LinearBits(4, 8), LinearBits(8, 4)):
        as_bytes = LinearBits(8, 8)
        assert rockchip.linear_bytes(SQUARE, bits) == rockchip.linear_bytes(SQUARE, as_bytes)
        found = rockchip.linear_seconds(SQUARE, bits, workload)
        assert found == rockchip.linear_seconds(SQUARE, as_bytes, workload)
    hexagon = CostModel.of(load_target("qnn-htp-v75"))
    four, eight = LinearBits(4, 4), LinearBits(4, 8)
    assert hexagon.linear_seconds(SQUARE, four, workload) == hexagon.linear_seconds(
        SQUARE, eight, workload
    )


def test_targets_and_widths_without_figures() -> None:
    with pytest.raises(DiagnosticError) as caught:
        CostModel.of(load_target("xdna2"))
    assert caught.value.codes == ["QN508"]
    rockchip = CostModel.of(load_target("rknpu2-rk3588"))
    for bits in (LinearBits(8, 16), LinearBits(4, 8, 32)):
        with pytest.raises(DiagnosticError) as caught:
            rockchip.linear_seconds(SQUARE, bits, Workload(1, 1))
        assert caught.value.codes == ["QN508"]
        with pytest.raises(DiagnosticError):
            rockchip.linear_bytes(SQUARE, bits)
    with pytest.raises(DiagnosticError):
        rockchip.cache_seconds(SMALL, 16, Workload(1, 1))


@pytest.mark.parametrize(
    ("prompt", "decode", "chunk", "context"),
    [(0, 1, 128, None), (1, -1, 128, None), (1, 1, 0, None), (1, 1, 1, 0), (8, 3, 8, 10)],
)
def test_workloads_that_make_no_sense(
    prompt: int, decode: int, chunk: int, context: int | None
) -> None:
    with pytest.raises(DiagnosticError) as caught:
        Workload(prompt, decode, chunk, context)
    assert caught.value.codes == ["QN503"]


def test_every_target_with_figures_is_known() -> None:
    known = {n for n in WITH_COST if load_target(n).cost is not None}
    assert known == set(WITH_COST)
    assert load_target("qnn-htp-v73").cost is None


def test_tables_without_a_source_or_a_base_are_refused() -> None:
    good = chip().table.model_dump()
    assert CostTable.model_validate(good).base == 2
    for change in (
        {"bandwidth": {"value": 1000, "source": ""}},
        {"bandwidth": {"value": 0, "source": "test"}},
        {"speeds": [speed(16, 16, 1)]},
        {"speeds": [speed(16, 8, 1, block_scale=4)]},
        {"latency": 1},
    ):
        with pytest.raises(ValidationError):
            CostTable.model_validate(good | change)


def test_a_result_says_what_it_is() -> None:
    model = CostModel.of(load_target("qnn-htp-v75"))
    bits = dict.fromkeys((s.name for s in SMALL.linears), LinearBits(4, 8))
    cost = model.total(SMALL, bits, 8, Workload(10, 2))
    plain = cost.to_json()
    assert (plain["kind"], plain["target"]) == ("modelled", "qnn-htp-v75")
    assert plain["prefill_s"] == cost.prefill_s > 0
    assert plain["decode_s"] == cost.decode_s > 0


@pytest.mark.parametrize(
    ("target", "shape", "widths", "head", "step_ms", "prompt_ms"),
    [
        # AI Hub, February 2026, and rknn-llm's benchmark.md: one token, and 128 tokens of a prompt
        ("qnn-htp-v79", LLAMA_3_2_3B, LinearBits(4, 16), LinearBits(8, 16), 35.7, 82.0),
        ("qnn-htp-v81", LLAMA_3_2_3B, LinearBits(4, 16), LinearBits(8, 16), 30.6, 69.0),
        ("rknpu2-rk3588", TINYLLAMA, LinearBits(8, 8), LinearBits(8, 8), 40.9, 243.9),
    ],
)
def test_runs_that_figures_are_from(
    target: str,
    shape: ModelShape,
    widths: LinearBits,
    head: LinearBits,
    step_ms: float,
    prompt_ms: float,
) -> None:
    """Within a tenth: attention is not part of the figures, and adds a little."""
    bits = {s.name: head if s.role == "head" else widths for s in shape.linears}
    cost = CostModel.of(load_target(target)).total(shape, bits, 8, Workload(128, 1))
    assert cost.decode_s * 1e3 == pytest.approx(step_ms, rel=0.1)
    assert cost.prefill_s * 1e3 == pytest.approx(prompt_ms, rel=0.1)


@pytest.mark.parametrize("block", [32, 64])
def test_published_gains_of_narrow_inputs(block: int) -> None:
    """Each within 3 points of what Quant.npu reports for SM8650."""
    found = rows("qnn-htp-v75", block)
    assert [row.published for row in found] == [-0.9, -4.6, -15.1]
    for row in found:
        assert row.modelled == pytest.approx(row.published, abs=3)


@pytest.mark.parametrize(("down_bits", "head_bits"), [(16, 4), (8, 8), (16, 8)])
def test_other_readings_of_the_published_gains(down_bits: int, head_bits: int) -> None:
    """The more of the time is reading the prompt, the greater the gain; wide inputs gain less."""
    gains = [-row.modelled for row in rows(down_bits=down_bits, head_bits=head_bits)]
    assert 0 < gains[0] < gains[1] < gains[2]
    assert gains[2] < -rows()[2].modelled
