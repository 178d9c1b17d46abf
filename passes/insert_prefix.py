"""insert-prefix: keys and values of a few tokens become constants in front of every text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qnpu.compiler.attention import Attention, find_attention, mask_operands, past_length
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import GraphEditor, constant_array, name_of, static_shape
from qnpu.compiler.op_traits import is_float, is_standard
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.prefix import Prefix, described, mark_prefix, prefix_of
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.compiler.rules import InvalidConfig, PrefixInserted, PrefixLeftOut
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.prefix import (
    Ids,
    NoPrefixError,
    PrefixConstants,
    PrefixSearch,
    TokenFeeds,
    capture_prefix,
    down_inputs,
    prefix_error,
)

_TOLERANCE = 1e-3
_HIDDEN = -1e9


@dataclass(frozen=True)
class InsertPrefix(Pass):
    """Puts a prefix of P tokens in front of every text, as constants of each attention.

    Before → after, k: (…, D, T), v: (…, T, D), mask: (…, S, T)::

        a = MatMul(Softmax(Add(MatMul(q, k), mask)), v)

        k' = Concat(prefix_k, k)          (…, D, P + T)
        v' = Concat(prefix_v, v)          (…, P + T, D)
        mask' = Concat(0, mask)           (…, S, P + T)
        a = MatMul(Softmax(Add(MatMul(q, k'), mask')), v')

    A model attends to its first token where there is nothing to attend to, and that token's
    activations become massive (SmolLM2: 50,529 × the median, quantnpu.md §3), as do those of some
    delimiters. Behind the prefix no token of the text needs to, and no range has to hold them.
    Source: PrefixQuant (arXiv 2410.05265).

    The text keeps its positions 0 … S - 1 and the prefix has -P … -1: keys as computed at
    0 … P - 1 are turned back by P steps of RoPE, whose angles are measured on the running graph
    (see ``capture_prefix``), so that any layout of pairs, scaling or base will do. Caches that
    come in stay behind the prefix, those that go out do not hold it.

    The prefix is found on data where ``ids`` is None, else it is what ``ids`` says.

    Must not fire where the graph takes no token ids or one at a time, an attention is not
    understood, keys depend on positions otherwise than by RoPE, nothing stands out, or the first
    tokens' attention differs from that of the graph given the prefix as tokens (QN310). A graph
    holds one prefix at most.

    Raises:
        DiagnosticError: QN301, QN305 the data do not fit; QN503 an id is not in the vocabulary.

    Attributes:
        data: what to run the graph on.
        ids: the tokens; None: search.
        search: how.
        progress: called with fraction done.
    """

    name: ClassVar[str] = "insert-prefix"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    data: FeedSource
    ids: Ids | None = None
    search: PrefixSearch = field(default_factory=PrefixSearch)
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        if prefix_of(model) is not None:
            return 0
        try:
            return self._insert(compilation)
        except NoPrefixError as reason:
            compilation.diagnostics.append(PrefixLeftOut(str(reason)).at())
            return 0

    def _insert(self, compilation: Compilation) -> int:
        model = compilation.model
        attentions, feeds = self._prepare(model)
        alone = _without_past(model, feeds.length)
        ids = self._choose(alone, feeds)
        before, after = (self.search.count(alone, feeds, [p])[0].count for p in ((), ids))
        captured, expected = capture_prefix(alone, find_attention(alone.graph)[0], feeds, ids)

        trial = alone.clone()
        adjacent = [item.at(alone, -len(ids)) for item in captured]
        _prepend(trial.graph, find_attention(trial.graph)[0], adjacent)
        names = [name_of(item.mix.outputs[0]) for item in attentions]
        error = prefix_error(trial, names, feeds, expected, len(ids))
        if not error <= _TOLERANCE:  # nor where it is NaN
            raise NoPrefixError(f"attention differs by {error:.1e} from that with tokens in front")

        steps = -len(ids) - _first_position(feeds, attentions[0].tokens - feeds.length)
        _prepend(model.graph, attentions, [item.at(alone, steps) for item in captured])
        mark_prefix(model, Prefix(ids, before, after, error))
        compilation.diagnostics.append(PrefixInserted(described(ids), before, after).at())
        return len(attentions)

    def _prepare(self, model: ir.Model) -> tuple[list[Attention], TokenFeeds]:
        """Attentions and data, or the reason why there can be no prefix."""
        attentions, blocked = find_attention(model.graph)
        if blocked:
            raise NoPrefixError(f"{blocked[0].reason} (at `{blocked[0].where}`)")
        if not attentions:
            raise NoPrefixError("no attention was found")
        entry = _token_input(model.graph)
        shape = static_shape(entry) if entry is not None else None
        if entry is None or shape is None or len(shape) != 2 or shape[0] != 1:
            raise NoPrefixError("the graph takes no token ids of one text, (1, S)")
        if shape[1] < 2:
            raise NoPrefixError("a run of one token has no room to compute a prefix in")
        pasts = {past_length(item, shape[1]) for item in attentions}
        if None in pasts or len(pasts) > 1:
            raise NoPrefixError("keys are neither the tokens' own nor a cache's in front of them")
        runs = [turn_caches(model, feeds) for feeds in self.data.feeds(model.graph.inputs)]
        return attentions, TokenFeeds(runs, name_of(entry))

    def _choose(self, model: ir.Model, feeds: TokenFeeds) -> Ids:
        """The tokens asked for, or found in a graph without a past."""
        if self.ids is not None:
            self._check_ids(model, feeds)
            if not 0 < len(self.ids) < feeds.length:
                raise NoPrefixError(f"{len(self.ids)} tokens do not fit into {feeds.length}")
            return self.ids
        if not down_inputs(model.graph):
            raise NoPrefixError("no down projection was found to look for outliers in")
        ids = self.search.search(model, feeds)
        if not ids:
            raise NoPrefixError(
                "no token stands out in the inputs of down projections, or none helps"
            )
        return ids

    def _check_ids(self, model: ir.Model, feeds: TokenFeeds) -> None:
        entry = next(v for v in model.graph.inputs if v.name == feeds.name)
        size = _vocabulary(entry)
        for number in self.ids or ():
            if size is not None and number >= size:
                reason = f"token {number} is not in a vocabulary of {size}"
                raise DiagnosticError(InvalidConfig("prefix", reason).at())


def _without_past(model: ir.Model, length: int) -> ir.Model:
    """A copy in which nothing of a cache is seen, so that a text stands alone.

    The keys in front of the last ``length`` get scores of minus a billion.
    """
    copy = model.clone()
    editor = GraphEditor(copy.graph)
    for item in find_attention(copy.graph)[0]:
        past = item.tokens - length
        node = next(node for node in item.between if node.op_type == "Softmax")
        scores = node.inputs[0]
        if not past or scores is None:
            continue
        row = np.where(np.arange(item.tokens) < past, np.float32(_HIDDEN), np.float32(0))
        hidden = editor.constant("past_hidden", row)
        label = f"{name_of(node)}_alone"
        alone = editor.node("Add", [scores, hidden], label, list(scores.shape or ()), before=node)
        node.replace_input_with(0, alone)
    return copy


def _first_position(feeds: TokenFeeds, past: int) -> int:
    """Where the first new token stands: behind the past, unless an input says otherwise."""
    first = feeds.runs[0]
    if "position_ids" in first:
        return int(first["position_ids"].reshape(-1)[0])
    if past and "attention_mask" in first:
        return int(first["attention_mask"].reshape(-1)[:past].sum())
    return past


def _token_input(graph: ir.Graph) -> ir.Value | None:
    """The input that a table of embeddings is looked up by; ``input_ids`` where there are more."""
    found = [value for value in graph.inputs if _vocabulary(value) is not None]
    return next((v for v in found if v.name == "input_ids"), found[0] if found else None)


def _vocabulary(value: ir.Value) -> int | None:
    """Rows of the table that ids choose from, looking through what only reshapes them."""
    for node, index in value.uses():
        if not is_standard(node):
            continue
        table = node.inputs[0]
        if node.op_type == "Gather" and index == 1 and table is not None:
            shape = static_shape(table)
            if table.is_initializer() and is_float(table) and shape and len(shape) == 2:
                return shape[0]
        elif node.op_type in ("Cast", "Identity", "Reshape") and index == 0:
            rows = _vocabulary(node.outputs[0])
            if rows is not None:
                return rows
    return None


def _prepend(
    graph: ir.Graph, attentions: Sequence[Attention], constants: Sequence[PrefixConstants]
) -> None:
    """Puts constants in front of keys and values, and open columns in front of masks."""
    editor = GraphEditor(graph)
    masks: dict[tuple[ir.Value, bool], ir.Value] = {}
    for item, constant in zip(attentions, constants, strict=True):
        count = constant.keys.shape[-1]
        for node, index in mask_operands(item):
            mask, opens = node.inputs[index], _opens(node, index, item)
            if mask is None:
                continue
            if (mask, opens) not in masks:
                masks[mask, opens] = _widened(editor, node, mask, count, opens)
            node.replace_input_with(index, masks[mask, opens])
        _join(editor, item.scores, constant.keys, "keys", -1)
        _join(editor, item.mix, constant.values, "values", -2)
        for node in (item.scores, *item.between):
            value = node.outputs[0]
            value.shape = ir.Shape([*list(value.shape or ())[:-1], item.tokens + count])


def _join(editor: GraphEditor, node: ir.Node, array: np.ndarray, what: str, axis: int) -> None:
    operand = node.inputs[1]
    if operand is None:
        raise ValueError(f"{name_of(node)} has no second input")
    label = f"{name_of(node)}_prefix"
    shape = list(static_shape(operand) or ())
    shape[axis] += array.shape[axis]
    constant = editor.constant(f"{label}_{what}", array)
    inputs = [constant, operand]
    joined = editor.node(
        "Concat", inputs, f"{label}_and_{what}", shape, before=node, axis=len(shape) + axis
    )
    node.replace_input_with(1, joined)


def _opens(node: ir.Node, index: int, attention: Attention) -> bool:
    """What a new column of a boolean operand must be, so that the score passes."""
    flow = attention.scores.outputs[0]
    for other in attention.between:
        if other is node:
            break
        flow = other.outputs[0]
    return node.op_type == "Where" and index == 0 and node.inputs[1] is flow


def _widened(
    editor: GraphEditor, node: ir.Node, mask: ir.Value, count: int, opens: bool
) -> ir.Value:
    """A mask with columns in front: zeros, or what lets a score through a Where."""
    shape = list(static_shape(mask) or ())
    if not shape or mask.dtype is None:
        raise ValueError(f"mask {mask.name} has no static shape or type")
    columns = np.full([*shape[:-1], count], opens, mask.dtype.numpy())
    array = constant_array(mask)
    label = f"{mask.name}_prefix"
    if array is not None and mask.is_initializer() and not mask.is_graph_input():
        return editor.constant(label, np.concatenate([columns, array], axis=-1))
    constant = editor.constant(f"{label}_columns", columns)
    shape[-1] += count
    value = editor.node("Concat", [constant, mask], label, shape, before=node, axis=len(shape) - 1)
    value.type = mask.type
    return value
