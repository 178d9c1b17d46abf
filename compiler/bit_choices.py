"""Bits chosen linear by linear and cache by cache: what a search finds, and a user may edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import PerBlock, PerChannel, QuantSpec
from qnpu.compiler.rules import InvalidPlan, MissingFile

FORMAT, VERSION = "qnpu-bit-plan", 2
WEIGHT_BITS = (4, 8)
INPUT_BITS = (4, 8, 16)
KV_BITS = (8, 16)
BLOCK_BITS = 4
"""Of weights that may have blocks."""
BLOCK_SIZES = (16, 32, 64, 128)
"""Features that may share a block scale (LPBQ)."""


@dataclass(frozen=True, slots=True, order=True)
class WeightBits:
    """Bits of a weight.

    Attributes:
        bits: of a code.
        block: input features that share a whole block scale (LPBQ); 0: one scale per channel.
    """

    bits: int
    block: int = 0

    def __str__(self) -> str:
        return f"{self.bits}b{self.block}" if self.block else str(self.bits)

    def spec(self, channel_axis: int) -> QuantSpec:
        """Of a weight (features, channels) or the other way round: signed and symmetric."""
        blocks = PerBlock(1 - channel_axis, self.block) if self.block else None
        return QuantSpec(self.bits, True, True, blocks or PerChannel(channel_axis))


@dataclass(frozen=True, slots=True)
class LinearBits:
    """Bits of a linear y = x·W.

    Attributes:
        weight: of W.
        input: of x; y has as many, but 8 at least.
        block: input features that share a whole block scale (LPBQ); 0: one scale per channel.
    """

    weight: int
    input: int
    block: int = 0

    @property
    def weight_name(self) -> int | str:
        """Bits of W as a plan writes them: 4, 8, or 4b32 for 4 bits in blocks of 32."""
        return str(WeightBits(self.weight, self.block)) if self.block else self.weight

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as in bit_plan.json."""
        return {"weight": self.weight_name, "input": self.input}


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
            "linears": {name: bits.to_json() for name, bits in self.linears.items()},
            "caches": dict(self.caches),
        }


_WEIGHTS: dict[int | str, tuple[int, int]] = {
    LinearBits(bits, 0, block).weight_name: (bits, block)
    for bits, block in [*((b, 0) for b in WEIGHT_BITS), *((BLOCK_BITS, s) for s in BLOCK_SIZES)]
}
"""Bits of a weight as a plan writes them → bits, features of a block."""


class _Linear(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    weight: int | str
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
        _check(path, f"linears.{name}.weight", linear.weight, tuple(_WEIGHTS))
        _check(path, f"linears.{name}.input", linear.input, INPUT_BITS)
    for name, bits in plan.caches.items():
        _check(path, f"caches.{name}", bits, KV_BITS)
    linears = {}
    for name, linear in plan.linears.items():
        weight, block = _WEIGHTS[linear.weight]
        linears[name] = LinearBits(weight, linear.input, block)
    return plan.scheme, BitChoices(linears, plan.caches)


def _check(path: Path, place: str, bits: int | str, known: tuple[int | str, ...]) -> None:
    if bits not in known:
        raise _fault(path, f"`{place}` is {bits!r}, not one of {', '.join(map(str, known))}")


def _fault(path: Path, reason: str) -> DiagnosticError:
    return DiagnosticError(InvalidPlan(reason).at(file=str(path)))
