"""decompose-attention: the fused Attention operator becomes MatMul and Softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import (
    NodeBuilder,
    add_initializer,
    constant_array,
    static_shape,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_MASKED = np.finfo(np.float32).min


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Spells out Attention-23 at static shapes.

    Before → after, q of shape (B, Hq, S, D), k and v of (B, Hkv, S, D), past of (B, Hkv, P, D)::

        y, k', v' = Attention(q, k, v, mask, past_k, past_v)

        k' = Concat(past_k, k), v' = Concat(past_v, v)            each head Hq / Hkv times over
        y = MatMul(Softmax(Add(Mul(MatMul(q, k'ᵀ), scale), mask)), v')

    Three-dimensional operands (B, S, H·D) are split into heads first. A softcap c makes the scores
    c·tanh(scores / c) before the mask. Causal and boolean masks become one additive constant.

    Why: inside one operator neither the scores nor the probabilities can have an encoding, and R2
    finds no path from the values to the heads.

    Must not fire on dynamic shapes, on lengths given at run time (opset 24), on a boolean mask
    that is not constant or hides a whole row, on a causal mask over another number of new keys
    than of queries, on the output of scores, or on a softmax of another precision than float32.
    Source: ONNX Attention-23.
    """

    name: ClassVar[str] = "decompose-attention"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        masks: dict[tuple[object, ...], ir.Value] = {}
        count = 0
        for node in list(graph):
            if node.op_type == "Attention" and is_standard(node):
                shapes = _read_shapes(node)
                if shapes is not None and _is_plain(node, shapes):
                    _decompose(graph, node, shapes, masks)
                    count += 1
        if count:
            common.RemoveUnusedNodesPass()(compilation.model)
            common.ShapeInferencePass(strict_mode=False, check_type=False)(compilation.model)
        return count


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Sizes of one attention; ``new`` counts the keys that are not of the past."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    new: int
    past: int
    width: int
    value_width: int
    flat: bool

    @property
    def total(self) -> int:
        return self.past + self.new


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _read_shapes(node: ir.Node) -> _Shapes | None:
    query, key, value = (static_shape(v) if v is not None else None for v in node.inputs[:3])
    past_value = _input(node, 4)
    past = static_shape(past_value) if past_value is not None else (0, 0, 0, 0)
    if query is None or key is None or value is None or past is None or len(past) != 4:
        return None
    flat = len(query) == 3
    if not len(query) == len(key) == len(value) or len(query) not in (3, 4):
        return None
    if flat:
        heads = node.attributes.get_int("q_num_heads", 0)
        kv_heads = node.attributes.get_int("kv_num_heads", 0)
        if not heads or not kv_heads:
            return None
        widths = query[2] // heads, value[2] // kv_heads
        return _Shapes(query[0], heads, kv_heads, query[1], key[1], past[2], *widths, flat)
    widths = query[3], value[3]
    return _Shapes(query[0], query[1], key[1], query[2], key[2], past[2], *widths, flat)


def _is_plain(node: ir.Node, shapes: _Shapes) -> bool:
    """Nothing is asked of it that the small operators would not do."""
    more_inputs = any(value is not None for value in node.inputs[6:])
    scores = any(v.uses() or v.is_graph_output() for v in node.outputs[3:])
    precision = node.attributes.get_int("softmax_precision", ir.DataType.FLOAT.value)
    causal = node.attributes.get_int("is_causal", 0)
    if more_inputs or scores or precision != ir.DataType.FLOAT.value:
        return False
    if shapes.heads % shapes.kv_heads or (causal and shapes.tokens != shapes.new):
        return False
    mask = _input(node, 3)
    if mask is None or mask.dtype is not ir.DataType.BOOL:
        return True
    allowed = constant_array(mask)
    if allowed is None:
        return False
    hidden = _additive(allowed) + (_causal(shapes) if causal else 0)
    return bool((hidden > _MASKED / 2).any(axis=-1).all())


def _decompose(
    graph: ir.Graph, node: ir.Node, shapes: _Shapes, masks: dict[tuple[object, ...], ir.Value]
) -> None:
    build = NodeBuilder(graph, node)
    query, key, value = (v for v in node.inputs[:3] if v is not None)
    if shapes.flat:
        query = _to_heads(build, query, shapes.heads, "query")
        key = _to_heads(build, key, shapes.kv_heads, "key")
        value = _to_heads(build, value, shapes.kv_heads, "value")
    keys = _with_past(build, _input(node, 4), key, shapes, "keys")
    values = _with_past(build, _input(node, 5), value, shapes, "values")
    each_key = _repeat(build, keys, shapes, shapes.width, "each_key")
    each_value = _repeat(build, values, shapes, shapes.value_width, "each_value")

    turned = build.add("Transpose", [each_key], "keys_transposed", perm=[0, 1, 3, 2])
    scores = _scale(build, node, build.add("MatMul", [query, turned], "scores"), shapes)
    mask = _mask(graph, node, shapes, masks, build)
    if mask is not None:
        scores = build.add("Add", [scores, mask], "masked")
    weights = build.add("Softmax", [scores], "weights", axis=-1)
    output = build.add("MatMul", [weights, each_value], "mixed")
    if shapes.flat:
        joined = build.add("Transpose", [output], "joined", perm=[0, 2, 1, 3])
        size = shapes.batch, shapes.tokens, shapes.heads * shapes.value_width
        output = build.add("Reshape", [joined, build.integers("output_shape", *size)], "output")
    build.replace(output, keys, values)


def _to_heads(build: NodeBuilder, source: ir.Value, heads: int, label: str) -> ir.Value:
    """(B, S, heads·D) → (B, heads, S, D)"""
    shape = build.integers(f"{label}_shape", 0, 0, heads, -1)
    split = build.add("Reshape", [source, shape], f"{label}_split")
    return build.add("Transpose", [split], f"{label}_heads", perm=[0, 2, 1, 3])


def _with_past(
    build: NodeBuilder, past: ir.Value | None, new: ir.Value, shapes: _Shapes, label: str
) -> ir.Value:
    if past is None or not shapes.past:
        return new
    return build.add("Concat", [past, new], label, axis=2)


def _repeat(
    build: NodeBuilder, source: ir.Value, shapes: _Shapes, width: int, label: str
) -> ir.Value:
    """(B, Hkv, T, D) → (B, Hq, T, D), each head so many times in a row."""
    times = shapes.heads // shapes.kv_heads
    if times == 1:
        return source
    wide = build.add("Unsqueeze", [source, build.integers(f"{label}_axis", 2)], f"{label}_group")
    sizes = shapes.batch, shapes.kv_heads, times, shapes.total, width
    copies = build.add(
        "Expand", [wide, build.integers(f"{label}_sizes", *sizes)], f"{label}_copies"
    )
    joined = shapes.batch, shapes.heads, shapes.total, width
    return build.add("Reshape", [copies, build.integers(f"{label}_shape", *joined)], label)


def _scale(build: NodeBuilder, node: ir.Node, scores: ir.Value, shapes: _Shapes) -> ir.Value:
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(shapes.width)
    softcap = node.attributes.get_float("softcap", 0.0)
    if not softcap:
        factor = build.constant("scale", np.array(scale, np.float32))
        return build.add("Mul", [scores, factor], "scaled")
    inner = build.constant("scale", np.array(scale / softcap, np.float32))
    bent = build.add("Tanh", [build.add("Mul", [scores, inner], "scaled")], "bent")
    return build.add(
        "Mul", [bent, build.constant("softcap", np.array(softcap, np.float32))], "capped"
    )


def _mask(
    graph: ir.Graph,
    node: ir.Node,
    shapes: _Shapes,
    masks: dict[tuple[object, ...], ir.Value],
    build: NodeBuilder,
) -> ir.Value | None:
    """One addend for all that is masked; constant parts are one constant, shared by all layers."""
    given, causal = _input(node, 3), node.attributes.get_int("is_causal", 0)
    array = constant_array(given)
    if given is not None and not causal and given.dtype is not ir.DataType.BOOL:
        return given
    if given is None and not causal:
        return None
    constant = given if array is not None else None
    key = (constant, causal, shapes.tokens, shapes.past)
    if key not in masks:
        addend = np.zeros(1, np.float32) if array is None else _additive(array)
        if causal:
            addend = np.maximum(addend + _causal(shapes), np.float32(_MASKED))
        masks[key] = add_initializer(graph, "attention_mask", addend.astype(np.float32))
    if given is not None and array is None:
        return build.add("Add", [given, masks[key]], "mask")
    return masks[key]


def _additive(mask: NDArray[np.generic]) -> NDArray[np.float64]:
    """A boolean mask as what is added to the scores; any other as it is."""
    if mask.dtype == np.bool_:
        return np.where(mask, 0.0, float(_MASKED))
    return mask.astype(np.float64)


def _causal(shapes: _Shapes) -> NDArray[np.float64]:
    """(S, P + S): new token i sees keys up to P + i."""
    ahead = np.arange(shapes.total)[None] > shapes.past + np.arange(shapes.tokens)[:, None]
    return np.where(ahead, float(_MASKED), 0.0)
