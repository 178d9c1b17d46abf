"""lower-nonlinear: softmax, norms and functions of one number as integer functions of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import (
    lookup_pair_arguments,
    norm_arguments,
    short_norm_arguments,
    softmax_arguments,
)
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_math import (
    NormShape,
    norm_numbers,
    short_norm_numbers,
    softmax_numbers,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.operands import input_operand
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.quant_types import FloatArray
from qnpu.compiler.quantized_operators import DOMAIN, is_exact_sigmoid, product_ratio, sigmoid
from qnpu.compiler.quantized_results import (
    CodedInput,
    CodedResult,
    coded_input,
    coded_results,
    real_constant,
    stored_type,
    table_order,
)

_BYTES = frozenset({ir.DataType.UINT8, ir.DataType.INT8})
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
        DQ → RMSNormalization → Q     qnpu.IntRMSNorm; to 8 bits: qnpu.IntRMSNormShort
        DQ → LayerNormalization → Q   qnpu.IntLayerNorm
        DQ → Sigmoid → Q              qnpu.IntLookup (Tanh, Gelu, Pow with a constant, …)
        DQ(x) · DQ(f(x)) → Q          qnpu.IntLookup of x alone
        DQ(x) · DQ(f(y)) → Q          qnpu.IntLookupPair, where x and y have 8 bits
        DQ(x) · DQ(y) → Q             QLinearMul and QLinearSigmoid, of 8 bits and for ``cpu`` VNNI

    Each takes codes and gives codes. Softmax and norms are formulas in 64-bit integers
    (``qnpu.compiler.integer_functions``; quantnpu.md §6), within 1 LSB of the exact result.
    Functions of one number become tables of all 2^b results, exactly rounded: 256 or 65,536
    entries; so do products of two 8-bit numbers, or of what was looked up for such. Operators of
    ONNX Runtime's own take the place of tables where they are faster and give the same codes, which
    is tried on all of them (``qnpu.compiler.quantized_operators``).

    Must not fire where an input has several scales or none, a result is read as a float, or a
    norm's gains are computed.
    """

    name: ClassVar[str] = "lower-nonlinear"
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ

    cpu: Cpu = Cpu.ANY

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model, self.cpu), 0
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
    spec, zero_point = result.encoding.spec, result.zero_point
    numbers = short_norm_numbers(norm, gains, result.encoding)
    if numbers is not None and axes[0] == 1:
        arguments = short_norm_arguments(numbers, operand.zero_point, zero_point, spec)
        return editor.call("IntRMSNormShort", [operand.codes], arguments, result.codes, before=node)
    numbers = norm_numbers(norm, gains, result.encoding)
    arguments = norm_arguments(numbers, axes[0], zero_point, spec, zero=operand.zero_point)
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
    bytes_alone = node.op_type == "Sigmoid" and _has_bytes(editor, operand, result)
    if bytes_alone and is_exact_sigmoid(operand, result):
        scales = [operand.scale, result.scale]
        return _quantized(editor, "QLinearSigmoid", node, [operand], result, scales)
    table = result.rounded(_function_values(node, operand) / result.scale)
    return editor.lookup(operand.codes, table, result.codes, before=node)


def _lookup_of_product(
    editor: IntegerEditor, node: ir.Node, operand: CodedInput, result: CodedResult
) -> ir.Value | None:
    """A product of functions of one number is a function of it; of two of 8 bits, of the pair."""
    factors = [_Function.of(value) for value in node.inputs]
    one, other = factors if len(factors) == 2 else (None, None)
    if one is None or other is None:
        return None
    of_one = one.codes is other.codes
    if of_one and not (one.looked_up or other.looked_up):
        return None
    operands = [item for value in node.inputs if (item := coded_input(value)) is not None]
    by_table = [item.codes.producer() for item in operands]
    one_table = of_one and any(maker and maker.op_type == "IntLookup" for maker in by_table)
    if not one_table and _has_bytes(editor, *operands, result):
        ratio = product_ratio(operands[0], operands[1], result)
        if ratio is not None:
            scales = [float(ratio), 1.0, 1.0]
            return _quantized(editor, "QLinearMul", node, operands, result, scales)
    if of_one:
        table = result.rounded(one.real * other.real / result.scale)
        return editor.lookup(one.codes, table, result.codes, before=node)
    shape = static_shape(one.codes)
    if shape is None or static_shape(other.codes) != shape or len(one.real) + len(other.real) > 512:
        return None
    table = np.empty(1 << 16, stored_type(result.encoding.spec.dtype).numpy())
    places = (256 * one.numbers[:, None] + other.numbers) % len(table)
    table[places] = result.rounded(np.outer(one.real, other.real) / result.scale)
    arguments = lookup_pair_arguments(table, prod(shape))
    return editor.call(
        "IntLookupPair", [one.codes, other.codes], arguments, result.codes, before=node
    )


def _has_bytes(editor: IntegerEditor, *items: CodedInput | CodedResult) -> bool:
    """True where operators of ONNX Runtime's own take and give such codes, and may be used."""
    kinds = {item.encoding.spec.dtype for item in items}
    return editor.cpu is Cpu.VNNI and len(kinds) == 1 and kinds <= _BYTES


def _quantized(
    editor: IntegerEditor,
    op_type: str,
    node: ir.Node,
    operands: Sequence[CodedInput],
    result: CodedResult,
    scales: Sequence[float],
) -> ir.Value:
    """An operator of ONNX Runtime's own: codes, scale and zero point of each operand, then of y."""
    ends: list[CodedInput | CodedResult] = [*operands, result]
    inputs: list[ir.Value] = []
    for item, scale in zip(ends, scales, strict=True):
        zero_point = editor.zero_point(item.zero_point, item.codes)
        taken = [] if item is result else [item.codes]
        inputs += [*taken, editor.scale(np.array(scale, np.float32)), zero_point]
    return editor.codes(op_type, inputs, result.codes, before=node, domain=DOMAIN)


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """A factor as a function of codes: of itself, or of those that it was looked up for.

    Attributes:
        codes: the latter.
        numbers: all that they can be, in the order of a table.
        real: what the factor is for each of them.
        looked_up: a table or a QLinearSigmoid is behind it.
    """

    codes: ir.Value
    numbers: NDArray[np.int64]
    real: FloatArray
    looked_up: bool

    @classmethod
    def of(cls, value: ir.Value | None) -> _Function | None:
        factor = coded_input(value)
        if factor is None or factor.constant:
            return None
        maker = factor.codes.producer()
        table = _table_of(maker, factor) if maker is not None else None
        if maker is None or table is None or maker.inputs[0] is None:
            return cls(factor.codes, factor.table_order, factor.numbers * factor.scale, False)
        real = (table.astype(np.int64) - factor.zero_point) * factor.scale
        kind = maker.inputs[0].dtype
        codes = table_order(len(table), signed=kind is not None and kind.is_signed())
        return cls(maker.inputs[0], codes, real, True)


def _table_of(maker: ir.Node, factor: CodedInput) -> NDArray[Any] | None:
    """The codes of a factor for each code that its maker takes, where it is a function of that."""
    if maker.op_type == "IntLookup":
        return constant_array(maker.inputs[1])
    if maker.op_type != "QLinearSigmoid":
        return None
    scale, zero_point = map(constant_array, maker.inputs[1:3])
    if scale is None or zero_point is None:
        return None
    spec = factor.encoding.spec
    numbers = table_order(1 << spec.bits, signed=spec.signed) - int(zero_point)
    nearest = np.rint(sigmoid(numbers * float(scale)) / factor.scale)
    table: NDArray[Any] = np.clip(nearest + factor.zero_point, spec.q_min, spec.q_max)
    return table


def _is_scalar(value: ir.Value) -> bool:
    constant = real_constant(input_operand(value))
    if constant is None and value.const_value is not None:
        constant = value.const_value.numpy()
    return constant is not None and constant.size == 1


def _function_values(node: ir.Node, operand: CodedInput) -> NDArray[np.float64]:
    """What a node makes of the number that each code stands for; negative codes come last."""
    import torch  # noqa: PLC0415

    from qnpu.runtime_check.torch_executor import TorchExecutor  # noqa: PLC0415

    real = operand.numbers * operand.scale
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
