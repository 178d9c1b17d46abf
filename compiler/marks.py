"""What passes note in the metadata of models and values under ``qnpu.…``, read back.

A file comes from anywhere, so that nothing in it is taken for what a pass wrote before it is
checked.
"""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import UnreadableMark

T = TypeVar("T")
RAISED = "qnpu.raised"
"""Of a value: what its numbers are above the codes that they stand for, LSB."""


def read_mark(model: ir.Model, mark: str, kind: TypeAdapter[T]) -> T | None:
    """A note, or None where there is none.

    Args:
        model: that may have it.
        mark: key of the metadata.
        kind: what a pass writes there, as JSON.

    Raises:
        DiagnosticError: QN119 it is something else.
    """
    text = model.metadata_props.get(mark)
    if text is None:
        return None
    try:
        return kind.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"`{place}`: {first['msg']}" if place else str(first["msg"])
        raise DiagnosticError(UnreadableMark(mark, reason).at()) from error


def raised(value: ir.Value | None) -> int:
    """What a value's numbers are above its codes, LSB; 0 where nothing says so.

    Raises:
        DiagnosticError: QN119 it is no whole number.
    """
    text = value.metadata_props.get(RAISED, "0") if value is not None else "0"
    try:
        return int(text)
    except ValueError as error:
        raise DiagnosticError(UnreadableMark(RAISED, f"`{text}` is no number").at()) from error
