"""Feeds from token windows and from arrays, and every way they can fail to fit."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.runtime_check.feeds import ArraySamples, FeedSource, FirstRuns, LastRuns, TokenWindows
from tests.conftest import Array, normal, parse

DECODER = """
    g (int64[1, 3] input_ids, int64[1, 3] attention_mask, int64[1, 3] position_ids,
       int32[1, 3] token_type_ids) => (int64[1, 3] y) { y = Identity(input_ids) }
"""
WINDOWS = TokenWindows(np.array([[5, 6, 7], [8, 9, 10]]))


def faults(source: FeedSource, text: str) -> list[tuple[str, str]]:
    with pytest.raises(DiagnosticError) as caught:
        source.feeds(parse(text).graph.inputs)
    return [(d.code, d.location.value) for d in caught.value.diagnostics]


def test_a_run_per_window() -> None:
    feeds = WINDOWS.feeds(parse(DECODER).graph.inputs)
    assert [{name: array.tolist() for name, array in run.items()} for run in feeds] == [
        {
            "input_ids": [ids],
            "attention_mask": [[1, 1, 1]],
            "position_ids": [[0, 1, 2]],
            "token_type_ids": [[0, 0, 0]],
        }
        for ids in ([5, 6, 7], [8, 9, 10])
    ]
    assert feeds[0]["input_ids"].dtype == np.int64
    assert feeds[0]["token_type_ids"].dtype == np.int32


def test_the_first_and_the_last_runs() -> None:
    windows = TokenWindows(np.arange(15).reshape(5, 3))
    inputs = parse(DECODER).graph.inputs
    whole = [run["input_ids"].tolist() for run in windows.feeds(inputs)]
    for count in (1, 2, 9):
        first, last = FirstRuns(windows, count), LastRuns(windows, count)
        assert [run["input_ids"].tolist() for run in first.feeds(inputs)] == whole[:count]
        assert [run["input_ids"].tolist() for run in last.feeds(inputs)] == whole[-count:]


def test_windows_of_another_length() -> None:
    text = "g (int64[1, 4] input_ids) => (int64[1, 4] y) { y = Identity(input_ids) }"
    assert faults(WINDOWS, text) == [("QN301", "input_ids")]
    batch = text.replace("[1, 4]", "[2, 3]")
    assert faults(WINDOWS, batch) == [("QN301", "input_ids")]


def test_text_cannot_feed_an_image() -> None:
    text = """
        g (int64[1, 3] input_ids, float[1, 3] pixels, float[1] scale) => (float[1, 3] y)
        { y = Mul(pixels, scale) }
    """
    assert faults(WINDOWS, text) == [("QN305", "pixels"), ("QN305", "scale")]


IMAGES = (
    "g (float[2, 3] x, int32[1] n) => (float[2, 3] y) { c = Cast<to: int = 1>(n) y = Mul(x, c) }"
)


def test_arrays_are_cut_into_runs() -> None:
    x = np.arange(12, dtype=np.float64).reshape(4, 3)
    feeds = ArraySamples({"x": x, "n": np.array([7, 8])}).feeds(parse(IMAGES).graph.inputs)
    assert [run["x"].tolist() for run in feeds] == [x[:2].tolist(), x[2:].tolist()]
    assert [run["n"].tolist() for run in feeds] == [[7], [8]]
    assert feeds[0]["x"].dtype == np.float32
    assert feeds[0]["n"].dtype == np.int32
    assert all(array.flags.c_contiguous for run in feeds for array in run.values())


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x": normal(4, 3)}, ["n"]),  # one is missing
        ({"x": normal(4, 3), "n": np.ones(2, int), "z": normal(1)}, ["z"]),  # one too many
        ({"x": normal(4, 2), "n": np.ones(2, int)}, ["x"]),  # another width
        ({"x": normal(4, 3, 1), "n": np.ones(2, int)}, ["x"]),  # another rank
        ({"x": normal(3, 3), "n": np.ones(1, int)}, ["x"]),  # runs of two do not fit three
        ({"x": normal(0, 3), "n": np.ones(0, int)}, ["x", "n"]),  # nothing
        ({"x": np.ones((4, 3), int), "n": np.ones(2, int)}, ["x"]),  # integers for floats
        ({"x": normal(4, 3), "n": normal(2)}, ["n"]),  # floats for integers
        ({"x": np.full((4, 3), "a"), "n": np.ones(2, int)}, ["x"]),  # text
        ({"x": np.ones((4, 3), complex), "n": np.ones(2, int)}, ["x"]),
        ({"x": normal(4, 3), "n": np.ones(3, int)}, [""]),  # two runs against three
        ({}, ["x", "n"]),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Array], expected: list[str]) -> None:
    found = faults(ArraySamples(arrays), IMAGES)
    assert found == [("QN301", name) for name in expected]


def test_a_scalar_input_has_no_sample_axis() -> None:
    text = "g (float x) => (float y) { y = Neg(x) }"
    assert faults(ArraySamples({"x": normal(3)}), text) == [("QN301", "x")]


CACHED = """
    g (int64[1, 3] input_ids, int64[1, 5] attention_mask, int64[1, 3] position_ids,
       float[1, 1, 2, 4] past_key_0) => (int64[1, 3] y) { y = Identity(input_ids) }
"""


def test_nothing_comes_before_a_window() -> None:
    """A cache is zeros, which the mask leaves out; positions count from zero all the same."""
    first, second = WINDOWS.feeds(parse(CACHED).graph.inputs)
    assert first["attention_mask"].tolist() == [[0, 0, 1, 1, 1]]
    assert first["position_ids"].tolist() == [[0, 1, 2]]
    past = first["past_key_0"]
    assert past.shape == (1, 1, 2, 4)
    assert past.dtype == np.float32
    assert not past.any()
    assert second["past_key_0"] is past


def test_a_cache_that_no_mask_leaves_out() -> None:
    text = CACHED.replace("int64[1, 5] attention_mask, ", "")
    assert faults(WINDOWS, text) == [("QN305", "past_key_0")]
    short = CACHED.replace("[1, 5]", "[1, 3]")
    assert faults(WINDOWS, short) == [("QN301", "attention_mask")]
