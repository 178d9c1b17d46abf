"""Coded diagnostics: what is wrong, where, and how to put it right.

A *rule* (see ``qnpu.compiler.rules``) states a kind of fault once; a ``Diagnostic`` is one
occurrence of it at one place. Library code raises ``DiagnosticError`` for a fault that stops the
work and appends to a list for one that does not. Only the command line turns either into text.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar


class Severity(enum.Enum):
    """How bad a diagnostic is; only ``ERROR`` stops a compile."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a fault was found. Every part may be empty.

    Attributes:
        file: path as the user gave it.
        node: name of the ONNX node.
        value: name of the ONNX value (tensor).
    """

    file: str = ""
    node: str = ""
    value: str = ""

    def __str__(self) -> str:
        parts = [self.file, f"node {self.node}" if self.node else "", self.value]
        return ": ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Rule:
    """Base of all rules; fields of a subclass are what its message needs to know."""

    code: ClassVar[str] = ""
    name: ClassVar[str] = ""
    severity: ClassVar[Severity] = Severity.ERROR

    def message(self) -> str:
        """One sentence that states the fault, without a full stop."""
        raise NotImplementedError

    def help(self) -> str:
        """One sentence that says what to do."""
        raise NotImplementedError

    def at(self, *, file: str = "", node: str = "", value: str = "") -> Diagnostic:
        """This fault at one place."""
        return Diagnostic(self, Location(file, node, value))


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One occurrence of a rule."""

    rule: Rule
    location: Location = field(default_factory=Location)

    @property
    def code(self) -> str:
        return self.rule.code

    @property
    def severity(self) -> Severity:
        return self.rule.severity

    def __str__(self) -> str:
        lines = [f"{self.severity.value}[{self.code}] {self.rule.name}: {self.rule.message()}"]
        if str(self.location):
            lines.append(f"  --> {self.location}")
        lines.append(f"  help: {self.rule.help()}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, for ``--json`` and report.json."""
        return {
            "code": self.code,
            "name": self.rule.name,
            "severity": self.severity.value,
            "message": self.rule.message(),
            "help": self.rule.help(),
            "location": asdict(self.location),
        }


class DiagnosticError(Exception):
    """Work cannot go on; carries one diagnostic or several."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        if isinstance(diagnostics, Diagnostic):
            diagnostics = [diagnostics]
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__("\n".join(str(d) for d in self.diagnostics))

    @property
    def codes(self) -> list[str]:
        """Codes in order of report; what tests match on."""
        return [d.code for d in self.diagnostics]


def selected(
    diagnostics: Iterable[Diagnostic], select: Sequence[str], ignore: Sequence[str]
) -> list[Diagnostic]:
    """Those that are asked for, by beginnings of codes; of several that fit the longest decides.

    Args:
        diagnostics: in order.
        select: beginnings of codes to keep, such as ``QN5``; empty for all.
        ignore: beginnings of codes to leave out. It wins over ``select`` of the same length.
    """

    def specificity(code: str, prefixes: Sequence[str]) -> int:
        return max((len(prefix) for prefix in prefixes if code.startswith(prefix)), default=-1)

    return [
        diagnostic
        for diagnostic in diagnostics
        if specificity(diagnostic.code, select or [""]) > specificity(diagnostic.code, ignore)
    ]


def first_line(error: BaseException, *, limit: int = 300) -> str:
    """An exception as one line: the first line of its text that says something, else its type."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()[:limit]
    return type(error).__name__
