"""fold-affine: what follows a convolution channel by channel moves into it, nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qnpu.passes.fold_affine import FoldAffine
from tests.conftest import apply, assert_keeps, assert_rewrites, normal, parse, relative_error
from tests.conftest import run_model as run

WEIGHT = "<float[2, 1, 1, 1] w = {2.0, 3.0}, float[2] b = {1.0, -1.0}"
INPUT = "g (float[1, 1, 4, 4] x) => (float[1, 2, 4, 4] y)\n"


def test_batch_norm_becomes_weight_and_bias() -> None:
    """s = (2, 1), t = (0.5, 4): w·s = (4, 3), b·s + t = (2.5, 3)."""
    assert_rewrites(
        FoldAffine(),
        INPUT
        + WEIGHT
        + """, float[2] gain = {4.0, 3.0}, float[2] bias = {2.5, 1.0},
             float[2] mean = {1.0, -3.0}, float[2] var = {4.0, 9.0}>
        {
            c = Conv(x, w, b)
            y = BatchNormalization <epsilon: float = 0.0> (c, gain, bias, mean, var)
        }""",
        """
        g (float[1, 1, 4, 4] x) => (float[1, 2, 4, 4] y)
        <float[2, 1, 1, 1] w = {4.0, 3.0}, float[2] b = {2.5, 3.0}>
        { y = Conv(x, w, b) }
        """,
        count=3,
    )


@pytest.mark.parametrize(
    ("operation", "weight", "bias"),
    [
        ("Add(c, k)", (2, 3), (3, 3)),
        ("Add(k, c)", (2, 3), (3, 3)),
        ("Sub(c, k)", (2, 3), (-1, -5)),
        ("Sub(k, c)", (-2, -3), (1, 5)),
        ("Mul(c, k)", (4, 12), (2, -4)),
        ("Mul(k, c)", (4, 12), (2, -4)),
        ("Div(c, k)", (1, 0.75), (0.5, -0.25)),
        ("Add(c, one)", (2, 3), (2, 0)),
    ],
)
def test_each_form_is_folded(
    operation: str, weight: tuple[float, float], bias: tuple[float, float]
) -> None:
    model = parse(
        INPUT
        + WEIGHT
        + f""", float[2, 1, 1] k = {{2.0, 4.0}}, float one = {{1.0}}>
        {{ c = Conv(x, w, b)  y = {operation} }}"""
    )
    assert apply(FoldAffine(), model) == 1
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    _assert_constant(model, "w", weight)
    _assert_constant(model, "b", bias)


def test_a_convolution_without_bias_gets_one() -> None:
    model = parse(
        INPUT
        + """<float[2, 1, 1, 1] w = {2.0, 3.0}, float[1, 2, 1, 1] k = {2.0, 4.0}>
        { c = Conv(x, w)  y = Add(c, k) }"""
    )
    assert apply(FoldAffine(), model) == 1
    _assert_constant(model, "c_bias", (2, 4))


@pytest.mark.parametrize(
    ("conv", "weight"),
    [("Conv <group: int = 3>", (3, 1, 2, 2)), ("ConvTranspose", (3, 3, 2, 2))],
)
def test_the_function_stays_the_same(conv: str, weight: tuple[int, ...]) -> None:
    constants = {
        "w": normal(*weight),
        "gain": normal(3, seed=1),
        "bias": normal(3, seed=2),
        "mean": normal(3, seed=3),
        "var": np.abs(normal(3, seed=4)) + np.float32(0.1),
        "map": normal(1, 3, 1, 1, seed=5),
    }
    size = 3 if conv.startswith("Conv ") else 5
    declared = ", ".join(_constant_text(name, array) for name, array in constants.items())
    model = parse(
        f"""
        g (float[1, 3, 4, 4] x) => (float[1, 3, {size}, {size}] y)
        <{declared}>
        {{
            c = {conv} (x, w)
            n = BatchNormalization (c, gain, bias, mean, var)
            y = Mul(n, map)
        }}"""
    )
    feeds = {"x": normal(1, 3, 4, 4, seed=6)}
    expected = run(model, feeds)[0]
    assert apply(FoldAffine(), model) == 4
    assert [node.op_type for node in model.graph] == [conv.split(maxsplit=1)[0]]
    assert relative_error(run(model, feeds)[0], expected) < 1e-6
    assert apply(FoldAffine(), model) == 0


def test_a_norm_without_a_convolution_becomes_mul_and_add() -> None:
    model = parse(
        """
        g (float[1, 2, 4] x) => (float[1, 2, 4] y)
        <float[2] gain = {4.0, 3.0}, float[2] bias = {2.5, 1.0},
         float[2] mean = {1.0, -3.0}, float[2] var = {4.0, 9.0}>
        { y = BatchNormalization (x, gain, bias, mean, var) }"""
    )
    feeds = {"x": normal(1, 2, 4)}
    expected = run(model, feeds)[0]
    assert apply(FoldAffine(), model) == 1
    assert [node.op_type for node in model.graph] == ["Mul", "Add"]
    assert relative_error(run(model, feeds)[0], expected) < 1e-6


@pytest.mark.parametrize(
    ("constant", "body"),
    [
        (np.arange(1, 5), "c = Conv(x, w, b)  y = Add(c, k)"),
        (np.ones((1, 2, 4, 4)), "c = Conv(x, w, b)  y = Add(c, k)"),
        (np.array(0), "c = Conv(x, w, b)  y = Div(c, k)"),
        (np.array(2), "c = Conv(x, w, b)  y = Div(k, c)"),
        (np.array(2), "c = Conv(x, w, b)  d = Add(c, k)  y = Mul(c, d)"),
        (np.array(2), "y = Conv(x, w, b)  d = Add(y, k)"),
        (np.array(2), "c = Conv(x, w, b)  d = Mul(w, k)  y = Add(c, k)"),
        (np.array(2), "c = Conv(x, w, b)  y = Add(c, c)"),
    ],
    ids=["row", "map", "by zero", "inverse", "two users", "output", "shared weight", "itself"],
)
def test_must_not_fire(constant: NDArray[Any], body: str) -> None:
    k = _constant_text("k", constant)
    assert_keeps(FoldAffine(), f"{INPUT}{WEIGHT}, {k}>\n{{ {body} }}")


def _constant_text(name: str, array: NDArray[Any]) -> str:
    shape = f"[{', '.join(map(str, array.shape))}]" if array.ndim else ""
    return f"float{shape} {name} = {{{', '.join(repr(float(v)) for v in array.ravel())}}}"


def _assert_constant(model: ir.Model, name: str, expected: tuple[float, ...]) -> None:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy().ravel(), np.array(expected, np.float32))
