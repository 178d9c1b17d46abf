"""What each option of a search for bits loses: measured tensor by tensor, and plan by plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.bit_options import BitOptions, Option, Plan, cache_key, group_key
from qnpu.compiler.pass_base import ProgressCallback
from qnpu.runtime_check import processes
from qnpu.runtime_check.bit_changes import WIDE, BitChanges, joined
from qnpu.runtime_check.bit_losses import Change, LossMeter, Measure, Together
from qnpu.runtime_check.loss_record import LossRecord

_NOTHING = Change("nothing")


class TensorLosses:
    """Measures, each number once; what the record knows is not measured again.

    Args:
        options: what may be chosen.
        changes: what stands for each choice.
        meter: on the data.
        measure: of single tensors.
        record: open.
        progress: called with fraction done.
    """

    def __init__(
        self,
        options: BitOptions,
        changes: BitChanges,
        meter: LossMeter,
        measure: Measure,
        record: LossRecord,
        progress: ProgressCallback,
    ) -> None:
        self._options, self._changes, self._meter = options, changes, meter
        self._measure, self._record, self._progress = measure, record, progress
        self._groups = {group_key(group): group for group in options.items.groups}
        self._losses: dict[str, float] = {}

    def of(self, key: str, option: Option) -> float:
        """Sum over an option's tensors, nats per token."""
        if option.bits == WIDE and not option.weights:
            return 0.0
        losses = self.tensors()
        total = losses.get(f"{key} {option.bits}", 0.0)
        group = self._groups.get(key)
        if group is not None:
            for item, bits in zip(group.linears, option.weights, strict=True):
                total += losses[f"weight {item.shape.name} {bits}"]
        return total

    def tensors(self) -> Mapping[str, float]:
        """``KIND NAME BITS`` → nats per token, of all tensors at all of their widths but 16."""
        if not self._losses:
            few = list(self._few())
            found = self._each(few)
            if self._measure is not Measure.KL:
                found = self._scaled(few, found)
            self._losses = dict(found)
            for bits, wide in self._wide().items():
                self._losses |= self._shared_out(bits, wide, found)
        return self._losses

    def of_plan(self, plan: Plan) -> Together:
        """All of a plan at once."""
        text = json.dumps(sorted(plan.items()))
        return self._together(f"plan {hashlib.sha256(text.encode()).hexdigest()}", plan)

    def of_nothing(self) -> Together:
        """The float model."""
        return self._together("float", {})

    def _few(self) -> Iterator[Change]:
        """Inputs and caches at less than 16 bits, weights at the fewest: each by itself."""
        for group in self._options.items.groups:
            known = self._options.known[group_key(group)].values()
            for bits in sorted({option.bits for option in known} - {WIDE}):
                yield self._changes.of_input(group, bits)
            for index, item in enumerate(group.linears):
                yield self._changes.of_weight(item, min(o.weights[index] for o in known))
        for cache in self._options.items.caches:
            known = self._options.known[cache_key(cache)].values()
            for bits in sorted({option.bits for option in known} - {WIDE}):
                yield self._changes.of_cache(cache, bits)

    def _wide(self) -> dict[WeightBits, list[tuple[Change, str]]]:
        """Bits beyond the fewest → weights at those, and the names of the same at the fewest."""
        wide: dict[WeightBits, list[tuple[Change, str]]] = {}
        for group in self._options.items.groups:
            known = self._options.known[group_key(group)].values()
            for index, item in enumerate(group.linears):
                fewest, *others = sorted({option.weights[index] for option in known})
                few = f"weight {item.shape.name} {fewest}"
                for bits in others:
                    wide.setdefault(bits, []).append((self._changes.of_weight(item, bits), few))
        return wide

    def _each(self, changes: Sequence[Change]) -> dict[str, float]:
        """Of several processes each measures a share of what the first does not know."""
        keys = {change.name: f"{self._measure.value} {change.name}" for change in changes}
        read = {name: self._record.get(key) for name, key in keys.items()}
        known = processes.agreed({name: loss for name, loss in read.items() if loss is not None})
        share = processes.own_share([change for change in changes if change.name not in known])
        found: dict[str, float] = {}
        for name, loss in self._meter.each(share, self._measure, progress=self._progress):
            self._record.add(keys[name], loss)
            found[name] = loss
        return known | processes.gathered(found)

    def _scaled(self, few: Sequence[Change], losses: Mapping[str, float]) -> dict[str, float]:
        """Losses of each kind and width times what makes their sum the KL of all at once."""
        kinds: dict[tuple[str, str], list[Change]] = {}
        for change in few:
            kind, *_, bits = change.name.split(" ")
            kinds.setdefault((kind, bits), []).append(change)
        scaled: dict[str, float] = {}
        for (kind, bits), changes in kinds.items():
            total = sum(losses[change.name] for change in changes)
            whole = self._all(f"all {kind} {bits}", changes)
            factor = whole / total if total > 0 else 0.0
            scaled |= {change.name: losses[change.name] * factor for change in changes}
        return scaled

    def _shared_out(
        self, bits: WeightBits, wide: Sequence[tuple[Change, str]], losses: Mapping[str, float]
    ) -> dict[str, float]:
        """The KL of all these weights at once, in the proportions of the same at few bits."""
        whole = self._all(f"all weights {bits}", [change for change, _ in wide])
        total = sum(losses[few] for _, few in wide)
        share = whole / total if total > 0 else 0.0
        return {change.name: losses[few] * share for change, few in wide}

    def _all(self, key: str, changes: Sequence[Change]) -> float:
        known = self._record.get(key)
        if known is None:
            known = self._meter.together(joined(key, changes)).divergence
            self._record.add(key, known)
        return known

    def _together(self, key: str, plan: Plan) -> Together:
        divergence, nll = self._record.get(f"{key} kl"), self._record.get(f"{key} nll")
        if divergence is None or nll is None:
            found = self._meter.together(self._of_plan(plan) if plan else _NOTHING)
            divergence, nll = found.divergence, found.nll
            self._record.add(f"{key} kl", divergence)
            self._record.add(f"{key} nll", nll)
        return Together(divergence, nll)

    def _of_plan(self, plan: Plan) -> Change:
        changes: list[Change] = []
        for group in self._options.items.groups:
            option = self._options.known[group_key(group)][plan[group_key(group)]]
            changes.append(self._changes.of_input(group, option.bits))
            for item, bits in zip(group.linears, option.weights, strict=True):
                changes.append(self._changes.of_weight(item, bits))
        for cache in self._options.items.caches:
            option = self._options.known[cache_key(cache)][plan[cache_key(cache)]]
            changes.append(self._changes.of_cache(cache, option.bits))
        return joined("plan", changes)
