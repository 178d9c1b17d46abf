"""return-new-entries: a cache goes out as the entries that a run adds, not as all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.caches import ENTRIES_AXIS, is_past, present_name
from qnpu.compiler.graph_edit import GraphEditor, keeps_name, name_of
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage


@dataclass(frozen=True)
class ReturnNewEntries(Pass):
    """Hands out what is joined to a past cache in place of both.

    Before → after, S new entries behind P past ones::

        present.0.key [1, h, P + S, d] = Concat(past_key_values.0.key [1, h, P, d], k [1, h, S, d])

        present.0.key [1, h, S, d]
        present.0.key_whole [1, h, P + S, d] = Concat(past_key_values.0.key, present.0.key)

    Who runs the graph has the past already: it drops the oldest entries and appends the new ones.

    Must not fire on an output that is no Concat of a past input and one other value, in this order
    and along the entries, or whose new entries the caller knows under another name.
    """

    name: ClassVar[str] = "return-new-entries"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph, editor = compilation.graph, GraphEditor(compilation.graph)
        count = 0
        for index, whole in enumerate(graph.outputs):
            entries = new_entries(whole)
            if entries is None or keeps_name(entries):
                continue
            name = name_of(whole)
            whole.name = editor.free_name(f"{name}_whole")
            entries.name = name
            graph.outputs[index] = entries
            count += 1
        return count


def new_entries(present: ir.Value) -> ir.Value | None:
    """What a cache that goes out adds to one that came in; None for any other output."""
    node = present.producer()
    if node is None or not is_standard(node) or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, entries = node.inputs
    if past is None or entries is None or not past.is_graph_input() or not is_past(past):
        return None
    along = node.attributes.get_int("axis", 0) % 4 == ENTRIES_AXIS
    return entries if along and present_name(name_of(past)) == name_of(present) else None
