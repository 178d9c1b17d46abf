"""The key-value header of a GGUF file; weights are left to transformers.

Layout (version 2 and 3, little endian): ``GGUF``, u32 version, u64 tensors, u64 entries, then each
entry as key, u32 type, value. Strings carry a u64 length; arrays an element type and a u64 count.
Source: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import MissingFile, UnknownModel

MAGIC = b"GGUF"

_SCALARS = "BbHhIif?"  # by type number; 8 is a string, 9 an array
_WIDE_SCALARS = {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


def read_header(path: Path) -> dict[str, Any]:
    """Every entry of the header: scalars, strings, lists of strings, and NumPy arrays.

    Reads nothing beyond the header (262,144 tokens take about 0.3 s).

    Raises:
        DiagnosticError: QN102 the file cannot be read; QN113 it is not GGUF, or cut short.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            return _entries(_Cursor(mapped))
    except OSError as error:
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error
    except (ValueError, struct.error) as error:  # mmap refuses an empty file with ValueError
        reason = f"not a whole GGUF file ({error})"
        raise DiagnosticError(UnknownModel(str(path), reason).at(file=str(path))) from error


@dataclass(slots=True)
class _Cursor:
    data: mmap.mmap
    offset: int = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self.data):
            raise ValueError(f"needs {end} bytes, has {len(self.data)}")
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element in (_STRING, _ARRAY):
                return [self.value(element) for _ in range(count)]
            dtype = np.dtype(_scalar_code(element)).newbyteorder("<")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
        return self.scalar(_scalar_code(kind))


def _scalar_code(kind: int) -> str:
    if kind < len(_SCALARS):
        return _SCALARS[kind]
    if kind in _WIDE_SCALARS:
        return _WIDE_SCALARS[kind]
    raise ValueError(f"unknown value type {kind}")


def _entries(cursor: _Cursor) -> dict[str, Any]:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("wrong first bytes")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}")
    cursor.scalar("Q")  # tensors
    entries = {}
    for _ in range(cursor.scalar("Q")):
        key = cursor.string()
        entries[key] = cursor.value(cursor.scalar("I"))
    return entries
