"""lower-nonlinear: softmax, norms and functions of one number as integer functions of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.integer_arguments import norm_arguments, softmax_arguments
from qnpu.compiler.integer_edit import IntegerEditor, stored_type
from qnpu.compiler.integer_math import NormShape, norm_numbers, softmax_numbers
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.operands import input_operand
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quant_types import Encoding, FloatArray
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    real_constant,
)

# Functions of one number, whose every value a table holds.
_UNARY = frozenset(
    {
        "Abs",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mish",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)


@dataclass(frozen=True)
class LowerNonlinear(Pass):
    """Puts integer functions in the place of operators that are no sums of products.

    Before → after::

        DQ → Softmax → Q              qnpu.IntSoftmax
        DQ → RMSNormalization → Q     qnpu.IntRMSNorm
        DQ → LayerNormalization → Q   qnpu.IntLayerNorm
        DQ → Sigmoid → Q              qnpu.IntLookup (Tanh, Gelu, Pow with a constant, …)
        DQ(x) · DQ(f(x)) → Q          qnpu.IntLookup of x alone

    Each takes codes and gives codes. Softmax and norms are formulas in 64-bit integers
    (``qnpu.compiler.integer_functions``; quantnpu.md §6), within 1 LSB of the exact result.
    Functions of one number become tables of all 2^b results, exactly rounded: 256 or 65,536
    entries.

    Must not fire where an input has several scales or none, a result is read as a float, or a
    norm's gains are computed.
    """

    name: ClassVar[str] = "lower-nonlinear"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        for node in list(model.graph):
            lower = _lowering(node)
            operand = coded_input(node.inputs[0]) if lower is not None and node.inputs else None
            results = coded_results(node.outputs[0]) if operand is not None else None
            if lower is None or operand is None or not results:
                continue
            made = [lower(editor, node, operand, result) for result in results]
            count += editor.take_over_all([result.codes for result in results], made)
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


Lowering = Callable[[IntegerEditor, ir.Node, CodedInput, CodedResult], ir.Value | None]


def _lowering(node: ir.Node) -> Lowering | None:
    if not is_standard(node):
        return None
    if node.op_type in _UNARY:
        return _lookup
    return {
        "Mul": _lookup_of_product,
        "Softmax": _softmax,
        "RMSNormalization": _rms_norm,
        "LayerNormalization": _layer_norm,
    }.get(node.op_type)


def _softmax(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value:
    spec = result.encoding.spec
    numbers = softmax_numbers(operand.scale, operand.encoding.spec.bits, result.encoding)
    axis = node.attributes.get_int("axis", -1)
    arguments = softmax_arguments(numbers, axis, result.zero_point, spec)
    return editor.call("IntSoftmax", [operand.codes], arguments, result.codes, before=node)


def _rms_norm(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value | None:
    axes, gains = _axes(node), _gains(node)
    if gains is None or axes is None:
        return None
    norm = NormShape(
        features=axes[1],
        bits=operand.encoding.spec.bits,
        scale=operand.scale,
        epsilon=node.attributes.get_float("epsilon", 1e-5),
        centred=False,
    )
    numbers = norm_numbers(norm, gains, result.encoding)
    arguments = norm_arguments(
        numbers, axes[0], result.zero_point, result.encoding.spec, zero=operand.zero_point
    )
    return editor.call("IntRMSNorm", [operand.codes], arguments, result.codes, before=node)


def _layer_norm(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value | None:
    axes, gains = _axes(node), _gains(node)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = real_constant(input_operand(node.inputs[2]))
        if bias is None:
            return None
    if gains is None or axes is None or operand.encoding.spec.signed or len(node.outputs) > 1:
        return None
    norm = NormShape(
        features=axes[1],
        bits=operand.encoding.spec.bits,
        scale=operand.scale,
        epsilon=node.attributes.get_float("epsilon", 1e-5),
        centred=True,
    )
    numbers = norm_numbers(norm, gains, result.encoding, bias)
    more = {"finer": numbers.finer, "size": axes[1], "half": axes[1] // 2}
    arguments = norm_arguments(numbers, axes[0], result.zero_point, result.encoding.spec, **more)
    return editor.call("IntLayerNorm", [operand.codes], arguments, result.codes, before=node)


def _axes(node: ir.Node) -> tuple[int, int] | None:
    """How many of the last axes a norm runs over, and how many elements they have."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    rank = len(value.shape)
    axis = node.attributes.get_int("axis", -1) % rank
    sizes = [size for size in value.shape[axis:] if isinstance(size, int)]
    return (rank - axis, int(np.prod(sizes))) if len(sizes) == rank - axis else None


def _gains(node: ir.Node) -> tuple[NDArray[np.int64], float] | None:
    """Codes of a norm's gains less their zero point, and their scale; (1, 1.0) without gains."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return np.array(1, np.int64), 1.0
    gains = coded_input(node.inputs[1])
    if gains is None or not gains.constant or gains.codes.const_value is None:
        return None
    codes = gains.codes.const_value.numpy().astype(np.int64) - gains.zero_point
    if (codes == codes.reshape(-1)[0]).all():
        codes = codes.reshape(-1)[0]
    return np.asarray(codes), gains.scale


def _lookup(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value | None:
    if operand.constant or any(v is not None and not _is_scalar(v) for v in node.inputs[1:]):
        return None
    real = _function_values(node, operand)
    return _table(editor, node, operand.codes, real, result)


def _lookup_of_product(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value | None:
    """A product of a number and a function of it, or of two functions of it, is one as well."""
    factors = [coded_input(value) for value in node.inputs]
    views = [_as_function(factor) for factor in factors if factor is not None]
    if len(views) < 2 or views[0][0] is not views[1][0] or "IntLookup" not in _made_by(factors):
        return None
    return _table(editor, node, views[0][0], views[0][1] * views[1][1], result)


def _table(
    editor: IntegerEditor, node: ir.Node, codes: ir.Value, real: FloatArray, result: CodedResult
) -> ir.Value:
    """A look-up of what a function is for each code, rounded half up."""
    spec = result.encoding.spec
    nearest = np.floor(real / result.scale + 0.5) + result.zero_point
    kind = stored_type(spec.dtype).numpy()
    table = np.clip(nearest, spec.q_min, spec.q_max).astype(kind)
    return editor.call("IntLookup", [codes], {"table": table}, result.codes, before=node)


def _made_by(factors: Sequence[CodedInput | None]) -> set[str]:
    makers = [factor.codes.producer() for factor in factors if factor is not None]
    return {maker.op_type for maker in makers if maker is not None}


def _as_function(factor: CodedInput) -> tuple[ir.Value, FloatArray]:
    """Codes, and what a factor is for each of them, real: of a table's result those it looks up."""
    maker = factor.codes.producer()
    table = constant_array(maker.inputs[1]) if maker and maker.op_type == "IntLookup" else None
    if maker is not None and table is not None and maker.inputs[0] is not None:
        return maker.inputs[0], (table.astype(np.int64) - factor.zero_point) * factor.scale
    return factor.codes, _numbers(factor.encoding)


def _numbers(encoding: Encoding) -> FloatArray:
    """What each code stands for, real; negative codes come last."""
    codes = np.arange(1 << encoding.spec.bits)
    if encoding.spec.signed:
        half = 1 << (encoding.spec.bits - 1)
        codes = np.where(codes >= half, codes - 2 * half, codes)
    found: FloatArray = (codes - int(encoding.zero_point)) * float(encoding.scale)
    return found


def _is_scalar(value: ir.Value) -> bool:
    constant = real_constant(input_operand(value))
    if constant is None and value.const_value is not None:
        constant = value.const_value.numpy()
    return constant is not None and constant.size == 1


def _function_values(node: ir.Node, operand: CodedInput) -> NDArray[np.float64]:
    """What a node makes of the number that each code stands for; negative codes come last."""
    import torch  # noqa: PLC0415

    from qnpu.runtime_check.torch_executor import TorchExecutor  # noqa: PLC0415

    real = _numbers(operand.encoding)
    inputs = {name_of(node.inputs[0]): torch.from_numpy(real)} if node.inputs[0] else {}
    for value in node.inputs[1:]:
        constant = real_constant(input_operand(value)) if value is not None else None
        if value is not None and constant is not None:
            number = float(
                np.float32(constant.item())
            )  # as DequantizeLinear: an exponent of 3 is 3
            inputs[name_of(value)] = torch.tensor(number, dtype=torch.float64)
    output = name_of(node.outputs[0])
    executor = TorchExecutor([node], dtype=torch.float64)
    found: NDArray[np.float64] = executor.run(inputs, [output])[output].numpy()
    return found
