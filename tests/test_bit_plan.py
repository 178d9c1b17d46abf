"""Schemes by name, and the plan as a container and as JSON."""

from __future__ import annotations

import json

import pytest

from qnpu.compiler.bit_plan import AUTO, SCHEMES, BitPlan, Scheme, spec_to_json
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import PerChannel, QuantSpec


@pytest.mark.parametrize(
    ("name", "weight", "taken", "made"),
    [
        ("w8a16", 8, 16, 16),
        ("w8a8", 8, 8, 8),
        ("w4a16", 4, 16, 16),
        ("w4a8", 4, 8, 8),
        ("w4a4", 4, 4, 8),
    ],
)
def test_schemes(name: str, weight: int, taken: int, made: int) -> None:
    scheme = Scheme.parse(name)
    assert scheme.weight_bits == weight
    assert (scheme.input_bits, scheme.output_bits) == (taken, made)
    assert (scheme.down_bits, scheme.head_input_bits) == (16, made)
    assert (scheme.other_bits, scheme.kv_bits, scheme.head_bits) == (16, 8, 8)
    assert (scheme.gate_bits, scheme.query_bits, scheme.logits_bits) == (16, 16, 16)
    assert name in SCHEMES


def test_under_auto_nothing_is_narrow_that_was_not_chosen() -> None:
    scheme = Scheme.parse(AUTO)
    assert (scheme.name, scheme.weight_bits, scheme.input_bits) == ("auto", 8, 16)
    assert scheme.head_input_bits == 16


@pytest.mark.parametrize("name", ["", "w3a8", "w8", "W8A8", "w8a8 ", "w08a8", "w8a32", "w8a4"])
def test_unknown_schemes(name: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        Scheme.parse(name)
    assert caught.value.codes == ["QN501"]


def test_a_plan_keeps_its_order() -> None:
    weight = QuantSpec(4, True, True, PerChannel(0))
    activation = QuantSpec(16, False, False)
    plan = BitPlan("w4a16", {"b": weight, "a": activation})
    assert list(plan) == ["b", "a"]
    assert "a" in plan
    assert "c" not in plan
    assert plan["b"] is weight
    assert json.loads(json.dumps(plan.to_json())) == {
        "format": "qnpu-bit-plan",
        "version": 2,
        "scheme": "w4a16",
        "sensitivities": {},
        "promoted": [],
        "linears": {},
        "caches": {},
        "tensors": {
            "b": {"bits": 4, "signed": True, "symmetric": True, "axis": 0},
            "a": {"bits": 16, "signed": False, "symmetric": False},
        },
    }


def test_axis_zero_is_written() -> None:
    assert spec_to_json(QuantSpec(8, True, True, PerChannel(0)))["axis"] == 0
