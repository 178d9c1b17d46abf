"""Which diagnostics are asked for."""

from __future__ import annotations

import pytest

from qnpu.compiler.diagnostics import selected
from qnpu.compiler.rules import DynamicDimension, MissingEncoding, UnknownOperator

FOUND = [DynamicDimension("N", "x").at(), UnknownOperator("Foo").at(), MissingEncoding("t").at()]


@pytest.mark.parametrize(
    ("select", "ignore", "codes"),
    [
        ([], [], ["QN101", "QN106", "QN303"]),
        (["QN1"], [], ["QN101", "QN106"]),
        (["QN3", "QN101"], [], ["QN101", "QN303"]),
        (["QN2"], [], []),
        ([], ["QN106"], ["QN101", "QN303"]),
        ([], ["QN"], []),
        (["QN1"], ["QN106"], ["QN101"]),
        (["QN106"], ["QN1"], ["QN106"]),  # the longer beginning decides
        (["QN106"], ["QN106"], []),
        (["QN1", "QN106"], ["QN10"], ["QN106"]),
    ],
)
def test_selection(select: list[str], ignore: list[str], codes: list[str]) -> None:
    assert [item.code for item in selected(FOUND, select, ignore)] == codes
