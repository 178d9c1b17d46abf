"""What quantizing one tensor, and nothing else, costs a language model: a loss for each choice."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.compiler.quant_types import Encoding
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.fake_quantize import fake_quantized
from qnpu.runtime_check.segments import Segment
from qnpu.runtime_check.session import Array, Feeds
from qnpu.runtime_check.torch_executor import (
    CheckpointedExecutor,
    Tensors,
    TorchExecutor,
    Transform,
    feed_tensors,
)

_STEP = "measure losses"
_LEAST_MAGNITUDE = 1e-8
_STREAM_RANK = 3
_NOTHING: Tensors = MappingProxyType({})


class Measure(enum.Enum):
    """How a loss is measured, x̂ being the quantized tensor.

    KL: of the logits' distribution from the float model's, nats per token.
    BLOCK: squared error of what the tensor's block (decoder layer) hands on, relative to its
        energy.
    FISHER: ½ Σ g²·(x̂ - x)² per token, g the gradient of a batch's cross-entropy: an estimate of KL
        from one backward pass, nats per token.
    NOISE: squared error of the tensor itself, relative to its energy: 10^(-SQNR/10).
    RATIO: mean of |x̂ - x| / |x|, the paper's Eq. 4.
    """

    KL = "kl"
    BLOCK = "block"
    FISHER = "fisher"
    NOISE = "noise"
    RATIO = "ratio"

    @property
    def is_local(self) -> bool:
        """It needs the tensor alone."""
        return self in (Measure.NOISE, Measure.RATIO)


@dataclass(frozen=True, slots=True)
class Change:
    """One way to quantize tensors that go together.

    Attributes:
        name: what it is told apart by.
        activations: value name → encoding, of values that nodes make.
        weights: name of an initializer → what makes the tensor that stands in its place, real.
    """

    name: str
    activations: Mapping[str, Encoding] = field(default_factory=dict)
    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Weights, made: those of some names, or all."""
        return {n: make() for n, make in self.weights.items() if names is None or n in names}

    def transform(self, name: str, value: Tensor) -> Tensor:
        """A value as its consumers get it."""
        encoding = self.activations.get(name)
        return value if encoding is None else fake_quantized(value, encoding)


@dataclass(frozen=True, slots=True)
class Together:
    """What a change of many tensors costs.

    Attributes:
        divergence: KL of the logits' distribution from the float model's, nats per token.
        nll: mean cross-entropy of the next token, nats; perplexity is its exponential.
    """

    divergence: float
    nll: float


class LossMeter:
    """Measures what changes cost a language model, all on the same data.

    The graph runs a block at a time. Memory holds what crosses between blocks, and one change.

    Args:
        model: float, typed, topologically sorted; a language model for KL, FISHER and ``together``.
        batches: one feed dictionary per batch.
        logits: name of the output that a distribution is made of.
        stride: positions of which one is looked at for KL.
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Sequence[Feeds],
        *,
        logits: str = "logits",
        stride: int = 4,
    ) -> None:
        self._blocks = cut_blocks(model.graph)
        self._batches = batches
        self._logits = logits
        self._stride = stride
        self._runs: list[_FloatRun] = []

    def each(
        self,
        changes: Sequence[Change],
        measure: Measure,
        *,
        progress: ProgressCallback = no_progress,
    ) -> Iterator[tuple[str, float]]:
        """Each change's loss, mean over all batches, in the order of the graph's blocks.

        Of a change only its own block and those behind it run anew, from what the float model hands
        them; of the last one, the head, only every ``stride``-th position where its nodes allow it.

        Args:
            changes: each within one block.
            measure: what the loss is.
            progress: called with fraction done.

        Yields:
            Name of a change and its loss, 0 or more; as soon as it is measured.

        Raises:
            ValueError: a change is of nothing that one block takes or makes.
        """
        placed = _placed(self._blocks, changes)
        if measure is Measure.FISHER:
            yield from _fisher(self._blocks, self._batches, placed, self._logits)
            progress(_STEP, 1.0)
            return
        runs = self._float_runs()
        for count, (index, change) in enumerate(placed, start=1):
            weights = change.tensors()
            losses = [run.loss(index, change, weights, measure) for run in runs]
            yield change.name, sum(losses) / len(losses)
            progress(_STEP, count / len(placed))

    @torch.no_grad()
    def together(self, change: Change) -> Together:
        """All of a change at once; it may be of any blocks, or of nothing.

        Its weights are made block by block.
        """
        runs = self._float_runs()
        values: list[dict[str, Tensor]] = [{} for _ in runs]
        for place, block in enumerate(self._blocks):
            weights = change.tensors(_constants(block))
            for run, made in zip(runs, values, strict=True):
                made.update(run.quantized(place, made, change, weights))
        found = [
            run.compared(made.pop(self._logits), feeds["input_ids"])
            for run, made, feeds in zip(runs, values, self._batches, strict=True)
        ]
        count = len(found)
        return Together(
            sum(item.divergence for item in found) / count, sum(item.nll for item in found) / count
        )

    def _float_runs(self) -> list[_FloatRun]:
        if not self._runs:
            executors = [TorchExecutor(block.nodes) for block in self._blocks]
            self._runs = [
                _FloatRun.of(self._blocks, executors, feeds, self._logits, self._stride)
                for feeds in self._batches
            ]
        return self._runs


def _constants(block: Segment) -> set[str]:
    """Names of initializers that a block takes."""
    return {
        name_of(v) for n in block.nodes for v in n.inputs if v is not None and v.is_initializer()
    }


def _placed(blocks: Sequence[Segment], changes: Sequence[Change]) -> list[tuple[int, Change]]:
    """Changes and the first block that each is in, in the order of blocks."""
    made = [{name_of(v) for n in block.nodes for v in n.outputs if v.name} for block in blocks]
    taken = [_constants(block) for block in blocks]
    found: list[tuple[int, Change]] = []
    for change in changes:
        places = [
            index
            for index in range(len(blocks))
            if made[index].issuperset(change.activations)
            and taken[index].issuperset(change.weights)
        ]
        if not places:
            raise ValueError(f"{change.name} is of nothing that one block takes or makes")
        found.append((places[0], change))
    return sorted(found, key=lambda item: item[0])


class _FloatRun:
    """What the float model has in one batch, and how far a change takes it from there.

    Args:
        blocks: of the graph.
        executors: of each.
        crossing: what each takes, by name.
        logits: name of the output.
        stride: see ``LossMeter``.
    """

    def __init__(
        self,
        blocks: Sequence[Segment],
        executors: Sequence[TorchExecutor],
        crossing: list[dict[str, Tensor]],
        logits: str,
        stride: int,
    ) -> None:
        self._blocks, self._executors, self._crossing = blocks, executors, crossing
        self._logits = logits
        self._stride = stride
        self._handed: dict[int, dict[str, Tensor]] = {}
        self._float_likely: Tensor | None = None
        self._acts_on_rows = _acts_on_rows(blocks[-1])

    @classmethod
    def of(
        cls,
        blocks: Sequence[Segment],
        executors: Sequence[TorchExecutor],
        feeds: Feeds,
        logits: str,
        stride: int,
    ) -> _FloatRun:
        """Runs the float model."""
        values, crossing = feed_tensors(feeds), []
        with torch.no_grad():
            for block, executor in zip(blocks, executors, strict=True):
                taken = {name_of(v): values[name_of(v)] for v in block.takes}
                crossing.append(taken)
                if block.hands_on:
                    values |= executor.run(taken, [name_of(v) for v in block.hands_on])
        return cls(blocks, executors, crossing, logits, stride)

    @torch.no_grad()
    def loss(self, index: int, change: Change, weights: Tensors, measure: Measure) -> float:
        """Of a change in one block."""
        if measure.is_local:
            return self._local(index, change, weights, measure)
        if measure is Measure.BLOCK:
            return self._of_block(index, change, weights)
        values: dict[str, Tensor] = {}
        last = len(self._blocks) - 1
        for place in range(index, last):
            taken = self._taken(place, values)
            options = (weights, change.transform) if place == index else ()
            values |= self._run(place, taken, *options)
        options = (weights, change.transform) if index == last else ()
        return self._divergence(self._distribution(self._taken(last, values), *options))

    def quantized(
        self, place: int, values: Tensors, change: Change, weights: Tensors
    ) -> dict[str, Tensor]:
        """What a block hands on, quantized, from what those before it handed on so."""
        return self._run(place, self._taken(place, values), weights, change.transform)

    def compared(self, logits: Tensor, tokens: Array) -> Together:
        """Logits of all positions with the float model's, and with the tokens that came."""
        found = self._likely(logits)
        ids = torch.from_numpy(tokens.astype(np.int64))
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return Together(self._divergence(found), float(nll))

    def _divergence(self, found: Tensor) -> float:
        """KL of log-likelihoods from the float model's, mean over positions, nats."""
        if self._float_likely is None:
            self._float_likely = self._distribution(self._crossing[-1])
        likely = self._float_likely
        divergence = torch.sum(likely.exp() * (likely - found), dim=-1)
        return max(float(divergence.mean()), 0.0)

    def _taken(self, place: int, values: Tensors) -> dict[str, Tensor]:
        return {name: values.get(name, known) for name, known in self._crossing[place].items()}

    def _run(
        self,
        place: int,
        taken: Tensors,
        weights: Tensors = _NOTHING,
        transform: Transform | None = None,
    ) -> dict[str, Tensor]:
        """What a block hands on; of the last one the logits."""
        wanted = [name_of(v) for v in self._blocks[place].hands_on] or [self._logits]
        return self._executors[place].run(taken, wanted, weights=weights, transform=transform)

    def _distribution(
        self, taken: Tensors, weights: Tensors = _NOTHING, transform: Transform | None = None
    ) -> Tensor:
        """Logarithms of what is likely next, shape (positions, vocabulary)."""
        if not self._acts_on_rows:
            return self._likely(self._run(-1, taken, weights, transform)[self._logits])
        some = {name: value[:, self._rows] for name, value in taken.items()}
        logits = self._run(-1, some, weights, transform)[self._logits]
        return torch.log_softmax(logits.flatten(0, -2), dim=-1)

    def _likely(self, logits: Tensor) -> Tensor:
        """As ``_distribution``, of logits of all positions."""
        return torch.log_softmax(logits[:, self._rows].flatten(0, -2), dim=-1)

    @property
    def _rows(self) -> slice:
        """Positions that are looked at."""
        return slice(self._stride - 1, None, self._stride)

    def _of_block(self, index: int, change: Change, weights: Tensors) -> float:
        taken = self._crossing[index]
        if index not in self._handed:
            self._handed = {index: self._run(index, taken)}
        return _relative(self._handed[index], self._run(index, taken, weights, change.transform))

    def _local(self, index: int, change: Change, weights: Tensors, measure: Measure) -> float:
        names = [*change.activations, *weights]
        exact = self._executors[index].run(self._crossing[index], names)
        found = {name: change.transform(name, exact[name]) for name in change.activations}
        found |= weights
        if measure is Measure.NOISE:
            return _relative(exact, found)
        ratios = [(found[n] - exact[n]).abs() / (exact[n].abs() + _LEAST_MAGNITUDE) for n in exact]
        return float(torch.cat([item.reshape(-1) for item in ratios]).double().mean())


def _relative(exact: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Squared error relative to energy, of all values together."""
    floats = [name for name, value in exact.items() if value.is_floating_point()]
    errors = sum(float((found[n] - exact[n]).double().square().sum()) for n in floats)
    energy = sum(float(exact[n].double().square().sum()) for n in floats)
    return errors / energy if energy else 0.0


_ROWWISE = frozenset(
    {"Add", "Cast", "Div", "Identity", "MatMul", "Mul", "RMSNormalization", "Tanh"}
)


def _acts_on_rows(block: Segment) -> bool:
    """True where a block does the same with each position: (1, positions, features) in and out."""
    constants = [v for n in block.nodes for v in n.inputs if v is not None and v.is_initializer()]
    return (
        all(node.op_type in _ROWWISE for node in block.nodes)
        and all(_rank(value) == _STREAM_RANK for value in block.takes)
        and all(_rank(value) < _STREAM_RANK for value in constants)
    )


def _rank(value: ir.Value) -> int:
    return value.shape.rank() if value.shape is not None else -1


def _fisher(
    blocks: Sequence[Segment],
    batches: Sequence[Feeds],
    placed: Sequence[tuple[int, Change]],
    logits: str,
) -> Iterator[tuple[str, float]]:
    """One forward and one backward pass per batch, of the whole graph."""
    executor = CheckpointedExecutor([list(block.nodes) for block in blocks])
    changes = [change for _, change in placed]
    held = {
        name_of(v): v
        for block in blocks
        for n in block.nodes
        for v in n.inputs
        if v is not None and v.is_initializer()
    }
    watched = {name for change in changes for name in change.activations}
    leaves = {
        name: torch.from_numpy(array).clone().requires_grad_()
        for change in changes
        for name in change.weights
        if (array := constant_array(held[name])) is not None
    }
    sums = dict.fromkeys((change.name for change in changes), 0.0)
    for feeds in batches:
        exact, offsets, tokens = _gradients(executor, feeds, watched, leaves, logits)
        for change in changes:
            squares = 0.0
            for name in change.activations:
                squares += _energy(offsets[name], change.transform(name, exact[name]) - exact[name])
            for name, quantized in change.tensors().items():
                squares += _energy(leaves[name], quantized - leaves[name].detach())
            sums[change.name] += squares / (2 * tokens * len(batches))
        for leaf in leaves.values():
            leaf.grad = None
    yield from sums.items()


def _gradients(
    executor: CheckpointedExecutor,
    feeds: Feeds,
    watched: Collection[str],
    leaves: Tensors,
    logits: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Watched values, zeros with their gradients, and how many tokens were predicted."""
    exact: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}

    def transform(name: str, value: Tensor) -> Tensor:
        if name not in watched:
            return value
        if name not in offsets:  # a block runs again on the way back
            exact[name] = value.detach()
            offsets[name] = torch.zeros_like(value, requires_grad=True)
        return value + offsets[name]

    inputs = feed_tensors(feeds)
    made = executor.run(inputs, [logits], weights=leaves, transform=transform)
    rows, tokens = made[logits].flatten(0, -2)[:-1], inputs["input_ids"].reshape(-1)
    loss = torch.nn.functional.cross_entropy(rows, tokens[1:], reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return exact, offsets, len(rows)


def _energy(leaf: Tensor, change: Tensor) -> float:
    """Σ g²·δ²; 0 where no gradient came by."""
    return 0.0 if leaf.grad is None else float((leaf.grad * change).double().square().sum())
