"""What a graph may hold at each stage; checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.integer_only import Fault, float_faults
from qnpu.compiler.op_traits import (
    float_values,
    is_float,
    is_layout_copy,
    is_parameter,
    is_scale,
    layout_inputs,
)
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.rules import StageViolation

_QDQ_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MAX_FAULTS = 20


def verify_stage(compilation: Compilation) -> None:
    """Checks the graph and the side tables against the stage the last pass claims.

    Raises:
        DiagnosticError: QN903, the first 20 faults.
    """
    stage = compilation.stage
    faults = islice(_all_faults(compilation), _MAX_FAULTS)
    diagnostics: list[Diagnostic] = [
        StageViolation(stage.value, reason).at(node=node, value=value)
        for reason, node, value in faults
    ]
    if diagnostics:
        raise DiagnosticError(diagnostics)


def _all_faults(compilation: Compilation) -> Iterator[Fault]:
    yield from _structure(compilation.graph)
    for check in _CHECKS[compilation.stage]:
        yield from check(compilation)


def _structure(graph: ir.Graph) -> Iterator[Fault]:
    """Names are unique, each value is made before it is used."""
    seen: set[str] = set()
    ready: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    for value in ready:
        seen.add(name_of(value))
    for node in graph:
        for operand in node.inputs:
            if operand is not None and operand not in ready:
                yield f"`{operand.name}` is used before it is made", name_of(node), name_of(operand)
        for value in node.outputs:
            ready.add(value)
            if value.name and value.name in seen:
                yield "two values have this name", name_of(node), value.name
            seen.add(name_of(value))


def _no_qdq(compilation: Compilation) -> Iterator[Fault]:
    for node in compilation.graph:
        if node.op_type in _QDQ_OPS:
            yield f"`{node.op_type}` is already there", name_of(node), ""


def _planned(compilation: Compilation) -> Iterator[Fault]:
    for node in compilation.graph:
        for value in node.outputs:
            if value.name and value.dtype is None:
                yield "type is not known, so it may be a float", name_of(node), value.name
    for value in float_values(compilation.graph):
        if name_of(value) not in compilation.bit_plan:
            yield "float tensor is not in the bit plan", "", name_of(value)


def _encoded(compilation: Compilation) -> Iterator[Fault]:
    plan = compilation.bit_plan
    for value in float_values(compilation.graph):
        name = name_of(value)
        if name in plan and plan[name].bits < 32 and not is_layout_copy(value):
            if name not in compilation.encodings:
                yield "float tensor has no encoding", "", name
            elif compilation.encodings[name].spec != plan[name]:
                yield "encoding is not of the planned type", "", name


def _every_edge_quantized(compilation: Compilation) -> Iterator[Fault]:
    graph = compilation.graph
    for node in graph:
        if node.op_type == "DequantizeLinear":
            continue
        if node.op_type != "QuantizeLinear":
            for index, value in enumerate(node.inputs):
                if value is None or not is_float(value) or is_parameter(node, index):
                    continue
                if not (_is_dequantized(value) or is_scale(value)):
                    yield (
                        "computes on a float that is not dequantized",
                        name_of(node),
                        str(value.name),
                    )
        for value in node.outputs:
            users = value.consumers()
            if is_float(value) and any(user.op_type != "QuantizeLinear" for user in users):
                yield (
                    "float result is used without being quantized",
                    name_of(node),
                    str(value.name),
                )
    for value in graph.outputs:
        computed = value.producer() is not None  # else an input or a constant, handed through
        if is_float(value) and computed and not _is_dequantized(value):
            yield "float output is not dequantized", "", name_of(value)


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _layout_shares(compilation: Compilation) -> Iterator[Fault]:
    """Around a layout operator all encodings are the same numbers."""
    for node in compilation.graph:
        tied = layout_inputs(node)
        if not tied:
            continue
        encodings = [_parameters_of(v.producer()) for v in tied]
        for output in node.outputs:
            encodings += [
                _parameters_of(user)
                for user in output.consumers()
                if user.op_type == "QuantizeLinear"
            ]
        if any(encoding != encodings[0] for encoding in encodings):
            yield "layout operator changes the encoding", name_of(node), ""


def _parameters_of(node: ir.Node | None) -> tuple[bytes, ...] | None:
    if node is None or node.op_type not in _QDQ_OPS:
        return None
    tensors = [v.const_value for v in node.inputs[1:] if v is not None]
    return tuple(tensor.tobytes() for tensor in tensors if tensor is not None)


def _integers_alone(compilation: Compilation) -> Iterator[Fault]:
    yield from float_faults(compilation.model)


Check = Callable[[Compilation], Iterator[Fault]]

_CHECKS: dict[Stage, tuple[Check, ...]] = {
    Stage.FLOAT: (_no_qdq,),
    Stage.PLANNED: (_no_qdq, _planned),
    Stage.ENCODED: (_no_qdq, _planned, _encoded),
    Stage.QDQ: (_every_edge_quantized, _layout_shares),
    Stage.INTEGER: (_integers_alone,),
}
