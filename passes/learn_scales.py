"""learn-scales: move scales, zero points and codes to where the model gives what it should."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.bit_plan import CHOSEN_BITS, LEARNED_BITS
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import Linear, as_linear, is_float, is_layout_copy
from qnpu.compiler.pass_base import (
    Compilation,
    LearningPoint,
    Pass,
    ProgressCallback,
    Stage,
    no_progress,
)
from qnpu.compiler.process import process_index
from qnpu.compiler.quant_types import widened
from qnpu.compiler.roles import is_down_projection
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.compiler.rules import LearningDiverged, NothingToPredict
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.learning_record import LearningRecord, State, fingerprint
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.range_measuring import encode_constants
from qnpu.runtime_check.segments import Segment
from qnpu.runtime_check.session import Feeds

if TYPE_CHECKING:
    from qnpu.runtime_check.learned_tensors import LearnedTensors

BLOCKWISE, END_TO_END = "blockwise", "end-to-end"
STEPS = {BLOCKWISE: 60, END_TO_END: 160}
"""Of the optimizer, per block or in all, where nothing else is asked for."""


@dataclass(frozen=True)
class LearnScales(Pass):
    """Learns encodings of linears' inputs and weights in the table of encodings (quantnpu.md §3).

    Two drivers over the same quantizers:

    * ``blockwise``: one block (decoder layer) after another, on inputs as the model quantized so
      far gives them, is made to give what the float model has after it; the loss is in
      ``qnpu.runtime_check.block_learning``.
    * ``end-to-end``: all layers at once, loss = d · KL(float ‖ quantized) + (1 - d) · cross-entropy
      of the next token; see ``qnpu.runtime_check.end_to_end_learning``.

    What learns of activations: scale and zero point of each linear's input of 8 bits or fewer, but
    not of a down projection's: only rotated tensors, as to learn the others does harm (paper,
    Fig. 1c). With ``tensors="all"`` every tensor of 8 bits or fewer.

    What learns of weights, the head's left out:

    * ``weights="codes"``: codes and scales of weights of 4 bits or fewer, where codes were chosen
      (**D**). The graph is not changed.
    * ``weights="rotations"``: scales of weights of 8 bits or fewer, rounded to nearest, together
      with R1 and R2, which are multiplied into the graph's weights at the end; other constants
      that are rotated so are encoded anew. End to end only.

    Must not fire on a graph that has no such tensor, or on encodings that this driver has learned.

    Attributes:
        data: what to run the graph on.
        driver: ``blockwise`` or ``end-to-end``.
        weights: ``codes`` or ``rotations``.
        tensors: ``rotated`` or ``all``.
        steps: optimizer steps, per block or in all; None: ``STEPS``; 0: nothing is learned.
        batch: runs per step.
        distillation: d.
        local_share: part of the steps in which activations' own errors count as well.
        seed: of the order of the data.
        method: ranges of constants that learned rotations change.
        dtype: what the model is computed in end to end: ``float32``, ``bfloat16``, or ``auto`` for
            the latter where the device multiplies it faster.
        device: what end to end runs on: ``cpu``, ``cuda``, or ``auto`` for the latter if there is
            one.
        sharded: several processes (torchrun) hold a part of the parameters each.
        record: keeps what was learned on disk, for a run that is killed; None: nothing is kept.
        progress: called with the loss and the fraction done.

    Raises:
        DiagnosticError: QN309 the driver is end-to-end, and the graph has no logits.
    """

    name: ClassVar[str] = "learn-scales"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    data: FeedSource
    driver: str = BLOCKWISE
    weights: str = "codes"
    tensors: str = "rotated"
    steps: int | None = None
    batch: int = 1
    distillation: float = 0.9
    local_share: float = 0.0
    seed: int = 0
    method: RangeMethod = RangeMethod.MSE
    dtype: str = "float32"
    device: str = "cpu"
    sharded: bool = False
    record: LearningRecord | None = None
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        graph = compilation.graph
        blocks = cut_blocks(graph)
        activations, weights = self.names(blocks, compilation.encodings)
        if not (activations or weights) or self._steps == 0:
            return 0
        feeds = [turn_caches(compilation.model, run) for run in self.data.feeds(graph.inputs)]
        work = _Work(compilation, blocks, feeds, activations, _reals(graph, weights))
        if self.record is not None and process_index() == 0:
            self.record.open(work.fingerprint(self._options()))
        if self.driver == BLOCKWISE:
            self._learn_blocks(work)
        else:
            self._learn_whole(work)
        self.progress("learn", 1.0)
        return len(activations) + len(weights)

    @property
    def _steps(self) -> int:
        return STEPS[self.driver] if self.steps is None else self.steps

    def _options(self) -> str:
        chosen = (self.driver, self.weights, self.tensors, self._steps, self.batch)
        return repr(
            (*chosen, self.distillation, self.local_share, self.seed, self.dtype, self.device)
        )

    def _learn_blocks(self, work: _Work) -> None:
        from qnpu.runtime_check import block_learning  # noqa: PLC0415  (imports torch)

        options = block_learning.LearningOptions(self._steps, self.batch, seed=self.seed)
        done = self.record.load if self.record is not None else _nothing
        table, blocks = work.compilation.encodings, work.blocks
        names = work.activations, work.reals
        for result in block_learning.learn_blocks(blocks, table, work.feeds, *names, options, done):
            if self.record is not None and not result.resumed:
                self.record.save(result.block, result.to_state())
            name = f"block {result.block}"
            if result.diverged:
                fault = LearningDiverged(name, result.before, result.after)
                work.compilation.diagnostics.append(fault.at())
            losses = f"loss {result.before:.2e} → {result.after:.2e}"
            work.compilation.learning += [
                LearningPoint(name, step, loss)
                for step, loss in result.losses.items()
                if math.isfinite(loss)
            ]
            if not result.resumed:
                fraction = (result.block + 1) / (len(blocks) - 1)
                self.progress(f"learn: {name}, {losses}", fraction)
        table.mark_learned([*work.activations, *work.reals], BLOCKWISE)

    def _learn_whole(self, work: _Work) -> None:
        from qnpu.runtime_check import end_to_end_learning as end_to_end  # noqa: PLC0415
        from qnpu.runtime_check import learned_tensors, processes  # noqa: PLC0415
        from qnpu.runtime_check.learned_rotations import LearnedRotations  # noqa: PLC0415

        processes.wait()  # for the record
        graph, table = work.compilation.graph, work.compilation.encodings
        device = end_to_end.working_device(self.device)
        options = end_to_end.EndToEndOptions(
            logits=_logits(graph),
            steps=self._steps,
            batch=self.batch,
            distillation=self.distillation,
            local_share=self.local_share,
            seed=self.seed,
            dtype=end_to_end.working_type(self.dtype, device),
            device=device,
            sharded=self.sharded,
        )
        rotations = LearnedRotations(graph) if self.weights == "rotations" else None
        learned: LearnedTensors
        if rotations is None:
            learned = learned_tensors.LearnedCodes(
                table, work.activations, work.reals, margin=end_to_end.MARGIN
            )
        else:
            learned = learned_tensors.LearnedScales(table, work.activations, work.reals, rotations)

        def tell(step: int, loss: float) -> None:
            self.progress(f"learn: step {step}, loss {loss:.4f}", step / options.steps)

        last: end_to_end.Check | None = None
        for check in end_to_end.learn_end_to_end(
            work.blocks, table, work.feeds, learned, options, self.record, tell
        ):
            last = check
            if math.isfinite(check.loss):
                point = LearningPoint("model", check.step, check.loss)
                work.compilation.learning.append(point)
        if last is not None and last.best_step < last.step:
            fault = LearningDiverged("model", last.first, last.best)
            work.compilation.diagnostics.append(fault.at())
        learned.store(table)
        if rotations is not None:
            for name in rotations.rotated - set(work.reals):
                table.forget(name)
            rotations.apply_to_graph()
            encode_constants(work.compilation, self.method)
        table.mark_learned(learned.names, END_TO_END)

    def names(self, blocks: Sequence[Segment], table: EncodingTable) -> tuple[list[str], list[str]]:
        """Activations and weights to learn, in graph order."""
        layers = [node for block in blocks[:-1] for node in block.nodes]
        activations: dict[str, None] = {}
        weights: dict[str, None] = {}
        most = CHOSEN_BITS if self.weights == "codes" else LEARNED_BITS
        for node in layers:
            linear = as_linear(node)
            for name in self._activations_at(node, linear):
                if self._is_open(name, table, LEARNED_BITS):
                    activations[name] = None
            weight = name_of(linear.weight) if linear is not None else ""
            if self._is_open(weight, table, most) and (
                self.weights != "codes" or table.has_codes(weight)
            ):
                weights[weight] = None
        return list(activations), list(weights)

    def _activations_at(self, node: ir.Node, linear: Linear | None) -> Iterator[str]:
        if self.tensors == "all":
            yield from (name_of(v) for v in node.outputs if is_float(v) and not is_layout_copy(v))
        elif linear is not None and not is_down_projection(linear):
            yield name_of(linear.activation)

    def _is_open(self, name: str, table: EncodingTable, bits: int) -> bool:
        return (
            name in table
            and table[name].spec.bits <= bits
            and not table.is_learned(name, self.driver)
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """One piece of learning."""

    compilation: Compilation
    blocks: Sequence[Segment]
    feeds: Sequence[Feeds]
    activations: Sequence[str]
    reals: dict[str, NDArray[Any]]

    def fingerprint(self, options: str) -> str:
        """Of the start, the data and the options."""
        table = self.compilation.encodings
        arrays = [array for run in self.feeds for array in run.values()]
        for encoding in (table[name] for name in table):
            arrays += [encoding.scale, encoding.zero_point]
            arrays += [encoding.block_scales] if encoding.block_scales is not None else []
        for name, real in self.reals.items():
            arrays += [real, widened(table.quantize(name, real))]
        return fingerprint(options, repr((*self.activations, *self.reals)), arrays=arrays)


def _nothing(part: int) -> State | None:
    return None


def _reals(graph: ir.Graph, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    arrays = {name: constant_array(graph.initializers[name]) for name in names}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def _logits(graph: ir.Graph) -> str:
    """The one output that is no cache: what the last float linear gives, say."""
    names = [name_of(value) for value in graph.outputs if is_float(value)]
    found = [name for name in names if name == "logits"] or names[:1]
    if not found:
        raise DiagnosticError(NothingToPredict().at())
    return found[0]
