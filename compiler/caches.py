"""Key/value caches among a graph's inputs and outputs, by the names that exporters give them.

A cache is float ``(1, heads, entries, head width)``, one of keys and one of values per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qnpu.compiler.graph_edit import name_of

PAST_PREFIXES = ("past_key_values.", "past_key_", "past_value_")
CACHED_INPUTS = ("attention_mask", "position_ids")  # that say what a cache holds
ENTRIES_AXIS = 2  # of a cache: what came before, oldest first


def is_past(value: ir.Value) -> bool:
    """True for an input that holds keys or values of earlier tokens."""
    rank = len(value.shape) if value.shape is not None else 0
    return name_of(value).startswith(PAST_PREFIXES) and rank == 4


def past_length(inputs: Sequence[ir.Value]) -> int:
    """Entries in the caches that come in, which all have as many; 0 without such an input."""
    sizes = [v.shape[ENTRIES_AXIS] for v in inputs if is_past(v) and v.shape is not None]
    return next((size for size in sizes if isinstance(size, int)), 0)


def present_name(past: str) -> str:
    """The output that goes on where a past input ends."""
    for prefix, replacement in (("past_key_values.", "present."), ("past_", "present_")):
        if past.startswith(prefix):
            return replacement + past.removeprefix(prefix)
    return past
