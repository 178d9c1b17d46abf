"""Prefix tokens, measured on the running graph: which ones, and their keys and values.

Massive activations arise where a token has nothing better to attend to than itself: at the first
position, and at some delimiters. With a fixed prefix in front they arise there alone (PrefixQuant,
arXiv 2410.05265).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.attention import Attention, KeyPath, key_path
from qnpu.compiler.graph_edit import name_of, subgraph_proto
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.compiler.roles import computed_by, is_down_projection
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Array, Feeds, open_session, run

OUTLIER = 64.0
"""A token stands out where its max |x| is so many times the median token's."""

_SAME_TOKEN_RUNS = 3
_FIT_TOLERANCE = 1e-3

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenFeeds:
    """Runs of a graph, and how to put other tokens into them.

    Attributes:
        runs: one feed dictionary per window.
        name: the input that holds token ids, (1, S).
    """

    runs: Sequence[Feeds]
    name: str

    @property
    def length(self) -> int:
        """S"""
        return int(self.runs[0][self.name].shape[-1])

    def text(self, index: int) -> NDArray[np.int64]:
        """Ids of a window, (S,)."""
        return self.runs[index][self.name].reshape(-1).astype(np.int64)

    def with_prefix(self, index: int, prefix: Sequence[int]) -> Feeds:
        """A window behind a prefix; its last tokens are cut off."""
        return self.with_tokens(index, np.array([*prefix, *self.text(index)])[: self.length])

    def with_tokens(self, index: int, ids: Array) -> Feeds:
        """A window with all its tokens replaced."""
        old = self.runs[index][self.name]
        return self.runs[index] | {self.name: ids.astype(old.dtype).reshape(old.shape)}


@dataclass(slots=True)
class Spread:
    """Of one tensor, what decides how well few codes hold it.

    Attributes:
        low, high: least and greatest element.
        powers: mean square of the median token, one of each run.
    """

    low: float = 0.0
    high: float = 0.0
    powers: list[float] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """Mean square of the rounding error of 8 bits over that of the median token."""
        step = (self.high - self.low) / 255
        return step**2 / 12 / max(float(np.mean(self.powers)), 1e-30)


@dataclass(slots=True)
class Outliers:
    """Tokens that stand out behind one prefix, over all windows and down projections.

    Attributes:
        count: how many.
        worst: the largest ratio of a token's max |x| to the median token's.
        ids: of those tokens, with how often each.
        spreads: by name of the tensor.
    """

    count: int = 0
    worst: float = 0.0
    ids: Counter[int] = field(default_factory=Counter)
    spreads: dict[str, Spread] = field(default_factory=dict)

    def look(
        self, name: str, array: Array, tokens: NDArray[np.int64], skipped: int, ratio: float
    ) -> None:
        """Adds one run of one tensor.

        Args:
            name: of the tensor.
            array: (1, S, n), or (S, n).
            tokens: (S,)
            skipped: tokens of the prefix.
            ratio: a token stands out where it is above it.
        """
        rows = array.reshape(len(tokens), -1)[skipped:]
        peaks = np.abs(rows).max(axis=-1)
        relative = peaks / max(float(np.median(peaks)), np.finfo(np.float32).tiny)
        out = np.flatnonzero(relative > ratio)
        self.count += len(out)
        self.worst = max(self.worst, float(relative.max()))
        self.ids.update(int(tokens[skipped + i]) for i in out)
        spread = self.spreads.setdefault(name, Spread())
        spread.low = min(spread.low, float(rows.min()))
        spread.high = max(spread.high, float(rows.max()))
        spread.powers.append(float(np.median(np.square(rows).mean(axis=-1))))

    @property
    def noise(self) -> float:
        """Of all tensors."""
        return sum(spread.noise for spread in self.spreads.values())


def down_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of the down projections, before an online rotation."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        linear = as_linear(node)
        if linear is not None and is_down_projection(linear):
            maker = computed_by(linear.activation)
            if maker is not None:
                found[maker.outputs[0]] = None
    return list(found)


def count_outliers(
    model: ir.Model,
    feeds: TokenFeeds,
    prefixes: Sequence[Ids],
    *,
    ratio: float = OUTLIER,
    progress: ProgressCallback = no_progress,
) -> list[Outliers]:
    """Runs every window behind every prefix, given as tokens; one result per prefix."""
    names = {name_of(value) for value in down_inputs(model.graph)}
    windows = len(feeds.runs)
    batches = [feeds.with_prefix(i, prefix) for prefix in prefixes for i in range(windows)]
    tokens = [batch[feeds.name].reshape(-1).astype(np.int64) for batch in batches]
    found = [Outliers() for _ in prefixes]
    runner = SegmentRunner(model, batches)
    total = len(runner.segments) * len(batches)
    for done, step in enumerate(runner.stream(names), start=1):
        which = step.batch // windows
        for name, array in step.values.items():
            found[which].look(name, array, tokens[step.batch], len(prefixes[which]), ratio)
        progress("prefix", done / total)
    return found


@dataclass(frozen=True, slots=True)
class PrefixSearch:
    """Greedy: the token that leaves the fewest outliers, then the next behind it.

    Of tokens that leave equally few, the one behind which 8 bits lose least is taken.

    Attributes:
        most: tokens at most.
        candidates: ids of each kind to try: that stand out, and that are frequent.
        special: further ids to try, as vocabularies have their special tokens there.
        windows: of the data, to try candidates on.
        ratio: see ``OUTLIER``.
        progress: called with fraction done of each step.
    """

    most: int = 4
    candidates: int = 4
    special: Ids = (0, 1, 2)
    windows: int = 2
    ratio: float = OUTLIER
    progress: ProgressCallback = no_progress

    def search(self, model: ir.Model, feeds: TokenFeeds) -> Ids:
        """The prefix; no token where nothing stands out or none helps."""
        few = TokenFeeds(feeds.runs[: self.windows], feeds.name)
        prefix: Ids = ()
        (best,) = self.count(model, few, [()])
        while best.count and len(prefix) < min(self.most, feeds.length - 1):
            tried = [(*prefix, number) for number in self._candidates(few, best)]
            results = self.count(model, few, tried)
            at = min(range(len(tried)), key=lambda i: (results[i].count, results[i].noise))
            if results[at].count >= best.count:
                break
            prefix, best = tried[at], results[at]
        return prefix

    def count(self, model: ir.Model, feeds: TokenFeeds, prefixes: Sequence[Ids]) -> list[Outliers]:
        """What stands out behind each prefix, in all windows of the data."""
        return count_outliers(model, feeds, prefixes, ratio=self.ratio, progress=self.progress)

    def _candidates(self, feeds: TokenFeeds, outliers: Outliers) -> list[int]:
        frequent = Counter(int(i) for run in range(len(feeds.runs)) for i in feeds.text(run))
        ranked = [number for number, _ in outliers.ids.most_common(self.candidates)]
        ranked += [number for number, _ in frequent.most_common(self.candidates)]
        return list(dict.fromkeys([*self.special, *ranked]))


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of RoPE, as measured: pairs of features and the angle each is turned by.

    Attributes:
        first, second: features of each pair, (pairs,).
        angles: radians per position, (pairs,).
        error: max |Δ| of keys that these predict, relative to the largest key.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    angles: NDArray[np.float64]
    error: float

    def apply(self, rows: Array, steps: int) -> Array:
        """Keys (…, D) as they would be so many positions later."""
        turned = rows.astype(np.float64)
        pairs = (rows[..., self.first] + 1j * rows[..., self.second]).astype(np.complex128)
        pairs *= np.exp(1j * steps * self.angles)
        turned[..., self.first], turned[..., self.second] = pairs.real, pairs.imag
        return turned.astype(rows.dtype)


def measure_turn(keys: Array) -> Turn:
    """Finds RoPE in keys of the same hidden state at every position.

    Args:
        keys: (…, S, D).

    Returns:
        The layout of pairs (halves or neighbours, of all features or the first few) that predicts
        the keys best: k_p = R^p k_0, turned by R = exp(iθ) of each pair.
    """
    rows = keys.reshape(-1, *keys.shape[-2:]).astype(np.float64)
    width = rows.shape[-1]
    layouts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for rotated in range(width - width % 2, 0, -2):
        order = np.arange(rotated)
        layouts += [(order[: rotated // 2], order[rotated // 2 :]), (order[::2], order[1::2])]
    return min((_fit(rows, *layout) for layout in layouts), key=lambda turn: turn.error)


def _fit(rows: Array, first: NDArray[np.int64], second: NDArray[np.int64]) -> Turn:
    pairs = rows[..., first] + 1j * rows[..., second]
    angles = np.angle((pairs[:, 1:] * pairs[:, :-1].conj()).sum(axis=(0, 1)))
    position = np.arange(rows.shape[1])[:, None]
    start = (pairs * np.exp(-1j * position * angles)).mean(axis=1, keepdims=True)
    predicted = start * np.exp(1j * position * angles)
    miss = float(np.abs(predicted - pairs).max())
    rest = np.delete(rows, np.concatenate([first, second]), axis=-1)
    if rest.size:
        miss = max(miss, float(np.abs(rest - rest.mean(axis=1, keepdims=True)).max()))
    return Turn(first, second, angles, miss / max(float(np.abs(rows).max()), 1e-30))


@dataclass(frozen=True, slots=True)
class PrefixConstants:
    """What a prefix is to one attention.

    Attributes:
        keys: (…, D, P)
        values: (…, P, D)
    """

    keys: Array
    values: Array


class NoPrefixError(Exception):
    """The graph is not such that a prefix can be held as constants; says why."""


@dataclass(frozen=True, slots=True)
class CapturedPrefix:
    """Keys and values of a prefix, as one attention computed them.

    Attributes:
        rows: keys behind RoPE, (…, S, D); zero but for the first P.
        turn: RoPE as measured.
        values: (…, P, D)
        path: from such rows to what the scores take.
        operand: that value.
    """

    rows: Array
    turn: Turn
    values: Array
    path: KeyPath
    operand: ir.Value

    def at(self, model: ir.Model, steps: int) -> PrefixConstants:
        """As constants, so many positions later than they were computed at.

        Args:
            model: with the graph that they were computed by, whose own online rotation is run.
            steps: negative for earlier.
        """
        count = self.values.shape[-2]
        turned = self.turn.apply(self.rows, steps)
        keys = np.swapaxes(turned, -1, -2)
        if self.path.nodes:
            proto = subgraph_proto(self.path.nodes, [self.path.source], [self.operand], model)
            feeds = {name_of(self.path.source): turned}
            (keys,) = run(open_session(proto), [name_of(self.operand)], feeds)
        return PrefixConstants(keys[..., :count].copy(), self.values)


def capture_prefix(
    model: ir.Model, attentions: Sequence[Attention], feeds: TokenFeeds, prefix: Ids
) -> tuple[list[CapturedPrefix], list[Array]]:
    """Runs the graph on the prefix, and on the same token over and over to measure RoPE.

    Of equal tokens all hidden states are equal, whatever the attention, so that their keys differ
    by RoPE alone.

    Args:
        model: that sees no tokens but those it is given: no past.
        attentions: of that model, all of them.
        feeds: the first window is run.
        prefix: P tokens.

    Returns:
        One item per attention, and the result of each attention, (…, S, D), of the first window
        behind the prefix.

    Raises:
        NoPrefixError: keys or values depend on positions otherwise than by RoPE.
    """
    paths = [key_path(item) for item in attentions]
    batches = [feeds.with_prefix(0, prefix)]
    batches += [feeds.with_tokens(0, np.full(feeds.length, i)) for i in _different(feeds, prefix)]
    needed = {
        index: [name_of(v) for v in (path.source, item.values, item.mix.outputs[0])]
        for index, (item, path) in enumerate(zip(attentions, paths, strict=True))
    }
    captured: dict[int, CapturedPrefix] = {}
    results: dict[int, Array] = {}
    runs: dict[str, list[Array]] = {}
    for step in SegmentRunner(model, batches).stream(
        {n for names in needed.values() for n in names}
    ):
        for name, array in step.values.items():
            runs.setdefault(name, []).append(array)
        if not step.last:
            continue
        for index in [i for i, names in needed.items() if all(name in runs for name in names)]:
            keys, values, mixed = (runs[name] for name in needed.pop(index))
            item, path = attentions[index], paths[index]
            captured[index] = _captured(item, path, keys, values, feeds.length, len(prefix))
            results[index] = mixed[0]
        waiting = {name for names in needed.values() for name in names}
        runs = {name: arrays for name, arrays in runs.items() if name in waiting}
    order = range(len(attentions))
    return [captured[i] for i in order], [results[i] for i in order]


def _different(feeds: TokenFeeds, prefix: Ids) -> list[int]:
    """A few different tokens: of the prefix, then of the text."""
    numbers = dict.fromkeys([*prefix, *(int(i) for i in feeds.text(0))])
    return list(numbers)[:_SAME_TOKEN_RUNS]


def _captured(
    attention: Attention,
    path: KeyPath,
    keys: list[Array],
    values: list[Array],
    length: int,
    count: int,
) -> CapturedPrefix:
    """From runs of the prefix and of equal tokens; of keys and values the last ``length`` count."""
    values = [array[..., -length:, :] for array in values]
    for array in values[1:]:
        spread = float(np.abs(array - array.mean(axis=-2, keepdims=True)).max())
        if spread > _FIT_TOLERANCE * float(np.abs(array).max()):
            raise NoPrefixError("values depend on positions: these are added to the embeddings")
    rows = [array if path.by_rows else np.swapaxes(array, -1, -2) for array in keys]
    rows = [array[..., -length:, :] for array in rows]
    turn = measure_turn(np.stack(rows[1:]))
    if not turn.error <= _FIT_TOLERANCE:  # nor where it is NaN
        raise NoPrefixError("keys do not depend on positions as rotary embeddings make them")
    only = np.zeros_like(rows[0])
    only[..., :count, :] = rows[0][..., :count, :]
    first = values[0][..., :count, :].copy()
    return CapturedPrefix(only, turn, first, path, attention.keys)


def prefix_error(
    model: ir.Model, names: Sequence[str], feeds: TokenFeeds, expected: Sequence[Array], count: int
) -> float:
    """How far a graph that holds a prefix is from one that is given it as tokens.

    Args:
        model: holds the prefix.
        names: results of its attentions.
        feeds: the first window is run.
        expected: the same results with the prefix given, (…, S, D).
        count: tokens of the prefix.

    Returns:
        max |Δ| over the first tokens of the text, which a sliding window does not cut off yet,
        relative to max |result|; the worst attention's.
    """
    tokens = min(4, feeds.length - count)
    reference = dict(zip(names, expected, strict=True))
    worst = 0.0
    for step in SegmentRunner(model, [feeds.runs[0]]).stream(set(names)):
        for name, array in step.values.items():
            right = reference[name][..., count : count + tokens, :]
            miss = float(np.abs(array[..., :tokens, :] - right).max())
            worst = max(worst, miss / max(float(np.abs(right).max()), 1e-30))
    return worst
