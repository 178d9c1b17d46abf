"""What a target's compiler would find wrong with a graph, as coded diagnostics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.operands import Operand, Operation
from qnpu.compiler.quant_types import widened
from qnpu.compiler.target import Fault, TargetProfile, Verdict
from qnpu.compiler.target_check import NodeVerdict, TargetReport
from qnpu.compiler.target_rules import (
    AccumulatorOverflow,
    ChangedEncoding,
    FloatIsland,
    IgnoredBiasScale,
    ModelTooLarge,
    OpsetAboveLimit,
    RankAboveLimit,
    TargetRule,
    UnknownToProfile,
    UnsharedEncoding,
    UnsupportedAttribute,
    UnsupportedForm,
    UnsupportedGranularity,
    UnsupportedOperator,
    UnsupportedOutputType,
    UnsupportedTypes,
)

_RULES: dict[Fault, type[TargetRule]] = {
    Fault.OPERATOR: UnsupportedOperator,
    Fault.TYPES: UnsupportedTypes,
    Fault.GRANULARITY: UnsupportedGranularity,
    Fault.OUTPUT_TYPE: UnsupportedOutputType,
    Fault.ATTRIBUTE: UnsupportedAttribute,
    Fault.RANK: RankAboveLimit,
    Fault.ENCODINGS: UnsharedEncoding,
    Fault.ISLAND: FloatIsland,
    Fault.CHANGED: ChangedEncoding,
}
_LINEARS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_SCALE_TOLERANCE = 1e-5
_INTEGER_OPS = ("MatMulInteger", "ConvInteger", "com.microsoft.MatMulIntegerToFloat")


def target_faults(model: ir.Model, report: TargetReport) -> list[Diagnostic]:
    """Every fault of a graph on one target: of the graph as a whole, then node by node.

    Args:
        model: the one that was judged.
        report: of ``check_target``.
    """
    profile = report.profile
    return [
        *_graph_faults(model, report),
        *chain.from_iterable(_node_faults(node, profile) for node in report.nodes),
    ]


def _graph_faults(model: ir.Model, report: TargetReport) -> Iterator[Diagnostic]:
    profile, limits = report.profile, report.profile.graph
    opset = model.graph.opset_imports.get("", 0)
    if limits.opset_max is not None and opset > limits.opset_max:
        yield OpsetAboveLimit(opset, limits.opset_max, profile.id).at()
    form = form_of(report)
    if limits.forms and form and form not in limits.forms:
        yield UnsupportedForm(form, " or ".join(limits.forms), profile.id).at()
    if limits.file_bytes_max is not None:
        size = weight_bytes(model.graph)
        if size > limits.file_bytes_max:
            megabytes, most = size // 10**6, limits.file_bytes_max // 10**6
            yield ModelTooLarge(megabytes, most, profile.id).at()


def form_of(report: TargetReport) -> str:
    """How a quantized graph is written: ``qdq``, ``qlinear``, ``integer``; else empty."""
    operands = chain.from_iterable(
        (*node.operation.present, *node.operation.outputs) for node in report.nodes
    )
    if any(operand.quantized for operand in operands):
        return "qdq"
    names = {node.operation.op_type.rpartition(".")[2] for node in report.nodes}
    if any(name.startswith("QLinear") for name in names):
        return "qlinear"
    return "integer" if names & set(_INTEGER_OPS) else ""


def weight_bytes(graph: ir.Graph) -> int:
    """Bytes of all initializers, 4-bit ones packed."""
    tensors = {id(v.const_value): v.const_value for v in graph.initializers.values()}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


def _node_faults(node: NodeVerdict, profile: TargetProfile) -> Iterator[Diagnostic]:
    operation = node.operation
    name = name_of(operation.node)
    if node.verdict is not Verdict.INT:
        rule = UnknownToProfile if node.verdict is Verdict.UNKNOWN else _RULES[node.fault]
        where = name_of(operation.outputs[0].value) if operation.outputs else ""
        yield rule(str(operation), profile.id, node.does, node.fix).at(node=name, value=where)
    if operation.op_type not in _LINEARS:
        return
    factor = bias_factor(operation) if profile.bias.derived else None
    if factor is not None and operation.inputs[2] is not None:
        place = name_of(operation.inputs[2].value)
        yield IgnoredBiasScale(factor, profile.id).at(node=name, value=place)
    bits = profile.graph.accumulator_bits
    needed = accumulator_bits(operation) if bits else None
    if needed is not None and needed > bits:
        yield AccumulatorOverflow(bits, needed, profile.id).at(node=name)


def bias_factor(operation: Operation) -> float | None:
    """How far the scale of a linear's int32 bias is from input times weight; None where it agrees,
    or there is no such bias."""
    bias = operation.inputs[2] if len(operation.inputs) > 2 else None
    if bias is None or operation.op_type not in _LINEARS:
        return None
    factors = [operand.scale for operand in operation.inputs[:2] if operand is not None]
    scales = [scale.astype(np.float64).reshape(-1) for scale in factors if scale is not None]
    if bias.dtype != "s32" or bias.scale is None or len(scales) != 2:
        return None
    declared = bias.scale.astype(np.float64).reshape(-1)
    if len({scale.size for scale in (*scales, declared)} - {1}) > 1:
        return None
    product = scales[0] * scales[1]
    ratio = product / declared
    if bool(np.allclose(ratio, 1.0, rtol=_SCALE_TOLERANCE, atol=0)):
        return None
    return float(max(ratio.max(), 1.0 / ratio.min()))


def accumulator_bits(operation: Operation) -> float | None:
    """Bits that a signed accumulator needs for the worst input, from the actual weights.

    The bound is max over channels of Σ|w - z_w| · max|x - z_x| + |bias|, in LSB.

    Returns:
        None for a node that is no linear with constant, quantized weight.
    """
    sides = [operand for operand in operation.inputs[:2] if operand is not None]
    weights = [operand for operand in sides if operand.constant and operand.quantized]
    inputs = [operand for operand in sides if not operand.constant and operand.quantized]
    if len(weights) != 1 or len(inputs) != 1 or operation.op_type not in _LINEARS:
        return None
    codes, zero = constant_array(weights[0].codes), weights[0].zero_point
    swing = _swing(inputs[0])
    if codes is None or zero is None or swing is None:
        return None
    axis = channel_axis(operation, weights[0])
    rows = np.moveaxis(widened(codes).astype(np.int32, copy=False), axis, 0).reshape(
        codes.shape[axis], -1
    )
    offset = zero.reshape(-1, 1) if zero.size in (1, len(rows)) else np.zeros((1, 1), np.int64)
    sums = np.abs(rows - offset if offset.any() else rows).sum(axis=1, dtype=np.int64)
    bound = sums.astype(np.float64) * swing
    bias = operation.inputs[2] if len(operation.inputs) > 2 else None
    added = constant_array(bias.codes) if bias is not None and bias.codes is not None else None
    if added is not None and added.size in (1, len(bound)):
        bound += np.abs(added.astype(np.float64)).reshape(-1)
    return float(np.log2(bound.max() + 1)) + 1 if bound.size else None


def channel_axis(operation: Operation, weight: Operand) -> int:
    """The axis of a linear's weight that counts output channels."""
    rank = weight.rank or 2
    if operation.op_type == "Conv":
        return 0
    if operation.op_type == "Gemm" and operation.node.attributes.get_int("transB", 0) == 1:
        return 0
    return 1 if operation.op_type == "ConvTranspose" else rank - 1


def _swing(operand: Operand) -> float | None:
    """Largest |code - zero point| that an input can have."""
    if operand.zero_point is None or operand.dtype[1:] not in ("4", "8", "16"):
        return None
    bits = int(operand.dtype[1:])
    low, high = (
        (0, 2**bits - 1) if operand.dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    zero = operand.zero_point.reshape(-1)
    return float(max(np.abs(low - zero).max(), np.abs(high - zero).max()))
