"""Passes of a user's own, by name: ``my_passes:Trim[share=0.1]``."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, first_line
from qnpu.compiler.pass_base import Pass, Stage
from qnpu.compiler.rules import InvalidPass
from qnpu.compiler.toml_file import parse_toml

GROUP = "qnpu.passes"
"""Entry points of installed packages whose names stand for passes."""

_SPEC = re.compile(r"(?P<name>[\w.:-]+)(?:\[(?P<options>.*)\])?", re.DOTALL)


def load_passes(specs: Sequence[str]) -> dict[Stage, list[Pass]]:
    """Passes by the stage that they work on, in the order given.

    Raises:
        DiagnosticError: QN542 for each that cannot be used.
    """
    by_stage: dict[Stage, list[Pass]] = {stage: [] for stage in Stage}
    faults: list[Diagnostic] = []
    for spec in specs:
        try:
            item = load_pass(spec)
        except DiagnosticError as error:
            faults += error.diagnostics
        else:
            by_stage[item.consumes].append(item)
    if faults:
        raise DiagnosticError(faults)
    return by_stage


def load_pass(spec: str) -> Pass:
    """A pass by ``MODULE:CLASS`` or the name of an entry point, with options as in TOML.

    The working directory is looked into as well. A pass has one stage: it consumes what it
    produces, and it is not the integer one.

    Raises:
        DiagnosticError: QN542 it cannot be found, made, or put anywhere.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise _fault(spec, "it is not MODULE:CLASS[key=value, …]")
    kind = _find(spec, match["name"])
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise _fault(spec, "it is no subclass of qnpu.compiler.pass_base.Pass")
    try:
        options: dict[str, Any] = parse_toml(f"x = {{{match['options'] or ''}}}")["x"]
    except ValueError as error:
        raise _fault(spec, f"options are not as in TOML: {error}") from error
    try:
        item = kind(**options)
    except Exception as error:  # whatever a stranger's class raises
        raise _fault(spec, first_line(error)) from error
    stages = getattr(item, "consumes", None), getattr(item, "produces", None)
    if not isinstance(stages[0], Stage) or stages[0] is not stages[1]:
        raise _fault(spec, "`consumes` and `produces` are not one stage")
    if item.consumes is Stage.INTEGER:
        raise _fault(spec, "integer graphs are made after all passes")
    return item


def _find(spec: str, name: str) -> object:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = importlib.metadata.entry_points(group=GROUP)
        if name not in known.names:
            names = ", ".join(sorted(known.names)) or "none"
            raise _fault(
                spec, f"no installed package has an entry point of this name; known: {names}"
            )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        if not colon:
            return known[name].load()
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a stranger's module raises
        raise _fault(spec, f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(here)


def _fault(spec: str, reason: str) -> DiagnosticError:
    return DiagnosticError(InvalidPass(spec, reason).at())
