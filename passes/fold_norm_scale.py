"""fold-norm-scale: norm gains move into the linears behind, so the norm commutes with rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import (
    add_initializer,
    constant_array,
    name_of,
    replace_value,
    set_constant,
)
from qnpu.compiler.op_traits import Linear, normalized_inputs
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.topology import ResidualStream, discover, input_axis, linears_behind
from qnpu.passes.canonicalize import bias_into_gemm


@dataclass(frozen=True)
class FoldNormScale(Pass):
    """Folds gains and biases of norms into the linears that take their results.

    Before → after, γ, β of shape (H,), W of shape (H, N)::

        MatMul(RMSNormalization(x, γ), W)
            → MatMul(RMSNormalization(x, 1), diag(γ)·W)
        Gemm(LayerNormalization(x, γ, β), W, b)
            → Gemm(RMSNormalization(x, 1), diag(γ)·W, b + βW)

    A LayerNorm becomes an RMSNorm where every source of the residual stream can be centred: with
    W(I - 11ᵀ/H) in the sources the stream's mean is zero, so subtracting it does nothing. Folds in
    float64, stores float32, one weight at a time (quantnpu.md §0).

    Must not fire where a norm's result goes elsewhere than to linears, where a weight has another
    user, or on gains that are one already.
    """

    name: ClassVar[str] = "fold-norm-scale"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        topology = discover(graph)
        if topology is None:
            return 0
        count = _centre(graph, topology.stream)
        for node in list(graph):
            if normalized_inputs(node):
                count += _fold(graph, node)
        return count


def _fold(graph: ir.Graph, norm: ir.Node) -> int:
    linears = linears_behind(norm.outputs[0])
    gain = constant_array(norm.inputs[1])
    if not linears or gain is None or not _own_weights(linears):
        return 0
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    bias_array = constant_array(bias)
    has_bias = bias_array is not None and bool(bias_array.any())
    if bool((gain == 1).all()) and not has_bias:
        return 0
    for linear in linears:
        weight = constant_array(linear.weight)
        if weight is None:
            return 0
        axis = input_axis(linear)
        if has_bias and bias_array is not None:
            extra = np.tensordot(bias_array.astype(np.float64), weight, axes=([0], [axis]))
            _add_bias(graph, linear, extra)
        shape = [1] * weight.ndim
        shape[axis] = -1
        scaled = weight.astype(np.float64) * gain.astype(np.float64).reshape(shape)
        set_constant(linear.weight, scaled.astype(np.float32))
    ones = add_initializer(graph, f"{name_of(norm)}_unit_gain", np.ones(gain.shape, np.float32))
    norm.replace_input_with(1, ones)
    if bias is not None:
        zeros = np.zeros(gain.shape, np.float32)
        norm.replace_input_with(2, add_initializer(graph, f"{name_of(norm)}_no_bias", zeros))
    return 1


def _own_weights(linears: list[Linear]) -> bool:
    """No weight, nor bias, is used by anyone but its linear."""
    constants = [v for linear in linears for v in (linear.weight, linear.bias) if v is not None]
    return all(len(list(v.uses())) == 1 for v in constants) and all(
        linear.bias is not None or len(linear.node.inputs) < 3 for linear in linears
    )


def _add_bias(graph: ir.Graph, linear: Linear, extra: NDArray[np.float64]) -> None:
    """Adds to a linear's bias; a MatMul without one becomes a Gemm with one."""
    if linear.bias is not None:
        old = constant_array(linear.bias)
        if old is not None:
            set_constant(linear.bias, (old.astype(np.float64) + extra).astype(np.float32))
        return
    node, output = linear.node, linear.node.outputs[0]
    bias = add_initializer(graph, f"{name_of(node)}_bias", extra.astype(np.float32))
    if node.op_type == "Gemm":
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        return
    add = ir.node("Add", [output, bias], name=f"{name_of(node)}_add_bias")
    result = add.outputs[0]
    result.name, result.type, result.shape = f"{name_of(output)}_biased", output.type, output.shape
    graph.insert_after(node, add)
    replace_value(graph, output, result)
    add.replace_input_with(0, output)
    bias_into_gemm(graph, add)


def _centre(graph: ir.Graph, stream: ResidualStream) -> int:
    """Turns every LayerNorm on the stream into an RMSNorm; all of them or none."""
    norms = [sink.norm for sink in stream.sinks if sink.norm is not None]
    if stream.blockers or not norms or any(n.op_type != "LayerNormalization" for n in norms):
        return 0
    if not all(sink.norm is not None and _own_weights(list(sink.linears)) for sink in stream.sinks):
        return 0
    for source in stream.sources:
        for value, axis in ((source.weight, source.axis), (source.bias, 0)):
            array = constant_array(value)
            if value is not None and array is not None:
                mean = array.mean(axis=axis, keepdims=True, dtype=np.float64)
                set_constant(value, (array - mean).astype(np.float32))
    for norm in norms:
        _fold(graph, norm)
        _to_rms(graph, norm)
    return len(norms)


def _to_rms(graph: ir.Graph, norm: ir.Node) -> None:
    source, gain = norm.inputs[0], norm.inputs[1]
    attributes: dict[str, Any] = {
        "axis": -1,
        "epsilon": norm.attributes.get_float("epsilon", 1e-5),
    }
    rms = ir.node("RMSNormalization", [source, gain], attributes, name=name_of(norm))
    output, old = rms.outputs[0], norm.outputs[0]
    output.name, output.type, output.shape = f"{name_of(old)}_rms", old.type, old.shape
    graph.insert_before(norm, rms)
    replace_value(graph, old, output)
    graph.remove(norm, safe=True)
