"""join-halves: one rotation for two halves, the same codes, and what it leaves alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.integer_arguments import Arguments, rotate_arguments, rotate_by_arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import fixed_point, rotary_numbers
from qnpu.passes.join_halves import JoinHalves
from tests.conftest import apply, parse, run_model
from tests.integer_nodes import U8, U16, Array, codes, result

INT32, UINT32 = int(ir.DataType.INT32), int(ir.DataType.UINT32)
ANGLES = np.outer(np.arange(5), [1.0, 0.3, 0.05, 0.001])


def halves(*, axis: int = -1, more: str = "", last: str = "f, s") -> ir.Model:
    """Split, one node for each half that is no rotation yet, Concat."""
    return parse(f"""
        g (uint8[2, 5, 8] x, uint16[5, 4] c, uint16[5, 4] n) => (uint8[2, 5, 8] y)
        <int64[2] sizes = {{4, 4}}>
        {{
            a, b = Split<axis = -1>(x, sizes)
            f = Identity(a)
            s = Identity(b)
            y = Concat<axis = {axis}>({last})
            {more}
        }}
    """)


def constant_tables() -> tuple[Arguments, Arguments]:
    cosines, sines = np.cos(ANGLES), np.sin(ANGLES)
    numbers = [
        rotary_numbers(tables, (255, 255), result(U8))
        for tables in ((cosines, -sines), (cosines, sines))
    ]
    first, second = (rotate_arguments(item, (100, 100), 120, U8) for item in numbers)
    return first, second


def positions(sign: int, zeros: tuple[int, int] = (100, 100)) -> Arguments:
    fixed = fixed_point([Fraction(1, 1 << 15)], [1 << 24], result(U8), close=Fraction(1, 256))
    return rotate_by_arguments(fixed, (*zeros, 32768, 32768), sign, 120, U8, np.int32)


def rotated(model: ir.Model, function: str, arguments: tuple[Arguments, Arguments]) -> ir.Model:
    """A rotation in the place of each Identity."""
    editor = IntegerEditor(model)
    split = next(node for node in model.graph if node.op_type == "Split")
    a, b = split.outputs
    tables = list(model.graph.inputs)[1:] if function == "IntRotateBy" else []
    attributes = {"word": INT32}
    if function == "IntRotate":
        attributes["unsigned"] = UINT32
    places = [node for node in model.graph if node.op_type == "Identity"][:2]
    for node, operands, some in zip(places, ([a, b], [b, a]), arguments, strict=True):
        like = node.outputs[0]
        like.type = ir.TensorType(ir.DataType.UINT8)
        made = editor.call(function, [*operands, *tables], some, like, before=node, **attributes)
        editor.take_over(like, made)
    return model


FEEDS: dict[str, Array] = {
    "x": codes(U8, 2, 5, 8),
    "c": codes(U16, 5, 4, seed=1),
    "n": codes(U16, 5, 4, seed=2),
}


@pytest.mark.parametrize("function", ["IntRotate", "IntRotateBy"])
def test_the_same_codes(function: str) -> None:
    arguments = constant_tables()
    if function == "IntRotateBy":
        arguments = positions(-1), positions(1)
    model = rotated(halves(), function, arguments)
    before = run_model(model, FEEDS)[0]
    assert apply(JoinHalves(), model) == 1
    assert apply(JoinHalves(), model) == 0
    made = {
        "IntRotate": ["IntRotateHalves"],
        "IntRotateBy": ["IntRotaryTables", "IntRotateHalvesBy"],
    }
    assert [node.op_type for node in model.graph] == made[function]
    assert model.graph.outputs[0].name == "y"
    after = run_model(model, FEEDS)[0]
    assert len(np.unique(after)) > 30
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "model",
    [
        rotated(halves(axis=1), "IntRotate", constant_tables()),
        rotated(halves(last="s, f"), "IntRotate", constant_tables()),
        rotated(halves(more="z = Identity(f)"), "IntRotate", constant_tables()),
        rotated(halves(), "IntRotateBy", (positions(1), positions(1))),
        rotated(halves(), "IntRotateBy", (positions(-1, (100, 90)), positions(1, (90, 100)))),
        rotated(
            halves(),
            "IntRotate",
            (constant_tables()[0], constant_tables()[1] | {"high": np.array(900, np.uint32)}),
        ),
        rotated(
            halves(),
            "IntRotate",
            (
                constant_tables()[0],
                {k: a[:1] if a.ndim else a for k, a in constant_tables()[1].items()},
            ),
        ),
    ],
    ids=["axis", "order", "read elsewhere", "signs", "zero points", "clipped otherwise", "shapes"],
)
def test_must_not_fire(model: ir.Model) -> None:
    model.graph.outputs.extend(
        node.outputs[0] for node in model.graph if node.op_type == "Identity"
    )
    before = [node.op_type for node in model.graph]
    assert apply(JoinHalves(), model) == 0
    assert [node.op_type for node in model.graph] == before
