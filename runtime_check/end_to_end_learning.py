"""Learns all layers at once, so that the model predicts what the float model does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.process import process_count, process_index
from qnpu.runtime_check import processes
from qnpu.runtime_check.cayley_sgd import CayleySGD
from qnpu.runtime_check.freed_memory import keep_freed_memory
from qnpu.runtime_check.learned_tensors import LearnedTensors
from qnpu.runtime_check.learning_rate import rate_at
from qnpu.runtime_check.learning_record import LearningRecord, State
from qnpu.runtime_check.quantized_run import quantized_constants
from qnpu.runtime_check.segments import Segment
from qnpu.runtime_check.session import Feeds, cpu_flags
from qnpu.runtime_check.torch_executor import CheckpointedExecutor, TorchExecutor, feed_tensors

_PATIENCE = 3
_MOST_HELD = 4  # each costs as much at every check as half a step
_ROWS = 16  # of logits at a time: they stay in the cache
_NOW = 0
_MAIN_MEMORY = torch.device("cpu")
_CHECKS = "checks"
TOKENS = "input_ids"
RATES = {
    "adamw": {"latent": 3e-4, "weight_step": 5e-4, "step": 5e-4, "zero_point": 0.02},
    "sgd": {"rotation": 0.1, "weight_step": 0.01, "step": 0.01, "zero_point": 0.01},
}
"""Optimizer → kind of parameter → learning rate; of SGD the paper's."""
MARGIN = 0.05
"""Of codes, LSB; see ``LearnedRounding``. With 0.01 the noise of single runs flips many at once."""


@dataclass(frozen=True, slots=True)
class EndToEndOptions:
    """How the model is learned.

    Attributes:
        logits: name of the output.
        steps: of the optimizer.
        batch: runs of the graph per step, over all processes.
        distillation: part of the loss that is KL to the float model; the rest is cross-entropy.
        rates: kind of parameter → learning rate, in the parameter's unit per step; None: ``RATES``.
        local_share: part of the steps in which activations' own errors count, too.
        checks: how often the loss is measured on runs that are not learned from.
        seed: of the order of runs.
        dtype: of the student's activations and float weights.
        device: where both models run, and what learns is.
        sharded: each process holds a part of the parameters.
    """

    logits: str
    steps: int = 200
    batch: int = 1
    distillation: float = 0.9
    rates: Mapping[str, float] | None = None
    local_share: float = 0.0
    checks: int = 8
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = _MAIN_MEMORY
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """How far learning is.

    Attributes:
        step: how many are done.
        loss: on runs that are not learned from, nats per token.
        first: the same at the start.
        best: the least so far.
        best_step: when that was.
    """

    step: int
    loss: float
    first: float
    best: float
    best_step: int


def working_device(name: str) -> torch.device:
    """The device of a name, ``cpu`` or ``cuda``; ``auto``: a GPU that torch can use, if any."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def working_type(name: str, device: torch.device = _MAIN_MEMORY) -> torch.dtype:
    """The type of a name; ``auto``: bfloat16 where the device multiplies it faster."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags())
    return torch.bfloat16 if fast else torch.float32


class Teacher:
    """The float model's logits; what its head takes is kept, the rest computed once per run."""

    def __init__(
        self,
        blocks: Sequence[Segment],
        feeds: Sequence[Feeds],
        logits: str,
        device: torch.device = _MAIN_MEMORY,
    ) -> None:
        self._body = CheckpointedExecutor([block.nodes for block in blocks[:-1]], device=device)
        self._head = TorchExecutor(blocks[-1].nodes, device=device)
        self._takes = [name_of(value) for value in blocks[-1].takes]
        self._feeds = feeds
        self._logits = logits
        self._kept: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def logits(self, run: int) -> Tensor:
        """Shape (1, n, vocabulary)."""
        if run not in self._kept:
            self._kept[run] = self._body.run(feed_tensors(self._feeds[run]), self._takes)
        return self._head.run(self._kept[run], [self._logits])[self._logits]


class Student:
    """The model as quantized so far; gradients flow to what learns."""

    def __init__(
        self,
        blocks: Sequence[Segment],
        table: EncodingTable,
        learned: LearnedTensors,
        logits: str,
        dtype: torch.dtype,
        device: torch.device = _MAIN_MEMORY,
    ) -> None:
        nodes = [block.nodes for block in blocks]
        self._executor = CheckpointedExecutor(nodes, dtype=dtype, device=device)
        self._fixed: dict[str, Tensor] = {}
        for block in blocks:
            fixed = quantized_constants(block, table, but=learned.weights)
            fixed = {name: tensor.to(device) for name, tensor in fixed.items()}
            self._fixed |= {n: t.to(dtype) if t.dim() > 1 else t for n, t in fixed.items()}
        self._learned = learned
        self._logits = logits

    def logits(self, feeds: Feeds) -> Tensor:
        """Shape (1, n, vocabulary)."""
        made = self._executor.run(
            feed_tensors(feeds),
            [self._logits],
            weights=self._weight,
            transform=self._learned.transform,
        )
        return made[self._logits]

    def _weight(self, name: str) -> Tensor | None:
        fixed = self._fixed.get(name)
        return self._learned.weight(name) if fixed is None else fixed


class _PredictionLoss(torch.autograd.Function):
    """See ``prediction_loss``; a few rows at a time, and their gradient at once.

    Logits are the largest tensors of a step: as whole tensors their exponentials and differences
    would cost more than the layers do.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, tokens: Tensor | None, distillation: float
    ) -> Tensor:
        """``student``, ``teacher``: (n, vocabulary); ``tokens``: (n,)."""
        count = len(student)
        of_kl = distillation / count if tokens is not None else 1.0 / count
        of_entropy = (1.0 - distillation) / max(count - 1, 1) if tokens is not None else 0.0
        ctx.gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        device = student.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            found = log_softmax(student[rows].float(), dim=-1)
            truth = log_softmax(teacher[rows].float(), dim=-1)
            likely = truth.exp()
            total += of_kl * torch.dot(truth.sub_(found).view(-1), likely.view(-1))
            right = tokens[start + 1 : start + _ROWS + 1] if tokens is not None else None
            if right is not None:
                total -= of_entropy * found[torch.arange(len(right), device=device), right].sum()
            if ctx.gradient is None:
                continue
            slope = found.exp_()
            if right is None:
                ctx.gradient[rows] = slope.sub_(likely).mul_(of_kl)
                continue
            part = torch.full((len(slope), 1), of_kl + of_entropy, device=device)
            part[len(right) :] = of_kl  # nothing follows the last token
            slope.mul_(part).sub_(likely, alpha=of_kl)
            slope[torch.arange(len(right), device=device), right] -= of_entropy
            ctx.gradient[rows] = slope
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad, None, None, None


def prediction_loss(
    student: Tensor, teacher: Tensor, tokens: Tensor | None, distillation: float
) -> Tensor:
    """d · KL(teacher ‖ student) + (1 - d) · cross-entropy of the next token, nats per token.

    Args:
        student, teacher: logits, (1, n, vocabulary).
        tokens: (1, n); None where the model takes something else: then KL alone.
        distillation: d.
    """
    vocabulary = student.shape[-1]
    loss: Tensor = _PredictionLoss.apply(  # type: ignore[no-untyped-call]
        student.reshape(-1, vocabulary),
        teacher.reshape(-1, vocabulary),
        None if tokens is None else tokens.reshape(-1).to(student.device),
        distillation,
    )
    return loss


def learn_end_to_end(
    blocks: Sequence[Segment],
    table: EncodingTable,
    feeds: Sequence[Feeds],
    learned: LearnedTensors,
    options: EndToEndOptions,
    record: LearningRecord | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[Check]:
    """Learns with the whole model's loss, and leaves the best state in ``learned``.

    A sixteenth of the runs, one to four, is not learned from: of the states at equal distances the
    one with the least loss there is kept. Three checks in a row that bring nothing better end it.

    Args:
        blocks: of a float graph, in order, all of it.
        table: encodings, and codes of weights.
        feeds: one per run of the graph, two or more.
        learned: what learns.
        options: how.
        record: keeps the state at each check, for a run that is killed.
        tell: called after each step with its number and its loss.

    Yields:
        Each check, the one before the first step and those of an earlier run included.
    """
    yield from _Trainer(blocks, table, feeds, learned, options, record, tell).run()


class _Trainer:
    def __init__(
        self,
        blocks: Sequence[Segment],
        table: EncodingTable,
        feeds: Sequence[Feeds],
        learned: LearnedTensors,
        options: EndToEndOptions,
        record: LearningRecord | None,
        tell: Callable[[int, float], None],
    ) -> None:
        keep_freed_memory()
        self._options, self._learned, self._feeds = options, learned, feeds
        self._record, self._tell = record, tell
        logits, device = options.logits, options.device
        learned.move(device)
        self._teacher = Teacher(blocks, feeds, logits, device)
        self._student = Student(blocks, table, learned, logits, options.dtype, device)
        held = min(_MOST_HELD, max(1, len(feeds) // 16)) if len(feeds) > 1 else 0
        self._count = len(feeds) - held
        self._held = range(self._count, len(feeds)) if held else range(len(feeds))
        processes.join()
        processes.same_start(learned.all_parameters())
        if options.sharded and process_count() > 1:
            processes.shard(learned.large_modules())
        self._optimizers = _optimizers(learned, options)
        self._step, self._since = 0, 0
        self._checks: list[Check] = []
        self._kept: State = {}

    def run(self) -> Iterator[Check]:
        if not self._load():
            self._look(self._held_loss())
        yield from self._checks
        options = self._options
        every = max(1, options.steps // max(options.checks, 1))
        while self._step < options.steps and self._since < _PATIENCE:
            loss = self._learn_step()
            self._step += 1
            self._tell(self._step, loss)
            if not math.isfinite(loss):
                yield self._look(math.inf)
            elif self._step % every == 0 or self._step == options.steps:
                yield self._look(self._held_loss())
        self._learned.load(self._kept)

    def _look(self, loss: float) -> Check:
        """Takes note of how far learning is, and keeps the state where it is the best so far."""
        past = self._checks[-1] if self._checks else Check(0, loss, loss, math.inf, 0)
        better = loss <= past.best
        self._since = 0 if better else self._since + 1
        if not math.isfinite(loss):
            self._since = _PATIENCE
        best, best_step = (loss, self._step) if better else (past.best, past.best_step)
        self._checks.append(Check(self._step, loss, past.first, best, best_step))
        self._keep(past.best_step)
        return self._checks[-1]

    def _keep(self, before: int) -> None:
        """Remembers the best state; writes it, then the state now, then drops the best before it.

        In this order, because a record is read after a kill at any moment.
        """
        state, best_step = self._learned.state(), self._checks[-1].best_step
        if best_step == self._step:
            self._kept = state
        moments = _moments(self._optimizers)
        if self._record is None or self._step == 0 or process_index():
            return
        if best_step > before:
            self._record.save(best_step, self._kept)
        checks = np.array([astuple(check) for check in self._checks], np.float64)
        self._record.save(_NOW, {_CHECKS: checks, **state, **moments})
        if best_step > before > 0:
            self._record.drop(before)

    def _load(self) -> bool:
        """Goes on from a record, where there is one."""
        now = self._record.load(_NOW) if self._record is not None else None
        if self._record is None or now is None:
            return False
        rows = now.pop(_CHECKS).tolist()
        checks = [Check(int(r[0]), r[1], r[2], r[3], int(r[4])) for r in rows]
        best_step = checks[-1].best_step
        kept = self._record.load(best_step) if best_step else self._learned.state()
        if kept is None:
            return False
        self._checks, self._kept, self._step = checks, kept, checks[-1].step
        self._since = sum(check.step > best_step for check in checks)
        if not math.isfinite(checks[-1].loss):
            self._since = _PATIENCE
        self._learned.load(now)
        _set_moments(self._optimizers, now)
        return True

    def _learn_step(self) -> float:
        """One step of the optimizers; the mean loss of its runs."""
        options, learned = self._options, self._learned
        local = self._step < options.local_share * options.steps
        part = process_count() / options.batch  # what a run counts in the mean over processes
        learned.set_local_loss(part if local else 0.0)
        runs = processes.own_share(_runs_of(self._step, options, self._count))
        total = 0.0
        for run in runs:
            loss = self._loss(run)
            total += float(loss.detach())
            (loss * part).backward()  # type: ignore[no-untyped-call]
        processes.average_gradients(learned.all_parameters())
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate_at(self._step, options.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        learned.clamp()
        return processes.mean_of(total / max(len(runs), 1))

    def _held_loss(self) -> float:
        self._learned.set_local_loss(0.0)
        with torch.no_grad():
            return float(np.mean([float(self._loss(run)) for run in self._held]))

    def _loss(self, run: int) -> Tensor:
        feeds = self._feeds[run]
        tokens = torch.from_numpy(feeds[TOKENS]).long() if TOKENS in feeds else None
        return prediction_loss(
            self._student.logits(feeds),
            self._teacher.logits(run),
            tokens,
            self._options.distillation,
        )


def _optimizers(learned: LearnedTensors, options: EndToEndOptions) -> list[torch.optim.Optimizer]:
    """One for all that lies in a vector space, one for rotations."""
    kinds = {kind: items for kind, items in learned.parameters().items() if items}
    rates = options.rates if options.rates is not None else RATES[learned.optimizer]
    groups = [
        {"params": items, "lr": rates[kind], "full_rate": rates[kind]}
        for kind, items in kinds.items()
        if kind != "rotation"
    ]
    found: list[torch.optim.Optimizer] = []
    if groups and learned.optimizer == "adamw":
        found.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    elif groups:
        found.append(torch.optim.SGD(groups))
    if "rotation" in kinds:
        found.append(CayleySGD(kinds["rotation"], lr=rates["rotation"]))
        found[-1].param_groups[0]["full_rate"] = rates["rotation"]
    return found


def _moments(optimizers: Sequence[torch.optim.Optimizer]) -> State:
    """What optimizers remember, by optimizer, parameter and name."""
    found: State = {}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, parameter in enumerate(parameters):
            for name, tensor in optimizer.state.get(parameter, {}).items():
                if isinstance(tensor, Tensor):
                    found[f"moment/{i}/{j}/{name}"] = processes.whole(tensor).numpy()
    return found


def _set_moments(optimizers: Sequence[torch.optim.Optimizer], state: State) -> None:
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, parameter in enumerate(parameters):
            prefix = f"moment/{i}/{j}/"
            for key in [key for key in state if key.startswith(prefix)]:
                name = key.removeprefix(prefix)
                alone = name == "step"  # a number of its own, whatever the parameter's shape
                where = parameter.device
                tensor = torch.zeros((), device=where) if alone else torch.zeros_like(parameter)
                processes.fill(tensor, state[key])
                optimizer.state[parameter][name] = tensor


def _runs_of(step: int, options: EndToEndOptions, count: int) -> list[int]:
    """Runs of a step: in random order, each once before any comes again."""
    found: list[int] = []
    for position in range(step * options.batch, (step + 1) * options.batch):
        epoch, index = divmod(position, count)
        order = np.random.default_rng((options.seed, epoch)).permutation(count)
        found.append(int(order[index]))
    return found
