"""Perplexity of a graph on token windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qnpu.compiler.pass_base import ProgressCallback, no_progress
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
    losses: list[float] = []
    tokens = 0
    for index, feed in enumerate(feeds):
        logits = run(session, [logits_name], feed)[0][0]
        loss = next_token_loss(logits, feed["input_ids"][0])
        losses.append(float(loss.mean()))
        tokens += len(loss)
        progress(label, (index + 1) / len(feeds))
    weights = [len(feed["input_ids"][0]) - 1 for feed in feeds]
    mean = float(np.average(losses, weights=weights))
    return Perplexity(float(np.exp(mean)), tuple(losses), len(feeds), tokens)


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
