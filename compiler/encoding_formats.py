"""Encodings files of AIMET and Qualcomm's converters, versions 0.6.1, 1.0.0 and 2.0.0.

Such a file belongs to a float ONNX graph and names its tensors; ``qairt-converter`` takes it as
``--quantization_overrides``. A tensor that it leaves out is given an encoding by the vendor's tool,
silently, so every float tensor of the graph is written: inputs, outputs, activations, weights,
constants and int32 biases.

The three versions say the same in different words, which must not be mixed:

=================  ==========================  ======================  ======================
of a tensor        0.6.1                       1.0.0                   2.0.0
=================  ==========================  ======================  ======================
kept in            a mapping for activations,  two lists               one list
                   one for parameters
type               bitwidth, is_symmetric      bw, is_sym              output_dtype ("int8")
zero point         offset, unsigned codes      offset, unsigned codes  y_zero_point, own codes
per channel        a list entry each           enc_type, lists         axis, lists
channel axis       left to the operator        left to the operator    axis
in blocks (LPBQ)   cannot be said              enc_type, compressed_bw block_size, axis of blocks
=================  ==========================  ======================  ======================

Offsets are ``-zero_point`` on the unsigned grid: -8 for symmetric int4, -128 for symmetric int8.
``is_symmetric`` stands for signed codes; signed codes of an activation whose zero is not at the
middle are therefore written as the unsigned codes of the same real numbers.

Source: aimet-onnx 2.42 (``QuantizationSimModel.export`` and ``load_encodings_to_sim``).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.op_traits import as_linear, float_values
from qnpu.compiler.quant_types import (
    Encoding,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantSpec,
)
from qnpu.compiler.rules import MissingEncoding, UnreadableEncodings, UnwritableEncodings

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")

_Number = TypeVar("_Number", int, float)

# ------------------------------------------------------------------------------------------ write


def export_encodings(table: EncodingTable, graph: ir.Graph, version: str) -> dict[str, object]:
    """The encodings of every float tensor of a graph, as a plain dictionary for JSON.

    Args:
        table: encodings by tensor name; other names than the graph's are left out.
        graph: the float graph, as the vendor's converter is given it.
        version: of ``VERSIONS``.

    Raises:
        DiagnosticError: QN303 for each float tensor without an encoding; QN314 the version has no
            words for weights in blocks.
    """
    values = float_values(graph)
    missing = [name_of(value) for value in values if name_of(value) not in table]
    if missing:
        raise DiagnosticError([MissingEncoding(name).at(value=name) for name in missing])
    blocks = [name_of(v) for v in values if table[name_of(v)].block_scales is not None]
    if blocks and version == "0.6.1":
        raise DiagnosticError(UnwritableEncodings(version).at(value=blocks[0]))
    head: dict[str, object] = {
        "producer": {"package": "qnpu", "version": importlib.metadata.version("qnpu")},
        "version": version,
    }
    if version == "2.0.0":
        return head | {"encodings": [_write_2(name_of(v), table[name_of(v)]) for v in values]}
    for section, parameters in (("activation_encodings", False), ("param_encodings", True)):
        names = [name_of(value) for value in values if value.is_initializer() == parameters]
        head[section] = (
            {name: _write_0(table[name]) for name in names}
            if version == "0.6.1"
            else [_write_1(name, table[name]) for name in names]
        )
    return head


def _write_0(encoding: Encoding) -> list[dict[str, object]]:
    bits, signed, offsets = _unsigned_grid(encoding)
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(signed),
            "max": scale * (2**bits - 1 + offset),
            "min": scale * offset,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in zip(_scales(encoding), offsets, strict=True)
    ]


def _write_1(name: str, encoding: Encoding) -> dict[str, object]:
    if encoding.block_scales is not None and isinstance(encoding.spec.granularity, PerBlock):
        return _write_blocks_1(name, encoding, encoding.block_scales, encoding.spec.granularity)
    bits, signed, offsets = _unsigned_grid(encoding)
    per_channel = isinstance(encoding.spec.granularity, PerChannel)
    return {
        "bw": bits,
        "dtype": "INT",
        "enc_type": "PER_CHANNEL" if per_channel else "PER_TENSOR",
        "is_sym": signed,
        "name": name,
        "offset": offsets,
        "scale": _scales(encoding),
    }


def _write_blocks_1(
    name: str, encoding: Encoding, blocks: NDArray[np.uint8], granularity: PerBlock
) -> dict[str, object]:
    """Codes times block scales count as codes of 8 bits; block scales go channel by channel."""
    of_channels = blocks if granularity.channel_axis == 0 else blocks.T
    bits = 2 * encoding.spec.bits
    return {
        "block_size": granularity.size,
        "bw": bits,
        "compressed_bw": encoding.spec.bits,
        "dtype": "INT",
        "enc_type": "LPBQ",
        "is_sym": True,
        "name": name,
        "offset": [-(1 << (bits - 1))] * len(encoding.scale),
        "per_block_int_scale": of_channels.reshape(-1).tolist(),
        "scale": _scales(encoding),
    }


def _write_2(name: str, encoding: Encoding) -> dict[str, object]:
    spec, zero = encoding.spec, encoding.zero_point
    if encoding.block_scales is not None and isinstance(spec.granularity, PerBlock):
        per_channel = np.expand_dims(encoding.scale, spec.granularity.axis)
        return {
            "name": name,
            "output_dtype": f"int{spec.bits}",
            "per_channel_float_scale": per_channel.tolist(),
            "per_block_int_scale": encoding.block_scales.tolist(),
            "axis": spec.granularity.axis,
            "block_size": spec.granularity.size,
        }
    entry: dict[str, object] = {
        "name": name,
        "output_dtype": f"{'' if spec.signed else 'u'}int{spec.bits}",
        "y_scale": encoding.scale.tolist(),  # a number where it is 0-d
    }
    if zero.any():
        entry["y_zero_point"] = zero.tolist()
    if isinstance(spec.granularity, PerChannel):
        entry["axis"] = spec.granularity.axis
    return entry


def _scales(encoding: Encoding) -> list[float]:
    return [float(scale) for scale in encoding.scale.reshape(-1)]


def _unsigned_grid(encoding: Encoding) -> tuple[int, bool, list[int]]:
    """Bits, whether to call it signed, and offsets: minus the zero points of unsigned codes."""
    spec = encoding.spec
    signed = spec.signed and (spec.bits == 32 or not encoding.zero_point.any())
    shift = 1 << (spec.bits - 1) if spec.signed else 0
    return spec.bits, signed, [-(int(zero) + shift) for zero in encoding.zero_point.reshape(-1)]


# ------------------------------------------------------------------------------------------- read


def _whole(number: object) -> int:
    """AIMET writes offsets as -128.0."""
    if isinstance(number, bool) or not isinstance(number, int | float) or number % 1 != 0:
        raise ValueError("is no whole number")
    return int(number)


def _float32(number: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        as_float32 = float(np.float32(number))
    if not (math.isfinite(as_float32) and as_float32 >= float(np.finfo(np.float32).tiny)):
        raise ValueError("is no positive float32 number")
    return as_float32


_Bits = Literal[4, 8, 16, 32]
_Scale = Annotated[float, Field(strict=True), AfterValidator(_float32)]
_Whole = Annotated[int, BeforeValidator(_whole)]
_Name = Annotated[str, Field(strict=True, min_length=1)]
_Scales = Annotated[list[_Scale], Field(min_length=1)]
_Wholes = Annotated[list[_Whole], Field(min_length=1)]


class _Entry(BaseModel):
    """An entry of a file. A key of another version, or of block scales, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Entry0(_Entry):
    bitwidth: _Bits
    dtype: Literal["int"]
    is_symmetric: Literal["True", "False"]
    scale: _Scale
    offset: _Whole
    min: float = 0.0
    max: float = 0.0


class _Entry1(_Entry):
    name: _Name
    bw: _Bits
    dtype: Literal["INT"]
    enc_type: Literal["PER_TENSOR", "PER_CHANNEL"]
    is_sym: Annotated[bool, Field(strict=True)]
    scale: _Scales
    offset: _Wholes


class _Entry2(_Entry):
    name: _Name
    output_dtype: Literal["int4", "int8", "int16", "int32", "uint4", "uint8", "uint16"]
    y_scale: _Scale | _Scales
    y_zero_point: _Whole | _Wholes | None = None
    axis: Annotated[int, Field(strict=True)] | None = None


class _File0(BaseModel):
    activation_encodings: dict[_Name, Annotated[list[_Entry0], Field(min_length=1)]]
    param_encodings: dict[_Name, Annotated[list[_Entry0], Field(min_length=1)]]


class _File1(BaseModel):
    activation_encodings: list[_Entry1]
    param_encodings: list[_Entry1]


class _File2(BaseModel):
    encodings: list[_Entry2]


def read_encodings(document: object, graph: ir.Graph) -> EncodingTable:
    """Reads an encodings file of any of the three versions.

    Signed codes with every zero point 0 become symmetric, whose lowest code (-128) is not in use:
    a real number below -127.5 scales is one LSB off what the file says.

    Args:
        document: parsed JSON.
        graph: the float graph that the file is about; it tells channel axes.

    Returns:
        Encodings in the order of the file.

    Raises:
        DiagnosticError: QN306 for anything but an affine integer encoding, per tensor or per
            channel, of a tensor of the graph.
    """
    version = document.get("version") if isinstance(document, dict) else None
    try:
        match version:
            case "0.6.1":
                entries = _entries_0(_File0.model_validate(document))
            case "1.0.0":
                entries = _entries_1(_File1.model_validate(document))
            case "2.0.0":
                entries = _entries_2(_File2.model_validate(document))
            case _:
                raise _fault("version", f"is none of {', '.join(VERSIONS)}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _fault(".".join(map(str, first["loc"])), first["msg"]) from error
    values, axes = _values(graph), _channel_axes(graph)
    table = EncodingTable()
    for entry in entries:
        if entry.name not in values:
            raise _fault(entry.name, "names no tensor of the graph")
        if entry.name in table:
            raise _fault(entry.name, "has two encodings")
        table[entry.name] = _encoding(entry, _granularity(entry, values[entry.name], axes))
    return table


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What any version says of a tensor.

    Attributes:
        zeros: zero points on the codes' own grid.
        axis: of the channels; None per tensor, ``operator`` where the file does not say which.
    """

    name: str
    bits: int
    signed: bool
    scales: list[float]
    zeros: list[int]
    axis: int | Literal["operator"] | None


def _entries_0(file: _File0) -> Iterator[_Parsed]:
    for section in (file.activation_encodings, file.param_encodings):
        for name, channels in section.items():
            if len({(entry.bitwidth, entry.is_symmetric) for entry in channels}) > 1:
                raise _fault(name, "has channels of different types")
            bits, signed = channels[0].bitwidth, channels[0].is_symmetric == "True"
            scales = [entry.scale for entry in channels]
            zeros = _own_zeros(bits, signed, [entry.offset for entry in channels])
            axis: Literal["operator"] | None = "operator" if len(channels) > 1 else None
            yield _Parsed(name, bits, signed, scales, zeros, axis)


def _entries_1(file: _File1) -> Iterator[_Parsed]:
    for entry in (*file.activation_encodings, *file.param_encodings):
        axis: Literal["operator"] | None = "operator" if entry.enc_type == "PER_CHANNEL" else None
        if axis is None and len(entry.scale) > 1:
            raise _fault(entry.name, "is PER_TENSOR and has several scales")
        zeros = _own_zeros(entry.bw, entry.is_sym, entry.offset)
        yield _Parsed(entry.name, entry.bw, entry.is_sym, entry.scale, zeros, axis)


def _entries_2(file: _File2) -> Iterator[_Parsed]:
    for entry in file.encodings:
        scales, zeros = _listed(entry.y_scale), _listed(entry.y_zero_point)
        given = [entry.y_scale] + [entry.y_zero_point] * (entry.y_zero_point is not None)
        if any(isinstance(item, list) != (entry.axis is not None) for item in given):
            raise _fault(entry.name, "has lists without an axis, or an axis without lists")
        signed = not entry.output_dtype.startswith("u")
        bits = int(entry.output_dtype.removeprefix("u").removeprefix("int"))
        yield _Parsed(entry.name, bits, signed, scales, zeros or [0] * len(scales), entry.axis)


def _listed(item: _Number | list[_Number] | None) -> list[_Number]:
    if isinstance(item, list):
        return item
    return [] if item is None else [item]


def _own_zeros(bits: int, signed: bool, offsets: list[int]) -> list[int]:
    """Zero points on the codes' own grid, from offsets on the unsigned one."""
    shift = 1 << (bits - 1) if signed else 0
    return [-offset - shift for offset in offsets]


def _encoding(entry: _Parsed, granularity: Granularity) -> Encoding:
    name, bits, signed = entry.name, entry.bits, entry.signed
    if len(entry.zeros) != len(entry.scales):
        raise _fault(name, f"has {len(entry.scales)} scales and {len(entry.zeros)} zero points")
    lowest = -(1 << (bits - 1)) if signed else 0
    if not all(lowest <= zero < lowest + (1 << bits) for zero in entry.zeros):
        raise _fault(name, "has a zero point that is no code")
    if bits == 32 and not signed:
        raise _fault(name, "has unsigned codes of 32 bits")
    shape = (-1,) if isinstance(granularity, PerChannel) else ()
    return Encoding(
        QuantSpec(bits, signed, signed and not any(entry.zeros), granularity),
        np.array(entry.scales, np.float32).reshape(shape),
        np.array(entry.zeros, np.int32).reshape(shape),
    )


def _granularity(entry: _Parsed, value: ir.Value, axes: Mapping[str, int]) -> Granularity:
    if entry.axis is None:
        return PerTensor()
    shape, channels = static_shape(value), len(entry.scales)
    if shape is None:
        raise _fault(entry.name, "has channels, and a shape that is not static")
    if entry.axis == "operator":
        fitting = [index for index, size in enumerate(shape) if size == channels]
        axis = axes.get(entry.name, fitting[0] if len(fitting) == 1 else len(shape))
    else:
        axis = entry.axis + len(shape) * (entry.axis < 0)
    if not (0 <= axis < len(shape) and shape[axis] == channels):
        raise _fault(entry.name, f"has {channels} scales; its shape {shape} has no axis for them")
    return PerChannel(axis)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return {name_of(value): value for value in values if value.name}


def _channel_axes(graph: ir.Graph) -> dict[str, int]:
    """Weight name → its axis of output channels."""
    linears = [linear for node in graph if (linear := as_linear(node)) is not None]
    return {name_of(linear.weight): linear.channel_axis for linear in linears}


def _fault(place: str, reason: str) -> DiagnosticError:
    return DiagnosticError(UnreadableEncodings(place, reason).at())
