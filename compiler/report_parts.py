"""What a report page is made of, and how it reads a report and writes numbers and names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, TensorBits

NAME_LENGTH = 120
LABEL_LENGTH = 32
STATES = {
    "pass": "✓ passed",
    "fail": "✗ failed",
    "warn": "! look at",
    "info": "measured",
    "none": "not measured",
}
"""Results of a check: class in the page → what it says."""

_LEAST_PLAIN, _MOST_PLAIN = 1e3, 1e9

# What no XML has and no reader sees: controls, halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells; the first of each heads its row.
        words: columns from the left that hold words, set left; others hold numbers, set right.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart and what it was drawn from.

    Attributes:
        svg: the element.
        caption: what to see in it.
        table: its data.
        wide: it keeps its size, and scrolls where the screen is narrower.
    """

    svg: Markup
    caption: str
    table: Table
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under one heading.

    Attributes:
        key: its identifier.
        title: the heading.
        text: paragraphs.
        charts: beside each other where there is room.
        tables: shown.
        folded: shown on demand.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()


def as_read(report: Mapping[str, object]) -> Report:
    """A report as report.json would give it back: keys are text, what is not finite is None."""
    text = json.dumps(report, default=dict)
    facts: Report = json.loads(text, parse_constant=lambda _: None)
    return facts


def tensor_bits(facts: Report) -> list[TensorBits]:
    found = part(facts, "search").get("tensors") or facts.get("bits") or []
    return [
        TensorBits(
            name=item["name"],
            layer=item["layer"],
            role=short(item["role"], LABEL_LENGTH),
            bits=item["bits"],
            losses={bits: known(loss) for bits, loss in item["losses"].items()},
            block=item.get("block", 0),
        )
        for item in found
    ]


def bit_search(facts: Report) -> BitSearch | None:
    search = part(facts, "search")
    if not search or not search["float_perplexity"]:
        return None
    return BitSearch(
        target=short(search["target"], LABEL_LENGTH),
        workload=short(search["workload"], LABEL_LENGTH),
        budget=short(search["budget"]),
        sensitivity=short(search["sensitivity"], LABEL_LENGTH),
        float_perplexity=search["float_perplexity"],
        gap=known(search["gap"]),
        tensors=tuple(tensor_bits(facts)),
        chosen=_plan(search["chosen"]),
        trials=tuple(map(_plan, search["trials"])),
        front=tuple(map(_plan, search["front"])),
        others=tuple(map(_plan, search["others"])),
    )


def _plan(item: Report) -> MeasuredPlan:
    return MeasuredPlan(
        label=short(item["label"], LABEL_LENGTH),
        seconds=item["seconds"],
        bytes=item["bytes"],
        expected=known(item["expected"]),
        measured=known(item["measured"]),
        perplexity=known(item["perplexity"]),
    )


def part(facts: Report, key: str) -> Report:
    """A part of a report; empty where there is none."""
    found = facts.get(key)
    return found if isinstance(found, dict) else {}


def known(value: float | None) -> float:
    return math.nan if value is None else value


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def short(text: object, length: int = NAME_LENGTH) -> str:
    """Text to show: no controls, and no more than so many characters."""
    clean = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))
    if len(clean) <= length:
        return clean
    head = length * 2 // 3
    return f"{clean[:head]}…{clean[head + 1 - length :]}"


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many digits; of what is no finite number, words."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    rounded = float(f"{value:.{digits}g}")
    plain = _LEAST_PLAIN <= abs(rounded) < _MOST_PLAIN
    return f"{rounded:,.0f}" if plain else f"{rounded:.{digits}g}"


def duration(seconds: float) -> str:
    """A time in the unit that it is at least one of."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    unit, factor = next((item for item in units if seconds * item[1] >= 1), units[-1])
    return f"{seconds * factor:.4g} {unit}"


def size(count: float) -> str:
    """Bytes in the decimal unit that they are at least one of."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    unit, factor = next((item for item in units if count >= item[1]), units[-1])
    return f"{count / factor:.4g} {unit}"
