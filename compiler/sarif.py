"""Diagnostics as a SARIF 2.1.0 log, which code hosts and editors show beside the file.

Source: OASIS, Static Analysis Results Interchange Format 2.1.0, errata 01.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from qnpu.compiler.diagnostics import Diagnostic, Rule
from qnpu.compiler.rules import all_rules

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)

Json = dict[str, object]


def sarif_log(diagnostics: Sequence[Diagnostic], file: str) -> Json:
    """One run of qnpu-check, as a plain dictionary for JSON.

    Args:
        diagnostics: all of them, in order.
        file: the model, for those that name no file; relative to the working directory or absolute.
    """
    rules = all_rules()
    position = {rule.code: index for index, rule in enumerate(rules)}
    driver: Json = {
        "name": "qnpu",
        "version": importlib.metadata.version("qnpu"),
        "rules": [_rule(rule) for rule in rules],
    }
    run: Json = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(item, file, position[item.code]) for item in diagnostics],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(rule: type[Rule]) -> Json:
    sections = _sections(rule)
    what, why, *_ = sections.values()
    text = "\n\n".join(f"{title}\n{body}" for title, body in sections.items())
    markdown = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": _one_line(what)},
        "fullDescription": {"text": _one_line(why)},
        "help": {"text": text, "markdown": markdown},
        "defaultConfiguration": {"level": rule.severity.value},
    }


def _sections(rule: type[Rule]) -> dict[str, str]:
    """Heading → text of a rule's manual page."""
    sections: dict[str, list[str]] = {}
    for line in inspect.cleandoc(rule.__doc__ or "").splitlines():
        if line and not line.startswith(" "):
            sections[line] = []
        else:
            list(sections.values())[-1].append(line)
    return {
        title: textwrap.dedent("\n".join(lines)).strip("\n") for title, lines in sections.items()
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _result(diagnostic: Diagnostic, file: str, index: int) -> Json:
    return {
        "ruleId": diagnostic.code,
        "ruleIndex": index,
        "level": diagnostic.severity.value,
        "message": {"text": f"{diagnostic.rule.message()}. To fix: {diagnostic.rule.help()}."},
        "locations": [_location(diagnostic, file)],
    }


def _location(diagnostic: Diagnostic, file: str) -> Json:
    place = diagnostic.location
    logical = [
        {"name": name, "kind": kind}
        for kind, name in (("node", place.node), ("tensor", place.value))
        if name
    ]
    location: Json = {
        "physicalLocation": {"artifactLocation": {"uri": _uri(place.file or file)}},
    }
    if logical:
        location["logicalLocations"] = logical
    return location


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
