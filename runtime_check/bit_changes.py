"""What to put in a tensor's place when it is quantized: encodings from data, codes by GPTQ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.bit_items import BitItems, CacheItem, LinearGroup, LinearItem
from qnpu.compiler.bit_plan import CHOSEN_BITS, BitPlan
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.pass_base import Compilation, ProgressCallback
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.roles import can_have_blocks
from qnpu.compiler.target import TargetProfile
from qnpu.runtime_check.bit_losses import Change
from qnpu.runtime_check.observer import Observer, RangeMethod
from qnpu.runtime_check.range_measuring import encode_constants, encoding_of, observer_maker
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Feeds
from qnpu.runtime_check.weight_rounding import RoundingOptions, round_linears

WIDE = 16
"""Bits of activations that are taken to lose nothing."""

NARROW = (4, 8)
"""Other widths of activations."""

ROUNDING = RoundingOptions(sweeps=0, scales=(1.0,))
"""Of 4-bit weights: a third of the time of what a compile does then, 15 % more squared error."""


class BitChanges:
    """Makes changes for a loss meter, from data; the graph is not changed.

    Ranges are measured, and 4-bit weights are rounded, when first asked for. Memory: the codes of
    4-bit weights, a byte each.

    Args:
        model: canonical float graph.
        items: of it.
        target: that says what types codes have.
        ranges: to take ranges of activations from.
        rounding: to choose codes of 4-bit weights on (``qnpu.compiler.gptq``).
        method: how ranges are taken.
        progress: called with fraction done.
    """

    def __init__(
        self,
        model: ir.Model,
        items: BitItems,
        target: TargetProfile,
        ranges: Sequence[Feeds],
        rounding: Sequence[Feeds],
        method: RangeMethod,
        progress: ProgressCallback,
    ) -> None:
        self._model = model
        self._items = items
        self._target = target
        self._ranges = ranges
        self._rounding = rounding
        self._method = method
        self._progress = progress
        self._activations: dict[tuple[str, QuantSpec], Encoding] = {}
        self._weights: dict[WeightBits, EncodingTable] = {}

    def of_input(self, group: LinearGroup, bits: int) -> Change:
        """The input of linears, and the results that have as many bits, 8 at least."""
        name = f"input {group.name} {bits}"
        if bits >= WIDE:
            return Change(name)
        spec = self._target.activation_spec
        results = [v for item in group.linears if (v := item.narrow_result) is not None]
        encodings = {name_of(v): self._encoding(v, spec(max(bits, 8))) for v in results}
        return Change(name, {group.name: self._encoding(group.source, spec(bits)), **encodings})

    def of_cache(self, cache: CacheItem, bits: int) -> Change:
        """Keys or values."""
        name, operand = f"cache {cache.name} {bits}", cache.operand
        if bits >= WIDE:
            return Change(name)
        spec = self._target.key_value_spec(bits)
        return Change(name, {name_of(operand): self._encoding(operand, spec)})

    def of_weight(self, item: LinearItem, bits: WeightBits) -> Change:
        """A weight: chosen codes where it has few bits, else the nearest."""
        name = item.shape.name

        def make() -> Tensor:
            table, array = self._codes(bits), constant_array(item.linear.weight)
            if array is None:
                raise ValueError(f"initializer {name} has no data")
            return torch.from_numpy(np.asarray(table[name].dequantize(table.quantize(name, array))))

        return Change(f"weight {name} {bits}", weights={name: make})

    def _encoding(self, value: ir.Value, spec: QuantSpec) -> Encoding:
        if not self._activations:
            self._measure()
        return self._activations[name_of(value), spec]

    def _measure(self) -> None:
        """All values at all widths that may be asked for, in one pass over the data.

        Raises:
            DiagnosticError: QN304 a value is NaN or infinite.
        """
        wanted: dict[str, set[QuantSpec]] = {}
        kinds = self._target.activation_spec, self._target.key_value_spec
        for group in self._items.groups:
            results = [v for item in group.linears if (v := item.narrow_result) is not None]
            for value in (group.source, *results):
                wanted.setdefault(name_of(value), set()).update(kinds[0](b) for b in NARROW)
        for cache in self._items.caches:
            wanted.setdefault(name_of(cache.operand), set()).update(kinds[1](b) for b in NARROW)
        make = observer_maker(Compilation(self._model, self._target), self._method)
        runner = SegmentRunner(self._model, self._ranges)
        total = len(runner.segments) * len(self._ranges)
        observers: dict[str, Observer] = {}
        for done, step in enumerate(runner.stream(set(wanted)), start=1):
            for name, array in step.values.items():
                if name not in observers:
                    observers[name] = make(name)
                observers[name].look(array)
            if step.last:
                for name, observer in observers.items():
                    for spec in wanted[name]:
                        self._activations[name, spec] = encoding_of(name, observer, spec)
                observers.clear()
            self._progress("measure ranges", done / total)

    def _codes(self, bits: WeightBits) -> EncodingTable:
        """Encodings of all weights, with chosen codes where they have few bits.

        With blocks only weights that can have them.
        """
        if bits not in self._weights:
            linears = [
                item.linear
                for group in self._items.groups
                for item in group.linears
                if not bits.block or can_have_blocks(item.linear.weight, bits.block)
            ]
            specs = {name_of(linear.weight): bits.spec(linear.channel_axis) for linear in linears}
            scratch = Compilation(self._model, self._target, bit_plan=BitPlan(specs=specs))
            encode_constants(scratch, self._method)
            if bits.bits <= CHOSEN_BITS:
                graph = self._model.graph
                by_node = {linear.node: linear for linear in linears}
                round_linears(
                    graph, by_node, scratch.encodings, self._rounding, ROUNDING, self._progress
                )
            self._weights[bits] = scratch.encodings
        return self._weights[bits]


def joined(name: str, changes: Sequence[Change]) -> Change:
    """All of several changes; where two speak of one value, the later holds."""
    activations = {key: item for change in changes for key, item in change.activations.items()}
    weights = {key: item for change in changes for key, item in change.weights.items()}
    return Change(name, activations, weights)
