"""Tensors that lie in files and take memory only while someone reads them.

A compile holds the weights several times over: as loaded, rotated, as codes. Only one of them is
looked at at a time, so all others can be on disk.
"""

from __future__ import annotations

import resource
from functools import cache
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

STORED_BYTES = 2**20
"""Arrays from this size on go to files."""

_OPEN_FILES = 10_240  # the most that macOS lets a process ask for


def stored_tensor(
    array: NDArray[Any], dtype: ir.DataType | None = None, name: str | None = None
) -> ir.TensorProtocol:
    """A tensor of an array; a large one lies in a temporary file.

    The file has no name, so nothing is left of it once the tensor and all arrays made of it are
    gone, not even where the process is killed. Each call of ``numpy()`` maps it anew, with the
    strides of ``array``; its pages leave memory together with what that returned. Who writes to
    that changes a copy of his own (torch warns of arrays that cannot be written to).

    Args:
        array: copied where it is large, shared where it is small.
        dtype: of the tensor, where the array's type does not tell.
        name: of the tensor.

    Raises:
        OSError: the folder for temporary files is full.
    """
    tensor = ir.tensor(array, dtype=dtype, name=name)
    if array.nbytes < STORED_BYTES:
        return tensor
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    dense = np.ascontiguousarray(array.transpose(order))
    back = np.argsort(order)
    _allow_many_files()
    file = TemporaryFile(prefix="qnpu-")  # noqa: SIM115  (closed with the tensor)
    file.write(dense.reshape(-1).view(np.uint8).data)
    file.flush()
    kind, shape = array.dtype, dense.shape

    def read() -> ir.TensorProtocol:
        mapped = np.memmap(file, kind, "c", shape=shape)
        return ir.tensor(np.asarray(mapped).transpose(back), dtype=dtype, name=name)

    return ir.LazyTensor(read, tensor.dtype, ir.Shape(array.shape), name=name)


def transposed_tensor(source: ir.TensorProtocol, order: list[int], name: str) -> ir.TensorProtocol:
    """A tensor with its axes in another order, which is read with its source."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(source.numpy().transpose(order), dtype=source.dtype, name=name)

    shape = ir.Shape([int(source.shape.numpy()[axis]) for axis in order])
    return ir.LazyTensor(read, source.dtype, shape, name=name)


@cache
def _allow_many_files() -> None:
    """Each stored tensor takes an open file, and some systems allow only a few hundred at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
