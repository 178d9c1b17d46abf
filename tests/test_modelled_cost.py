"""modelled_cost: of a compiled graph, the same as of the plan that it was compiled with."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.bit_items import find_items
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.cost_model import CostModel, Workload
from qnpu.compiler.modelled_cost import modelled_cost
from qnpu.compiler.pipeline import CompileResult, compile_model
from qnpu.compiler.target import load_target
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import parse
from tests.decoders import LENGTH, exported
from tests.searching import TARGET, WINDOWS, rotated

PLAIN = """
    plain (float[1, 4] x) => (float[1, 2] y)
    <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { y = MatMul(x, w) }
"""


def compiled(scheme: str, target: str = TARGET, **more: object) -> CompileResult:
    options = {"scheme": scheme, "target": target, "seq_len": LENGTH, "learn_windows": 2} | more
    return compile_model(exported("llama"), CompileConfig(**options), WINDOWS)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a8"])
def test_the_cost_of_what_was_compiled(scheme: str) -> None:
    result = compiled(scheme, workload="300/20")
    assert result.cost is not None
    items = find_items(rotated())
    expected = CostModel.of(load_target(TARGET)).total(
        items.shape, result.bit_plan.choices.linears, 8, Workload(300, 20)
    )
    assert result.cost.seconds == pytest.approx(expected.seconds)
    assert result.cost.prefill_s == pytest.approx(expected.prefill_s)
    assert result.cost.bytes == pytest.approx(expected.weight_bytes + expected.kv_bytes)
    assert result.cost.to_json()["kind"] == "modelled"


def test_a_search_and_the_compile_agree() -> None:
    result = compiled("auto", budget="latency=350us", search_windows=1)
    assert result.cost is not None
    assert result.bit_search is not None
    assert result.cost.seconds == pytest.approx(result.bit_search.chosen.seconds)
    assert result.cost.bytes == pytest.approx(result.bit_search.chosen.bytes)


def test_where_nothing_is_known() -> None:
    assert compiled("w8a8", "onnxruntime").cost is None
    data = ArraySamples({"x": np.ones((2, 4), np.float32)})
    plain = compile_model(parse(PLAIN), CompileConfig(target=TARGET), data)
    assert plain.cost is None
    choices = compiled("w8a8").bit_plan.choices
    assert modelled_cost(parse(PLAIN), choices, load_target(TARGET), "64/1") is None
