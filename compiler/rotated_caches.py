"""Caches that hold V·R2 instead of V: which inputs and outputs they are, and data for them.

The mark lies in the model's metadata, so that it also stands in the file that is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, TypeAdapter

from qnpu.compiler.hadamard import rotation_matrix
from qnpu.compiler.marks import read_mark

MARK = "qnpu.rotated_caches"
_Width = Annotated[int, Field(gt=0, le=8192)]  # more, and the matrix alone would fill the memory
_TABLE = TypeAdapter(dict[str, tuple[_Width, NonNegativeInt]])

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class CacheRotation:
    """The rotation of every head of one cache.

    Attributes:
        width: of a head, and of the matrix.
        seed: of ``rotation_matrix``.
    """

    width: int
    seed: int

    def apply(self, array: Array, *, back: bool = False) -> Array:
        """x·(I⊗R) over the last axis, whose length is a multiple of ``width``; ``back``: ·(I⊗Rᵀ).

        Computed in float64, returned in the array's own type.
        """
        matrix = rotation_matrix(self.width, self.seed)[0]
        heads = array.reshape(*array.shape[:-1], array.shape[-1] // self.width, self.width)
        turned = heads.astype(np.float64) @ (matrix.T if back else matrix)
        return turned.reshape(array.shape).astype(array.dtype)


def mark_rotated(model: ir.Model, caches: Mapping[str, CacheRotation]) -> None:
    """Notes graph inputs and outputs by name; nothing where there is none."""
    if caches:
        table = {name: [cache.width, cache.seed] for name, cache in caches.items()}
        model.metadata_props[MARK] = json.dumps(table)


def rotated_caches(model: ir.Model) -> dict[str, CacheRotation]:
    """The graph inputs and outputs that hold rotated values, by name.

    Raises:
        DiagnosticError: QN119 the mark is no table of them.
    """
    table = read_mark(model, MARK, _TABLE) or {}
    return {name: CacheRotation(width, seed) for name, (width, seed) in table.items()}


def turn_caches(
    model: ir.Model, arrays: Mapping[str, Array], *, back: bool = False
) -> dict[str, Array]:
    """Arrays of the unrotated model as a rotated one takes them, or with ``back`` its own undone.

    Args:
        model: the rotated one.
        arrays: by name of graph input or output.
        back: from rotated to unrotated.
    """
    caches = rotated_caches(model)
    return {
        name: caches[name].apply(array, back=back) if name in caches else array
        for name, array in arrays.items()
    }
