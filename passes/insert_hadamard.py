"""insert-hadamard: rotate queries and keys (R3) and inputs of down projections (R4) at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import (
    GraphEditor,
    constant_array,
    last_dimension,
    name_of,
    set_constant,
)
from qnpu.compiler.hadamard import hadamard_pair, has_hadamard, random_hadamard
from qnpu.compiler.op_traits import Linear, is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.roles import is_down_projection, is_rotated_online, makes_scores
from qnpu.compiler.rules import NotRotatedOnline
from qnpu.compiler.topology import (
    as_feature_linear,
    has_one_role,
    input_axis,
    keeps_features,
    scaled_source,
)

KINDS = ("r3", "r4")
_CHUNK_ROWS = 8192

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class InsertHadamard(Pass):
    """Puts MatMuls by Hadamard matrices into the graph; it computes the same.

    Before → after, R3 of shape (D, D), D the width of a head, R4 of shape (n, n)::

        scores = MatMul(q, Transpose(k))           q: (1, heads, T, D), k: (1, groups, T, D)
        y = MatMul(x, W)                           x: (1, T, n), a down projection

        scores = MatMul(MatMul(q, R3), Transpose(MatMul(k, R3)))
        y = MatMul(MatMul(x, R4), R4⁻¹·W)

    Behind RoPE no weight can take the rotation of queries and keys, and none that of what an
    activation function made, so these two run online (quantnpu.md §0; QuaRot, SpinQuant). Keys are
    rotated before they are repeated for query heads that share them.

    R = s·diag(±1)·H, H a ±1 Hadamard matrix of order n, s = 1/√n in float32, signs drawn from the
    seed: calibrate-ranges stores it as codes ±1 with the one scale s, without error. With s the
    rotation is orthogonal, so that no range grows, neither of x·R nor of the scores; a fixed-point
    kernel has it in its requantize multiplier, where it costs nothing. R4⁻¹ = Rᵀ/(n·s²), in
    float64, undoes the very s that is stored; of R3, n·s² = 1 ± 1e-7 is left in the scores.

    Up to ``whole_up_to`` one matrix does it. Beyond, n² products per token cost more than the
    linear itself (SmolLM2's down projection: 1536² against 1536·576), so R = A⊗B, a·b = n of the
    least a + b (32·48: n·80 products)::

        x: (…, n) → Reshape (…, a, b) → MatMul B → Transpose (…, b, a) → MatMul A → Reshape (…, n)

    The result's features are in the order (b, a), which the rows of W take up. A Transpose rather
    than MatMul(Aᵀ, x): with the constant second it is a fully connected layer to an NPU, and not a
    batch of T small products.

    Must not fire where no Hadamard matrix of the size is known, where a down projection's weight
    has another use, where keys are not transposed just before the scores or are joined to a cache
    (all of it would be rotated anew for each token) (QN204), or where a rotation is there already.

    Attributes:
        kinds: any of ``r3`` and ``r4``.
        seed: of the signs.
        whole_up_to: largest size that one matrix rotates.
    """

    name: ClassVar[str] = "insert-hadamard"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    whole_up_to: int = 128

    def run(self, compilation: Compilation) -> int:
        count = 0
        if "r3" in self.kinds:
            count += self._rotate_scores(compilation)
        if "r4" in self.kinds:
            count += self._rotate_down_inputs(compilation)
        return count

    def _rotate_scores(self, compilation: Compilation) -> int:
        graph, editor = compilation.graph, GraphEditor(compilation.graph)
        sites = [node for node in graph if makes_scores(node)]
        if not sites:
            reason = "no scores that go to a softmax were found"
            compilation.diagnostics.append(NotRotatedOnline("R3", reason).at())
        rotations: dict[int, _Rotation] = {}
        count = 0
        for node in sites:
            keys = _before_transpose(node)
            size = last_dimension(node.inputs[0])
            reason = _why_not(keys, size)
            if reason:
                compilation.diagnostics.append(
                    NotRotatedOnline("R3", reason).at(node=name_of(node))
                )
            elif keys is not None and size is not None and not _is_rotated(*keys):
                if size not in rotations:
                    rotations[size] = self._rotation(editor, size, "keys")
                rotations[size].insert(editor, node, 0)
                rotations[size].insert(editor, *keys)
                count += 1
        return count

    def _rotate_down_inputs(self, compilation: Compilation) -> int:
        graph, editor = compilation.graph, GraphEditor(compilation.graph)
        linears = [linear for node in graph if (linear := as_feature_linear(node)) is not None]
        sites = [linear for linear in linears if is_down_projection(linear)]
        if not sites:
            reason = "no down projection was found"
            compilation.diagnostics.append(NotRotatedOnline("R4", reason).at())
        rotations: dict[int, _Rotation] = {}
        count = 0
        for linear in sites:
            if is_rotated_online(linear.activation):
                continue
            size = last_dimension(linear.activation)
            reason = _no_matrix(size)
            if not has_one_role(linear.weight):
                reason = "the weight is used in two roles"
            if reason or size is None:
                compilation.diagnostics.append(
                    NotRotatedOnline("R4", reason).at(node=name_of(linear.node))
                )
                continue
            if size not in rotations:
                rotations[size] = self._rotation(editor, size, "down")
            rotations[size].insert(editor, linear.node, 0)
            rotations[size].fold_inverse(linear)
            count += 1
        return count

    def _rotation(self, editor: GraphEditor, size: int, what: str) -> _Rotation:
        """One set of constants for all layers, as their linears have one size."""
        pair = hadamard_pair(size) if size > self.whole_up_to else None
        factors: list[ir.Value] = []
        for index, order in enumerate(pair or (size,)):
            matrix = random_hadamard(order, self.seed + index).astype(np.float32)
            factors.append(editor.constant(f"hadamard_{what}_{order}", matrix))
        return _Rotation(tuple(factors), size)


@dataclass(frozen=True, eq=False)
class _Rotation:
    """R = A⊗B, or one matrix.

    Attributes:
        factors: initializers: (A, B), or (R,).
        size: n.
    """

    factors: tuple[ir.Value, ...]
    size: int

    def insert(self, editor: GraphEditor, node: ir.Node, index: int) -> None:
        """Rotates one input of a node; who else takes that value gets it as it was."""
        value = node.inputs[index]
        if value is None or value.shape is None:
            raise ValueError(f"input {index} of {name_of(node)} has no shape")
        lead = list(value.shape)[:-1]
        label = f"{name_of(node)}_input_{index}_rotated"

        def step(op_type: str, constants: list[ir.Value], last: list[int], **more: Any) -> None:
            nonlocal value
            inputs, shape = [value, *constants], [*lead, *last]
            value = editor.node(op_type, inputs, label, shape, before=node, **more)

        def reshape(last: list[int]) -> None:
            sizes = [size if isinstance(size, int) else 0 for size in [*lead, *last]]  # 0 copies
            step("Reshape", [editor.constant(f"{label}_shape", np.array(sizes, np.int64))], last)

        if len(self.factors) == 1:
            step("MatMul", [self.factors[0]], [self.size])
        else:
            a, b = (last_dimension(factor) or 0 for factor in self.factors)
            reshape([a, b])
            step("MatMul", [self.factors[1]], [a, b])
            step("Transpose", [], [b, a], perm=[*range(len(lead)), len(lead) + 1, len(lead)])
            step("MatMul", [self.factors[0]], [b, a])
            reshape([self.size])
        node.replace_input_with(index, value)

    def fold_inverse(self, linear: Linear) -> None:
        """Replaces W by R⁻¹·W, rows in the order that ``insert`` leaves features in."""
        weight = constant_array(linear.weight)
        if weight is None:
            raise ValueError(f"initializer {linear.weight.name} has no data")
        rows: NDArray[Any] = np.moveaxis(weight, input_axis(linear), -1)
        flat = rows.reshape(-1, self.size)
        inverses = [_inverse(factor) for factor in self.factors]
        result = np.empty(flat.shape, weight.dtype)
        for start in range(0, len(flat), _CHUNK_ROWS):
            part = flat[start : start + _CHUNK_ROWS].astype(np.float64)
            result[start : start + _CHUNK_ROWS] = _turned(part, inverses)
        set_constant(linear.weight, np.moveaxis(result.reshape(rows.shape), -1, input_axis(linear)))


def _inverse(factor: ir.Value) -> NDArray[np.float64]:
    """R⁻¹ = Rᵀ/(n·s²) of R = s·H as it is stored."""
    matrix = np.asarray(constant_array(factor), np.float64)
    inverse: NDArray[np.float64] = matrix.T / (len(matrix) * matrix[0, 0] ** 2)
    return inverse


def _turned(rows: NDArray[np.float64], inverses: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Each row w, a column of W, becomes R⁻¹·w; of two factors in the order (b, a)."""
    if len(inverses) == 1:
        whole: NDArray[np.float64] = rows @ inverses[0].T
        return whole
    a, b = inverses
    blocks = rows.reshape(len(rows), len(a), len(b)) @ b.T
    turned: NDArray[np.float64] = blocks.transpose(0, 2, 1) @ a.T
    return turned.reshape(len(rows), -1)


def _before_transpose(scores: ir.Node) -> tuple[ir.Node, int] | None:
    """Which input of which node are keys, (…, D), that only these scores read behind it.

    From the scores back through the Transpose, and on through what repeats keys for several
    query heads. None where there is no such Transpose, or another reads what it makes.
    """
    node, index = scores, 1
    transposed = False
    while True:
        value = node.inputs[index]
        maker = value.producer() if value is not None else None
        if value is None or maker is None or value.is_graph_output() or len(value.uses()) > 1:
            break
        turns = not transposed and _turns_features(maker)
        if turns or (transposed and _moves_rows(maker)):
            transposed = True
            node, index = maker, 0
        elif (source := scaled_source(maker)) is not None:
            node, index = maker, list(maker.inputs).index(source)
        else:
            break
    return (node, index) if transposed else None


def _turns_features(node: ir.Node) -> bool:
    """A Transpose that makes the last axis the one before the last."""
    order = node.attributes.get_ints("perm", ()) if node.op_type == "Transpose" else ()
    return is_standard(node) and len(order) > 1 and order[-2] == len(order) - 1


def _moves_rows(node: ir.Node) -> bool:
    """Moves or repeats whole rows of the last axis."""
    if node.op_type in ("Expand", "Tile") and is_standard(node):
        width = last_dimension(node.inputs[0])
        return width is not None and width == last_dimension(node.outputs[0])
    order = node.attributes.get_ints("perm", ()) if node.op_type == "Transpose" else ()
    if is_standard(node) and order:
        return order[-1] == len(order) - 1
    return keeps_features(node)


def _joins_features(concat: ir.Node) -> bool:
    """Along the last axis, as rotary embeddings do; a cache grows along another."""
    rank = len(concat.outputs[0].shape or ())
    return concat.attributes.get_int("axis", -1) in (-1, rank - 1)


def _why_not(keys: tuple[ir.Node, int] | None, size: int | None) -> str:
    """Half a sentence on why queries and keys cannot be rotated; empty where they can."""
    if keys is None:
        return "keys are not transposed just before the scores, or are read elsewhere too"
    value = keys[0].inputs[keys[1]]
    maker = value.producer() if value is not None else None
    if maker is None:
        return "keys are a graph input or a constant"
    if maker.op_type == "Concat" and not _joins_features(maker):
        return "keys join a cache, all of which would be rotated anew for each token"
    return _no_matrix(size)


def _no_matrix(size: int | None) -> str:
    if size is None:
        return "the size is not static"
    return "" if size > 1 and has_hadamard(size) else f"no Hadamard matrix of size {size} is known"


def _is_rotated(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    return value is not None and is_rotated_online(value)
