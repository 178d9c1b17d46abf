"""Read an ONNX file without trusting it; weights in external files stay on disk."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, first_line
from qnpu.compiler.rules import (
    ExternalDataOutsideFolder,
    MissingExternalData,
    MissingFile,
    NotOnnx,
)

MAX_REPORTED = 20

_OTHER_FORMATS = {
    b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull`",
    b"GGUF": "it is a GGUF file; rename it to .gguf",
    b"PK\x03\x04": "it is a zip archive",
    b"<": "it is text, such as a web page",
    b"{": "it is text, such as JSON",
}
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
    faults = [fault for tensor in _tensors(proto) for fault in _faults(tensor, folder, str(path))]
    if faults:
        raise DiagnosticError(faults[:MAX_REPORTED])
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir lets ValueError, KeyError, TypeError and its own through
        raise _not_onnx(path, first_line(error)) from error
    for value in (*model.graph.inputs, *model.graph.outputs):
        _forget_negative_dims(value)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, folder)
    return model


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
    if path.is_dir():
        raise _not_onnx(path, "it is a folder")
    try:
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
class _Tensor:
    proto: onnx.TensorProto
    node: str


def _tensors(message: Any, node: str = "") -> Iterator[_Tensor]:
    """Every tensor anywhere in a message: initializers, sparse ones, attributes, functions.

    It follows the message types instead of listing places, so that none can be forgotten.
    """
    if isinstance(message, onnx.TensorProto):
        yield _Tensor(message, node)
        return
    if isinstance(message, onnx.NodeProto):
        node = message.name or message.op_type
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for child in value if field.is_repeated else (value,):
            yield from _tensors(child, node)


def _faults(tensor: _Tensor, folder: Path, file: str) -> Iterator[Diagnostic]:
    """What is wrong with one tensor: nothing, or one diagnostic."""
    proto = tensor.proto
    where = {"file": file, "node": tensor.node, "value": proto.name}
    size = _byte_size(proto)
    external = proto.data_location == onnx.TensorProto.EXTERNAL
    if size is None and (external or proto.data_type != onnx.TensorProto.STRING):
        reason = f"tensor `{proto.name}` has data type {proto.data_type} and shape {[*proto.dims]}"
        yield NotOnnx(reason).at(**where)
    elif external and size is not None:
        yield from (rule.at(**where) for rule in _external_faults(proto, size, folder))
    elif proto.HasField("raw_data") and len(proto.raw_data) != size:
        reason = f"tensor `{proto.name}` has {len(proto.raw_data)} bytes of data, needs {size}"
        yield NotOnnx(reason).at(**where)


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
