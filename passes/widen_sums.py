"""widen-sums: codes that only sums in 32 bits read stay in 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.integer_functions import DOMAIN, named_inputs
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_MAKERS = frozenset(
    {"IntRequantizeShort", "IntRequantizeInside", "IntSumBytesShort", "IntAddShort"}
)
_READERS = {"IntAddShort": 2, "IntRMSNormShort": 1}  # how many first inputs are codes


@dataclass(frozen=True)
class WidenSums(Pass):
    """Leaves unsigned 16-bit codes as int32 where all that reads them casts them to that.

    Before → after::

        qnpu.IntRequantizeShort<to = UINT16> → qnpu.IntAddShort    <to = INT32>, the same numbers

    The residual stream is such a chain: at each Add three casts less. Linears made in parts of
    their channels are joined as int32 in it.

    Must not fire on outputs of the graph, on signed codes (what lifts their sums above 0 vanishes
    only in a cast to 16 bits), or on what anything else reads.
    """

    name: ClassVar[str] = "widen-sums"
    consumes: ClassVar[Stage] = Stage.INTEGER
    produces: ClassVar[Stage] = Stage.INTEGER

    def run(self, compilation: Compilation) -> int:
        model, count = compilation.model, 0
        for node in model.graph:
            parts = _parts(node)
            if not (parts and _read_by_sums(node.outputs[0])):
                continue
            if all(_makes_unsigned(part, model) for part in parts):
                for part in parts:
                    part.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.INT32))
                for value in (*(part.outputs[0] for part in parts), node.outputs[0]):
                    value.type = ir.TensorType(ir.DataType.INT32)
                count += 1
        return count


def _parts(node: ir.Node) -> list[ir.Node]:
    """What makes a value: the node itself, or those whose results it joins and nothing else reads.

    Empty where the parts are not known, or are read elsewhere.
    """
    if not is_standard(node) or node.op_type != "Concat":
        return [node]
    alone = [v for v in node.inputs if v and len(v.uses()) == 1 and not v.is_graph_output()]
    parts = [part for value in alone if (part := value.producer()) is not None]
    return parts if len(parts) == len(node.inputs) else []


def _makes_unsigned(node: ir.Node, model: ir.Model) -> bool:
    if node.domain != DOMAIN or node.op_type not in _MAKERS:
        return False
    if node.outputs[0].dtype is not ir.DataType.UINT16:
        return False
    inputs = named_inputs(node, model)
    low = constant_array(inputs.get("low"))
    return "low" not in inputs or (low is not None and not low.any())


def _read_by_sums(value: ir.Value) -> bool:
    uses = value.uses()
    return (
        bool(uses)
        and not value.is_graph_output()
        and all(
            node.domain == DOMAIN and index < _READERS.get(node.op_type, 0) for node, index in uses
        )
    )
