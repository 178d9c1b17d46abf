"""fold-reshapes: one Reshape for several operators that keep the order, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.passes.fold_reshapes import FoldReshapes
from tests.conftest import apply, parse, run_model


def model(body: str, *, given: str = "1, 1, 6", result: str = "1, 3, 1, 2", more: str = "") -> str:
    return f"""
        g (uint8[{given}] x) => (uint8[{result}] y{more})
        <int64[4] split = {{1, 1, 3, 2}}, int64[4] many = {{1, 2, 3, 1}}, int64[1] all = {{-1}},
         int64[1] first = {{0}}> {{ {body} }}
    """


FOLDED = {
    "a transpose that moves ones": (
        "h = Reshape(x, split) y = Transpose<perm: ints = [0, 2, 1, 3]>(h)",
        ["Reshape"],
    ),
    "a transpose alone": (
        "h = Cast<to: int = 2>(x) y = Transpose<perm: ints = [0, 2, 1]>(h)",
        ["Cast", "Reshape"],
    ),
    "several": (
        "a = Reshape(x, all) b = Unsqueeze(a, first) c = Squeeze(b, first) y = Reshape(c, split)",
        ["Reshape"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folds(name: str) -> None:
    body, operators = FOLDED[name]
    shapes = {"a transpose alone": "1, 6, 1", "several": "1, 1, 3, 2"}
    graph = parse(model(body, result=shapes.get(name, "1, 3, 1, 2")))
    given = {"x": np.arange(6, dtype=np.uint8).reshape(1, 1, 6)}
    before = run_model(graph, given)[0]
    assert apply(FoldReshapes(), graph) >= 1
    assert apply(FoldReshapes(), graph) == 0
    assert [node.op_type for node in graph.graph] == operators
    assert graph.graph.outputs[0].name == "y"
    after = run_model(graph, given)[0]
    assert after.shape == before.shape
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("body", "result", "more"),
    [
        ("h = Reshape(x, many) y = Transpose<perm: ints = [0, 2, 1, 3]>(h)", "1, 3, 2, 1", ""),
        ("h = Reshape(x, all) y = Reshape(h, split)", "1, 1, 3, 2", ", uint8[6] h"),
        ("h = Cast<to: int = 2>(x) y = Reshape(h, split)", "1, 1, 3, 2", ""),
    ],
    ids=["elements change places", "handed out", "one alone"],
)
def test_must_not_fire(body: str, result: str, more: str) -> None:
    graph = parse(model(body, result=result, more=more))
    before = [node.op_type for node in graph.graph]
    assert apply(FoldReshapes(), graph) == 0
    assert [node.op_type for node in graph.graph] == before
