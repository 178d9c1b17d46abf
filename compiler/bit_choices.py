"""Bits chosen linear by linear and cache by cache: what a search finds, and a user may edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InvalidPlan, MissingFile

FORMAT, VERSION = "qnpu-bit-plan", 2
WEIGHT_BITS = (4, 8)
INPUT_BITS = (4, 8, 16)
KV_BITS = (8, 16)


@dataclass(frozen=True, slots=True)
class LinearBits:
    """Bits of a linear y = x·W.

    Attributes:
        weight: of W.
        input: of x; y has as many, but 8 at least.
    """

    weight: int
    input: int


@dataclass(frozen=True, slots=True)
class BitChoices:
    """Bits of what may vary; everything else goes by its role (``Scheme``).

    Attributes:
        linears: name of a weight → bits of its linear.
        caches: name of a MatMul of two activations → bits of its second operand: keys or values.
    """

    linears: Mapping[str, LinearBits] = field(default_factory=dict)
    caches: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries, as in bit_plan.json."""
        return {
            "linears": {name: asdict(bits) for name, bits in self.linears.items()},
            "caches": dict(self.caches),
        }


class _Linear(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    weight: int
    input: int


class _Plan(BaseModel):
    """What is read of bit_plan.json; the rest of it follows from that."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format: str
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    scheme: str
    linears: dict[str, _Linear]
    caches: dict[str, int]


def read_plan(path: Path) -> tuple[str, BitChoices]:
    """Scheme and choices of a bit_plan.json.

    Raises:
        DiagnosticError: QN102 there is no such file, QN540 it is no plan, or asks for bits that
            nothing has.
    """
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error
    try:
        plan = _Plan.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _fault(path, f"`{place}`: {first['msg']}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON
        raise _fault(path, f"it is no JSON: {error}") from error
    if plan.format != FORMAT:
        raise _fault(path, f"`format` is {plan.format!r}, not {FORMAT!r}")
    for name, linear in plan.linears.items():
        _check(path, f"linears.{name}.weight", linear.weight, WEIGHT_BITS)
        _check(path, f"linears.{name}.input", linear.input, INPUT_BITS)
    for name, bits in plan.caches.items():
        _check(path, f"caches.{name}", bits, KV_BITS)
    linears = {name: LinearBits(item.weight, item.input) for name, item in plan.linears.items()}
    return plan.scheme, BitChoices(linears, plan.caches)


def _check(path: Path, place: str, bits: int, known: tuple[int, ...]) -> None:
    if bits not in known:
        raise _fault(path, f"`{place}` is {bits}, not one of {', '.join(map(str, known))}")


def _fault(path: Path, reason: str) -> DiagnosticError:
    return DiagnosticError(InvalidPlan(reason).at(file=str(path)))
