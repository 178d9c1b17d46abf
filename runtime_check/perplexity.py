"""Perplexity of a graph on token windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Array, Feeds, run


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        value: exp(mean negative log-likelihood) over all predicted tokens.
        nll: nats per token, mean of each window.
        windows: how many.
        tokens: predicted tokens in all.
    """

    value: float
    nll: tuple[float, ...]
    windows: int
    tokens: int

    @classmethod
    def of(cls, losses: Sequence[NDArray[np.float64]]) -> Perplexity:
        """From the losses of each window's predicted tokens, nats."""
        nll = tuple(float(loss.mean()) for loss in losses)
        mean = float(np.average(nll, weights=[len(loss) for loss in losses]))
        return cls(float(np.exp(mean)), nll, len(losses), sum(len(loss) for loss in losses))


def measure_perplexity(
    session: ort.InferenceSession,
    feeds: Sequence[Feeds],
    *,
    logits_name: str = "logits",
    progress: ProgressCallback = no_progress,
    label: str = "evaluate",
) -> Perplexity:
    """exp(mean NLL of positions 1 … n-1 of each window), as in quantnpu.md §8.

    Args:
        session: a graph with ``input_ids`` (1, n) and logits (1, n, vocabulary).
        feeds: one per window.
        logits_name: which output holds the logits.
        progress: called with fraction done.
        label: step name for progress.

    Raises:
        DiagnosticError: QN116 where the graph does not run on these feeds.
    """
    losses: list[NDArray[np.float64]] = []
    for index, feed in enumerate(feeds):
        logits = run(session, [logits_name], feed)[0][0]
        losses.append(next_token_loss(logits, feed["input_ids"][0]))
        progress(label, (index + 1) / len(feeds))
    return Perplexity.of(losses)


def stream_perplexity(
    model: ir.Model,
    feeds: Sequence[Feeds],
    *,
    logits_name: str = "logits",
    progress: ProgressCallback = no_progress,
    label: str = "evaluate",
) -> Perplexity:
    """The same of a graph in memory, run by segments: holds one segment's weights at a time.

    Args:
        model: typed, topologically sorted; for the rest see ``measure_perplexity``.
    """
    losses: list[NDArray[np.float64]] = []
    runner = SegmentRunner(model, feeds)
    total = len(runner.segments) * len(feeds)
    for done, step in enumerate(runner.stream({logits_name}), start=1):
        if logits_name in step.values:
            ids = feeds[step.batch]["input_ids"][0]
            losses.append(next_token_loss(step.values[logits_name][0], ids))
        progress(label, done / total)
    progress(label, 1.0)
    return Perplexity.of(losses)


def next_token_loss(logits: Array, ids: Array) -> NDArray[np.float64]:
    """Negative log-likelihood of each next token, nats, shape (n - 1,).

    Args:
        logits: (n, vocabulary).
        ids: (n,).
    """
    rows = logits[:-1]
    peak = rows.max(axis=-1, keepdims=True)
    total: NDArray[np.float64] = np.exp(rows - peak).sum(axis=-1, dtype=np.float64)
    picked = rows[np.arange(len(rows)), ids[1:]].astype(np.float64)
    loss: NDArray[np.float64] = np.log(total) + peak[:, 0] - picked
    return loss
