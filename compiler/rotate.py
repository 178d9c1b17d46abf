"""Multiplies a rotation into one axis of a constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, set_constant

_CHUNK_ROWS = 8192


def rotate_axis(
    value: ir.Value,
    axis: int,
    rotation: NDArray[np.float64],
    first: int = 0,
    last: int | None = None,
) -> None:
    """Replaces w by w' with w'[…, j, …] = Σ_i w[…, i, …] · R[i, j] along one axis.

    The same formula serves both ends: outputs become y·R, and an input axis undoes it, since
    (x·R)·(Rᵀ·W) = x·W and (Rᵀ·W)[j, n] = Σ_i R[i, j]·W[i, n].

    Args:
        value: initializer.
        axis: its features; their number is a multiple of R's size, block by block.
        rotation: orthogonal, float64.
        first, last: part of the axis to rotate; all of it by default.
    """
    array = constant_array(value)
    if array is None:
        return
    rows: NDArray[Any] = np.moveaxis(array, axis, -1)
    lead, width, size = rows.shape[:-1], rows.shape[-1], len(rotation)
    last = width if last is None else last
    flat = rows.reshape(-1, width)
    result = np.array(flat)
    for start in range(0, len(flat), _CHUNK_ROWS):
        part = flat[start : start + _CHUNK_ROWS, first:last].astype(np.float64)
        turned = part.reshape(-1, size) @ rotation  # one product, not one for each row
        result[start : start + _CHUNK_ROWS, first:last] = turned.reshape(part.shape)
    set_constant(value, np.moveaxis(result.reshape(*lead, width), -1, axis))
