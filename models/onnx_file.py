"""Read an ONNX file without trusting it; weights in external files stay on disk."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, first_line
from qnpu.compiler.rules import (
    ExternalDataOutsideFolder,
    MissingExternalData,
    MissingFile,
    NotOnnx,
)

MAX_REPORTED = 20

_PROTOBUF_LIMIT = 2**31 - 1

_OTHER_FORMATS = {
    b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull`",
    b"GGUF": "it is a GGUF file; rename it to .gguf",
    b"PK\x03\x04": "it is a zip archive",
    b"<": "it is text, such as a web page",
    b"{": "it is text, such as JSON",
}
_OF_BOTH_DOMAINS = ("QuantizeLinear", "DequantizeLinear")  # com.microsoft's have no schema in onnx
_NUMBER_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data",
                  "uint64_data")  # fmt: skip
_SIX = 6  # bits of the narrowest floats that ONNX gives a byte each
_COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
_LFS_MARK = b"version https://git-lfs"


def load_onnx(path: str | Path) -> ir.Model:
    """Read a model. External tensors are checked first, then mapped only when they are used.

    Returns:
        The model. Its external tensors hold the absolute folder, so that a later change of the
        working directory does not matter; inline weights take memory as the file does.

    Raises:
        DiagnosticError: QN102 the file is missing or unreadable; QN103 it is not a whole ONNX
            model; QN104 external data is missing or too short; QN105 it lies outside the model's
            folder. Faulty tensors are reported together, at most ``MAX_REPORTED``.
    """
    path = Path(path)
    proto = _parse(path)
    folder = path.parent.resolve()
    places = list(_places(proto))
    if reason := next(filter(None, map(_text_fault, places)), ""):
        raise _not_onnx(path, reason)
    tensors = [place for place in places if isinstance(place.message, onnx.TensorProto)]
    faults = [fault for tensor in tensors for fault in _faults(tensor, folder, str(path))]
    del places, tensors
    if faults:
        raise DiagnosticError(faults[:MAX_REPORTED])
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir lets ValueError, KeyError, TypeError and its own through
        raise _not_onnx(path, first_line(error)) from error
    _check_order(model, path)
    _check_attributes(model, path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _forget_negative_dims(value)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, folder)
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _Mapped.like(value.const_value)
    return model


class _Mapped(ir.ExternalTensor):
    """External data whose pages leave memory with what was read; onnx_ir keeps them mapped."""

    @classmethod
    def like(cls, tensor: ir.ExternalTensor) -> _Mapped:
        """The same data."""
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        return cls(*place, shape=tensor.shape, name=tensor.name or "", base_dir=tensor.base_dir)

    def numpy(self) -> NDArray[Any]:
        return self._fresh().numpy()

    def tobytes(self) -> bytes:
        return self._fresh().tobytes()

    def __array__(self, dtype: Any = None) -> NDArray[Any]:
        return self._fresh().__array__(dtype)

    def _fresh(self) -> ir.ExternalTensor:
        place = self.location, self.offset, self.length, self.dtype
        return ir.ExternalTensor(
            *place, shape=self.shape, name=self.name or "", base_dir=self.base_dir
        )


def _check_order(model: ir.Model, path: Path) -> None:
    """Sorts nodes where the file does not; onnx_ir makes up values that nothing makes.

    Raises:
        DiagnosticError: QN103 a value is taken that nothing makes, or that depends on itself.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        taken = [value for node in graph.all_nodes() for value in node.inputs]
        outputs = [value for part in (graph, *graph.subgraphs()) for value in part.outputs]
        for value in (*taken, *outputs):
            if value is not None and not _is_made(value):
                raise _not_onnx(path, f"nothing makes `{value.name}`")
        if not _is_sorted(graph, set()):
            try:
                graph.sort()
            except ValueError as error:
                raise _not_onnx(path, "its graph has a cycle") from error


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _is_sorted(graph: ir.Graph, done: set[ir.Node]) -> bool:
    """Whether each node comes behind those whose results it, or a graph within it, takes."""
    for node in graph:
        makers = (value.producer() for value in node.inputs if value is not None)
        if any(maker is not None and maker not in done for maker in makers):
            return False
        if not all(_is_sorted(inner, done) for inner in _graphs_within(node)):
            return False
        done.add(node)
    return True


def _graphs_within(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _check_attributes(model: ir.Model, path: Path) -> None:
    """Refuses attributes of another type than their operators have, or that name a function's own.

    Raises:
        DiagnosticError: QN103.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            pair = node.op_type in _OF_BOTH_DOMAINS
            domain = "" if pair or node.domain == "ai.onnx" else node.domain
            version = 0 if pair else graph.opset_imports.get(domain, 0)  # old ones had no axis
            kinds = _attribute_kinds(node.op_type, version, domain)
            for name, attribute in node.attributes.items():
                if attribute.is_ref() and graph is model.graph:
                    found = "stands for one of a function, and is in none"
                    raise _not_onnx(path, f"`{name}` of node `{node.name}` {found}")
                kind = kinds.get(name)
                if kind is not None and attribute.type.value != kind:
                    due = ir.AttributeType(kind).name
                    found = f"has type {attribute.type.name}, {due} is due"
                    raise _not_onnx(path, f"`{name}` of node `{node.name}` {found}")


@lru_cache(maxsize=1024)
def _attribute_kinds(op_type: str, version: int, domain: str) -> dict[str, int]:
    """Attribute → number of its type; empty for an operator without an ONNX schema.

    Of an opset that is not imported, or does not exist, the newest stands in.
    """
    newest = 2**31 - 1
    version = version if 0 < version < newest else newest
    if not onnx.defs.has(op_type, version, domain):
        return {}
    schema = onnx.defs.get_schema(op_type, version, domain)
    kinds: dict[str, Any] = {name: item.type for name, item in schema.attributes.items()}
    return {name: int(kind) for name, kind in kinds.items()}


def _forget_negative_dims(value: ir.Value) -> None:
    """PaddlePaddle writes -1 where ONNX leaves a dimension out."""
    if value.shape is not None:
        value.shape = ir.Shape(
            None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape
        )


def _not_onnx(path: Path, reason: str) -> DiagnosticError:
    return DiagnosticError(NotOnnx(reason).at(file=str(path)))


def _parse(path: Path) -> onnx.ModelProto:
    """The protobuf message, complete as far as can be told."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise _not_onnx(path, "it is a folder")
        if not stat.S_ISREG(status.st_mode):  # /dev/zero has no end
            raise _not_onnx(path, "it is not a plain file")
        if status.st_size > _PROTOBUF_LIMIT:
            raise _not_onnx(path, "it has more than the 2 GiB that protobuf can hold")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error
    if not content.strip():
        raise _not_onnx(path, "the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
        reason = _incomplete(proto)
    except DecodeError:
        reason = "the file is cut short or not protobuf"
    if reason:
        known = (text for magic, text in _OTHER_FORMATS.items() if content.startswith(magic))
        raise _not_onnx(path, next(known, reason))
    return proto


def _incomplete(proto: onnx.ModelProto) -> str:
    """Why a message that parses is no model: cut between two fields it still parses."""
    if not proto.HasField("graph"):
        return "it has no graph"
    if not proto.graph.output:
        return "its graph has no output"
    if not proto.opset_import:
        return "it imports no opset; the file may be cut short"
    return ""


@dataclass(frozen=True, slots=True)
class _Place:
    """A message within a model, and the name of the node that it belongs to."""

    message: Any
    node: str


def _places(message: Any, node: str = "") -> Iterator[_Place]:
    """Every message, itself first: graphs, nodes, tensors, attributes, functions.

    It follows the message types instead of listing places, so that none can be forgotten.
    """
    if isinstance(message, onnx.NodeProto):
        node = str(message.name or message.op_type)
    yield _Place(message, node)
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for child in value if field.is_repeated else (value,):
            yield from _places(child, node)


def _text_fault(place: _Place) -> str:
    """A name that is not UTF-8, which protobuf hands out as bytes."""
    for field, value in place.message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = value if field.is_repeated else (value,)
            if any(isinstance(text, bytes) for text in texts):
                return f"`{field.name}` of {place.node or 'the graph'} is not UTF-8"
    return ""


def _faults(tensor: _Place, folder: Path, file: str) -> Iterator[Diagnostic]:
    """What is wrong with one tensor: nothing, or one diagnostic."""
    proto = tensor.message
    where = {"file": file, "node": tensor.node, "value": proto.name}
    size = _byte_size(proto)
    external = proto.data_location == onnx.TensorProto.EXTERNAL
    if size is None and (external or proto.data_type != onnx.TensorProto.STRING):
        reason = f"tensor `{proto.name}` has data type {proto.data_type} and shape {[*proto.dims]}"
        yield NotOnnx(reason).at(**where)
    elif external and size is not None:
        found = [rule.at(**where) for rule in _external_faults(proto, size, folder)]
        yield from found
        if not found and (reason := _six_bit_fault(proto, folder)):
            yield NotOnnx(reason).at(**where)
    elif proto.HasField("raw_data") and len(proto.raw_data) != size:
        reason = f"tensor `{proto.name}` has {len(proto.raw_data)} bytes of data, needs {size}"
        yield NotOnnx(reason).at(**where)
    elif reason := _numbers_fault(proto) or _six_bit_fault(proto, folder):
        yield NotOnnx(reason).at(**where)


def _numbers_fault(proto: onnx.TensorProto) -> str:
    """What is wrong with data that are listed as numbers, one or several codes in each."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return ""
    name = onnx.helper.tensor_dtype_to_field(proto.data_type)
    count = math.prod(int(dim) for dim in proto.dims)
    if proto.data_type != onnx.TensorProto.STRING:
        bits = int(ir.DataType(proto.data_type).bitwidth)
        count = -(-count * bits // 8) if bits < 8 else count * (1 + (proto.data_type in _COMPLEX))
    raw = proto.HasField("raw_data")
    sizes = {field: len(getattr(proto, field)) for field in _NUMBER_FIELDS}
    wanted = dict.fromkeys(_NUMBER_FIELDS, 0) | ({} if raw else {name: count})
    if sizes == wanted:
        return ""
    found = ", ".join(f"{size} in {field}" for field, size in sizes.items() if size) or "none"
    due = "raw data alone" if raw else f"{count} in {name}"
    return f"tensor `{proto.name}` has these numbers: {found}; due are {due}"


def _six_bit_fault(proto: onnx.TensorProto, folder: Path) -> str:
    """A code beyond 63: those of 6 bits have a byte each, which holds more."""
    if ir.DataType(proto.data_type).bitwidth != _SIX:
        return ""
    try:
        ir.serde.deserialize_tensor(proto, str(folder)).numpy()
    except ValueError:
        return f"tensor `{proto.name}` has codes beyond 63, of 6 bits"
    return ""


def _byte_size(proto: onnx.TensorProto) -> int | None:
    """Bytes of a tensor's data, elements below a byte packed; None where there is no such size."""
    if any(dim < 0 for dim in proto.dims):
        return None
    try:
        bits = int(ir.DataType(proto.data_type).bitwidth)
    except (TypeError, ValueError):
        return None
    return -(-math.prod(int(dim) for dim in proto.dims) * bits // 8)


def _external_faults(
    proto: onnx.TensorProto, size: int, folder: Path
) -> Iterator[ExternalDataOutsideFolder | MissingExternalData]:
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if not location or "\0" in location:
        yield MissingExternalData(location, "is not a file name")
    elif _leaves(location) or not (folder / location).resolve().is_relative_to(folder):
        yield ExternalDataOutsideFolder(location)
    else:
        yield from _extent_faults(entries, location, size, folder / location)


def _leaves(location: str) -> bool:
    """Whether a path is absolute or climbs, read as either system's path."""
    paths = (PurePosixPath(location), PureWindowsPath(location))
    return any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)


def _extent_faults(
    entries: dict[str, str], location: str, size: int, path: Path
) -> Iterator[ExternalDataOutsideFolder | MissingExternalData]:
    try:
        status = path.stat()
    except OSError:
        yield MissingExternalData(location, "does not exist")
        return
    if not stat.S_ISREG(status.st_mode):
        yield MissingExternalData(location, "is not a plain file")
        return
    if status.st_nlink > 1:  # onnx_ir refuses to map these: the other name may be anywhere
        yield ExternalDataOutsideFolder(f"{location} (a hard link)")
        return
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or size)
    except ValueError:
        yield MissingExternalData(location, "has an offset or length that is not a number")
        return
    if offset < 0 or length < size:
        reason = f"has offset {offset} and length {length} for a tensor of {size} bytes"
        yield MissingExternalData(location, reason)
    elif status.st_size < offset + length:
        reason = f"has {status.st_size} bytes, needs {offset + length}"
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_MARK)) == _LFS_MARK
        hint = "; it is a Git LFS pointer" if pointer else ""
        yield MissingExternalData(location, reason + hint)
