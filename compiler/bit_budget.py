"""What a search for bits is to keep to, as a user writes it: ``latency=80ms,size=90MB``."""

from __future__ import annotations

import re
from math import isfinite

from pydantic import ByteSize, TypeAdapter, ValidationError

from qnpu.compiler.cost_model import Workload
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InvalidConfig

LATENCY, SIZE, PERPLEXITY = "latency", "size", "ppl"
DEFAULT_WORKLOAD = "512/64"

_SECONDS = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?\s*(us|ms|s|)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def parse_budget(text: str) -> dict[str, float]:
    """Limits by name.

    ``latency`` is in s, or in ``ms``, ``us``; ``size`` in bytes, or in ``kB``, ``MB``, ``MiB`` and
    so on; ``ppl`` is perplexity relative to the float model's.

    Args:
        text: one or more ``NAME=AMOUNT``, separated by commas.

    Returns:
        ``latency``: s, ``size``: bytes, ``ppl``: a factor above 1; those that were given.

    Raises:
        DiagnosticError: QN503 it is none.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, found, amount = part.strip().partition("=")
        if not found or name not in (LATENCY, SIZE, PERPLEXITY) or name in limits:
            known = f"{LATENCY}=80ms, {SIZE}=90MB, {PERPLEXITY}=1.05"
            raise _fault(f"`{part}` is not one of {known}, each once")
        limits[name] = _PARSERS[name](amount.strip())
    return limits


def parse_workload(text: str) -> Workload:
    """Tokens of a prompt and tokens generated, ``PROMPT/DECODE``.

    Raises:
        DiagnosticError: QN503 it is none.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        reason = f"`{text}` is not PROMPT/DECODE, such as {DEFAULT_WORKLOAD}"
        raise DiagnosticError(InvalidConfig("workload", reason).at())
    return Workload(int(match[1]), int(match[2]))


def _seconds(text: str) -> float:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise _fault(f"`{text}` is no time such as 0.08 or 80ms")
    return _positive(float(f"{match[1]}e{match[2] or 0}") * _UNITS[match[3]], text)


def _bytes(text: str) -> float:
    try:
        return _positive(float(TypeAdapter(ByteSize).validate_python(text)), text)
    except (ValidationError, OverflowError) as error:
        raise _fault(f"`{text}` is no size such as 90MB or 86MiB") from error


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError as error:
        raise _fault(f"`{text}` is no number such as 1.05") from error
    if not (ratio > 1 and isfinite(ratio)):
        raise _fault(f"ppl is relative to the float model's: {text} is not above 1")
    return ratio


def _positive(amount: float, text: str) -> float:
    if not (amount > 0 and isfinite(amount)):
        raise _fault(f"`{text}` is not above 0")
    return amount


_PARSERS = {LATENCY: _seconds, SIZE: _bytes, PERPLEXITY: _ratio}


def _fault(reason: str) -> DiagnosticError:
    return DiagnosticError(InvalidConfig("budget", reason).at())
