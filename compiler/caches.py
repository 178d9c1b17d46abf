"""Key/value caches among a graph's inputs and outputs, by the names that exporters give them.

A cache is float ``(1, heads, entries, head width)``, one of keys and one of values per layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from qnpu.compiler.graph_edit import name_of

PAST_PREFIXES = ("past_key_values.", "past_key_", "past_value_")
CACHED_INPUTS = ("attention_mask", "position_ids")  # that say what a cache holds
ENTRIES_AXIS = 2  # of a cache: what came before, oldest first

_EXPORTED = re.compile(r"past_key_values\.(?P<layer>\d+)\.(?P<kind>key|value)")
_HUB_ENDS = "_in", "_out"


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
    if past.startswith("past_") and past.endswith(_HUB_ENDS[0]):
        return past.removesuffix(_HUB_ENDS[0]) + _HUB_ENDS[1]
    for prefix, replacement in (("past_key_values.", "present."), ("past_", "present_")):
        if past.startswith(prefix):
            return replacement + past.removeprefix(prefix)
    return past


def take_hub_names(graph: ir.Graph) -> None:
    """Gives caches that come in and go out the names they have in Qualcomm AI Hub's models.

    Before → after::

        past_key_values.0.key, present.0.key     past_key_0_in, past_key_0_out

    Another value that has such a name already gets a longer one.
    """
    outputs = {name_of(value): value for value in graph.outputs}
    renamed: dict[str, ir.Value] = {}
    for value in graph.inputs:
        name = name_of(value)
        found = _EXPORTED.fullmatch(name)
        if not is_past(value) or found is None:
            continue
        layer, kind = found["layer"], found["kind"]
        present = outputs.get(present_name(name))
        for item, end in zip((value, present), _HUB_ENDS, strict=True):
            if item is not None:
                renamed[f"past_{kind}_{layer}{end}"] = item
    inner = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *inner):
        if value.name in renamed and renamed[value.name] is not value:
            value.name = f"{value.name}_inner"
    for name, value in renamed.items():
        value.name = name
