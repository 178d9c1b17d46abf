"""Edits of a graph on its way to integers: nodes that call integer functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import GraphEditor
from qnpu.compiler.integer_functions import DOMAIN, NEEDS, VERSION, integer_function


class IntegerEditor(GraphEditor):
    """Adds integer nodes to a model; equal constants of one or few numbers are stored once.

    Args:
        model: changed in place.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model.graph)
        self._model = model
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def call(
        self,
        function: str,
        operands: Sequence[ir.Value],
        arguments: Mapping[str, NDArray[Any]],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        *,
        before: ir.Node,
        cast: bool = True,
    ) -> ir.Value:
        """The result of a node that calls an integer function.

        Args:
            function: its name.
            operands: first inputs, codes.
            arguments: constants by parameter name, all others.
            name: of the result; that of the node is made from it.
            dtype: of the result.
            shape: of the result.
            before: place of the node.
            cast: the function takes its result's type as an attribute.
        """
        self._define(function)
        definition = self._model.functions[DOMAIN, function, ""]
        wanted = [str(item.name) for item in definition.inputs][len(operands) :]
        if set(wanted) != set(arguments):
            raise ValueError(f"{function} takes {wanted}, not {sorted(arguments)}")
        constants = [self._argument(f"{name}_{key}", arguments[key]) for key in wanted]
        attributes = {"to": int(dtype)} if cast else {}
        node = ir.node(
            function,
            [*operands, *constants],
            attributes or None,
            domain=DOMAIN,
            num_outputs=len(definition.outputs),
            name=self.free_name(f"{name}_{function}"),
        )
        for index, output in enumerate(node.outputs):
            output.name = self.free_name(name if not index else f"{name}_{index}")
            output.type, output.shape = ir.TensorType(dtype), shape
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _define(self, function: str) -> None:
        for name in (function, *NEEDS.get(function, ())):
            if (DOMAIN, name, "") not in self._model.functions:
                definition = integer_function(name, self._model.opset_imports[""])
                self._model.functions[DOMAIN, name, ""] = definition
                self._model.opset_imports[DOMAIN] = VERSION

    def _argument(self, name: str, array: NDArray[Any]) -> ir.Value:
        key = str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes()
        if key not in self._shared:
            self._shared[key] = self.constant(name, array)
        return self._shared[key]
