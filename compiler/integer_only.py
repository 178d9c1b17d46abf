"""Proof that an integer graph holds no float: the type of every tensor, inferred, not believed.

Integer functions are inlined first, so tensors inside their bodies are looked at for each call with
the types that this call gives them. Declared types of results are dropped before inference: what
is left has followed from inputs, initializers and operators alone.

Scales of QLinearMatMul, QLinearMul and QLinearSigmoid are floats by definition. They may be, where
they are initializers that nothing else takes: no float is computed of them outside of those
operators. What these three give has the type of its zero point, their last input, also by
definition: ONNX infers no types for operators of com.microsoft.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import is_scale, scale_inputs

Fault = tuple[str, str, str]
"""Reason, node name, value name."""

_CALLER = "qnpu.caller"


def float_faults(model: ir.Model) -> Iterator[Fault]:
    """Every tensor that is a float, or of which nobody can say what it is.

    Inputs and outputs count, and so do nested graphs; initializers that nothing uses do not.

    Args:
        model: left as it is; weights are neither copied nor read.

    Yields:
        For a tensor inside a function's body the node is the one that calls the function.
    """
    typed = _inlined(model)
    for graph in typed.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            used = not value.is_initializer() or value.uses() or value.is_graph_output()
            if used and not is_scale(value):
                yield from _faults_of(value, "")
        for node in graph:
            where = node.metadata_props.get(_CALLER, name_of(node))
            for value in node.outputs:
                if value.name:
                    yield from _faults_of(value, where)


def _faults_of(value: ir.Value, node: str) -> Iterator[Fault]:
    if value.dtype is None:
        yield "type is not known, so it may be a float", node, name_of(value)
    elif not (value.dtype.is_integer() or value.dtype in _NO_NUMBERS):
        yield f"holds floats, {value.dtype.name}", node, name_of(value)


_NO_NUMBERS = (ir.DataType.BOOL, ir.DataType.STRING)


def _inlined(model: ir.Model) -> ir.Model:
    """A copy without functions, typed; inlined nodes know who called them."""
    copy = model.clone()
    for graph in copy.graphs():
        for node in graph:
            node.metadata_props[_CALLER] = name_of(node)
            given = node.inputs[-1] if scale_inputs(node) else None
            for value in node.outputs:
                value.type, value.shape = None if given is None else given.type, None
    common.InlinePass()(copy)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy)
    return copy
