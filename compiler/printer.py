"""Deterministic ONNX text of a graph, for golden tests and for reading.

``str(ir.Model)`` depends on hash order, and ``onnx.printer`` leaves out elements of 4-bit tensors.
What this prints ``onnx.parser`` reads back, save for 4-bit elements, which it misplaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir


def model_to_text(model: ir.Model) -> str:
    """The main graph; shapes of intermediate values, functions and metadata are left out."""
    graph = model.graph
    opsets = ", ".join(f'"{d}" : {v}' for d, v in sorted(graph.opset_imports.items()))
    lines = [
        f"<ir_version: {model.ir_version}, opset_import: [{opsets}]>",
        f"{graph.name or 'graph'} {_signature(graph)}",
    ]
    if graph.initializers:
        values = (_initializer(value) for value in graph.initializers.values())
        lines.append("<" + ",\n ".join(values) + ">")
    return "\n".join([*lines, "{", *(f"  {_node(node)}" for node in graph), "}"]) + "\n"


def _signature(graph: ir.Graph) -> str:
    inputs, outputs = (", ".join(map(_typed, values)) for values in (graph.inputs, graph.outputs))
    return f"({inputs}) => ({outputs})"


def _typed(value: ir.Value) -> str:
    return f"{_type_text(value.dtype, value.shape)} {value.name}"


def _type_text(dtype: ir.DataType | None, shape: ir.Shape | None) -> str:
    kind = dtype.name.lower() if dtype is not None else "undefined"
    if shape is None:
        return f"{kind}[]"
    dims = [str(d) if isinstance(d, int) else str(d.value or "?") for d in shape]
    return f"{kind}[{', '.join(dims)}]" if dims else kind


def _initializer(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return f"{_typed(value)} = {{}}"
    return f"{_type_text(tensor.dtype, value.shape)} {value.name} = {_elements(tensor)}"


def _elements(tensor: ir.TensorProtocol) -> str:
    array = tensor.numpy()
    return "{" + ", ".join(_number(item) for item in array.reshape(-1)) + "}"


def _number(item: Any) -> str:
    if isinstance(item, bytes | str):
        return _quoted(item.decode("utf-8") if isinstance(item, bytes) else item)
    if isinstance(item, np.bool_):
        return str(int(item))
    if isinstance(item, np.floating):
        return str(item)  # the shortest digits that give the same float of this width
    try:
        return str(int(item)) if float(item) == int(item) else str(float(item))
    except (ValueError, OverflowError):  # an extension type's NaN or infinity
        return str(float(item))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _node(node: ir.Node) -> str:
    outputs = ", ".join(value.name or '""' for value in node.outputs)
    inputs = ", ".join((value.name or "") if value is not None else '""' for value in node.inputs)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = _attributes(node.attributes.values())
    return f"{outputs} = {operator}{attributes}({inputs})"


def _attributes(attributes: Iterable[ir.Attr]) -> str:
    parts = [_attribute(item) for item in sorted(attributes, key=lambda item: item.name)]
    return f"<{', '.join(parts)}>" if parts else ""


def _attribute(item: ir.Attr) -> str:
    value: Any = item.value
    match item.type:
        case ir.AttributeType.FLOAT:
            text = str(np.float32(value))
        case ir.AttributeType.FLOATS:
            text = "[" + ", ".join(str(np.float32(v)) for v in value) + "]"
        case ir.AttributeType.STRING:
            text = _quoted(value)
        case ir.AttributeType.STRINGS:
            text = "[" + ", ".join(_quoted(v) for v in value) + "]"
        case ir.AttributeType.INTS:
            text = "[" + ", ".join(str(v) for v in value) + "]"
        case ir.AttributeType.TENSOR:
            text = f"{_type_text(value.dtype, ir.Shape(value.shape))} {_elements(value)}"
        case ir.AttributeType.GRAPH:
            body = " ".join(_node(node) for node in value)
            text = f"{value.name or 'body'} {_signature(value)} {{ {body} }}"
        case _:
            text = str(value)
    return f"{item.name}: {item.type.name.lower()} = {text}"
