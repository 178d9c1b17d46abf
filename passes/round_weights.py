"""round-weights: choose the codes of linear weights so that the linears' outputs stay right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qnpu.compiler.bit_plan import CHOSEN_BITS
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import Linear, as_linear
from qnpu.compiler.pass_base import Compilation, Pass, ProgressCallback, Stage, no_progress
from qnpu.compiler.rotated_caches import turn_caches
from qnpu.runtime_check.feeds import FeedSource


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Fills the encoding table's codes of linear weights; the graph is not changed.

    The model runs once over the data as quantized so far: activations with their encodings, each
    weight with the codes it has just been given. Before a run of linears executes, their weights
    are rounded to the least error on the inputs that arrive (GPTQ and coordinate descent; see
    ``qnpu.compiler.gptq``), so that each layer makes up for what the ones before it lost::

        H = Σ_t c_t · x_tᵀ·x_t,   c_t = min(1, 16 · median |x|² / |x_t|²)
        codes, scale = argmin Σ_channels (w - s·q)·H·(w - s·q)ᵀ

    c keeps the few tokens with massive activations from being all that H knows (**D**). Each
    channel's scale is the best of several (quantnpu.md §3 **D**, §8). With ``nearest`` codes are
    the nearest, and only the scales are chosen so (SeqMSE; see ``qnpu.compiler.seqmse``).

    Memory: what crosses between runs of linears for all batches, and one H of (features, features).

    Where there are not two tokens for each feature, H's diagonal is used alone: nearest codes.

    Must not fire on weights of more than ``bits`` bits, Conv, or a weight that has codes already.

    Attributes:
        data: what to run the graph on.
        nearest: choose scales alone.
        bits: widest weights to choose codes for; rounding to nearest serves wider ones.
        damping: part of the mean of diag H that is added to it.
        sweeps: passes of coordinate descent.
        progress: called with fraction done.
    """

    name: ClassVar[str] = "round-weights"
    consumes: ClassVar[Stage] = Stage.ENCODED
    produces: ClassVar[Stage] = Stage.ENCODED

    data: FeedSource
    nearest: bool = False
    bits: int = CHOSEN_BITS
    damping: float = 0.01
    sweeps: int = 2
    progress: ProgressCallback = no_progress

    def run(self, compilation: Compilation) -> int:
        graph, table = compilation.graph, compilation.encodings
        linears = {
            node: linear
            for node in graph
            if (linear := as_linear(node)) is not None and self._wants(linear, table)
        }
        if not linears:
            return 0
        from qnpu.runtime_check import weight_rounding  # noqa: PLC0415  (imports torch)

        model = compilation.model
        feeds = [turn_caches(model, run) for run in self.data.feeds(graph.inputs)]
        options = weight_rounding.RoundingOptions(self.nearest, self.damping, self.sweeps)
        weight_rounding.round_linears(graph, linears, table, feeds, options, self.progress)
        return len({linear.weight for linear in linears.values()})

    def _wants(self, linear: Linear, table: EncodingTable) -> bool:
        name = name_of(linear.weight)
        return (
            linear.node.op_type in ("MatMul", "Gemm")
            and len(linear.weight.shape or ()) == 2
            and linear.activation is linear.node.inputs[0]
            and linear.node.attributes.get_int("transA", 0) == 0
            and name in table
            and table[name].spec.bits <= self.bits
            and table[name].scale.size > 1
            and not table.has_codes(name)
        )
