"""Learns codes and scales one block after another, each to give what the float block gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.runtime_check.learned_tensors import LearnedCodes
from qnpu.runtime_check.learning_rate import rate_at
from qnpu.runtime_check.learning_record import State
from qnpu.runtime_check.quantized_run import advance, quantized_constants
from qnpu.runtime_check.segments import Segment
from qnpu.runtime_check.session import Feeds
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors
from qnpu.runtime_check.weight_rounding import token_energy, token_shares

# A token of more than this many times the median energy counts as if it had that much.
_MOST_ENERGY = 4.0
_CHECKS = 4

_LOSSES = "losses"


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """How each block is learned.

    Attributes:
        steps: of the optimizer.
        batch: runs of the graph per step.
        latent_rate: of weights' codes, LSB per step.
        step_rate: of scales, logarithm per step.
        zero_point_rate: LSB per step.
        seed: of the order of runs.
    """

    steps: int = 60
    batch: int = 1
    latent_rate: float = 1e-3
    step_rate: float = 1e-3
    zero_point_rate: float = 0.05
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What learning one block came to.

    Attributes:
        block: index.
        losses: on the runs that are checked, by step; the first is that of the start.
        learned: what was kept, by value name: the state with the least loss.
        resumed: an earlier run learned it.
    """

    block: int
    losses: dict[int, float]
    learned: State
    resumed: bool = False

    @property
    def before(self) -> float:
        """The loss at the start."""
        return self.losses[0]

    @property
    def after(self) -> float:
        """The loss of what was kept; never more than ``before``."""
        return min(self.losses.values())

    @property
    def diverged(self) -> bool:
        """The last state was worse than what was kept, or not finite, so that it was dropped."""
        return not list(self.losses.values())[-1] <= self.after

    def to_state(self) -> State:
        """All of it as arrays, for a record."""
        return {**self.learned, _LOSSES: np.array([*self.losses.items()], np.float64)}

    @classmethod
    def from_state(cls, block: int, state: State) -> BlockResult:
        """From what ``to_state`` gave."""
        learned = dict(state)
        losses = {int(step): loss for step, loss in learned.pop(_LOSSES).tolist()}
        return cls(block, losses, learned, resumed=True)


def learn_blocks(
    blocks: Sequence[Segment],
    table: EncodingTable,
    feeds: Sequence[Feeds],
    activations: Collection[str],
    weights: Collection[str],
    options: LearningOptions,
    done: Callable[[int], State | None],
) -> Iterator[BlockResult]:
    """Learns every block but the last that holds something to learn; writes it into the table.

    The loss of a block is the squared error of what it hands on, given the quantized model's
    inputs, against what the float model has there, per token and divided by the median token's
    energy m; a token of energy e > 4·m counts 4·m/e, so that massive ones are not all that counts
    (quantnpu.md §3 **D**)::

        L = mean_t min(1, 4m / e_t) · |y_t - ŷ_t|² / m

    AdamW without decay, cosine schedule. Of the states at the start, at the end and at equal
    distances between them the one with the least loss on a few of the runs is kept.

    Args:
        blocks: of a float graph, in order.
        table: encodings, and codes of the weights.
        feeds: one per run of the graph.
        activations: names of values whose encodings learn.
        weights: names of constants whose codes and scales learn.
        options: of the optimizer.
        done: block → what an earlier run came to, as ``BlockResult.to_state``, or None.

    Yields:
        A result per block that learns.
    """
    exact = EncodingTable()
    truth, seen = [feed_tensors(run) for run in feeds], [feed_tensors(run) for run in feeds]
    for index, block in enumerate(blocks[:-1]):
        learned = _learned_tensors(block, table, activations, weights)
        taken = [{name_of(v): run[name_of(v)] for v in block.takes} for run in seen]
        with torch.no_grad():
            advance(block, blocks[index + 1 :], truth, exact)
        if learned is not None:
            state = done(index)
            if state is not None:
                result = BlockResult.from_state(index, state)
            else:
                result = _learn(index, block, learned, taken, truth, table, options)
            yield result
            learned.load(result.learned)
            learned.store(table)
        del taken, learned
        with torch.no_grad():
            advance(block, blocks[index + 1 :], seen, table)


def _learned_tensors(
    block: Segment, table: EncodingTable, activations: Collection[str], weights: Collection[str]
) -> LearnedCodes | None:
    own = [v for node in block.nodes for v in (*node.inputs, *node.outputs) if v is not None]
    names = {name_of(v) for v in own if v.name}
    arrays = {
        name_of(value): array
        for value in own
        if value.name in weights and (array := constant_array(value)) is not None
    }
    mine = sorted(names & set(activations))
    if not mine and not arrays:
        return None
    return LearnedCodes(table, mine, {name: arrays[name] for name in sorted(arrays)})


def _learn(
    index: int,
    block: Segment,
    learned: LearnedCodes,
    taken: Sequence[dict[str, Tensor]],
    truth: Sequence[dict[str, Tensor]],
    table: EncodingTable,
    options: LearningOptions,
) -> BlockResult:
    loss = _BlockLoss(block, learned, taken, truth, table)
    order = _Order(len(taken), options.seed + index)
    checked = range(0, len(taken), max(1, len(taken) // 8))
    groups = learned.parameters()
    rates = {
        "latent": options.latent_rate,
        "weight_step": options.step_rate,
        "step": options.step_rate,
        "zero_point": options.zero_point_rate,
    }
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rate} for name, rate in rates.items() if groups[name]],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i, options.steps))
    losses = {0: loss.mean(checked)}
    least, kept = losses[0], learned.state()
    for step in range(1, options.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        for run in order.take(options.batch):
            (loss.of(run) / options.batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        learned.clamp()
        if step % max(1, options.steps // _CHECKS) == 0 or step == options.steps:
            now = losses[step] = loss.mean(checked)
            if now <= least:
                least, kept = now, learned.state()
            if not math.isfinite(now):
                break
    return BlockResult(index, losses, kept)


class _BlockLoss:
    """The loss of a block on each run; see ``learn_blocks``."""

    def __init__(
        self,
        block: Segment,
        learned: LearnedCodes,
        taken: Sequence[dict[str, Tensor]],
        truth: Sequence[dict[str, Tensor]],
        table: EncodingTable,
    ) -> None:
        self._executor = TorchExecutor(block.nodes)
        self._learned = learned
        self._taken = taken
        self._names = [name_of(v) for v in block.hands_on if name_of(v) in truth[0]]
        self._truth = truth
        self._fixed = quantized_constants(block, table, but=learned.weights)
        self._median = {
            name: torch.cat([token_energy(run[name]) for run in truth]).median()
            for name in self._names
        }

    def of(self, run: int) -> Tensor:
        made = self._executor.run(
            self._taken[run], self._names, weights=self._weight, transform=self._learned.transform
        )
        return torch.stack([self._error(name, made[name], run) for name in self._names]).sum()

    def mean(self, runs: Sequence[int]) -> float:
        with torch.no_grad():
            return float(np.mean([float(self.of(run)) for run in runs]))

    def _error(self, name: str, found: Tensor, run: int) -> Tensor:
        wanted, median = self._truth[run][name], self._median[name]
        shares = token_shares(token_energy(wanted), _MOST_ENERGY * median)
        return (token_energy(found - wanted) * shares).mean() / median

    def _weight(self, name: str) -> Tensor | None:
        fixed = self._fixed.get(name)
        return self._learned.weight(name) if fixed is None else fixed


class _Order:
    """Runs in random order, each once before any comes again."""

    def __init__(self, count: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._count = count
        self._left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self._left) < count:
            self._left += self._random.permutation(self._count).tolist()
        taken, self._left = self._left[:count], self._left[count:]
        return taken
