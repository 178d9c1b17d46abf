"""fold-conversions: one rounding, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.passes.fold_conversions import FoldConversions
from tests.conftest import apply, assert_keeps, assert_rewrites, normal, parse, run_model

WIDE = "float s = {0.001}, uint16 z = {30000}"
NARROW = "float t = {0.2}, uint8 o = {100}"


def graph(operator: str = "Sigmoid(x)", body: str = "", outputs: str = "uint8[2, 300] y") -> str:
    return f"""
        g (float[2, 300] x) => ({outputs})
        <{WIDE}, {NARROW}>
        {{
            h = {operator}
            wide = QuantizeLinear(h, s, z)
            real = DequantizeLinear(wide, s, z)
            y = QuantizeLinear(real, t, o)
            {body}
        }}
    """


AFTER = f"""
    g (float[2, 300] x) => (uint8[2, 300] y)
    <{NARROW}>
    {{ h = Sigmoid(x)  y = QuantizeLinear(h, t, o) }}
"""


def test_form() -> None:
    assert_rewrites(
        FoldConversions(), graph(), AFTER.replace("float s = {0.001}, uint16 z = {30000}, ", ""), 1
    )


def test_codes_differ_by_one_at_most_and_are_nearer() -> None:
    text = graph("Mul(x, x)")
    model, x = parse(text), normal(2, 300, scale=3)
    (before,) = run_model(model, {"x": x})
    apply(FoldConversions(), model)
    (after,) = run_model(model, {"x": x})
    real = np.clip(x.astype(np.float64) ** 2 / np.float32(0.2) + 100, 0, 255)
    assert np.abs(after.astype(int) - before.astype(int)).max() <= 1
    assert np.abs(after - real).max() <= np.abs(before - real).max()


@pytest.mark.parametrize(
    "text",
    [
        graph("Add(x, x)"),  # exact as it is
        graph("Transpose<perm = [0, 1]>(x)"),
        graph(body="w = Identity(wide)", outputs="uint8[2, 300] y, uint16[2, 300] w"),
        graph(body="w = Identity(real)", outputs="uint8[2, 300] y, float[2, 300] w"),
        graph(outputs="uint8[2, 300] y, uint16[2, 300] wide"),
        graph()
        .replace("float t = {0.2}, uint8 o = {100}", "float t = {0.2}, uint16 o = {100}")
        .replace("uint8[", "uint16["),
    ],
    ids=["sum", "layout", "codes read", "numbers read", "an output", "not narrower"],
)
def test_must_not_fire(text: str) -> None:
    assert_keeps(FoldConversions(), text)
