"""What may be chosen of a decoder's bits on a target, and what each choice costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnpu.compiler.bit_budget import LATENCY, SIZE
from qnpu.compiler.bit_choices import (
    BLOCK_BITS,
    INPUT_BITS,
    KV_BITS,
    WEIGHT_BITS,
    BitChoices,
    LinearBits,
    WeightBits,
)
from qnpu.compiler.bit_items import HEAD, BitItems, CacheItem, LinearGroup, LinearItem
from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.cost_model import CostModel, Workload
from qnpu.compiler.roles import can_have_blocks
from qnpu.compiler.target import TargetProfile

if TYPE_CHECKING:
    from qnpu.compiler.allocation import Problem

Plan = Mapping[str, str]
"""Key of an item → name of its option."""

_UNROTATED_BITS = 8


@dataclass(frozen=True, slots=True)
class Option:
    """Bits of an item.

    Attributes:
        bits: of what the linears take, or of keys or values.
        weights: of each linear's weight; none for a cache.
        seconds: of the workload; modelled.
        bytes: of weights, or of keys or values in the longest run.
    """

    bits: int
    weights: tuple[WeightBits, ...]
    seconds: float = 0.0
    bytes: float = 0.0

    @property
    def name(self) -> str:
        """``8 w4,4b32,8``: 8-bit input, three weights; ``16`` of a cache."""
        weights = ",".join(map(str, self.weights))
        return f"{self.bits} w{weights}" if weights else str(self.bits)


def group_key(group: LinearGroup) -> str:
    """Under which a plan has a group."""
    return f"input {group.name}"


def cache_key(cache: CacheItem) -> str:
    """Under which a plan has keys or values."""
    return f"cache {cache.name}"


class BitOptions:
    """All that may be chosen.

    Of weights 4 and 8 bits, and 4 in blocks where they can have them; of what linears take 8, 16
    and, where a rotation has spread its outliers, 4; of keys and values 8 and 16; of these what the
    target's profile lists as pairs.

    Args:
        items: of the graph.
        target: with figures of cost.
        workload: that times are of.
        block: input features of a block (LPBQ); 0: no weight may have blocks.

    Attributes:
        items: as given.
        block: as given.
        known: key of an item → its options by name, fewest bits first.

    Raises:
        DiagnosticError: QN508 the target's profile has no figures.
    """

    def __init__(
        self, items: BitItems, target: TargetProfile, workload: Workload, block: int = 0
    ) -> None:
        self.items, self.block = items, block
        self._cost, self._workload = CostModel.of(target), workload
        self._least_input = target.activation_bits_min
        self.known: dict[str, dict[str, Option]] = {}
        for group in items.groups:
            self.known[group_key(group)] = {o.name: o for o in self._of_group(group)}
        for cache in items.caches:
            self.known[cache_key(cache)] = {o.name: o for o in self._of_cache()}

    def problem(self, loss: Callable[[str, Option], float]) -> Problem:
        """For the solver; its units are ``latency``, s, and ``size``, bytes.

        Args:
            loss: key and option → nats per token.
        """
        from qnpu.compiler.allocation import Choice, Item, Problem  # noqa: PLC0415  (imports scipy)

        items = [
            Item(
                key,
                [
                    Choice(o.name, loss(key, o), {LATENCY: o.seconds, SIZE: o.bytes})
                    for o in options.values()
                ],
            )
            for key, options in self.known.items()
        ]
        fixed = {
            LATENCY: self._cost.other_seconds(self.items.shape, self._workload),
            SIZE: float(self._cost.embedding_bytes(self.items.shape)),
        }
        return Problem(items, fixed)

    def by_scheme(self, scheme: Scheme, promoted: Collection[str] = ()) -> Plan | None:
        """What a scheme gives each item; None where the target has not got that.

        Args:
            scheme: bits by role.
            promoted: keys of groups that get wide inputs all the same.
        """
        plan: dict[str, str] = {}
        for group in self.items.groups:
            key, role = group_key(group), group.linears[0].shape.role
            bits = scheme.down_bits if role == "down" else scheme.input_bits
            bits = scheme.head_input_bits if role == HEAD else bits
            bits = scheme.other_bits if key in promoted else bits
            weight = scheme.head_bits if role == HEAD else scheme.weight_bits
            weights = (_weight_bits(item, weight, scheme.block) for item in group.linears)
            plan[key] = Option(bits, tuple(weights)).name
        plan |= {cache_key(cache): Option(scheme.kv_bits, ()).name for cache in self.items.caches}
        return plan if all(name in self.known[key] for key, name in plan.items()) else None

    def choices(self, plan: Plan) -> BitChoices:
        """A plan as assign-bit-widths takes it."""
        linears: dict[str, LinearBits] = {}
        for group in self.items.groups:
            option = self.known[group_key(group)][plan[group_key(group)]]
            for item, weight in zip(group.linears, option.weights, strict=True):
                linears[item.shape.name] = LinearBits(weight.bits, option.bits, weight.block)
        caches = {
            cache.name: self.known[cache_key(cache)][plan[cache_key(cache)]].bits
            for cache in self.items.caches
        }
        return BitChoices(linears, caches)

    def _of_group(self, group: LinearGroup) -> Iterator[Option]:
        for bits in INPUT_BITS:
            if bits < _UNROTATED_BITS and not (group.rotated and bits >= self._least_input):
                continue
            weights = (self._of_weight(item, bits) for item in group.linears)
            for chosen in itertools.product(*weights):
                pairs = [
                    (item.shape, LinearBits(weight.bits, bits, weight.block))
                    for item, weight in zip(group.linears, chosen, strict=True)
                ]
                seconds = sum(self._cost.linear_seconds(*p, self._workload) for p in pairs)
                yield Option(bits, chosen, seconds, sum(self._cost.linear_bytes(*p) for p in pairs))

    def _of_weight(self, item: LinearItem, input_bits: int) -> list[WeightBits]:
        """Fewest first."""
        blocks = {0, self.block}
        found = {_weight_bits(item, bits, block) for bits in WEIGHT_BITS for block in blocks}
        has = self._cost.has
        return sorted(bits for bits in found if has(bits.bits, input_bits, block=bits.block))

    def _of_cache(self) -> Iterator[Option]:
        shape = self.items.shape
        for bits in KV_BITS:
            if self._cost.has(bits, max(INPUT_BITS)):
                seconds = self._cost.cache_seconds(shape, bits, self._workload)
                yield Option(bits, (), seconds, self._cost.cache_bytes(shape, bits, self._workload))


def _weight_bits(item: LinearItem, bits: int, block: int) -> WeightBits:
    """In blocks only where a weight can have them."""
    in_blocks = block and bits == BLOCK_BITS and can_have_blocks(item.linear.weight, block)
    return WeightBits(bits, block if in_blocks else 0)
