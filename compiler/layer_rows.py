"""What a report tells by layer: bits of linears and caches, and which layer a tensor is of."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qnpu.compiler.bit_choices import BitChoices
from qnpu.compiler.bit_items import BitItems, items_of
from qnpu.compiler.bit_search import TensorBits
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.topology import discover
from qnpu.runtime_check.blocks import cut_blocks

BEFORE_LAYERS = -1
"""Layer of what comes before the first one: embedding, rotary tables, mask."""


def bit_rows(model: ir.Model, choices: BitChoices) -> tuple[TensorBits, ...]:
    """Bits of each linear's weight and input, of keys and of values; no losses.

    Args:
        model: float graph, as before Q/DQ pairs go in.
        choices: bits of its linears and caches.

    Returns:
        In graph order; none for a graph that is no decoder that is understood.
    """
    items = items_of(model)
    return tuple(_rows(items, choices)) if items is not None else ()


def _rows(items: BitItems, choices: BitChoices) -> Iterator[TensorBits]:
    for group in items.groups:
        linears = [item.shape for item in group.linears if item.shape.name in choices.linears]
        if linears:
            bits = choices.linears[linears[0].name].input
            yield TensorBits(group.name, group.layer, f"input of {linears[0].role}", bits, {})
        for shape in linears:
            chosen = choices.linears[shape.name]
            yield TensorBits(shape.name, group.layer, shape.role, chosen.weight, {}, chosen.block)
    for cache in items.caches:
        if cache.name in choices.caches:
            yield TensorBits(cache.name, cache.layer, cache.role, choices.caches[cache.name], {})


def layers_of_values(model: ir.Model) -> dict[str, int]:
    """Value → layer of the node that makes it; the head has one of its own, behind the last.

    Args:
        model: canonical float graph.

    Returns:
        Empty for a graph that is no decoder.
    """
    topology = discover(model.graph)
    if topology is None or not topology.stream.values:
        return {}
    return {
        name_of(value): layer
        for layer, block in enumerate(cut_blocks(model.graph), start=BEFORE_LAYERS)
        for node in block.nodes
        for value in node.outputs
    }
