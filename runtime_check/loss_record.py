"""Losses that were measured, on disk, so that another search, or a killed one, need not again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import CannotWrite

LOSSES_FOLDER = ".qnpu-losses"
"""In the folder of a compile's results, where no other is asked for."""


@dataclass(slots=True)
class LossRecord:
    """A file of lines, one for each number, in a folder; one file per piece of work.

    Lines are only ever added, so a kill at any moment costs the last one at most: what is no whole
    line is passed over.

    Attributes:
        folder: made when first needed; None: numbers are kept in memory alone.
    """

    folder: Path | None = None
    _path: Path | None = None
    _known: dict[str, float] = field(default_factory=dict)

    def open(self, fingerprint: str) -> None:
        """Reads what is known.

        Args:
            fingerprint: of model, data and options; hexadecimal.

        Raises:
            DiagnosticError: QN901 the folder cannot be written.
        """
        self._known = {}
        if self.folder is None:
            return
        self._path = self.folder / f"{fingerprint[:32]}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                file.seek(0)
                text = file.read()
                if text and not text.endswith(b"\n"):
                    file.write(b"\n")  # behind a line that a kill cut off
        except OSError as error:
            raise self._fault(error) from error
        for line in text.splitlines():
            try:
                key, number = json.loads(line)
                self._known[str(key)] = float(number)
            except (ValueError, TypeError):
                continue

    def get(self, key: str) -> float | None:
        """What was measured, or None."""
        return self._known.get(key)

    def add(self, key: str, number: float) -> None:
        """Keeps a number.

        Raises:
            DiagnosticError: QN901 the file cannot be written.
        """
        self._known[key] = number
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps([key, number]).encode() + b"\n")
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> DiagnosticError:
        return DiagnosticError(CannotWrite(str(self.folder), first_line(error)).at())
