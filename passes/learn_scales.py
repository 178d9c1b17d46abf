"""learn-scales: move scales, zero points and codes to where the model gives what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qnpu.compiler.bit_plan import CHOSEN_BITS
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.quant_types import widened
from qnpu.compiler.roles import is_down_projection
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.compiler.rules import LearningDiverged
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.learning_record import LearningRecord, State, fingerprint
from qnpu.runtime_check.segments import Segment
from qnpu.runtime_check.session import Feeds

_NARROW = 8


@dataclass(frozen=True)
class LearnScales(Pass):
    """Learns encodings of linears' inputs and weights in place in the table of encodings.

    The graph is not changed. One block (decoder layer) after another, on inputs as the model
    quantized so far gives them, is made to give what the float model has after it; see
    ``qnpu.runtime_check.block_learning`` for the loss. What learns (quantnpu.md §3):

    * scale and zero point of each linear's input of 8 bits or fewer, but not of a down
      projection's: only rotated tensors, as to learn the others does harm (paper, Fig. 1c);
    * codes and scales of weights of 4 bits or fewer, where codes were chosen (**D**: the paper
      learns scales and rotations alone).

    Must not fire on the head (the last block), on a graph that has no such tensor, or on encodings
    that have been learned.

    Attributes:
        data: what to run the graph on.
        steps: optimizer steps per block; 0: nothing is learned.
        seed: of the order of the data.
        record: keeps each learned block on disk, for a run that is killed; None: nothing is kept.
        progress: called with the loss and the fraction done.
    """

    name: ClassVar[str] = "learn-scales"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    data: FeedSource
    steps: int = 60
    seed: int = 0
    record: LearningRecord | None = None
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        graph, table = compilation.graph, compilation.encodings
        blocks = cut_blocks(graph)
        layers = [node for block in blocks[:-1] for node in block.nodes]
        activations, weights = _learned_names(layers, table)
        if not (activations or weights) or self.steps == 0:
            return 0
        model = compilation.model
        feeds = [turn_caches(model, run) for run in self.data.feeds(graph.inputs)]
        self._learn(compilation, blocks, feeds, (activations, weights))
        return len(activations) + len(weights)

    def _learn(
        self,
        compilation: Compilation,
        blocks: Sequence[Segment],
        feeds: Sequence[Feeds],
        names: tuple[list[str], list[str]],
    ) -> None:
        from qnpu.runtime_check import block_learning  # noqa: PLC0415  (imports torch)

        graph, table = compilation.graph, compilation.encodings
        options = block_learning.LearningOptions(steps=self.steps, seed=self.seed)
        if self.record is not None:
            self.record.open(_work(graph, table, feeds, names, repr(options)))
        done = self.record.load if self.record is not None else _nothing
        for result in block_learning.learn_blocks(blocks, table, feeds, *names, options, done):
            if self.record is not None:
                self.record.save(result.block, result.learned)
            if result.diverged:
                fault = LearningDiverged(result.block, result.before, result.after)
                compilation.diagnostics.append(fault.at())
            losses = f"loss {result.before:.2e} → {result.after:.2e}"
            fraction = (result.block + 1) / (len(blocks) - 1)
            self.progress(f"learn: block {result.block}, {losses}", fraction)
        self.progress("learn", 1.0)


def _nothing(part: int) -> State | None:
    return None


def _learned_names(nodes: Sequence[ir.Node], table: EncodingTable) -> tuple[list[str], list[str]]:
    """Linears' inputs and weights to learn, in graph order; see ``LearnScales``."""
    activations: dict[str, None] = {}
    weights: dict[str, None] = {}
    for node in nodes:
        linear = as_linear(node)
        if linear is None:
            continue
        source, weight = name_of(linear.activation), name_of(linear.weight)
        if _is_open(source, table, _NARROW) and not is_down_projection(linear):
            activations[source] = None
        if _is_open(weight, table, CHOSEN_BITS) and table.has_codes(weight):
            weights[weight] = None
    return list(activations), list(weights)


def _is_open(name: str, table: EncodingTable, bits: int) -> bool:
    return name in table and table[name].spec.bits <= bits and not table.is_learned(name)


def _work(
    graph: ir.Graph,
    table: EncodingTable,
    feeds: Sequence[Feeds],
    names: tuple[list[str], list[str]],
    options: str,
) -> str:
    """A fingerprint of the start, the data and the options."""
    arrays = [array for run in feeds for array in run.values()]
    arrays += [array for name in table for array in (table[name].scale, table[name].zero_point)]
    for name in names[1]:
        real = constant_array(graph.initializers[name])
        if real is not None:
            arrays += [real, widened(table.quantize(name, real))]
    return fingerprint(options, repr(names), arrays=arrays)
