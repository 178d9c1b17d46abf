"""TOML as users write it: whatever is wrong with it is one kind of fault."""

from __future__ import annotations

import tomllib
from importlib.resources.abc import Traversable
from typing import Any

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InvalidConfig, MissingFile


def parse_toml(text: str) -> dict[str, Any]:
    """Keys and values of a TOML document.

    Raises:
        ValueError: it is none, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_toml(path: Traversable) -> dict[str, Any]:
    """Keys and values of a TOML file.

    Raises:
        DiagnosticError: QN102 no such file, QN503 it is not TOML.
    """
    try:
        return parse_toml(path.read_text("utf-8"))
    except OSError as error:
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error
    except ValueError as error:  # bytes that are no text, too
        raise DiagnosticError(InvalidConfig("TOML", str(error)).at(file=str(path))) from error
