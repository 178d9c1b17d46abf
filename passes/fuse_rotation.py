"""fuse-rotation: rotate the residual stream and the attention values, within the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.hadamard import rotation_matrix
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rotate import rotate_axis
from qnpu.compiler.rotated_caches import CacheRotation, mark_rotated
from qnpu.compiler.rotated_weights import mark_rotated_weights
from qnpu.compiler.rules import NoHadamard, RotatedCache, StreamNotRotated, ValuesNotRotated
from qnpu.compiler.topology import (
    Blocker,
    DecoderTopology,
    ResidualStream,
    ValuePath,
    discover,
    gains_on,
    input_axis,
    own_biases,
    untie,
)

MARK = "qnpu.rotation"
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class FuseRotation(Pass):
    """Multiplies orthogonal matrices into weights; the graph computes the same.

    Before → after, R1 of shape (H, H), R2 of shape (D, D), I⊗R2 block-diagonal over heads::

        E, W_o, W_down              → E·R1, W_o·R1, W_down·R1      (sources; biases likewise)
        W_q, W_k, W_gate, W_up, lm_head → R1ᵀ·W                    (sinks)
        W_v (input already by R1)   → W_v·(I⊗R2)
        W_o                         → (I⊗R2ᵀ)·W_o

    A rotation spreads an outlier channel over all channels, so that one scale fits them
    (quantnpu.md §0; SpinQuant, QuaRot). R1 is one matrix for all layers, R2 one per layer. Both are
    randomised Hadamard matrices where the size has one, else random orthogonal ones.

    Of ``tries`` seeds for R1 the one is kept whose rotated stream is flattest: least
    max / mean of diag(R1ᵀ·C·R1), C = Σ WᵀW over all sources, a data-free stand-in for the stream's
    second moment. Folds in float64, stores the weight's own type, one weight at a time. A linear
    tied to the embedding gets a weight of its own first, linears that share a bias get one each.

    Must not fire where a norm on the stream has a gain, where anything but norms and linears reads
    the stream or anything but embeddings and linears writes it (QN201), where a value path is not
    reshapes alone (QN202), or on a model that carries the mark of an earlier run.

    A cache of values, a graph input joined to the new ones or a graph output of them, holds V·R2
    afterwards (QN205). R2 depends on the seed and the layer's number alone, so that the caches of
    a prefill graph and of a decode graph of one model agree.

    Attributes:
        residual: rotate the stream (R1).
        values: rotate the attention values (R2).
        seed: of the first try.
        tries: seeds to choose R1 from.
        rotate_caches: rotate values that a cache holds; else their attention stays (QN202).
    """

    name: ClassVar[str] = "fuse-rotation"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    residual: bool = True
    values: bool = True
    seed: int = 0
    tries: int = 8
    rotate_caches: bool = True

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        topology = discover(model.graph) if MARK not in model.metadata_props else None
        if topology is None or not (self.residual or self.values):
            return 0
        count = own_biases(model.graph)
        if count:  # biases that blocked a rotation are free now
            topology = discover(model.graph) or topology
        done: list[str] = []
        if self.residual:
            count += self._rotate_stream(compilation, topology.stream, done)
        if self.values:
            count += self._rotate_values(compilation, topology, done)
        if done:
            model.metadata_props[MARK] = " ".join(done)
        return count

    def _rotate_stream(
        self, compilation: Compilation, stream: ResidualStream, done: list[str]
    ) -> int:
        blockers = [*stream.blockers, *gains_on(stream)]
        if blockers:
            compilation.diagnostics += [
                StreamNotRotated(b.reason).at(node=b.where) for b in blockers
            ]
            return 0
        seed, rotation = self._flattest(compilation, stream)
        graph = compilation.graph
        readers = [untie(graph, linear) for sink in stream.sinks for linear in sink.linears]
        for source in stream.sources:
            rotate_axis(source.weight, source.axis, rotation)
            if source.bias is not None:
                rotate_axis(source.bias, 0, rotation)
        for linear in readers:
            rotate_axis(linear.weight, input_axis(linear), rotation)
        mark_rotated_weights(
            compilation.model,
            inputs=[linear.weight for linear in readers],
            outputs=[source.weight for source in stream.sources if as_linear(source.node)],
        )
        done.append(f"r1={seed}")
        return 1

    def _flattest(self, compilation: Compilation, stream: ResidualStream) -> tuple[int, Matrix]:
        moment = np.zeros((stream.width, stream.width))
        for source in stream.sources:
            array = constant_array(source.weight)
            if array is not None:
                rows = np.moveaxis(array, source.axis, -1).reshape(-1, stream.width)
                moment += (rows.T @ rows).astype(np.float64)
        best: tuple[float, int, Matrix] | None = None
        for seed in range(self.seed, self.seed + max(self.tries, 1)):
            rotation, hadamard = rotation_matrix(stream.width, seed)
            energy = np.einsum("ij,ij->j", rotation, moment @ rotation)
            peak = float(energy.max() / energy.mean())
            if best is None or peak < best[0]:
                best = (peak, seed, rotation)
        if not hadamard:
            compilation.diagnostics.append(NoHadamard(stream.width).at())
        if best is None:
            raise ValueError("no seed was tried")
        return best[1], best[2]

    def _rotate_values(
        self, compilation: Compilation, topology: DecoderTopology, done: list[str]
    ) -> int:
        kept = [] if self.rotate_caches else [p for p in topology.value_paths if p.caches]
        blockers = [
            *topology.value_blockers,
            *(Blocker("a cache holds the values", name_of(path.matmul)) for path in kept),
        ]
        compilation.diagnostics += [ValuesNotRotated(b.reason).at(node=b.where) for b in blockers]
        paths = [p for p in topology.value_paths if self.rotate_caches or not p.caches]
        caches: dict[str, CacheRotation] = {}
        for path in paths:
            seed = self.seed + path.layer
            rotation, hadamard = rotation_matrix(path.head_dim, seed)
            if not hadamard:
                node = name_of(path.matmul)
                compilation.diagnostics.append(NoHadamard(path.head_dim).at(node=node))
            _rotate_path(path, rotation)
            for cache in path.caches:
                caches[name_of(cache)] = CacheRotation(path.head_dim, seed)
        compilation.diagnostics += [RotatedCache(name).at(value=name) for name in caches]
        mark_rotated(compilation.model, caches)
        mark_rotated_weights(
            compilation.model,
            inputs=[path.output.weight for path in paths],
            outputs=[path.value.weight for path in paths],
        )
        if paths:
            done.append(f"r2={self.seed}")
        return len(paths)


def _rotate_path(path: ValuePath, rotation: Matrix) -> None:
    first, last = path.columns
    rotate_axis(path.value.weight, path.value.channel_axis, rotation, first, last)
    if path.value.bias is not None:
        rotate_axis(path.value.bias, 0, rotation, first, last)
    rotate_axis(path.output.weight, input_axis(path.output), rotation)
