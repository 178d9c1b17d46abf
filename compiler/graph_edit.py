"""Small edits of an onnx_ir graph that several passes need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.stored_tensors import STORED_BYTES, stored_tensor

# Types of whole bytes, which NumPy holds as files do.
_WHOLE_TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16}
)


def name_of(item: ir.Value | ir.Node) -> str:
    """The name of a value or node; empty where it has none."""
    return item.name or ""


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of a constant value, or None where it is not constant."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Registers a new initializer under ``name`` or, where taken, ``name_1``, ``name_2`` …"""
    tensor = stored_tensor(array, name=unique_initializer_name(graph, name))
    return register_tensor(graph, tensor)


def register_tensor(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a tensor under its own name, which must be free."""
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=shape_of(tensor),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """The shape of a constant, which is always static."""
    return ir.Shape([int(d) for d in tensor.shape.numpy()])


def set_constant(value: ir.Value, array: NDArray[Any]) -> None:
    """Gives an initializer new data. The old tensor stays whole for whoever else holds it."""
    tensor = stored_tensor(array, name=value.name)
    value.const_value = tensor
    value.shape = shape_of(tensor)


def unique_initializer_name(graph: ir.Graph, name: str) -> str:
    """``name``, or with the first number behind it that no initializer has."""
    candidate, number = name, 0
    while candidate in graph.initializers:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def like(value: ir.Value, name: str) -> ir.Value:
    """A new, unproduced value of the same type and shape."""
    return ir.Value(name=name, type=value.type, shape=value.shape)


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Lets every consumer use ``new``; graph outputs stay what they are."""
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)


def keeps_name(value: ir.Value) -> bool:
    """True for inputs, initializers and outputs: someone outside knows them by name."""
    return value.is_graph_input() or value.is_initializer() or value.is_graph_output()


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Lets every consumer and graph output use ``new``; an output keeps its name.

    Where ``new`` has a name of its own to keep, as an input, an initializer or an output, an
    Identity stands between it and the graph output.
    """
    if old.is_graph_output() and old.name != new.name:
        if keeps_name(new):
            copy = ir.node("Identity", [new], name=f"Identity_{old.name}")
            output = copy.outputs[0]
            output.type, output.shape = new.type, new.shape
            graph.append(copy)
            replace_uses(old, new)
            old.name, output.name = None, old.name
            old.replace_all_uses_with(output, replace_graph_outputs=True)
            return
        old.name, new.name = None, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape where every dimension is known, else None."""
    if value.shape is None:
        return None
    dims = tuple(d for d in value.shape if isinstance(d, int))
    return dims if len(dims) == len(value.shape) else None


def last_dimension(value: ir.Value | None) -> int | None:
    """Elements along the last axis, or None where that is not static; the others may be dynamic."""
    size = value.shape[-1] if value is not None and value.shape else None
    return size if isinstance(size, int) else None


class GraphEditor:
    """Changes a graph. It knows which names are taken, so use one for a whole pass.

    Attributes:
        graph: what is changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        values = [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        self._names = {name_of(value) for value in values} | {name_of(node) for node in graph}

    def free_name(self, name: str) -> str:
        """``name``, or with the first number behind it that nothing has; it is taken from then."""
        candidate, number = name, 0
        while candidate in self._names or candidate in self.graph.initializers:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def constant(
        self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A new initializer."""
        return register_tensor(self.graph, stored_tensor(array, dtype, self.free_name(name)))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[int | ir.SymbolicDim] | None,
        *,
        before: ir.Node,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node with one float output, put before another.

        Args:
            op_type: operator.
            inputs: as the operator takes them.
            name: of node and output, made unique.
            shape: of the output, None for unknown.
            before: its place.
            domain: of the operator.
            attributes: as the operator takes them.
        """
        label = self.free_name(name)
        node = ir.node(op_type, inputs, attributes or None, domain=domain, name=label)
        value = node.outputs[0]
        value.name, value.type = label, ir.TensorType(ir.DataType.FLOAT)
        value.shape = None if shape is None else ir.Shape(list(shape))
        self.graph.insert_before(before, node)
        return value

    def insert_behind(self, value: ir.Value, node: ir.Node) -> None:
        """Puts a node right behind what makes a value; of an input or constant, in front."""
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(next(iter(self.graph)), node)

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Puts a value in the place of the only output of a node, and removes the node."""
        old = node.outputs[0]
        if result.type is None:
            result.type, result.shape = old.type, old.shape
        replace_value(self.graph, old, result)
        self.graph.remove(node, safe=True)

    def take_names(self, nodes: Iterable[ir.Node]) -> None:
        """Gives nodes made elsewhere, and their outputs, names that nothing else has."""
        for node in nodes:
            node.name = self.free_name(name_of(node))
            for value in node.outputs:
                value.name = node.name if len(node.outputs) == 1 else self.free_name(name_of(value))


class NodeBuilder:
    """Makes the nodes that take the place of one; names start with that node's."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._nodes: list[ir.Node] = []
        self._graph = graph
        self._node = node
        self._name = name_of(node) or name_of(node.outputs[0])

    @property
    def nodes(self) -> list[ir.Node]:
        """All nodes made so far, in order."""
        return list(self._nodes)

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], label: str, **attributes: Any
    ) -> ir.Value:
        """One node of the default domain with one output; shape and type are left to inference."""
        return self.add_many(op_type, inputs, [label], **attributes)[0]

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        labels: Sequence[str],
        **attributes: Any,
    ) -> list[ir.Value]:
        """One node of the default domain, an output for each label."""
        names = [f"{self._name}_{label}" for label in labels]
        node = ir.node(op_type, inputs, attributes or None, num_outputs=len(labels), name=names[0])
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name
        self._nodes.append(node)
        return list(node.outputs)

    def constant(self, label: str, array: NDArray[Any]) -> ir.Value:
        """An initializer."""
        return add_initializer(self._graph, f"{self._name}_{label}", array)

    def integers(self, label: str, *numbers: int) -> ir.Value:
        """A 1-D int64 initializer: a shape, lengths, axes."""
        return self.constant(label, np.array(numbers, np.int64))

    def replace(self, *results: ir.Value | None) -> None:
        """Puts the new nodes in the old one's place, and each result in that of its output.

        Args:
            results: in the order of the outputs; None, or none at all, for an output not in use.
        """
        self._graph.insert_before(self._node, self._nodes)
        for old, new in zip(self._node.outputs, results, strict=False):
            if new is not None:
                if new.type is None:
                    new.type, new.shape = old.type, old.shape
                replace_value(self._graph, old, new)
        self._graph.remove(self._node, safe=True)


def bytes_of(value: ir.Value) -> int:
    """Of an array; an open dimension counts as 1, an unknown type as 32 bits."""
    dims = static_shape(value) or tuple(d if isinstance(d, int) else 1 for d in (value.shape or ()))
    bits = value.dtype.bitwidth if value.dtype is not None else 32
    return prod(dims) * bits // 8


def nodes_behind(value: ir.Value) -> list[ir.Node]:
    """All nodes that a value is computed by, from the last one on; not in topological order."""
    found: dict[ir.Node, None] = {}
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = None
            pending += [item.producer() for item in node.inputs if item is not None]
    return list(found)


def subgraph_proto(
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    model: ir.Model,
    outside: dict[str, ir.TensorProtocol] | None = None,
) -> onnx.ModelProto:
    """A model of some nodes of a graph, with copies of the initializers they use.

    Args:
        nodes: in topological order.
        inputs: values the nodes take from outside; typed.
        outputs: values to return.
        model: where opsets and IR version come from.
        outside: takes up large initializers by name, for ``open_session``; the model then holds
            their types and shapes alone.
    """
    initializers: dict[str, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                initializers[name_of(value)] = value
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "segment",
        [ir.serde.serialize_value(value) for value in inputs],
        [ir.serde.serialize_value(value) for value in outputs],
        [_tensor_proto(name, value, outside) for name, value in initializers.items()],
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()]
    functions = [ir.serde.serialize_function(function) for function in model.functions.values()]
    return onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=model.ir_version, functions=functions
    )


def _tensor_proto(
    name: str, value: ir.Value, outside: dict[str, ir.TensorProtocol] | None
) -> onnx.TensorProto:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"initializer {name} has no data")
    dims = tensor.shape.numpy()
    proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=dims)
    if outside is None or tensor.dtype not in _WHOLE_TYPES or tensor.nbytes < STORED_BYTES:
        proto.raw_data = tensor.tobytes()
        return proto
    outside[name] = tensor
    return proto
