"""What learning has come to so far, on disk, so that a killed compile can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import CannotWrite

State = dict[str, NDArray[Any]]
"""Parameters by ``value name/parameter``."""

LEARNING_FOLDER = ".qnpu-learning"
"""In the folder of a compile's results, as long as it works."""

_KEY = "work.json"
_NAMES = "names"


@dataclass(frozen=True, slots=True)
class LearningRecord:
    """A folder with one file per part that is learned.

    A record is of one piece of work: the same start, data and options. Files appear whole or not at
    all, so that it can be read after a kill at any moment.

    Attributes:
        folder: made when first needed.
        resume: go on with what is there; else it is thrown away first.
    """

    folder: Path
    resume: bool = False

    def open(self, fingerprint: str) -> None:
        """Prepares the folder for a piece of work.

        Args:
            fingerprint: of the work; what belongs to another one is thrown away.

        Raises:
            DiagnosticError: QN901 the folder cannot be written.
        """
        try:
            if not self.resume or self._fingerprint() != fingerprint:
                self.discard()
            self.folder.mkdir(parents=True, exist_ok=True)
            key = json.dumps({"work": fingerprint}).encode()
            self._write(_KEY, lambda file: file.write(key))
        except OSError as error:
            raise DiagnosticError(CannotWrite(str(self.folder), first_line(error)).at()) from error

    def load(self, part: int) -> State | None:
        """What was learned of a part, or None where it is not done."""
        try:
            with np.load(self._file(part)) as arrays:
                names = json.loads(arrays[_NAMES].tobytes())
                return {name: arrays[str(i)] for i, name in enumerate(names)}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def save(self, part: int, state: State) -> None:
        """Keeps what was learned of a part.

        Raises:
            DiagnosticError: QN901 the folder cannot be written.
        """
        arrays = {str(i): array for i, array in enumerate(state.values())}
        arrays[_NAMES] = np.frombuffer(json.dumps(list(state)).encode(), np.uint8)
        path = self._file(part)
        try:
            self._write(path.name, lambda file: np.savez(file, allow_pickle=False, **arrays))
        except OSError as error:
            raise DiagnosticError(CannotWrite(str(path), first_line(error)).at()) from error

    def drop(self, part: int) -> None:
        """Forgets what was learned of a part; there may be nothing."""
        self._file(part).unlink(missing_ok=True)

    def discard(self) -> None:
        """Throws the folder away; there may be none."""
        if (self.folder / _KEY).exists():
            shutil.rmtree(self.folder)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:04d}.npz"

    def _fingerprint(self) -> str:
        try:
            found = json.loads((self.folder / _KEY).read_text("utf-8"))
        except (OSError, ValueError):
            return ""
        return str(found.get("work", "")) if isinstance(found, dict) else ""

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        scratch = self.folder / f"{name}.part"
        with scratch.open("wb") as file:
            write(file)
        scratch.replace(self.folder / name)


def fingerprint(*texts: str, arrays: Iterable[NDArray[Any]]) -> str:
    """SHA-256 of texts and of arrays with their types and shapes, hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
