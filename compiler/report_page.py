"""report.html: what report.json holds, as one page that needs no network and no script."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qnpu.compiler.bit_budget import LATENCY, PERPLEXITY, SIZE, parse_budget
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.report_parts import (
    LABEL_LENGTH,
    NAME_LENGTH,
    STATES,
    Report,
    Section,
    Table,
    as_read,
    duration,
    number,
    part,
    short,
    size,
)
from qnpu.compiler.report_sections import SECTIONS
from qnpu.compiler.rules import TooFarFromFloat, manual_page

_PLACES = 20
_GRAPH_SUFFIXES = (".onnx", ".data", ".bin")
_LARGEST_FILES = 3
_GRAPHS = {"float": "float", "qdq": "quantized", "integer": "on integers"}
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A key figure: ``label``, ``value``, and a ``note`` that says how it came to be."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Check:
    """Something looked at: ``state`` is a key of ``STATES``."""

    name: str
    found: str
    state: str


@dataclass(frozen=True, slots=True)
class Finding:
    """All diagnostics of one code.

    Attributes:
        code, name, severity: of the rule.
        places: message, place, and help of each, the first few.
        more: how many others there are.
        manual: heading and blocks of each part of the rule's manual page; empty for an unknown
            code. A block is whether it is code, and its pieces: whether each is code, and its text.
    """

    code: str
    name: str
    severity: str
    places: Sequence[tuple[str, str, str]]
    more: int
    manual: Sequence[tuple[str, Sequence[Block]]]


Block = tuple[bool, Sequence[tuple[bool, str]]]


def write_page(report: Mapping[str, object], path: Path) -> None:
    """Writes the page.

    Args:
        report: as ``make_report`` gives it or as report.json holds it. What is not in it has no
            place in the page, which then says that it was not measured.
        path: of the HTML file. The same report gives the same bytes.
    """
    path.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, object]) -> str:
    """The text of the page; see ``write_page``."""
    facts = as_read(report)
    environment = Environment(
        loader=PackageLoader("qnpu.compiler", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    sections = [section for make in SECTIONS if (section := make(facts)) is not None]
    checks = list(_checks(facts))
    return environment.get_template("report.html.j2").render(
        name=short(part(facts, "input").get("name") or "a model"),
        subtitle=_subtitle(facts),
        figures=list(_figures(facts)),
        verdict=_verdict(checks),
        checks=checks,
        states=STATES,
        unmeasured=list(_unmeasured(facts)),
        sections=sections,
        findings=_findings(facts),
        provenance=_provenance(facts),
    )


# --------------------------------------------------------------------------------------- headline


def _subtitle(facts: Report) -> str:
    config = part(facts, "config")
    parts = [
        f"{label} {short(config[key])}"
        for key, label in (("scheme", "scheme"), ("target", "for"), ("budget", "within"))
        if config.get(key)
    ]
    return ", ".join(parts)


def _figures(facts: Report) -> Iterator[KeyFigure]:
    base = _perplexity(facts, "float")
    for key, label in _GRAPHS.items():
        value = _perplexity(facts, key)
        if key in part(facts, "perplexity"):
            note = "measured"
            if key != "float" and value is not None and base:
                note = f"{_ratio(value / base)} times float; measured"
            yield KeyFigure(f"Perplexity, {label}", number(value), note)
    cost = part(facts, "cost")
    if cost:
        parts = (
            f"prefill {duration(cost['prefill_s'])}, decode {duration(cost['decode_s'])},"
            f" {cost['workload']} tokens on {short(cost['target'])}"
        )
        yield KeyFigure("Latency", duration(cost["seconds"]), f"{parts}; modelled")
        yield KeyFigure("Weights and caches", size(cost["bytes"]), "on the target; modelled")
    files = {
        name: int(entry["bytes"])
        for name, entry in part(facts, "outputs").items()
        if name.endswith(_GRAPH_SUFFIXES)
    }
    for name in sorted(files, key=lambda name: -files[name])[:_LARGEST_FILES]:
        yield KeyFigure("File size", size(files[name]), short(name))


def _perplexity(facts: Report, graph: str) -> float | None:
    value = part(part(facts, "perplexity"), graph).get("value")
    return None if value is None else float(value)


def _ratio(value: float) -> str:
    """Of two perplexities, which are compared in the fourth decimal."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _checks(facts: Report) -> Iterator[Check]:
    if "source_error" in facts:
        error = number(facts["source_error"], 2)
        yield Check("Float graph against the source", f"{error} of max |output|", "info")
    base, quantized = _perplexity(facts, "float"), _perplexity(facts, "qdq")
    if base and quantized is not None:
        found, limit = f"{_ratio(quantized / base)} times the float one", _limit(facts)
        if limit is not None:
            found += f", {limit:g} at most"
        state = "info" if limit is None else "fail" if _too_far(facts) else "pass"
        yield Check("Perplexity of the quantized graph", found, state)
    else:
        yield Check("Perplexity of the quantized graph", "no text, or no language model", "none")
    yield from _budget_checks(facts)
    yield _parity_check(facts)
    after = part(part(facts, "verdicts"), "after")
    if after:
        found = ", ".join(f"{count} {short(name)}" for name, count in after.items())
        state = "fail" if after.get("reject") else "warn" if set(after) - {"int"} else "pass"
        yield Check("Nodes as the target takes them", found, state)
    yield _diagnostics_check(facts)


def _limit(facts: Report) -> float | None:
    limit = part(facts, "config").get("max_ratio")
    return None if limit is None else float(limit)


def _too_far(facts: Report) -> bool:
    return any(item["code"] == TooFarFromFloat.code for item in facts.get("diagnostics") or [])


def _budget_checks(facts: Report) -> Iterator[Check]:
    search = part(facts, "search")
    if not search:
        return
    try:
        limits = parse_budget(search["budget"])
    except DiagnosticError:
        return
    chosen, base = search["chosen"], search["float_perplexity"]
    ratio = chosen["perplexity"] / base if chosen["perplexity"] is not None and base else None
    found: dict[str, tuple[float | None, Callable[[Any], str], str]] = {
        LATENCY: (chosen["seconds"], duration, "modelled"),
        SIZE: (chosen["bytes"], size, "modelled"),
        PERPLEXITY: (ratio, _ratio, "times float, in the search"),
    }
    for name, limit in limits.items():
        value, shown, how = found[name]
        kept = value is not None and value <= limit * (1 + _ROUNDING)
        text = f"{shown(value)} of {shown(limit)}; {how}"
        yield Check(f"Budget: {name}", text, "pass" if kept else "fail")


def _parity_check(facts: Report) -> Check:
    name = "Integer graph against the quantized one"
    kinds = facts.get("parity") or []
    if not kinds:
        return Check(name, "no integer graph was made", "none")
    failed = [short(kind["kind"]) for kind in kinds if not kind["passed"]]
    if failed:
        return Check(name, f"beyond the limit: {', '.join(failed)}", "fail")
    worst = max(kind["max_lsb"] for kind in kinds)
    return Check(name, f"all codes within their limits, {worst} LSB off at most", "pass")


def _diagnostics_check(facts: Report) -> Check:
    counts = Counter(item["severity"] for item in facts.get("diagnostics") or [])
    found = ", ".join(
        f"{counts[severity]} {severity}{'s'[: counts[severity] != 1]}"
        for severity in ("error", "warning", "note")
        if counts[severity]
    )
    state = "fail" if counts["error"] else "warn" if counts["warning"] else "pass"
    return Check("Diagnostics", found or "none", state)


def _verdict(checks: Sequence[Check]) -> tuple[str, str]:
    """State and sentence."""
    failed = [check.name for check in checks if check.state == "fail"]
    warned = [check.name for check in checks if check.state == "warn"]
    if failed:
        return "fail", f"Failed: {'; '.join(failed)}."
    if warned:
        return "warn", f"No check failed. Look at: {'; '.join(warned)}."
    return "pass", "No check failed."


def _unmeasured(facts: Report) -> Iterator[str]:
    if not facts.get("perplexity"):
        yield "Perplexity: no text was given, or the graph is no language model."
    if not facts.get("cost"):
        yield "Latency: the target's profile has no figures, or the graph is no known decoder."
    if facts.get("cost"):
        yield "Latency on a device: the figure here comes from a model of the target."
    if not facts.get("parity"):
        yield "The integer graph: none was made (--integer)."
    if not facts.get("tensors"):
        yield "The error of single tensors."
    if not facts.get("histograms"):
        yield "Histograms before and after rotation."
    if not facts.get("search"):
        yield "Sensitivity to bits: they went by scheme, without a search (--scheme auto)."
    if not facts.get("learning"):
        yield "Learning: nothing was learned (--learn)."


# ---------------------------------------------------------------------- diagnostics and provenance


def _findings(facts: Report) -> list[Finding]:
    by_code: dict[str, list[Report]] = {}
    for item in facts.get("diagnostics") or []:
        by_code.setdefault(item["code"], []).append(item)
    order = {"error": 0, "warning": 1, "note": 2}
    codes = sorted(by_code, key=lambda code: (order.get(by_code[code][0]["severity"], 3), code))
    return [_finding(code, by_code[code]) for code in codes]


def _finding(code: str, items: Sequence[Report]) -> Finding:
    places = [
        (short(item["message"], 4 * NAME_LENGTH), _place(item), short(item["help"], 480))
        for item in items[:_PLACES]
    ]
    return Finding(
        code=short(code, LABEL_LENGTH),
        name=short(items[0]["name"]),
        severity=short(items[0]["severity"]),
        places=places,
        more=len(items) - len(places),
        manual=_manual(code),
    )


def _place(item: Report) -> str:
    location = part(item, "location")
    node = location.get("node")
    parts = [location.get("file"), f"node {node}" if node else "", location.get("value")]
    return ": ".join(short(part) for part in parts if part)


def _manual(code: str) -> list[tuple[str, list[Block]]]:
    """A rule's manual page by its parts: heading, then paragraphs and code."""
    text = manual_page(code)
    if text is None:
        return []
    parts: list[tuple[str, list[Block]]] = []
    for piece in re.split(r"\n\n(?=\S)", text)[1:]:
        heading, _, body = piece.partition("\n")
        lines = "\n".join(line.removeprefix("    ") for line in body.split("\n"))
        parts.append((heading, list(_blocks(lines))))
    return parts


def _blocks(text: str) -> Iterator[Block]:
    """Fenced code, and paragraphs."""
    for index, piece in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if index % 2:
            yield True, [(True, piece.strip("\n"))]
            continue
        for paragraph in re.split(r"\n\s*\n", piece):
            if paragraph.strip():
                words = paragraph.strip().split("``")
                yield False, [(bool(i % 2), word) for i, word in enumerate(words) if word]


def _provenance(facts: Report) -> Section:
    source, config = part(facts, "input"), part(facts, "config")
    told = [
        ("command", " ".join(map(str, facts.get("command") or []))),
        ("input", source.get("name")),
        ("SHA-256 of the input", source.get("sha256")),
        ("calibrated on", facts.get("calibration")),
        ("evaluated on", facts.get("evaluation")),
        ("compared on", facts.get("compared")),
        ("seed", facts.get("seed")),
        ("prefix", json.dumps(facts["prefix"]) if facts.get("prefix") else None),
        ("CPU", " ".join(map(str, facts.get("cpu_flags") or []))),
        *((f"version of {name}", value) for name, value in part(facts, "versions").items()),
    ]
    rows = [
        (short(name), short(value, 8 * NAME_LENGTH))
        for name, value in told
        if value not in (None, "")
    ]
    files = [
        (short(name), short(entry["sha256"]), size(entry["bytes"]))
        for name, entry in part(facts, "outputs").items()
    ]
    tables = [Table("Where this came from", ("what", "value"), rows, words=2)]
    if files:
        tables.append(Table("Files", ("file", "SHA-256", "size"), files, words=2))
    folded = [
        Table(
            "Configuration",
            ("option", "value"),
            [(short(name), short(json.dumps(value))) for name, value in config.items()],
            words=2,
        )
    ]
    rewrites = part(facts, "rewrites")
    if rewrites:
        counts = [(short(name), str(count)) for name, count in rewrites.items()]
        folded.append(Table("Passes and what they changed", ("pass", "places"), counts))
    legalized = Counter(
        (short(item["operator"]), short(item["rewrite"])) for item in facts.get("legalized") or []
    )
    if legalized:
        lines = [(*key, str(count)) for key, count in sorted(legalized.items())]
        columns = ("operator", "rewrite", "nodes")
        folded.append(Table("Rewritten for the target", columns, lines, words=2))
    return Section("provenance", "Provenance", [], [], tables, folded)
