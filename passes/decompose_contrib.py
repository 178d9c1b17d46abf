"""decompose-contrib: operators of ONNX Runtime's own domain become standard ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import (
    NodeBuilder,
    add_initializer,
    last_dimension,
    name_of,
    static_shape,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rules import UnsupportedOperatorForm
from qnpu.passes.canonicalize import raise_opset

_MICROSOFT = "com.microsoft"
_MASKED = float(np.finfo(np.float32).min)
# Values by which an attribute says that what it stands for is not in use.
_UNUSED = (0, -1, "", "NONE")
_QUANTIZED = (
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QMoE",
)


@dataclass(frozen=True)
class DecomposeContrib(Pass):
    """Rewrites what the onnxruntime-genai model builder writes for a float decoder to opset 23.

    Before → after, x of shape (B, S, H), heads D wide::

        SimplifiedLayerNormalization(x, γ)          → RMSNormalization(x, γ)
        SkipSimplifiedLayerNormalization(x, s, γ)   → r = Add(x, s), RMSNormalization(r, γ)
        SkipLayerNormalization(x, s, γ, β)          → r = Add(x, s), LayerNormalization(r, γ, β)
        GroupQueryAttention(qkv, past, lengths, cos, sin)
                    → Split, Reshape, Transpose, RotaryEmbedding(·, rows of cos and sin),
                      Attention(q, k, v, mask, past)
        MultiHeadAttention(q, k, v)                 → Attention(q, k, v)
        RotaryEmbedding(x, positions, cos, sin)     → RotaryEmbedding(x, rows of cos and sin)
        FastGelu, BiasGelu, Gelu, QuickGelu         → Add, Gelu, Mul, Sigmoid

    The mask of S new tokens behind P past ones is the constant (S, P + S) with the lowest float
    where j > P + i, and where j ≤ P + i - window. Attention-23 is left for decompose-attention.

    Must not fire on standard operators. Raises QN117 where weights are quantized, where an option
    is set that the standard operators lack (a head sink, smooth softmax, a quantized cache), or
    where lengths are not constant: freeze-shapes must have bound the attention mask.
    Source: the operators' schemas in ONNX Runtime 1.32 and its CPU kernels' results.
    """

    name: ClassVar[str] = "decompose-contrib"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        """Raises: DiagnosticError: QN117, and QN112 where the opset cannot be raised."""
        model = compilation.model
        found = [node for node in model.graph if _is_contrib(node)]
        if not found:
            return 0
        for node in found:
            node.domain = _MICROSOFT  # ONNX Runtime keeps one of them in the default domain
        raise_opset(model)
        onnxscript.optimizer.fold_constants(model)  # lengths, as computed from the attention mask
        shared: dict[object, ir.Value] = {}
        nodes = [node for node in model.graph if _is_contrib(node)]
        for node in nodes:
            _replace(_Site(model, node, NodeBuilder(model.graph, node), shared))
        common.RemoveUnusedNodesPass()(model)
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
        return len(nodes)


@dataclass(frozen=True, slots=True)
class _Site:
    """One node to replace.

    Attributes:
        shared: constants that nodes alike have in common, by what they are made of.
    """

    model: ir.Model
    node: ir.Node
    build: NodeBuilder
    shared: dict[object, ir.Value]

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def needed(self, index: int) -> ir.Value:
        value = self.input(index)
        if value is None:
            self.fail(f"input {index} is missing")
        return value

    def integer(self, name: str, default: int = 0) -> int:
        return self.node.attributes.get_int(name, default)

    def number(self, name: str, default: float = 0.0) -> float:
        return self.node.attributes.get_float(name, default)

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The static shape, inferred anew where the nodes before have only just been replaced."""
        if value.shape is None:
            common.ShapeInferencePass(strict_mode=False, check_type=False)(self.model)
        return static_shape(value)

    def constant(self, value: ir.Value | None) -> NDArray[np.generic] | None:
        """The array of an initializer or of a Constant node."""
        if value is None:
            return None
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    def fail(self, reason: str) -> NoReturn:
        operator = self.node.op_type
        raise DiagnosticError(UnsupportedOperatorForm(operator, reason).at(node=name_of(self.node)))


Results = dict[int, ir.Value]
"""What takes the place of each output, by its index."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How an operator is replaced, and what of it the replacement knows.

    Attributes:
        rewrite: makes the new nodes.
        inputs: indices of inputs that may be given.
        attributes: names of those that are heeded; any other must be unused.
        default_domain: ONNX Runtime has the operator in the default domain, where ONNX has none.
    """

    rewrite: Callable[[_Site], Results]
    inputs: tuple[int, ...]
    attributes: tuple[str, ...] = ()
    default_domain: bool = field(default=False, kw_only=True)


def _is_contrib(node: ir.Node) -> bool:
    if node.domain == _MICROSOFT:
        return node.op_type in _FORMS or node.op_type in _QUANTIZED
    return is_standard(node) and node.op_type in _FORMS and _FORMS[node.op_type].default_domain


def _replace(site: _Site) -> None:
    node = site.node
    if node.op_type in _QUANTIZED:
        site.fail("its weights are quantized already")
    form = _FORMS[node.op_type]
    for name, attribute in node.attributes.items():
        if name not in form.attributes and attribute.value not in _UNUSED:
            site.fail(f"attribute `{name}` is {attribute.value}")
    for index, value in enumerate(node.inputs):
        if value is not None and index not in form.inputs:
            site.fail(f"input {index}, `{value.name}`, has no equivalent")
    results = form.rewrite(site)
    for index, output in enumerate(node.outputs):
        used = output.is_graph_output() or bool(output.uses())
        if used and index not in results:
            site.fail(f"output {index}, `{output.name}`, has no equivalent")
    site.build.replace(*(results.get(index) for index in range(len(node.outputs))))


# ----------------------------------------------------------------------------------------- norms


def _simplified_norm(site: _Site) -> Results:
    return {0: _rms_norm(site, site.needed(0), site.needed(1))}


def _skip_simplified_norm(site: _Site) -> Results:
    total = _skip_sum(site, site.input(3))
    return {0: _rms_norm(site, total, site.needed(2)), 3: total}


def _skip_norm(site: _Site) -> Results:
    total = _skip_sum(site, site.input(4))
    inputs = [total, site.needed(2), *([beta] if (beta := site.input(3)) is not None else [])]
    epsilon = site.number("epsilon", 1e-12)
    normed = site.build.add("LayerNormalization", inputs, "norm", axis=-1, epsilon=epsilon)
    return {0: normed, 3: total}


def _rms_norm(site: _Site, source: ir.Value, gain: ir.Value) -> ir.Value:
    default = 1e-5 if site.node.op_type == "SimplifiedLayerNormalization" else 1e-12
    axis, epsilon = site.integer("axis", -1), site.number("epsilon", default)
    return site.build.add("RMSNormalization", [source, gain], "norm", axis=axis, epsilon=epsilon)


def _skip_sum(site: _Site, bias: ir.Value | None) -> ir.Value:
    total = site.build.add("Add", [site.needed(0), site.needed(1)], "sum")
    return total if bias is None else site.build.add("Add", [total, bias], "biased_sum")


# ----------------------------------------------------------------------------------- activations


def _gelu(site: _Site) -> Results:
    return {0: site.build.add("Gelu", [_biased(site)], "gelu")}


def _fast_gelu(site: _Site) -> Results:
    return {0: site.build.add("Gelu", [_biased(site)], "gelu", approximate="tanh")}


def _biased(site: _Site) -> ir.Value:
    bias = site.input(1)
    source = site.needed(0)
    return source if bias is None else site.build.add("Add", [source, bias], "biased")


def _quick_gelu(site: _Site) -> Results:
    """x·sigmoid(α·x)"""
    source = site.needed(0)
    alpha = site.build.constant("alpha", np.array(site.number("alpha", 1.702), np.float32))
    scaled = site.build.add("Mul", [source, alpha], "scaled")
    gate = site.build.add("Sigmoid", [scaled], "gate")
    return {0: site.build.add("Mul", [source, gate], "gelu")}


# ------------------------------------------------------------------------------------- attention


def _group_query_attention(site: _Site) -> Results:
    heads, kv_heads = site.integer("num_heads"), site.integer("kv_num_heads")
    past_key, past_value, past = _past(site, 3)
    total = _total_length(site)
    tokens = total - past
    if tokens < 1:
        site.fail(f"{past} past tokens of {total} in all: the cache is a buffer that is not full")
    query, key, value = _split_heads(site, heads, kv_heads)
    if site.integer("do_rotary"):
        _check_positions(site, past, total)
        positions, interleaved = np.arange(past, total)[None], site.integer("rotary_interleaved")
        query = _rotate(site, query, "query", positions, interleaved)
        key = _rotate(site, key, "key", positions, interleaved)
    mask = _mask(site, tokens, past, site.input(10))
    inputs = [query, key, value, mask]
    return _attend(site, inputs, past_key, past_value)


def _multi_head_attention(site: _Site) -> Results:
    heads = site.integer("num_heads")
    sources = [site.needed(0), site.needed(1), site.needed(2)]
    if any(len(site.shape(source) or ()) != 3 for source in sources):
        site.fail("queries, keys and values are packed, transposed or of unknown rank")
    past_key, past_value, past = _past(site, 6)
    bias = site.input(3)
    if bias is not None:
        sources = _add_packed_bias(site, sources, bias)
    labels = ("query", "key", "value")
    query, key, value = (
        _to_heads(site, x, heads, label) for x, label in zip(sources, labels, strict=True)
    )
    mask = site.input(5)
    if site.integer("unidirectional"):
        tokens = (site.shape(sources[0]) or (0, 0, 0))[1]
        if tokens != (site.shape(sources[1]) or (0, 0, 0))[1]:
            site.fail("it is causal over another number of keys than of queries")
        mask = _mask(site, tokens, past, mask)
    return _attend(site, [query, key, value, mask], past_key, past_value)


def _attend(
    site: _Site,
    inputs: list[ir.Value | None],
    past_key: ir.Value | None,
    past_value: ir.Value | None,
) -> Results:
    """Attention-23 over (B, heads, S, D); without a past the new keys and values are all."""
    scale, softcap = site.number("scale"), site.number("softcap")
    options = ({"scale": scale} if scale else {}) | ({"softcap": softcap} if softcap else {})
    keys, values = inputs[1], inputs[2]
    if past_key is None or past_value is None:
        mixed = site.build.add("Attention", inputs, "mixed", **options)
    else:
        mixed, keys, values = site.build.add_many(
            "Attention", [*inputs, past_key, past_value], ["mixed", "keys", "values"], **options
        )
    turned = site.build.add("Transpose", [mixed], "joined", perm=[0, 2, 1, 3])
    shape = site.build.integers("joined_shape", 0, 0, -1)
    output = site.build.add("Reshape", [turned, shape], "output")
    return {0: output} | {i: v for i, v in ((1, keys), (2, values)) if v is not None}


def _past(site: _Site, index: int) -> tuple[ir.Value | None, ir.Value | None, int]:
    """Past keys and values, and how many tokens they hold; None where they hold nothing."""
    key, value = site.input(index), site.input(index + 1)
    if key is None or value is None:
        return None, None, 0
    shape = site.shape(key)
    if shape is None or len(shape) != 4:
        site.fail("the length of the past is not static")
    return (key, value, shape[2]) if shape[2] else (None, None, 0)


def _total_length(site: _Site) -> int:
    """Past and new tokens, where every sequence of the batch is as long."""
    last, total = site.constant(site.input(5)), site.constant(site.input(6))
    if last is None or total is None:
        site.fail("`seqlens_k` is not constant: bind the attention mask")
    length = int(total.reshape(-1)[0])
    if not bool((last == length - 1).all()):
        site.fail(f"`seqlens_k` is not {length - 1} throughout: sequences are padded")
    return length


def _check_positions(site: _Site, past: int, total: int) -> None:
    if site.input(9) is None:
        return
    positions = site.constant(site.input(9))
    if positions is None or not bool((positions == np.arange(past, total)).all()):
        site.fail(f"`position_ids` are not the constants {past} … {total - 1}")


def _split_heads(site: _Site, heads: int, kv_heads: int) -> list[ir.Value]:
    """Queries, keys and values as (B, heads, S, D), from three tensors or from a packed one."""
    query, key, value = site.needed(0), site.input(1), site.input(2)
    if key is None or value is None:
        width = _head_width(site, query, heads + 2 * kv_heads)
        sizes = site.build.integers("widths", heads * width, kv_heads * width, kv_heads * width)
        labels = ["query", "key", "value"]
        query, key, value = site.build.add_many("Split", [query, sizes], labels, axis=-1)
    return [
        _to_heads(site, query, heads, "query"),
        _to_heads(site, key, kv_heads, "key"),
        _to_heads(site, value, kv_heads, "value"),
    ]


def _head_width(site: _Site, packed: ir.Value, heads: int) -> int:
    """Of the past where there is one: shapes behind a node just replaced would need inference."""
    width = last_dimension(site.input(3))
    if width is None:
        shape = site.shape(packed)
        width = shape[-1] // heads if shape else None
    if width is None:
        site.fail("the width of a head is not static")
    return width


def _to_heads(site: _Site, source: ir.Value, heads: int, label: str) -> ir.Value:
    """(B, S, heads·D) → (B, heads, S, D)"""
    shape = site.build.integers(f"{label}_shape", 0, 0, heads, -1)
    split = site.build.add("Reshape", [source, shape], f"{label}_split")
    return site.build.add("Transpose", [split], f"{label}_heads", perm=[0, 2, 1, 3])


def _add_packed_bias(site: _Site, sources: list[ir.Value], bias: ir.Value) -> list[ir.Value]:
    """Biases of queries, keys and values lie in one row, one behind the other."""
    array = site.constant(bias)
    if array is None:
        site.fail("its bias is not constant")
    widths = [(site.shape(source) or (0,))[-1] for source in sources]
    if sum(widths) != array.size:
        site.fail("its bias is of another width")
    parts = np.split(array, np.cumsum(widths[:-1]))
    labels = ("query", "key", "value")
    rows = [
        site.build.constant(f"{label}_bias", part)
        for label, part in zip(labels, parts, strict=True)
    ]
    return [
        site.build.add("Add", [source, row], f"{label}_biased")
        for source, row, label in zip(sources, rows, labels, strict=True)
    ]


def _mask(site: _Site, tokens: int, past: int, bias: ir.Value | None) -> ir.Value | None:
    """What is added to the scores, (tokens, past + tokens); None where all attend to all."""
    if site.integer("causal", 1) == 0:
        return bias
    window = site.integer("local_window_size", -1)
    key = ("mask", tokens, past, window)
    if key not in site.shared:
        ahead = np.arange(past + tokens)[None] - (past + np.arange(tokens)[:, None])
        hidden = ahead > 0
        if window >= 0:
            hidden |= ahead <= -window
        name = "causal_mask" if window < 0 else f"causal_mask_{window}"
        array = np.where(hidden, np.float32(_MASKED), np.float32(0))
        site.shared[key] = add_initializer(site.model.graph, name, array)
    mask = site.shared[key]
    return mask if bias is None else site.build.add("Add", [mask, bias], "mask")


# ---------------------------------------------------------------------------------------- rotary


def _rotary_embedding(site: _Site) -> Results:
    source = site.needed(0)
    shape = site.shape(source)
    if shape is None or len(shape) not in (3, 4):
        site.fail("the shape of its input is not static")
    if site.node.attributes.get_float("scale", 1.0) != 1.0:
        site.fail("attribute `scale` is not one")
    cos = site.constant(site.needed(2))
    tokens = shape[-2]
    positions = site.constant(site.needed(1))
    if positions is None or cos is None:
        site.fail("its positions or tables are not constant")
    if positions.size == 1:
        positions = positions.reshape(-1)[0] + np.arange(tokens)[None]
    interleaved = site.integer("interleaved")
    if len(shape) == 4:
        return {0: _rotate(site, source, "input", positions, interleaved)}
    rotated = site.integer("rotary_embedding_dim")
    heads = site.integer("num_heads") or shape[2] // (2 * cos.shape[1])
    if rotated and not site.integer("num_heads"):
        site.fail("the number of heads is not given")
    split = _to_heads(site, source, heads, "input")
    turned = _rotate(site, split, "input", positions, interleaved)
    back = site.build.add("Transpose", [turned], "joined", perm=[0, 2, 1, 3])
    size = site.build.integers("joined_shape", 0, 0, -1)
    return {0: site.build.add("Reshape", [back, size], "output")}


def _rotate(
    site: _Site, source: ir.Value, label: str, positions: NDArray[np.generic], interleaved: int
) -> ir.Value:
    """RotaryEmbedding-23 with the rows of the tables that belong to the positions."""
    first = 2 if site.node.op_type == "RotaryEmbedding" else 7
    tables = [site.needed(first), site.needed(first + 1)]
    width = 2 * (last_dimension(tables[0]) or 0)
    rows = [_table_rows(site, table, positions) for table in tables]
    return site.build.add(
        "RotaryEmbedding",
        [source, *rows],
        f"{label}_rotated",
        interleaved=interleaved,
        rotary_embedding_dim=width,
    )


def _table_rows(site: _Site, table: ir.Value, positions: NDArray[np.generic]) -> ir.Value:
    """(B, S, D/2) of a (positions, D/2) table."""
    key = (name_of(table), positions.tobytes())
    if key not in site.shared:
        array = site.constant(table)
        if array is None:
            site.fail("its tables of cosines and sines are not constant")
        if int(positions.max()) >= len(array):
            site.fail(f"its tables hold {len(array)} positions, {int(positions.max()) + 1} needed")
        rows = array[positions]
        site.shared[key] = add_initializer(site.model.graph, f"{table.name}_rows", rows)
    return site.shared[key]


_ROTARY = ("do_rotary", "rotary_interleaved")
_FORMS: dict[str, _Form] = {
    "BiasGelu": _Form(_gelu, (0, 1)),
    "FastGelu": _Form(_fast_gelu, (0, 1)),
    "Gelu": _Form(_gelu, (0,)),
    "GroupQueryAttention": _Form(
        _group_query_attention,
        tuple(range(11)),
        (
            *("num_heads", "kv_num_heads", "scale", "softcap", "causal", "local_window_size"),
            # of norms whose gains, inputs 14 and 15, are not there
            *("qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon"),
            *_ROTARY,
        ),
    ),
    "MultiHeadAttention": _Form(
        _multi_head_attention,
        (0, 1, 2, 3, 5, 6, 7),
        ("num_heads", "scale", "unidirectional", "mask_filter_value"),
    ),
    "QuickGelu": _Form(_quick_gelu, (0,), ("alpha",)),
    "RotaryEmbedding": _Form(
        _rotary_embedding,
        (0, 1, 2, 3),
        ("interleaved", "num_heads", "rotary_embedding_dim", "scale"),
    ),
    "SimplifiedLayerNormalization": _Form(
        _simplified_norm, (0, 1), ("epsilon", "axis", "stash_type"), default_domain=True
    ),
    "SkipLayerNormalization": _Form(_skip_norm, (0, 1, 2, 3, 4), ("epsilon",)),
    "SkipSimplifiedLayerNormalization": _Form(_skip_simplified_norm, (0, 1, 2, 3), ("epsilon",)),
}
