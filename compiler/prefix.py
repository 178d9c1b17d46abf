"""Tokens whose keys and values a graph holds as constants, as the file's metadata tells of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import onnx_ir as ir
from pydantic import NonNegativeInt, TypeAdapter

from qnpu.compiler.marks import read_mark

MARK = "qnpu.prefix"


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands in front of every text.

    Attributes:
        ids: the tokens, in order.
        outliers_before: tokens of the calibration text, counted in each down projection's input,
            that stand out without the prefix.
        outliers_after: with it.
        error: max |Δ| of the first tokens' attention results against the graph that is given the
            prefix as tokens, relative to their largest magnitude.
    """

    ids: tuple[NonNegativeInt, ...]
    outliers_before: int
    outliers_after: int
    error: float

    def to_json(self) -> dict[str, object]:
        """A plain dictionary."""
        return asdict(self)


_PREFIX = TypeAdapter(Prefix)


def mark_prefix(model: ir.Model, prefix: Prefix) -> None:
    """Notes the prefix in the model's metadata."""
    model.metadata_props[MARK] = json.dumps(prefix.to_json())


def prefix_of(model: ir.Model) -> Prefix | None:
    """The prefix that a graph holds, or None.

    Raises:
        DiagnosticError: QN119 the mark is no prefix.
    """
    return read_mark(model, MARK, _PREFIX)


def parse_prefix(text: str) -> tuple[int, ...] | None:
    """Token ids of an option: ``none`` is no token, ``auto`` is None, ``1,2`` are these.

    Raises:
        ValueError: anything else.
    """
    if text == "auto":
        return None
    if text == "none":
        return ()
    ids = tuple(int(part) for part in text.split(","))
    if any(number < 0 for number in ids):
        raise ValueError(f"{min(ids)} is no token id")
    return ids


def described(ids: Sequence[int]) -> str:
    """Ids as an option takes them."""
    return ",".join(str(number) for number in ids)
