"""freeze-shapes: sizes from names, axes and convention; inputs that a fixed shape decides."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.printer import model_to_text
from qnpu.passes.freeze_shapes import FreezeShapes
from tests.conftest import apply, assert_keeps, assert_rewrites, parse, run_model

DECODER = """
    g (int64[batch_size, seq] input_ids, int64[batch_size, total] attention_mask,
       int64[batch_size, seq] position_ids, int64[batch_size, seq] token_type_ids,
       float[batch_size, 1, past, 2] past_key_0)
      => (float[batch_size, 1, total, 2] present)
    <float[8, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
     int64[1] one = {1}>
    {
        places = Add(input_ids, position_ids)
        marked = Add(places, token_type_ids)
        rows = Gather(table, marked)
        key = Unsqueeze(rows, one)
        all = Concat<axis: int = 2>(past_key_0, key)
        mask = Cast<to: int = 1>(attention_mask)
        scale = ReduceSum<keepdims: int = 0>(mask)
        present = Mul(all, scale)
    }
"""


def test_decoder_inputs_are_bound() -> None:
    model = assert_rewrites(
        FreezeShapes(sequence_length=3),
        DECODER,
        """
        g (int64[1, 3] input_ids) => (float[batch_size, 1, total, 2] present)
        <float[8, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
         int64[1] one = {1},
         int64[1, 3] attention_mask = {1, 1, 1},
         int64[1, 3] position_ids = {0, 1, 2},
         int64[1, 3] token_type_ids = {0, 0, 0},
         float[1, 1, 0, 2] past_key_0 = {}>
        {
            places = Add(input_ids, position_ids)
            marked = Add(places, token_type_ids)
            rows = Gather(table, marked)
            key = Unsqueeze(rows, one)
            all = Concat<axis: int = 2>(past_key_0, key)
            mask = Cast<to: int = 1>(attention_mask)
            scale = ReduceSum<keepdims: int = 0>(mask)
            present = Mul(all, scale)
        }
        """.replace("[batch_size, 1, total, 2]", "[1, 1, 3, 2]"),
        count=14,  # ten dimensions, four inputs
    )
    assert all(isinstance(d, int) for node in model.graph for d in node.outputs[0].shape or ())


def test_numbers_stay() -> None:
    ids = np.array([[3, 1, 2]])
    row = np.ones((1, 3), np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": row,
        "position_ids": np.array([[0, 1, 2]]),
        "token_type_ids": row * 0,
        "past_key_0": np.zeros((1, 1, 0, 2), np.float32),
    }
    expected = run_model(parse(DECODER), feeds)[0]
    frozen = parse(DECODER)
    apply(FreezeShapes(sequence_length=3), frozen)
    np.testing.assert_array_equal(run_model(frozen, {"input_ids": ids})[0], expected)


def test_a_filled_cache_stays_an_input_and_shifts_positions() -> None:
    model = parse(DECODER)
    compilation = Compilation(model)
    FreezeShapes(sequence_length=1, past_length=4).run(compilation)
    assert [v.name for v in model.graph.inputs] == ["input_ids", "past_key_0"]
    text = model_to_text(model)
    assert "float[1, 1, 4, 2] past_key_0" in text
    assert "position_ids = {4}" in text
    assert "attention_mask = {1, 1, 1, 1, 1}" in text


def test_each_bound_input_is_noted() -> None:
    compilation = Compilation(parse(DECODER))
    FreezeShapes(sequence_length=3).run(compilation)
    noted = [(d.code, d.location.value) for d in compilation.diagnostics]
    assert noted == [
        ("QN110", "attention_mask"),
        ("QN110", "position_ids"),
        ("QN110", "token_type_ids"),
        ("QN110", "past_key_0"),
    ]


def test_kept_inputs_stay_inputs() -> None:
    model = parse(DECODER)
    keep = ("attention_mask", "position_ids")
    FreezeShapes(sequence_length=3, keep_inputs=keep).run(Compilation(model))
    assert [v.name for v in model.graph.inputs] == ["input_ids", *keep]
    assert all(list(v.shape or ()) == [1, 3] for v in model.graph.inputs)


@pytest.mark.parametrize("dims", [{"N": 5}, {"x:0": 5}, {"x:0": 5, "N": 7}])
def test_a_named_axis_wins_over_a_named_dimension(dims: dict[str, int]) -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    assert apply(FreezeShapes(dims), model) == 1
    assert list(model.graph.outputs[0].shape or ()) == [5, 4]


def test_what_the_user_names_wins_over_convention() -> None:
    model = parse(
        "g (int64[batch, S] input_ids) => (int64[batch, S] y) { y = Identity(input_ids) }"
    )
    apply(FreezeShapes({"batch": 2, "S": 9}, sequence_length=3), model)
    assert list(model.graph.inputs[0].shape or ()) == [2, 9]


def test_every_dimension_left_is_reported() -> None:
    model = parse("g (float[N, M] x, float[K] z) => (float[N, M] y) { y = Add(x, z) }")
    with pytest.raises(DiagnosticError) as caught:
        apply(FreezeShapes({"M": 2}), model)
    assert caught.value.codes == ["QN101", "QN101"]
    assert [d.location.value for d in caught.value.diagnostics] == ["x", "z"]


@pytest.mark.parametrize(
    "options",
    [
        FreezeShapes({"M": 2}),
        FreezeShapes({"x:2": 2}),
        FreezeShapes({"z:0": 2}),
        FreezeShapes({"N": 1}, keep_inputs=("z",)),
    ],
)
def test_a_name_that_nothing_has_is_an_error(options: FreezeShapes) -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    with pytest.raises(DiagnosticError) as caught:
        apply(options, model)
    assert caught.value.codes == ["QN503"]


@pytest.mark.parametrize("dims", [{"past": 4}, {"past_key_0:2": 4}])
def test_mask_and_positions_follow_the_past(dims: dict[str, int]) -> None:
    """Its length alone is given: the mask covers it, and positions start behind it."""
    model = parse(
        """
        g (int64[batch, seq] position_ids, int64[batch, all] attention_mask,
           float[batch, 1, past, 2] past_key_0)
            => (int64[batch, seq] p, int64[batch, all] m, float[batch, 1, past, 2] k)
        { p = Abs(position_ids)  m = Abs(attention_mask)  k = Abs(past_key_0) }
        """
    )
    assert apply(FreezeShapes(dims, sequence_length=3), model) > 0
    assert [(v.name, static_shape(v)) for v in model.graph.inputs] == [("past_key_0", (1, 1, 4, 2))]
    positions = constant_array(model.graph.initializers["position_ids"])
    assert positions is not None and positions.tolist() == [[4, 5, 6]]
    assert static_shape(model.graph.initializers["attention_mask"]) == (1, 7)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }",
        "g (float x) => (float y) { y = Relu(x) }",
        # a mask of three dimensions may hold anything
        "g (float[1, 1, 2] attention_mask) => (float[1, 1, 2] y) { y = Relu(attention_mask) }",
    ],
)
def test_keeps_static_inputs(text: str) -> None:
    assert_keeps(FreezeShapes(), text)
