"""tabulate-positions: rows of cosines and sines, the same numbers as before."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.passes.tabulate_positions import TabulatePositions
from tests.conftest import Array, apply, assert_keeps, parse, run_model

ROTARY = """
    g (int64[1, 3] position_ids, float[1, 3, 4] x) => (float[1, 3, 4] y, float[1, 3, 4] z)
    <float[1, 2, 1] frequencies = {1, 0.01}, int64[1] at = {1}> {
        row = Unsqueeze(position_ids, at)
        real = Cast<to: int = 1>(row)
        angles = MatMul(frequencies, real)
        columns = Transpose<perm: ints = [0, 2, 1]>(angles)
        twice = Concat<axis: int = -1>(columns, columns)
        cos = Cos(twice)
        sin = Sin(twice)
        y = Mul(x, cos)
        z = Mul(x, sin)
    }
"""


def test_rows_are_what_the_nodes_gave() -> None:
    model, before = parse(ROTARY), parse(ROTARY)
    assert apply(TabulatePositions(10), model) == 2
    assert [node.op_type for node in model.graph] == ["Gather", "Gather", "Mul", "Mul"]
    tables = [value for value in model.graph.initializers.values() if value.uses()]
    assert [list(value.shape or ()) for value in tables] == [[10, 4], [10, 4]]
    feeds = {"position_ids": np.array([[0, 7, 9]]), "x": np.ones((1, 3, 4), np.float32)}
    for old, new in zip(run_model(before, feeds), run_model(model, feeds), strict=True):
        np.testing.assert_array_equal(new, old)
    assert apply(TabulatePositions(10), model) == 0


def test_one_position_at_a_time_gives_the_same_table() -> None:
    several, one = parse(ROTARY), parse(ROTARY.replace("[1, 3", "[1, 1"))
    tables: list[list[Array]] = []
    for model in (several, one):
        apply(TabulatePositions(7), model)
        used = [value for value in model.graph.initializers.values() if value.uses()]
        tables.append([v.const_value.numpy() for v in used if v.const_value is not None])
        assert len(tables[-1]) == 2
    for first, second in zip(*tables, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("position_ids", "ids"),  # no positions
        ("MatMul(frequencies, real)", "MatMul(frequencies, more)  more = Neg(length)"),
        ("[1, 3] position_ids", "[1, N] position_ids"),
    ],
)
def test_other_angles_stay(old: str, new: str) -> None:
    text = ROTARY
    if "more" in new:
        text = ROTARY.replace("float[1, 3, 4] x)", "float[1, 3, 4] x, float[1, 1, 3] length)")
        new = "MatMul(frequencies, length)"
    assert_keeps(TabulatePositions(10), text.replace(old, new))
