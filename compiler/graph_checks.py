"""Faults of an input graph, each as a list of diagnostics; passes and qnpu-check share them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import float_values, is_float, is_quantized_operator
from qnpu.compiler.rules import (
    ControlFlow,
    DynamicDimension,
    MissingEncoding,
    NonFiniteWeight,
    UnknownOperator,
    UnsupportedFloatType,
)

_LAST_VERSION = 2**31 - 1  # onnx takes no larger number


def check_graph(model: ir.Model) -> list[Diagnostic]:
    """All faults of a graph, float or quantized, as ``qnpu-check`` reports them."""
    graph = model.graph
    faults = [
        *dynamic_dimensions(graph),
        *unknown_operators(model),
        *unsupported_float_types(graph),
        *control_flow(graph),
        *non_finite_weights(graph),
    ]
    if is_quantized(graph):
        faults += missing_encodings(graph)
    return faults


def is_quantized(graph: ir.Graph) -> bool:
    """True where any QuantizeLinear or DequantizeLinear is present."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph)


def dynamic_dimensions(graph: ir.Graph) -> list[Diagnostic]:
    """QN101 for each dimension of an input that is no number."""
    return [
        DynamicDimension(_dimension_name(value, axis), name_of(value)).at(value=name_of(value))
        for value in graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if not isinstance(dim, int)
    ]


def _dimension_name(value: ir.Value, axis: int) -> str:
    dim = value.shape[axis] if value.shape is not None else None
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return str(symbol) if symbol is not None else f"{value.name}:{axis}"


def unknown_operators(model: ir.Model) -> list[Diagnostic]:
    """QN106 for each node whose operator has neither an ONNX schema nor a function body.

    ONNX Runtime's own QLinear operators are known, of which QLinear and integer graphs are made.
    """
    faults: list[Diagnostic] = []
    for node in model.graph.all_nodes():
        version = model.graph.opset_imports.get(node.domain or "", 1)
        if node.op_identifier() in model.functions or is_quantized_operator(node):
            continue
        version = min(max(version, 0), _LAST_VERSION)
        if not onnx.defs.has(node.op_type, version, node.domain or ""):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            faults.append(UnknownOperator(operator).at(node=name_of(node)))
    return faults


def unsupported_float_types(graph: ir.Graph) -> list[Diagnostic]:
    """QN108 for each tensor of float16, bfloat16 or double."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return [
        UnsupportedFloatType(str(value.dtype)).at(value=name_of(value))
        for value in values
        if is_float(value) and value.dtype is not ir.DataType.FLOAT
    ]


def control_flow(graph: ir.Graph) -> list[Diagnostic]:
    """QN109 for each node that holds a graph."""
    return [
        ControlFlow(node.op_type).at(node=name_of(node))
        for node in graph
        if any(a.type is ir.AttributeType.GRAPH for a in node.attributes.values())
    ]


def non_finite_weights(graph: ir.Graph) -> list[Diagnostic]:
    """QN107 for each float initializer with NaN or infinity."""
    faults: list[Diagnostic] = []
    for name, value in graph.initializers.items():
        array = constant_array(value) if is_float(value) else None
        if array is None:
            continue
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            faults.append(NonFiniteWeight(bad).at(value=name))
    return faults


def missing_encodings(graph: ir.Graph) -> list[Diagnostic]:
    """QN303 for each float tensor of a QDQ graph that a node computes on without Q/DQ."""
    quantizers = ("QuantizeLinear", "DequantizeLinear")
    faults: list[Diagnostic] = []
    parameters = {
        value
        for node in graph
        if node.op_type in quantizers
        for value in node.inputs[1:]
        if value is not None
    }
    for value in float_values(graph):
        producer = value.producer()
        if value in parameters or (producer is not None and producer.op_type == quantizers[1]):
            continue
        users = value.consumers()
        handed_out = value.is_graph_output() and producer is not None
        bare = handed_out or any(user.op_type != quantizers[0] for user in users)
        if bare:
            faults.append(MissingEncoding(name_of(value)).at(value=name_of(value)))
    return faults
