"""Small Q/DQ graphs written down as data, and the families of operations they come from.

A ``Case`` is a chain of ONNX operations whose operands and results carry an encoding or none. It
builds into one ONNX model, always the same: codes of constants are seeded by the case itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Shape = tuple[int, ...]

DTYPES = {
    "u2": TensorProto.UINT2,
    "s2": TensorProto.INT2,
    "u4": TensorProto.UINT4,
    "s4": TensorProto.INT4,
    "u8": TensorProto.UINT8,
    "s8": TensorProto.INT8,
    "u16": TensorProto.UINT16,
    "s16": TensorProto.INT16,
    "s32": TensorProto.INT32,
}
"""Quantized types by short name; u is asymmetric about the middle code unless told."""

PLAIN = {
    "raw_u8": TensorProto.UINT8,  # codes of integer operations
    "raw_s8": TensorProto.INT8,
    "f32": TensorProto.FLOAT,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
"""Types without an encoding."""

SCALES = {
    "u2": 0.5, "s2": 0.5, "u4": 0.1, "s4": 0.1, "u8": 0.02, "s8": 0.02,
    "u16": 1e-4, "s16": 1e-4, "s32": 1e-6,
}  # fmt: skip


def code_range(dtype: str) -> tuple[int, int]:
    """Lowest and highest code of a quantized type."""
    bits = int(dtype[1:])
    return (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Operand:
    """A graph input, a constant, or (as an output) the encoding that a result gets.

    Attributes:
        dtype: key of ``DTYPES`` for one behind DequantizeLinear, of ``PLAIN`` otherwise.
        shape: its shape; ignored for results.
        const: an initializer, not a graph input.
        granularity: "tensor", "channel" along ``axis``, "block" of ``block`` along ``axis``, or
            "lpbq": blocks along ``axis`` with u8 scales over a float scale per other axis.
        axis: of channels or blocks.
        block: elements per block.
        scale: real units per LSB; 0 for the type's usual one.
        zero_point: LSB; None for the middle of an unsigned type and 0 of a signed one.
        values: codes of a constant, flat; drawn at random where empty.
        explicit_zero: False leaves the zero point's input away.
        tag: operands of one case with the same tag are one value.
    """

    dtype: str
    shape: Shape = ()
    const: bool = False
    granularity: str = "tensor"
    axis: int = 0
    block: int = 0
    scale: float = 0.0
    zero_point: int | None = None
    values: tuple[float, ...] = ()
    explicit_zero: bool = True
    tag: str = ""

    @property
    def quantized(self) -> bool:
        return self.dtype in DTYPES

    @property
    def real_scale(self) -> float:
        return self.scale or SCALES[self.dtype]

    @property
    def zero(self) -> int:
        if self.zero_point is not None:
            return self.zero_point
        low, high = code_range(self.dtype)
        return (high + 1) // 2 if low == 0 else 0


@dataclass(frozen=True)
class Step:
    """One ONNX node.

    Attributes:
        op: its type.
        inputs: operands, results of earlier steps as (step, output), or None for a missing one.
        outputs: one operand for each output, for its type and encoding.
        attributes: as ``onnx.helper.make_node`` takes them.
        domain: of the operation.
    """

    op: str
    inputs: tuple[Operand | tuple[int, int] | None, ...]
    outputs: tuple[Operand, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Case:
    """A graph: its steps, of which every result that nobody reads is an output.

    Attributes:
        name: short, unique among its kind.
        steps: in order.
        opset: of the standard domain.
        io: "float": graph inputs and outputs are float32 beside QuantizeLinear and
            DequantizeLinear; "int": they are codes.
    """

    name: str
    steps: tuple[Step, ...]
    opset: int = 21
    io: str = "float"

    @property
    def key(self) -> str:
        """Hash of all but the name."""
        text = json.dumps(asdict(replace(self, name="")), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build(self) -> onnx.ModelProto:
        """The model."""
        return _Builder(self).build()


class _Builder:
    """Collects nodes and initializers of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = np.random.default_rng(int(case.key, 16))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.known: dict[str, str] = {}

    def build(self) -> onnx.ModelProto:
        used = {
            source
            for step in self.case.steps
            for source in step.inputs
            if isinstance(source, tuple)
        }
        results: dict[tuple[int, int], str] = {}
        for index, step in enumerate(self.case.steps):
            inputs = [
                ""
                if source is None
                else results[source]
                if isinstance(source, tuple)
                else self._operand(source, f"s{index}_in{position}")
                for position, source in enumerate(step.inputs)
            ]
            raw = [f"s{index}_raw{k}" for k in range(len(step.outputs))]
            for k, output in enumerate(step.outputs):
                if not output.quantized:
                    raw[k] = f"s{index}_out{k}"
            self._node(step.op, inputs, raw, f"s{index}_{step.op}", step.domain, step.attributes)
            for k, output in enumerate(step.outputs):
                name = self._result(output, raw[k], f"s{index}_out{k}", (index, k) in used)
                results[index, k] = name
        graph = helper.make_graph(
            self.nodes, "case", self.inputs, self.outputs, initializer=self.constants
        )
        domains = {step.domain for step in self.case.steps} - {""}
        opsets = [helper.make_opsetid("", self.case.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)

    def _node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> None:
        node = helper.make_node(op, inputs, outputs, name=name, domain=domain, **(attributes or {}))
        self.nodes.append(node)

    def _operand(self, operand: Operand, name: str) -> str:
        if not operand.tag:
            return self._new_operand(operand, name)
        if operand.tag not in self.known:
            self.known[operand.tag] = self._new_operand(operand, name)
        return self.known[operand.tag]

    def _new_operand(self, operand: Operand, name: str) -> str:
        if not operand.quantized:
            if operand.const:
                self._constant(name, PLAIN[operand.dtype], operand.shape, self._plain(operand))
            else:
                self._input(name, PLAIN[operand.dtype], operand.shape)
            return name
        if operand.const:
            self._constant(f"{name}_q", DTYPES[operand.dtype], operand.shape, self._codes(operand))
        elif self.case.io == "int":
            self._input(f"{name}_q", DTYPES[operand.dtype], operand.shape)
        else:
            self._input(f"{name}_f", TensorProto.FLOAT, operand.shape)
            self._quantize(operand, f"{name}_f", f"{name}_q", name)
            return self._dequantize(operand, f"{name}_q", name)
        self._encoding(operand, name)
        return self._dequantize(operand, f"{name}_q", name)

    def _result(self, output: Operand, raw: str, name: str, used: bool) -> str:
        if not output.quantized:
            if not used:
                self.outputs.append(helper.make_tensor_value_info(raw, PLAIN[output.dtype], None))
            return raw
        self._quantize(output, raw, f"{name}_q", name)
        if not used and self.case.io == "int":
            info = helper.make_tensor_value_info(f"{name}_q", DTYPES[output.dtype], None)
            self.outputs.append(info)
            return name
        self._dequantize(output, f"{name}_q", name)
        if not used:
            self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return name

    def _quantize(self, operand: Operand, source: str, target: str, name: str) -> None:
        self._encoding(operand, name)
        self._node("QuantizeLinear", [source, *self._params(operand, name)], [target], f"{name}_Q")

    def _dequantize(self, operand: Operand, source: str, name: str) -> str:
        attributes: dict[str, Any] = {}
        if operand.granularity != "tensor":
            attributes["axis"] = operand.axis
        if operand.granularity in {"block", "lpbq"}:
            attributes["block_size"] = operand.block
        inputs = [source, *self._params(operand, name)]
        self._node("DequantizeLinear", inputs, [name], f"{name}_DQ", attributes=attributes)
        return name

    def _params(self, operand: Operand, name: str) -> list[str]:
        return [f"{name}_s", f"{name}_z"] if operand.explicit_zero else [f"{name}_s"]

    def _encoding(self, operand: Operand, name: str) -> None:
        """Initializers of scale and zero point."""
        shape = self._scale_shape(operand)
        count = int(np.prod(shape))
        # A bias gets the spread of its weight: same channels, same numbers.
        spread = np.linspace(0.5, 1.0, count) if shape else np.ones(1)
        scales = (operand.real_scale * spread).astype(np.float32)
        if operand.granularity == "lpbq":
            self._lpbq_scales(operand, name, shape)
        else:
            self._constant(f"{name}_s", TensorProto.FLOAT, shape, scales)
        if operand.explicit_zero:
            zeros = np.full(count, operand.zero)
            self._constant(f"{name}_z", DTYPES[operand.dtype], shape, zeros)

    def _lpbq_scales(self, operand: Operand, name: str, shape: Shape) -> None:
        """u8 codes per block, four bits of which Hexagon reads, and a float scale per channel."""
        channels = 1 - operand.axis
        size = shape[channels]
        self._constant(
            f"{name}_sq",
            TensorProto.UINT8,
            shape,
            self.random.integers(1, 17, int(np.prod(shape))),
        )
        scales = operand.real_scale / 16 * self.random.uniform(0.5, 1.0, size)
        self._constant(f"{name}_ss", TensorProto.FLOAT, (size,), scales.astype(np.float32))
        self._constant(f"{name}_sz", TensorProto.UINT8, (size,), np.zeros(size, np.int64))
        inputs = [f"{name}_sq", f"{name}_ss", f"{name}_sz"]
        self._node(
            "DequantizeLinear", inputs, [f"{name}_s"], f"{name}_sDQ", attributes={"axis": channels}
        )

    def _scale_shape(self, operand: Operand) -> Shape:
        if operand.granularity == "tensor":
            return ()
        if operand.granularity == "channel":
            return (operand.shape[operand.axis],)
        shape = list(operand.shape)
        shape[operand.axis] = -(-shape[operand.axis] // operand.block)
        return tuple(shape)

    def _codes(self, operand: Operand) -> NDArray[Any]:
        if operand.values:
            return np.asarray(operand.values)
        low, high = code_range(operand.dtype)
        if operand.dtype == "s32":
            low, high = -20000, 20000
        elif low < 0:
            low += 1  # symmetric
        return self.random.integers(low, high + 1, int(np.prod(operand.shape)))

    def _plain(self, operand: Operand) -> NDArray[Any]:
        if operand.values:
            return np.asarray(operand.values)
        count = int(np.prod(operand.shape))
        if operand.dtype == "f32":
            return self.random.normal(0.0, 0.5, count)
        return self.random.integers(0, 2, count)

    def _constant(self, name: str, dtype: int, shape: Shape, values: NDArray[Any]) -> None:
        flat = [v.item() for v in np.asarray(values).reshape(-1)]
        self.constants.append(helper.make_tensor(name, dtype, shape, flat))

    def _input(self, name: str, dtype: int, shape: Shape) -> None:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))


ACTIVATIONS = ("u8", "s8", "u16", "s16")
SHAPE: Shape = (1, 4, 8, 16)
WEIGHTS = ("u4", "s4", "u8", "s8", "u16", "s16")


def x(dtype: str, *shape: int, **more: Any) -> Operand:
    """A graph input."""
    return Operand(dtype, shape, **more)


def const(dtype: str, *shape: int, **more: Any) -> Operand:
    """A constant."""
    return Operand(dtype, shape, const=True, **more)


def ints(*values: int, dtype: str = "i64", scalar: bool = False) -> Operand:
    """A plain integer constant: axes, a shape, indices."""
    return Operand(dtype, () if scalar else (len(values),), const=True, values=values)


def y(dtype: str, **more: Any) -> Operand:
    """A result."""
    return Operand(dtype, **more)


def floats(*values: float) -> Operand:
    """A plain float constant, a scalar where it is one number."""
    return Operand("f32", () if len(values) == 1 else (len(values),), const=True, values=values)


def single(name: str, op: str, inputs: Iterable[Operand | None], out: Operand, **more: Any) -> Case:
    """A case of one node with one result."""
    keys = ("opset", "io")
    settings = {key: more.pop(key) for key in keys if key in more}
    domain = more.pop("domain", "")
    return Case(name, (Step(op, tuple(inputs), (out,), more, domain),), **settings)


def weight(dtype: str, granularity: str, k: int, n: int, axis: int = 1, **more: Any) -> Operand:
    """A constant (k, n) matrix; "block32" and "lpbq32" name the block too, along k."""
    kind = granularity.rstrip("0123456789")
    block = int(granularity[len(kind) :] or 0)
    axis = axis if kind == "channel" else 1 - axis
    return const(dtype, k, n, granularity=kind, axis=axis, block=block, **more)


def matmul_const(act: str, w: str, granularity: str, **more: Any) -> Case:
    """(1, m, k) @ constant (k, n)."""
    m, k, n = more.pop("mkn", (8, 64, 32))
    out = more.pop("out", act)
    keep = {key: more.pop(key) for key in ("io", "opset") if key in more}
    activation = x(act, 1, m, k, zero_point=more.pop("act_zero", None))
    name = f"MatMul_const/{act}x{w}/{granularity}" + (f"->{out}" if out != act else "")
    return single(
        name, "MatMul", [activation, weight(w, granularity, k, n, **more)], y(out), **keep
    )


def matmul_dynamic(a: str, b: str, out: str = "", shapes: Any = None, **more: Any) -> Case:
    """(1, 2, 8, 16) @ (1, 2, 16, 8), both graph inputs."""
    left, right = shapes or ((1, 2, 8, 16), (1, 2, 16, 8))
    name = f"MatMul_dyn/{a}x{b}" + (f"->{out}" if out else "")
    operands = [x(a, *left), x(b, *right, **more)]
    return single(name, "MatMul", operands, y(out or a))


def bias(act: Operand, w: Operand, n: int, dtype: str = "s32", factor: float = 1.0) -> Operand:
    """A constant bias; an s32 one has the scale s_x·s_w, per channel where the weight has."""
    if dtype == "f32":
        return const("f32", n)
    if dtype != "s32":
        return const(dtype, n)
    granularity = "channel" if w.granularity == "channel" else "tensor"
    scale = act.real_scale * w.real_scale * factor
    return const("s32", n, granularity=granularity, axis=0, scale=scale, zero_point=0)


def gemm(act: str, w: str, granularity: str, b: str | None = "s32", **more: Any) -> Case:
    """(m, k) · constant + bias."""
    m, k, n = 8, 64, 32
    trans = more.get("transB", 0)
    left = x(act, m, k)
    right = weight(w, granularity, *((n, k) if trans else (k, n)), axis=0 if trans else 1)
    inputs = [left, right] + ([bias(left, right, n, b)] if b else [])
    out = more.pop("out", act)
    name = f"Gemm/{act}x{w}/{granularity}+{b}"
    return single(name, "Gemm", inputs, y(out), **more)


def conv(
    act: str, w: str, granularity: str, b: str | None = "s32", kind: str = "Conv1x1", **more: Any
) -> Case:
    """Conv1x1, Conv3x3, ConvDepthwise, ConvTranspose, Conv1d, Conv3d over (1, 32, 8 …)."""
    c, n = more.pop("channels", (32, 16))
    space = (8,) * {"Conv1d": 1, "Conv3d": 3}.get(kind, 2)
    left = x(act, 1, c, *space)
    size = (1, 1) if kind == "Conv1x1" else (3,) * len(space)
    shape = (n, c, *size)
    attributes: dict[str, Any] = {}
    axis = 0
    if kind == "ConvDepthwise":
        shape, n, attributes = (c, 1, *size), c, {"group": c}
    if kind == "ConvTranspose":
        shape, axis = (c, n, *size), 1
    right = _conv_weight(w, granularity, shape, axis)
    inputs = [left, right] + ([bias(left, right, n, b)] if b else [])
    op = "ConvTranspose" if kind == "ConvTranspose" else "Conv"
    out = more.pop("out", act)
    return single(f"{kind}/{act}x{w}/{granularity}+{b}", op, inputs, y(out), **attributes, **more)


def _conv_weight(dtype: str, granularity: str, shape: Shape, axis: int) -> Operand:
    kind = granularity.rstrip("0123456789")
    block = int(granularity[len(kind) :] or 0)
    axis = axis if kind in {"channel", "tensor"} else 1 - axis
    return const(dtype, *shape, granularity=kind, axis=axis, block=block)


def unary(op: str, dtype: str, out: str = "", shape: Shape = SHAPE, **more: Any) -> Case:
    """An operation of one operand."""
    name = f"{op}/{dtype}" + (f"->{out}" if out and out != dtype else "")
    given = more.pop("given", {})
    result = y(out or dtype, **more.pop("result", {}))
    return single(name, op, [x(dtype, *shape, **given)], result, **more)


def binary(
    op: str, a: str, b: str, out: str = "", shapes: Any = (SHAPE, SHAPE), **more: Any
) -> Case:
    """An element by element operation; ``constant`` makes the second operand one."""
    name = f"{op}/{a}" + (f"+{b}" if a != b else "") + (f"->{out}" if out and out != a else "")
    second = Operand(b, shapes[1], const=more.pop("constant", False), **more.pop("second", {}))
    return single(
        name,
        op,
        [x(a, *shapes[0], scale=more.pop("scale", 0.0)), second],
        y(out or a, **more.pop("result", {})),
        **more,
    )
