"""Verdicts summed up by decoder layer, for a table that fits a screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.operands import Operation
from qnpu.compiler.target import Verdict
from qnpu.compiler.target_check import TargetReport

# As exporters name weights and nodes: model.layers.3.mlp, /model/layers.3/mlp, h.3.attn, blocks_3.
_LAYER = re.compile(r"(?:^|[./_])(?:layers?|h|blocks?)[._/](\d+)(?:[./_]|$)")


def verdicts_by_layer(report: TargetReport) -> dict[str, Counter[Verdict]]:
    """Layer → how many nodes of each verdict, in graph order.

    A node belongs to the layer that its own name or that of a weight speaks of, else to that of
    the node before it. What comes before the first layer is ``-``; behind the last one, ``head``
    begins with a weight that no layer is named with.
    """
    named = [_named_layer(node.operation) for node in report.nodes]
    last = max((i for i, layer in enumerate(named) if layer), default=-1)
    found: dict[str, Counter[Verdict]] = {}
    layer = "-"
    for index, node in enumerate(report.nodes):
        layer = named[index] or layer
        if index > last >= 0 and not named[index] and any(_weight_names(node.operation)):
            layer = "head"
        found.setdefault(layer, Counter())[node.verdict] += 1
    return found


def _named_layer(operation: Operation) -> str:
    names = [name_of(operation.node), *_weight_names(operation)]
    return next((layer[1] for name in names if (layer := _LAYER.search(name))), "")


def _weight_names(operation: Operation) -> Iterator[str]:
    for operand in operation.present:
        if operand.constant and operand.quantized and operand.shape:
            yield name_of(operand.codes or operand.value)
