"""Graphs that keep their weights in one file, each tensor of equal bytes once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

WEIGHTS_NAME = "weights.bin"
_INLINE_BYTES = 1024  # tensors up to this size stay in the .onnx file
_ALIGNMENT = 4096  # of a tensor's place, so that it can be mapped


class SharedWeights:
    """Collects the tensors of several models, then writes the file and what refers to it.

    Args:
        models: left as they are.
        name: of the file, which lies beside the models.
    """

    def __init__(self, models: Sequence[ir.Model], name: str = WEIGHTS_NAME) -> None:
        self._name = name
        self._places: dict[bytes, int] = {}
        self._tensors: list[tuple[int, ir.TensorProtocol]] = []
        self._keys: dict[int, bytes] = {}
        self._size = 0
        for model in models:
            for value in model.graph.initializers.values():
                self._add(value.const_value)

    def write(self, path: Path) -> None:
        """Writes all tensors, each at a multiple of 4 KiB; the rest is zeros."""
        with path.open("wb") as file:
            for place, tensor in self._tensors:
                file.seek(place)
                file.write(tensor.tobytes())

    def save_model(self, model: ir.Model, path: Path) -> None:
        """Writes one of the models, whose larger tensors are in the file."""
        copy = model.clone()
        for value in copy.graph.initializers.values():
            tensor = value.const_value
            key = self._keys.get(id(tensor))
            if tensor is not None and key is not None:
                value.const_value = ir.ExternalTensor(
                    self._name,
                    self._places[key],
                    tensor.nbytes,
                    tensor.dtype,
                    name=value.name or "",
                    shape=ir.Shape([int(size) for size in tensor.shape.numpy()]),
                    base_dir=path.parent,
                )
        ir.save(copy, path)

    def _add(self, tensor: ir.TensorProtocol | None) -> None:
        if tensor is None or tensor.nbytes <= _INLINE_BYTES or id(tensor) in self._keys:
            return
        key = hashlib.sha256(tensor.tobytes()).digest()
        self._keys[id(tensor)] = key
        if key not in self._places:
            self._places[key] = self._size
            self._tensors.append((self._size, tensor))
            self._size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
