"""Rotations that learn: of the residual stream (R1) and of each layer's attention values (R2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.graph_edit import constant_array, last_dimension, name_of
from qnpu.compiler.rotate import rotate_axis
from qnpu.compiler.topology import ResidualStream, ValuePath, discover, gains_on, input_axis

_STREAM = "r1"


@dataclass(frozen=True, slots=True)
class _Turn:
    """One rotation of part of one axis of a weight."""

    rotation: str
    axis: int
    first: int
    last: int


class LearnedRotations(torch.nn.Module):
    """What is to be multiplied into the weights of a decoder whose norms have no gains.

    Each matrix starts as the identity: of a graph that is rotated already, it is what to rotate on
    by. Weights, sources and sinks as in ``qnpu.passes.fuse_rotation``. What anything blocks is left
    out, and so is R2 where a cache holds the values.

    Args:
        graph: float; requantize points may be in it.

    Attributes:
        matrices: ``r1`` (H, H) and ``r2_layer`` (D, D), float32.
    """

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self.matrices = torch.nn.ParameterDict()
        self._turns: dict[str, list[_Turn]] = {}
        self._values: dict[str, ir.Value] = {}
        self._gathered: dict[str, str] = {}
        topology = discover(graph)
        if topology is not None:
            self._take_stream(topology.stream)
            for path in topology.value_paths:
                self._take_values(path)

    @property
    def rotated(self) -> set[str]:
        """Names of all constants that ``apply_to_graph`` changes."""
        return set(self._turns)

    @property
    def weights(self) -> set[str]:
        """Names of what is rotated as a weight."""
        return set(self._turns) - set(self._gathered.values())

    def turned(self, weight: str, real: Tensor) -> Tensor:
        """A weight, rotated; a gradient flows to the matrices."""
        for turn in self._turns.get(weight, ()):
            matrix = self.matrices[turn.rotation]
            real = _turned(real.to(matrix.device), turn, matrix)
        return real

    def weight(self, name: str) -> Tensor | None:
        """The float weight of a name, rotated; None for others."""
        if name not in self.weights:
            return None
        array = constant_array(self._values[name])
        return None if array is None else self.turned(name, torch.from_numpy(array))

    def output(self, name: str, value: Tensor) -> Tensor:
        """A value as it is after the rotation: rows looked up are cheaper to turn than a table."""
        if name not in self._gathered:
            return value
        rotated: Tensor = value @ self.matrices[_STREAM].to(value.dtype)
        return rotated

    def apply_to_graph(self) -> int:
        """Multiplies the matrices into the weights, in float64.

        Returns:
            How many weights changed.
        """
        exact = {name: _nearest_rotation(matrix) for name, matrix in self.matrices.items()}
        for name, turns in self._turns.items():
            for turn in turns:
                matrix = exact[turn.rotation]
                rotate_axis(self._values[name], turn.axis, matrix, turn.first, turn.last)
        return len(self._turns)

    def _take_stream(self, stream: ResidualStream) -> None:
        linears = [linear for sink in stream.sinks for linear in sink.linears]
        sources = {source.weight for source in stream.sources}
        tied = any(linear.weight in sources for linear in linears)
        free = not stream.blockers and not tied and not gains_on(stream)
        if not (free and sources):
            return
        self._add_matrix(_STREAM, stream.width)
        for source in stream.sources:
            self._add(source.weight, _Turn(_STREAM, source.axis, 0, stream.width))
            if source.node.op_type == "Gather":
                self._gathered[name_of(source.node.outputs[0])] = name_of(source.weight)
            if source.bias is not None:
                self._add(source.bias, _Turn(_STREAM, 0, 0, stream.width))
        for linear in linears:
            self._add(linear.weight, _Turn(_STREAM, input_axis(linear), 0, stream.width))

    def _take_values(self, path: ValuePath) -> None:
        width = last_dimension(path.output.activation)
        if path.caches or width is None:
            return
        name, (first, last) = f"r2_{path.layer}", path.columns
        self._add_matrix(name, path.head_dim)
        self._add(path.value.weight, _Turn(name, path.value.channel_axis, first, last))
        if path.value.bias is not None:
            self._add(path.value.bias, _Turn(name, 0, first, last))
        self._add(path.output.weight, _Turn(name, input_axis(path.output), 0, width))

    def _add_matrix(self, name: str, size: int) -> None:
        self.matrices[name] = torch.nn.Parameter(torch.eye(size))

    def _add(self, weight: ir.Value, turn: _Turn) -> None:
        name = name_of(weight)
        self._values[name] = weight
        self._turns.setdefault(name, []).append(turn)


def _turned(real: Tensor, turn: _Turn, matrix: Tensor) -> Tensor:
    rows = real.movedim(turn.axis, -1)
    part = rows[..., turn.first : turn.last]
    blocks = part.reshape(*part.shape[:-1], -1, len(matrix)) @ matrix.to(real.dtype)
    done = blocks.reshape(part.shape)
    if done.shape != rows.shape:
        done = torch.cat([rows[..., : turn.first], done, rows[..., turn.last :]], dim=-1)
    return done.movedim(-1, turn.axis)


def _nearest_rotation(matrix: Tensor) -> NDArray[np.float64]:
    """The orthogonal matrix next to one that is orthogonal but for float32 rounding (polar)."""
    left, _, right = np.linalg.svd(matrix.detach().cpu().numpy().astype(np.float64))
    nearest: NDArray[np.float64] = left @ right
    return nearest
