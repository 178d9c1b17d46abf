"""return-new-entries: caches go out without what came in."""

from __future__ import annotations

import pytest

from qnpu.passes.return_new_entries import ReturnNewEntries
from tests.conftest import assert_keeps, assert_rewrites

BEFORE = """
    g (float[1, 2, 5, 4] past_key_0, float[1, 2, 3, 4] x)
        => (float[1, 2, 8, 4] present_key_0, float[1, 2, 8, 4] y)
    {
        k = Neg(x)
        present_key_0 = Concat<axis: int = -2>(past_key_0, k)
        y = Abs(present_key_0)
    }
"""


def test_only_new_entries_go_out() -> None:
    after = """
        g (float[1, 2, 5, 4] past_key_0, float[1, 2, 3, 4] x)
            => (float[1, 2, 3, 4] present_key_0, float[1, 2, 8, 4] y)
        {
            present_key_0 = Neg(x)
            present_key_0_whole = Concat<axis: int = -2>(past_key_0, present_key_0)
            y = Abs(present_key_0_whole)
        }
    """
    assert_rewrites(ReturnNewEntries(), BEFORE, after, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(past_key_0, k)", "(k, past_key_0)"),  # the new ones come first
        ("(past_key_0, k)", "(past_key_0, x)"),  # an input, which keeps its name
        ("(past_key_0, k)", "(past_key_0, k, k)"),
        ("-2", "1"),  # along the heads
        ("present_key_0", "present_value_0"),  # another cache's name
        ("past_key_0", "cache"),  # no cache
    ],
)
def test_other_outputs_stay(old: str, new: str) -> None:
    text = BEFORE.replace("[1, 2, 5, 4]", "[1, 2, 3, 4]").replace("[1, 2, 8, 4]", "[1, N, M, 4]")
    assert_keeps(ReturnNewEntries(), text.replace(old, new))
