"""decompose-rotary: RotaryEmbedding-23 in small operators."""

from __future__ import annotations

import pytest

from qnpu.compiler.graph_edit import static_shape
from qnpu.passes.decompose_rotary import DecomposeRotary
from tests.conftest import (
    apply,
    assert_keeps,
    assert_rewrites,
    normal,
    parse,
    relative_error,
    run_model,
)

TABLES = """
    <float[1, 2, 2] cos = {1, 0.5, 0.25, 0.125}, float[1, 2, 2] sin = {0.1, 0.2, 0.3, 0.4}>
"""


def rotary(attributes: str = "", constants: str = TABLES, width: int = 4) -> str:
    shape = f"float[1, 3, 2, {width}]"
    node = f"y = RotaryEmbedding{attributes}(x, cos, sin)"
    return f"r ({shape} x) => ({shape} y) {constants} {{ {node} }}"


def test_golden() -> None:
    assert_rewrites(
        DecomposeRotary(),
        rotary(),
        """
        r (float[1, 3, 2, 4] x) => (float[1, 3, 2, 4] y)
        <float[1, 2, 2] cos = {1, 0.5, 0.25, 0.125}, float[1, 2, 2] sin = {0.1, 0.2, 0.3, 0.4},
         float[1, 1, 2, 2] cos_row = {1, 0.5, 0.25, 0.125},
         float[1, 1, 2, 2] sin_row = {0.1, 0.2, 0.3, 0.4},
         int64[2] y_split = {2, 2}>
        {
            y_first, y_second = Split<axis: int = -1>(x, y_split)
            y_first_cos = Mul(y_first, cos_row)
            y_second_sin = Mul(y_second, sin_row)
            y_second_cos = Mul(y_second, cos_row)
            y_first_sin = Mul(y_first, sin_row)
            y_turned_first = Sub(y_first_cos, y_second_sin)
            y_turned_second = Add(y_second_cos, y_first_sin)
            y = Concat<axis: int = -1>(y_turned_first, y_turned_second)
        }
        """,
        count=1,
    )


@pytest.mark.parametrize(
    ("attributes", "width"),
    [
        ("", 4),
        ("<rotary_embedding_dim: int = 4>", 4),
        ("<rotary_embedding_dim: int = 4>", 6),
        ("<interleaved: int = 1>", 4),
        ("<interleaved: int = 1, rotary_embedding_dim: int = 4>", 6),
    ],
)
def test_numbers_stay(attributes: str, width: int) -> None:
    model = parse(rotary(attributes, width=width))
    x = normal(1, 3, 2, width)
    expected = run_model(model, {"x": x})[0]
    assert apply(DecomposeRotary(), model) == 1
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}
    assert all(static_shape(value) for node in model.graph for value in node.outputs)
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 2e-7


def test_two_rotations_share_their_tables() -> None:
    model = parse(
        f"""
        r (float[1, 3, 2, 4] x) => (float[1, 3, 2, 4] y, float[1, 3, 2, 4] z) {TABLES}
        {{ y = RotaryEmbedding(x, cos, sin)  t = Neg(x)  z = RotaryEmbedding(t, cos, sin) }}
        """
    )
    assert apply(DecomposeRotary(), model) == 2
    rows = [name for name in model.graph.initializers if "row" in name]
    assert rows == ["cos_row", "sin_row"]


@pytest.mark.parametrize("attributes", ["", "<interleaved: int = 1>"])
def test_tables_that_are_computed(attributes: str) -> None:
    model = parse(
        f"""
        r (float[1, 3, 2, 4] x, float[1, 2, 2] angles)
            => (float[1, 3, 2, 4] y, float[1, 3, 2, 4] z) {{
            cos = Cos(angles)
            sin = Sin(angles)
            y = RotaryEmbedding{attributes}(x, cos, sin)
            t = Neg(x)
            z = RotaryEmbedding{attributes}(t, cos, sin)
        }}
        """
    )
    feeds = {"x": normal(1, 3, 2, 4), "angles": normal(1, 2, 2, seed=1)}
    expected = run_model(model, feeds)
    assert apply(DecomposeRotary(), model) == 2
    kinds = [node.op_type for node in model.graph]
    assert "RotaryEmbedding" not in kinds
    assert kinds.count("Reshape") == 2 + 4 * bool(attributes)  # one row of each table for both
    for old, new in zip(expected, run_model(model, feeds), strict=True):
        assert relative_error(new, old) <= 2e-7
    assert apply(DecomposeRotary(), model) == 0


@pytest.mark.parametrize(
    "text",
    [
        # three dimensions
        f"""
        r (float[1, 2, 4] x) => (float[1, 2, 4] y) {TABLES}
        {{ y = RotaryEmbedding<num_heads: int = 1>(x, cos, sin) }}
        """,
        # one table is computed
        """
        r (float[1, 3, 2, 4] x, float[1, 2, 2] cos) => (float[1, 3, 2, 4] y)
        <float[1, 2, 2] sin = {1, 2, 3, 4}>
        { y = RotaryEmbedding(x, cos, sin) }
        """,
        # computed tables, of which the operator takes a part
        """
        r (float[1, 3, 2, 4] x, float[1, 2, 4] cos, float[1, 2, 4] sin) => (float[1, 3, 2, 4] y)
        { y = RotaryEmbedding(x, cos, sin) }
        """,
        # tables indexed at run time
        """
        r (float[1, 3, 2, 4] x, int64[1, 2] at) => (float[1, 3, 2, 4] y)
        <float[2, 2] cos = {1, 2, 3, 4}, float[2, 2] sin = {1, 2, 3, 4}>
        { y = RotaryEmbedding(x, cos, sin, at) }
        """,
        # an operator of this name in another domain
        """
        <ir_version: 11, opset_import: ["" : 23, "acme" : 1]>
        r (float[1, 3, 2, 4] x) => (float[1, 3, 2, 4] y)
        <float[1, 2, 2] cos = {1, 2, 3, 4}, float[1, 2, 2] sin = {1, 2, 3, 4}>
        { y = acme.RotaryEmbedding(x, cos, sin) }
        """,
    ],
)
def test_other_rotations_stay(text: str) -> None:
    assert_keeps(DecomposeRotary(), text)
