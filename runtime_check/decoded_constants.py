"""What a graph decodes of constants alone, decoded once instead of in every run.

Node by node, ONNX Runtime decodes each weight of a Q/DQ graph anew in each run, which takes as long
as the products of a hundred tokens. Asked beforehand, the same kernels give the same values.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
import psutil
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import (
    bytes_of,
    name_of,
    nodes_behind,
    register_tensor,
    replace_value,
    static_shape,
    subgraph_proto,
    unique_initializer_name,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.runtime_check.session import Mode, open_session, run

_DRAWN = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SHARE = 0.5  # of free memory, for all values together


def decode_constants(model: ir.Model) -> int:
    """Puts initializers in the place of decoded constants and of what is computed of them alone.

    A value is computed when it is read, and not kept. Nothing changes where all of them would take
    more than half of the free memory; nor does a node whose results have no known type.

    Args:
        model: changed in place; to be run node by node, not to be handed out. Its session must not
            pack initializers, as it does not pack decoded values: sums would have another order.

    Returns:
        How many values.
    """
    graph = model.graph
    known: dict[ir.Node, int] = {}  # and places in the graph's order, which is topological
    for node in graph:
        if _is_constant(node, known):
            known[node] = len(known)
    ends = [value for node in known for value in node.outputs if _leads_out(value, known)]
    if sum(map(bytes_of, ends)) > _SHARE * psutil.virtual_memory().available:
        return 0
    for value in ends:
        nodes = sorted(nodes_behind(value), key=known.__getitem__)
        name = unique_initializer_name(graph, f"{name_of(value)}_decoded")
        tensor = _tensor(name, nodes, value, model)
        replace_value(graph, value, register_tensor(graph, tensor))
    if ends:
        common.RemoveUnusedNodesPass()(model)
    return len(ends)


def _is_constant(node: ir.Node, known: dict[ir.Node, int]) -> bool:
    """Whether it decodes constants, or reads decoded ones, and nothing that a run is given."""
    if not is_standard(node) or node.op_type.startswith(_DRAWN):
        return False
    if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
        return False
    read = [value for value in node.inputs if value is not None]
    given = [value for value in read if value.producer() not in known]
    if any(value.is_graph_input() or not value.is_initializer() for value in given):
        return False
    if node.op_type == "DequantizeLinear":
        _type_of_decoded(node)
    elif len(given) == len(read):
        return False
    return all(
        not value.is_graph_output() and value.dtype is not None and static_shape(value) is not None
        for value in node.outputs
    )


def _type_of_decoded(node: ir.Node) -> None:
    """Files of other tools do not always tell types within a graph."""
    codes, scale, value = node.inputs[0], node.inputs[1], node.outputs[0]
    if codes is not None and scale is not None and value.type is None and scale.type is not None:
        kind = node.attributes.get_int("output_dtype", 0) or scale.type.dtype.value
        value.type, value.shape = ir.TensorType(ir.DataType(kind)), codes.shape


def _leads_out(value: ir.Value, known: dict[ir.Node, int]) -> bool:
    return any(use.node not in known for use in value.uses())


def _tensor(name: str, nodes: list[ir.Node], value: ir.Value, model: ir.Model) -> ir.TensorProtocol:
    """What nodes make of constants, computed each time it is read."""
    codes: dict[str, ir.TensorProtocol] = {}
    proto = subgraph_proto(nodes, [], [value], model, codes)

    def computed() -> ir.TensorProtocol:
        graph = onnx.ModelProto()
        graph.CopyFrom(proto)
        return ir.tensor(run(open_session(graph, Mode.REFERENCE, codes), None, {})[0], name=name)

    if value.dtype is None or value.shape is None:
        raise ValueError(f"{value.name} has no type")
    return ir.LazyTensor(computed, dtype=value.dtype, shape=value.shape, name=name)
