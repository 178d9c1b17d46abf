"""Schemes and bit plans: how many bits each tensor gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from qnpu.compiler.bit_choices import FORMAT, VERSION, BitChoices
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import Granularity, PerBlock, PerTensor, QuantSpec
from qnpu.compiler.rules import UnknownScheme

SCHEMES = ("w8a16", "w8a8", "w4a16", "w4a8", "w4a4")

AUTO = "auto"
"""The scheme of which a search, or a plan, says what each linear and cache gets."""

CHOSEN_BITS = 4
"""Weights of so many bits or fewer get codes chosen on data; wider ones are rounded to nearest."""

LEARNED_BITS = 8
"""Tensors of so many bits or fewer are learned, and quantized while others are: at 16 bits the
error is far below what is learned, and half the time would go there."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits by role (quantnpu.md §Setting).

    Attributes:
        name: as on the command line.
        weight_bits: weights of linears.
        input_bits: inputs of linears. At 4 only of those that take a rotated activation; others
            get 8.
        output_bits: outputs of linears; one that is added to the residual stream, or is a graph
            output, keeps ``other_bits``.
        down_bits: inputs of down projections. They hold massive activations, so 16 even where
            ``input_bits`` is less, as in the paper's published figures (§7).
        other_bits: norms, softmax, activation functions, residual, embedding, rotary.
        gate_bits: what activation functions give in front of down projections, and its products
            (SiLU's sigmoid and product), up to the input of those.
        query_bits: queries, the first operand of the MatMul whose result a softmax takes.
        kv_bits: keys and values, that is the second operand of an activation-by-activation MatMul.
        head_bits: weights of the last linear (lm_head).
        head_input_bits: its input.
        logits_bits: its result.
        block: features of a weight of 4 bits that share a whole block scale (LPBQ); 0: one scale
            per output channel.
    """

    name: str
    weight_bits: int
    input_bits: int
    output_bits: int
    down_bits: int = 16
    other_bits: int = 16
    gate_bits: int = 16
    query_bits: int = 16
    kv_bits: int = 8
    head_bits: int = 8
    head_input_bits: int = 8
    logits_bits: int = 16
    block: int = 0

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme called ``w<weight bits>a<activation bits>``, or ``auto``.

        Of ``a4`` the outputs of linears and lm_head's input have 8 bits (quantnpu.md §Setting).
        Under ``auto`` what is neither a linear nor a cache that is known has 8-bit weights and
        16-bit inputs.

        Raises:
            DiagnosticError: QN501 for any other name.
        """
        if name == AUTO:
            return cls(name, 8, 16, output_bits=16, head_input_bits=16)
        match = re.fullmatch(r"w(\d+)a(\d+)", name)
        if name not in SCHEMES or match is None:
            raise DiagnosticError(UnknownScheme(name, ", ".join((*SCHEMES, AUTO))).at())
        weight_bits, bits = int(match[1]), int(match[2])
        wide = max(bits, 8)
        return cls(name, weight_bits, bits, output_bits=wide, head_input_bits=wide)


@dataclass(slots=True)
class BitPlan:
    """Value name → what it is to be encoded as. Weights, constants and activations alike.

    Attributes:
        scheme: its name.
        specs: in graph order.
        sensitivities: input of a down projection, or what an activation function makes for it →
            its relative error at few bits (``qnpu.runtime_check.sensitivity``); empty where it was
            not measured.
        promoted: those that were given more bits for it, most sensitive first.
        choices: bits of every linear and cache, as they came to be.
    """

    scheme: str = ""
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)
    promoted: tuple[str, ...] = ()
    choices: BitChoices = field(default_factory=BitChoices)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> QuantSpec:
        return self.specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def to_json(self) -> dict[str, object]:
        """A plain dictionary in plan order, as written to bit_plan.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "scheme": self.scheme,
            "sensitivities": self.sensitivities,
            "promoted": list(self.promoted),
            **self.choices.to_json(),
            "tensors": {name: spec_to_json(spec) for name, spec in self.specs.items()},
        }


def spec_to_json(spec: QuantSpec) -> dict[str, object]:
    """A plain dictionary of a spec; ``axis`` (of channels) is absent per tensor.

    Of blocks ``block_axis`` and ``block_size`` are there besides.
    """
    plain: dict[str, object] = {
        "bits": spec.bits,
        "signed": spec.signed,
        "symmetric": spec.symmetric,
    }
    granularity: Granularity = spec.granularity
    if not isinstance(granularity, PerTensor):
        plain["axis"] = granularity.channel_axis
    if isinstance(granularity, PerBlock):
        plain |= {"block_axis": granularity.axis, "block_size": granularity.size}
    return plain
