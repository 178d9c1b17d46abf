"""bit_budget: limits and workloads as users write them."""

from __future__ import annotations

import pytest

from qnpu.compiler.bit_budget import parse_budget, parse_workload
from qnpu.compiler.cost_model import Workload
from qnpu.compiler.diagnostics import DiagnosticError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latency=80ms", {"latency": 0.08}),
        ("latency=0.25", {"latency": 0.25}),
        ("latency=.5s", {"latency": 0.5}),
        ("latency=1e-2s", {"latency": 0.01}),
        ("latency=900 us", {"latency": 900e-6}),
        ("size=90MB", {"size": 90e6}),
        ("size=86 MiB", {"size": 86 * 2**20}),
        ("size=1234567", {"size": 1234567.0}),
        ("ppl=1.05", {"ppl": 1.05}),
        ("latency=80ms, size=1.5GB", {"latency": 0.08, "size": 1.5e9}),
    ],
)
def test_limits(text: str, expected: dict[str, float]) -> None:
    assert parse_budget(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latency",
        "latency=",
        "latency=fast",
        "latency=-1s",
        "latency=0",
        "latency=1e999",
        "latency=80ms,latency=90ms",
        "size=",
        "size=0",
        "size=-3MB",
        "size=90 parsecs",
        "size=1e400",
        "ppl=1",
        "ppl=0.9",
        "ppl=nan",
        "ppl=inf",
        "ppl=good",
        "speed=3",
    ],
)
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        parse_budget(text)
    assert caught.value.codes == ["QN503"]
    assert "`budget`" in str(caught.value)


def test_workloads() -> None:
    assert parse_workload("536/46") == Workload(536, 46)
    assert parse_workload("64/0") == Workload(64, 0)


@pytest.mark.parametrize(
    "text", ["", "64", "64/", "/3", "64/3/2", "-1/3", "0/3", "1e3/2", "9" * 30]
)
def test_what_is_no_workload(text: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        parse_workload(text)
    assert caught.value.codes == ["QN503"]
