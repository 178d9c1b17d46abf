"""Greedy text from a prefill and a decode graph whose inputs and outputs are codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.caches import ENTRIES_AXIS, is_past, present_name
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.integer_io import integer_io
from qnpu.compiler.rules import CacheInputMissing, InvalidConfig
from qnpu.runtime_check.session import Array, Feeds, Mode, open_session, run

PREFILL_NAME, DECODE_NAME = "prefill.int.onnx", "decode.int.onnx"
_LOGITS = "logits"

GraphRun = Callable[[Sequence[str], Feeds], list[Array]]
"""Names of outputs and what the inputs are fed with → those outputs."""


class CachedRunner:
    """Reads tokens through a prefill and a decode graph, and keeps what they leave in the cache.

    A cache is an array of codes (1, heads, C - 1, width) whose last entries are the newest. What no
    token has filled holds the code of zero and is masked. The first run of a text is filled up in
    front where it is shorter than the prefill graph, with tokens that the mask leaves out for good;
    they are the first to fall out of the cache.

    Args:
        prefill: graph of S tokens.
        decode: graph of one token, of the same source.
        paths: where the two lie, if they are files; else they are run from memory.
        mode: how ONNX Runtime may change them; integers come out the same in any.
        runs: what runs the two in the place of ONNX Runtime.

    Raises:
        DiagnosticError: QN116 ONNX Runtime refuses a graph, QN118 it takes no cache of codes.

    Attributes:
        context: C, tokens that can be read in all.
        chunk: S, tokens of a prefill run.
        length: tokens read so far.
    """

    def __init__(
        self,
        prefill: ir.Model,
        decode: ir.Model,
        paths: tuple[Path, Path] | None = None,
        mode: Mode = Mode.STOCK,
        runs: tuple[GraphRun, GraphRun] | None = None,
    ) -> None:
        self.context = _columns(prefill, "attention_mask")
        self.chunk = _columns(prefill, "input_ids")
        encodings = integer_io(decode)
        self._empty: dict[str, Array] = {}
        for value in decode.graph.inputs:
            if is_past(value):
                name = name_of(value)
                if name not in encodings:
                    raise DiagnosticError(CacheInputMissing(name, "holds no codes").at(value=name))
                zero = encodings[name].zero_point_codes
                self._empty[name] = np.full(static_shape(value) or (), zero)
        sources = paths if paths is not None else (prefill, decode)
        self._runs = runs or tuple(partial(run, open_session(s, mode)) for s in sources)
        self.reset()

    def reset(self) -> None:
        """Forgets all that was read."""
        self._caches = dict(self._empty)
        self._filled = np.zeros(self.context - 1, np.int64)
        self.length = 0

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens behind those read before: S at a time by the prefill graph.

        What is left over is read first: filled up, or behind other tokens by the decode graph.

        Args:
            ids: one token or more.

        Returns:
            Codes of the logits at each token, (tokens, vocabulary).

        Raises:
            DiagnosticError: QN503 more tokens than the graphs hold.
        """
        if self.length + len(ids) > self.context:
            reason = f"{self.length + len(ids)} tokens, the graphs hold {self.context}"
            raise DiagnosticError(InvalidConfig("prompt", reason).at())
        over = len(ids) % self.chunk
        alone = over if self.length or over == 1 else 0
        starts = [*range(over if alone else min(over, 1)), *range(over, len(ids), self.chunk)]
        parts = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        sizes = [1] * alone + [self.chunk] * (len(parts) - alone)
        runs = [self._run(size, ids[a:b]) for size, (a, b) in zip(sizes, parts, strict=True)]
        return np.concatenate(runs)

    def _run(self, size: int, ids: Sequence[int]) -> Array:
        """One run of the graph of ``size`` tokens, filled up in front."""
        count, entries = len(ids), self.context - size
        tokens = np.zeros((1, size), np.int64)
        tokens[0, size - count :] = ids
        positions = np.zeros((1, size), np.int64)
        positions[0, size - count :] = np.arange(self.length, self.length + count)
        present = np.arange(size) >= size - count
        filled = np.concatenate([self._filled, present.astype(np.int64)])
        feeds: Feeds = {
            "input_ids": tokens,
            "attention_mask": filled[None, -self.context :],
            "position_ids": positions,
        }
        feeds |= {name: cache[:, :, -entries:] for name, cache in self._caches.items()}
        compute = self._runs[0] if size == self.chunk else self._runs[1]
        names = [_LOGITS, *(present_name(name) for name in self._caches)]
        logits, *new = compute(names, feeds)
        for (name, cache), added in zip(list(self._caches.items()), new, strict=True):
            joined = np.concatenate([cache, added], ENTRIES_AXIS)
            self._caches[name] = joined[:, :, added.shape[ENTRIES_AXIS] :]
        self._filled = filled[size:]
        self.length += count
        return np.asarray(logits[0, size - count :])


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and how long it took.

    Attributes:
        ids: tokens behind the prompt, the one that stopped it included.
        prompt_tokens: how many were read before.
        prefill_seconds: to read the prompt and choose the first token.
        decode_seconds: for all tokens after the first.
    """

    ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first; 0 where there is no other."""
        return (len(self.ids) - 1) / max(self.decode_seconds, 1e-9) if len(self.ids) > 1 else 0.0


def generate(
    runner: CachedRunner,
    prompt: Sequence[int],
    count: int,
    stop: Collection[int] = (),
    each: Callable[[int], None] = lambda token: None,
) -> Generation:
    """The most likely token, again and again; the least id where several are equally likely.

    Args:
        runner: forgets what it has read before.
        prompt: token ids, one or more; the graphs hold ``runner.context`` tokens in all, of which
            the last one generated is none.
        count: tokens to generate at most.
        stop: tokens that end the text.
        each: called with each token as it comes.

    Raises:
        DiagnosticError: QN503 the prompt is empty or longer than the context.
    """
    if not prompt:
        raise DiagnosticError(InvalidConfig("prompt", "has no token to begin with").at())
    runner.reset()
    ids: list[int] = []
    started = time.perf_counter()
    row = runner.read(prompt)[-1]
    read = time.perf_counter()
    while True:
        ids.append(_greatest(row))
        each(ids[-1])
        if len(ids) == 1:
            read = time.perf_counter()
        if len(ids) >= count or ids[-1] in stop or runner.length == runner.context:
            break
        row = runner.read(ids[-1:])[-1]
    ended = time.perf_counter()
    return Generation(ids, len(prompt), read - started, ended - read)


def _columns(model: ir.Model, name: str) -> int:
    """The second dimension of an input."""
    for value in model.graph.inputs:
        shape = static_shape(value)
        if name_of(value) == name and shape is not None and len(shape) == 2:
            return shape[1]
    raise DiagnosticError(CacheInputMissing(name, "is no input of a fixed shape").at(value=name))


def _greatest(row: NDArray[np.generic]) -> int:
    return int(row.argmax())
