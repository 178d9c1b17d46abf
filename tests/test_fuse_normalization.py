"""fuse-normalization: spelt-out norms in their variants, and look-alikes that must stay."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.passes.fuse_normalization import FuseNormalization
from tests.conftest import (
    apply,
    assert_keeps,
    assert_rewrites,
    normal,
    parse,
    relative_error,
    run_model,
)

CONSTANTS = """
    <float[4] g = {1, 2, 3, 4}, float[4] b = {5, 6, 7, 8}, float two = {2}, float one = {1},
     float e = {1e-5}, int64[1] last = {-1}>
"""


def norm(body: str, constants: str = CONSTANTS) -> str:
    return f"n (float[2, 3, 4] x) => (float[2, 3, 4] y) {constants} {{ {body} }}"


SQUARES = ["s = Pow(x, two)", "s = Mul(x, x)"]
RMS = "m = ReduceMean(s, last)  t = Add(m, e)  r = Sqrt(t)"
NORMALIZED = [
    "i = Reciprocal(r)  n = Mul(x, i)",
    "i = Reciprocal(r)  n = Mul(i, x)",
    "i = Div(one, r)  n = Mul(x, i)",
    "n = Div(x, r)",
]
GAINS = ["y = Mul(n, g)", "y = Mul(g, n)"]


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("normalized", NORMALIZED)
@pytest.mark.parametrize("square", SQUARES)
def test_every_spelling_of_a_gained_rms_norm(square: str, normalized: str, gain: str) -> None:
    model = parse(norm(f"{square}  {RMS}  {normalized}  {gain}"))
    x = normal(2, 3, 4)
    expected = run_model(model, {"x": x})[0]
    assert apply(FuseNormalization(), model) == 1
    (node,) = model.graph
    assert node.op_type == "RMSNormalization"
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-5, rel=1e-7)
    # the same sums in another order
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 5e-7
    assert apply(FuseNormalization(), model) == 0


def test_golden_with_gain() -> None:
    assert_rewrites(
        FuseNormalization(),
        norm(f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}"),
        norm(
            "y = RMSNormalization<axis: int = -1, epsilon: float = 1e-5>(x, g)",
            "<float[4] g = {1, 2, 3, 4}>",
        ),
        count=1,
    )


def test_golden_without_gain() -> None:
    model = assert_rewrites(
        FuseNormalization(),
        norm(f"{SQUARES[0]}  {RMS}  i = Reciprocal(r)  y = Mul(x, i)"),
        norm(
            "y = RMSNormalization<axis: int = -1, epsilon: float = 1e-5>(x, x_unit_gain)",
            "<float[4] x_unit_gain = {1, 1, 1, 1}>",
        ),
        count=1,
    )
    x = normal(2, 3, 4)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 5e-7


LAYER = """
    u = ReduceMean(x, last)  d = Sub(x, u)  s = Pow(d, two)  m = ReduceMean(s, last)
    t = Add(m, e)  r = Sqrt(t)
"""


@pytest.mark.parametrize("normalized", [v.replace("x", "d") for v in NORMALIZED])
def test_layer_norm(normalized: str) -> None:
    model = parse(norm(f"{LAYER}  {normalized}  h = Mul(n, g)  y = Add(h, b)"))
    x = normal(2, 3, 4)
    expected = run_model(model, {"x": x})[0]
    assert apply(FuseNormalization(), model) == 1
    (node,) = model.graph
    assert node.op_type == "LayerNormalization"
    assert [v.name for v in node.inputs if v is not None] == ["x", "g", "b"]
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 5e-7
    assert apply(FuseNormalization(), model) == 0


def test_axis_may_be_counted_from_the_front() -> None:
    constants = CONSTANTS.replace("last = {-1}", "last = {2}")
    body = f"{SQUARES[1]}  {RMS}  {NORMALIZED[3]}  {GAINS[0]}"
    model = parse(norm(body, constants))
    assert apply(FuseNormalization(), model) == 1


@pytest.mark.parametrize(
    ("why", "text"),
    [
        (
            "the mean is over another axis",
            norm(
                f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}",
                CONSTANTS.replace("last = {-1}", "last = {1}"),
            ),
        ),
        (
            "the mean is over two axes",
            norm(
                f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}",
                CONSTANTS.replace("int64[1] last = {-1}", "int64[2] last = {-2, -1}"),
            ),
        ),
        (
            "the mean does not keep its axis",
            """
            n (float[4, 4] x) => (float[4, 4] y)
            <float[4] g = {1, 2, 3, 4}, float two = {2}, float e = {1e-5}, int64[1] last = {-1}>
            {
                s = Pow(x, two)  m = ReduceMean<keepdims: int = 0>(s, last)  t = Add(m, e)
                r = Sqrt(t)  i = Reciprocal(r)  n = Mul(x, i)  y = Mul(n, g)
            }
            """,
        ),
        (
            "epsilon is no scalar",
            norm(
                f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}",
                CONSTANTS.replace("float e = {1e-5}", "float[4] e = {1, 2, 3, 4}"),
            ),
        ),
        (
            "the power is no square",
            norm(
                f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}",
                CONSTANTS.replace("two = {2}", "two = {4}"),
            ),
        ),
        (
            "another tensor is divided",
            """
            n (float[2, 4] x, float[2, 4] z) => (float[2, 4] y)
            <float[4] g = {1, 2, 3, 4}, float two = {2}, float e = {1e-5}, int64[1] last = {-1}>
            {
                s = Pow(x, two)  m = ReduceMean(s, last)  t = Add(m, e)
                r = Sqrt(t)  i = Reciprocal(r)  n = Mul(z, i)  y = Mul(n, g)
            }
            """,
        ),
        (
            "the mean square is an output too",
            """
            n (float[2, 4] x) => (float[2, 4] y, float[2, 1] m)
            <float[4] g = {1, 2, 3, 4}, float two = {2}, float e = {1e-5}, int64[1] last = {-1}>
            {
                s = Pow(x, two)  m = ReduceMean(s, last)  t = Add(m, e)
                r = Sqrt(t)  i = Reciprocal(r)  n = Mul(x, i)  y = Mul(n, g)
            }
            """,
        ),
    ],
)
def test_look_alikes_stay(why: str, text: str) -> None:
    del why
    assert_keeps(FuseNormalization(), text)


def test_a_gain_of_another_shape_stays_outside() -> None:
    model = parse(
        norm(
            f"{SQUARES[0]}  {RMS}  {NORMALIZED[0]}  {GAINS[0]}",
            CONSTANTS.replace("float[4] g = {1, 2, 3, 4}", "float[3, 1] g = {1, 2, 3}"),
        )
    )
    x = normal(2, 3, 4)
    expected = run_model(model, {"x": x})[0]
    apply(FuseNormalization(), model)
    assert [node.op_type for node in model.graph] == ["RMSNormalization", "Mul"]
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 5e-7
