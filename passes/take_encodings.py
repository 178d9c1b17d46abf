"""take-encodings: a graph is encoded as another graph of the same model was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of, shape_of, static_shape
from qnpu.compiler.op_traits import float_values
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rules import GraphsDiffer


@dataclass(frozen=True)
class TakeEncodings(Pass):
    """Fills the encoding table from another graph's, tensor by tensor, by name.

    Before → after, of a decode graph beside a prefill graph of the same source::

        h: planned u16                   h: scale and zero point of the prefill graph's h
        W: planned s4 per channel        W: the prefill graph's W, scales and chosen codes

    A constant of the same shape is the other graph's own, so both store the same codes; one that
    depends on lengths keeps its values.

    Must not fire on a tensor that has an encoding already.

    Raises:
        DiagnosticError: QN312 for each tensor that the other graph lacks or plans otherwise.

    Attributes:
        plan: of the other graph.
        table: of the other graph, as insert-qdq is to find it.
        constants: of the other graph, by name.
    """

    name: ClassVar[str] = "take-encodings"
    consumes: ClassVar[Stage] = Stage.PLANNED
    produces: ClassVar[Stage] = Stage.ENCODED

    plan: BitPlan
    table: EncodingTable
    constants: Mapping[str, ir.TensorProtocol]

    def run(self, compilation: Compilation) -> int:
        own = compilation.encodings
        missing = [v for v in float_values(compilation.graph) if name_of(v) not in own]
        faults = [fault for value in missing if (fault := self._fault(value, compilation))]
        if faults:
            raise DiagnosticError(faults)
        for value in missing:
            name = name_of(value)
            own[name] = self.table[name]
            tensor = self.constants.get(name)
            if value.is_initializer() and tensor is not None:
                if static_shape(value) != _shape(tensor):
                    continue
                value.const_value = tensor
                if self.table.has_codes(name):
                    codes = self.table.quantize(name, tensor.numpy())
                    own.choose_codes(name, self.table[name], codes)
        return len(missing)

    def _fault(self, value: ir.Value, compilation: Compilation) -> Diagnostic | None:
        name = name_of(value)
        if name not in self.table or name not in self.plan:
            return GraphsDiffer(name, "the other graph has no such tensor").at(value=name)
        planned, other = compilation.bit_plan[name], self.plan[name]
        if planned != other:
            return GraphsDiffer(name, f"it is {planned} here and {other} there").at(value=name)
        return None


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a constant."""
    return tuple(int(size) for size in shape_of(tensor) if isinstance(size, int))
