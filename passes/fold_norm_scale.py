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
    last_dimension,
    name_of,
    replace_value,
    set_constant,
)
from qnpu.compiler.op_traits import Linear
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.topology import (
    ResidualStream,
    as_feature_norm,
    discover,
    has_foreign_bias,
    has_one_role,
    input_axis,
    is_tied,
    linears_behind,
    own_biases,
    untie,
)
from qnpu.passes.canonicalize import OPSET, bias_into_gemm


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
    float64, stores the weight's own type, one weight at a time (quantnpu.md §0). A linear tied to
    the embedding gets a weight of its own first, linears that share a bias get one each.

    Must not fire where a norm's result goes elsewhere than to linears or is not over the last axis
    alone, where a weight or a bias to be changed has another user, where a Gemm scales what a bias
    would have to pass (alpha, beta), or on gains that are one already.
    """

    name: ClassVar[str] = "fold-norm-scale"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        topology = discover(graph)
        if topology is None:
            return 0
        count = own_biases(graph)
        if count:  # biases that blocked the stream are free now
            topology = discover(graph) or topology
        count += _centre(graph, topology.stream)
        for node in list(graph):
            count += _fold(graph, node)
        return count


@dataclass(frozen=True, slots=True)
class _Affine:
    """What a norm does after normalizing, where the linears behind can do it.

    Attributes:
        gain: of shape (H,).
        bias: likewise, or None where it is zero.
        linears: their weights, and biases where needed, may change.
    """

    gain: NDArray[Any]
    bias: NDArray[Any] | None
    linears: list[Linear]


def _affine(norm: ir.Node) -> _Affine | None:
    """None where the gain and bias cannot be folded."""
    source = as_feature_norm(norm)
    linears = linears_behind(norm.outputs[0]) if source is not None else None
    if source is None or not linears:
        return None
    gain = constant_array(norm.inputs[1])
    bias = constant_array(norm.inputs[2]) if _bias_of(norm) is not None else None
    if gain is None or gain.shape != (last_dimension(source),):
        return None
    if _bias_of(norm) is not None and (bias is None or bias.shape != gain.shape):
        return None
    if bias is not None and not bias.any():
        bias = None
    if not all(_may_change(linear, with_bias=bias is not None) for linear in linears):
        return None
    return _Affine(gain, bias, linears)


def _bias_of(norm: ir.Node) -> ir.Value | None:
    return norm.inputs[2] if len(norm.inputs) > 2 else None


def _may_change(linear: Linear, *, with_bias: bool) -> bool:
    """The weight, and where needed the bias, serve this linear alone."""
    if not (has_one_role(linear.weight) or is_tied(linear)):
        return False
    if not with_bias:
        return True
    scales = [linear.node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    own_bias = linear.bias is None or has_one_role(linear.bias)
    return own_bias and not has_foreign_bias(linear) and scales == [1.0, 1.0]


def _fold(graph: ir.Graph, norm: ir.Node) -> int:
    affine = _affine(norm)
    if affine is None or (affine.bias is None and bool((affine.gain == 1).all())):
        return 0
    gain = affine.gain.astype(np.float64)
    for tied in affine.linears:
        linear = untie(graph, tied)
        weight = constant_array(linear.weight)
        if weight is None:
            raise ValueError(f"initializer {linear.weight.name} has no data")
        axis = input_axis(linear)
        if affine.bias is not None:
            extra = np.tensordot(affine.bias.astype(np.float64), weight, axes=([0], [axis]))
            _add_bias(graph, linear, extra.astype(weight.dtype))
        shape = [1] * weight.ndim
        shape[axis] = -1
        # in double precision, yet without a double of a whole lm_head
        scaled = np.empty(weight.shape, weight.dtype)
        np.multiply(weight, gain.reshape(shape), out=scaled, dtype=np.float64, casting="unsafe")
        set_constant(linear.weight, scaled)
    _replace_parameter(graph, norm, 1, "unit_gain", np.ones_like(affine.gain))
    if _bias_of(norm) is not None:
        _replace_parameter(graph, norm, 2, "no_bias", np.zeros_like(affine.gain))
    return 1


def _replace_parameter(
    graph: ir.Graph, norm: ir.Node, index: int, name: str, array: NDArray[Any]
) -> None:
    """Sets an input of a norm; the old constant goes where no one else has use for it."""
    old = norm.inputs[index]
    norm.replace_input_with(index, add_initializer(graph, f"{name_of(norm)}_{name}", array))
    _drop_unused(graph, old)


def _drop_unused(graph: ir.Graph, value: ir.Value | None) -> None:
    if value is None or not value.is_initializer() or value.uses():
        return
    if not (value.is_graph_input() or value.is_graph_output()):
        del graph.initializers[name_of(value)]


def _add_bias(graph: ir.Graph, linear: Linear, extra: NDArray[Any]) -> None:
    """Adds to a linear's bias; a MatMul without one becomes a Gemm with one."""
    if linear.bias is not None:
        old = constant_array(linear.bias)
        if old is not None:
            total = old.astype(np.float64) + extra
            set_constant(linear.bias, total.astype(old.dtype))
        return
    node, output = linear.node, linear.node.outputs[0]
    bias = add_initializer(graph, f"{name_of(node)}_bias", extra)
    if node.op_type == "Gemm":
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        return
    add = ir.node("Add", [output, bias], name=f"{name_of(node)}_add_bias")
    result, name = add.outputs[0], name_of(output)
    result.name, result.type, result.shape = f"{name}_biased", output.type, output.shape
    graph.insert_after(node, add)
    replace_value(graph, output, result)
    if output.name is None:  # the graph output keeps its name, so the product needs another
        output.name = f"{name}_unbiased"
    add.replace_input_with(0, output)
    bias_into_gemm(graph, add)


def _centre(graph: ir.Graph, stream: ResidualStream) -> int:
    """Turns every LayerNorm on the stream into an RMSNorm; all of them or none."""
    norms = [sink.norm for sink in stream.sinks if sink.norm is not None]
    if stream.blockers or not norms or any(n.op_type != "LayerNormalization" for n in norms):
        return 0
    if len(norms) < len(stream.sinks) or any(_affine(norm) is None for norm in norms):
        return 0
    if graph.opset_imports.get("", 0) < OPSET:  # the first with RMSNormalization
        return 0
    for sink in stream.sinks:
        for linear in sink.linears:
            untie(graph, linear)
    for source in stream.sources:
        for value, axis in ((source.weight, source.axis), (source.bias, 0)):
            array = constant_array(value)
            if value is not None and array is not None:
                mean = array.mean(axis=axis, keepdims=True, dtype=np.float64)
                set_constant(value, (array - mean).astype(array.dtype))
    for norm in norms:
        _fold(graph, norm)
        _to_rms(graph, norm)
    return len(norms)


def _to_rms(graph: ir.Graph, norm: ir.Node) -> None:
    source, gain, bias = norm.inputs[0], norm.inputs[1], _bias_of(norm)
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
    _drop_unused(graph, bias)
