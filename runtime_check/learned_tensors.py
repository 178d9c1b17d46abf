"""What is being learned of a quantized model, and the quantized model around it."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.bit_plan import LEARNED_BITS
from qnpu.compiler.encodings import EncodingTable
from qnpu.runtime_check.fake_quantize import LearnedRounding, Quantizer, fake_quantized
from qnpu.runtime_check.learned_rotations import LearnedRotations
from qnpu.runtime_check.learning_record import State
from qnpu.runtime_check.processes import fill, whole

Reals = Mapping[str, NDArray[Any]]
"""Name of a constant that learns → its real values."""


class LearnedTensors(abc.ABC):
    """Quantizers of the activations and weights that learn; every other value keeps its encoding.

    ``weight`` and ``transform`` are what ``TorchExecutor.run`` takes. Values of more than 8 bits
    are not quantized.

    Args:
        table: encodings and codes to start from.
        activations: names of values whose encodings learn.
        relative: learn logarithms of scales; see ``Quantizer``.

    Attributes:
        activations: quantizers by value name.
        weights: names of the constants that ``weight`` gives.
        optimizer: what serves these parameters, ``adamw`` or ``sgd``.
    """

    optimizer: ClassVar[str]

    def __init__(
        self, table: EncodingTable, activations: Collection[str], *, relative: bool
    ) -> None:
        self._table = table
        self.activations = {name: Quantizer(table[name], relative=relative) for name in activations}
        self.weights: Collection[str] = ()

    @abc.abstractmethod
    def weight(self, name: str) -> Tensor | None:
        """What a weight of a name is for now; None for any that does not learn."""

    @abc.abstractmethod
    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All that has parameters, by names of its own."""

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Parameters by kind: ``latent``, ``zero_point`` (LSB), ``weight_step``, ``step`` (of a
        scale: its logarithm, or itself), ``rotation``."""
        activations = self.activations.values()
        return {
            "step": [item.step for item in activations],
            "zero_point": [a.zero_point for a in activations if a.zero_point.requires_grad],
        }

    @property
    @abc.abstractmethod
    def names(self) -> list[str]:
        """Of all whose encodings learn."""

    @abc.abstractmethod
    def store(self, table: EncodingTable) -> None:
        """Writes encodings, and codes where they are chosen, as they stand."""

    def transform(self, name: str, value: Tensor) -> Tensor:
        """A value as its consumers get it."""
        if name in self.activations:
            result: Tensor = self.activations[name](value)
            return result
        if name in self._table and self._table[name].spec.bits <= LEARNED_BITS:
            return fake_quantized(value, self._table[name])
        return value

    def large_modules(self) -> Iterator[torch.nn.Module]:
        """Those whose parameters are worth sharing out between processes."""
        yield from ()

    def move(self, device: torch.device) -> None:
        """To where it is learned; a caller takes parameters afterwards."""
        for _, module in self.modules():
            module.to(device)

    def all_parameters(self) -> list[torch.nn.Parameter]:
        """Of every kind."""
        return [parameter for kind in self.parameters().values() for parameter in kind]

    def set_local_loss(self, weight: float) -> None:
        """Weighs activations' own errors; see ``FakeQuantize``."""
        for quantizer in self.activations.values():
            quantizer.local = weight

    @abc.abstractmethod
    def clamp(self) -> None:
        """To be called after each step."""

    def state(self) -> State:
        """A copy of all parameters."""
        return {name: whole(parameter).numpy().copy() for name, parameter in self._named()}

    def load(self, state: State) -> None:
        """Takes over what ``state`` gave.

        Raises:
            KeyError: it is of other tensors.
        """
        for name, parameter in self._named():
            fill(parameter, state[name])

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, module in self.modules():
            for label, parameter in module.named_parameters():
                yield f"{name}/{label}", parameter


class LearnedCodes(LearnedTensors):
    """Scales, zero points, and each code of a weight for itself (quantnpu.md §3 **D**).

    Args:
        table: encodings and codes to start from.
        activations: names of values whose encodings learn.
        reals: constants whose codes and scales learn.
        margin: see ``LearnedRounding``.
    """

    optimizer = "adamw"

    def __init__(
        self,
        table: EncodingTable,
        activations: Collection[str],
        reals: Reals,
        *,
        margin: float = 0.01,
    ) -> None:
        super().__init__(table, activations, relative=True)
        self._rounded = {
            name: LearnedRounding(table[name], table.quantize(name, real), real, margin)
            for name, real in reals.items()
        }
        self.weights = self._rounded

    def weight(self, name: str) -> Tensor | None:
        result: Tensor | None = self._rounded[name]() if name in self._rounded else None
        return result

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        yield from self.activations.items()
        yield from self._rounded.items()

    def large_modules(self) -> Iterator[torch.nn.Module]:
        yield from self._rounded.values()

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        weights = self._rounded.values()
        return {
            "latent": [item.latent for item in weights],
            "weight_step": [item.step for item in weights],
            **super().parameters(),
        }

    def clamp(self) -> None:
        for item in self._rounded.values():
            item.clamp()

    @property
    def names(self) -> list[str]:
        return [*self.activations, *self._rounded]

    def store(self, table: EncodingTable) -> None:
        for name, activation in self.activations.items():
            table[name] = activation.encoding()
        for name, weight in self._rounded.items():
            table.choose_codes(name, *weight.codes())


class LearnedScales(LearnedTensors):
    """Scales, zero points and rotations; codes are the nearest (the paper's way, quantnpu.md §3).

    Args:
        table: encodings to start from.
        activations: names of values whose encodings learn.
        reals: constants whose scales learn, as the graph has them.
        rotations: that learn; what they turn but ``reals`` leaves out stays float.
    """

    optimizer = "sgd"

    def __init__(
        self,
        table: EncodingTable,
        activations: Collection[str],
        reals: Reals,
        rotations: LearnedRotations,
    ) -> None:
        super().__init__(table, activations, relative=False)
        self.rotations = rotations
        self._quantizers = {name: Quantizer(table[name], relative=False) for name in reals}
        self._reals = {name: torch.from_numpy(np.asarray(real)) for name, real in reals.items()}
        self.weights = {*reals, *rotations.weights}

    def move(self, device: torch.device) -> None:
        super().move(device)
        self._reals = {name: real.to(device) for name, real in self._reals.items()}

    def weight(self, name: str) -> Tensor | None:
        if name not in self._quantizers:
            return self.rotations.weight(name)
        result: Tensor = self._quantizers[name](self.rotations.turned(name, self._reals[name]))
        return result

    def transform(self, name: str, value: Tensor) -> Tensor:
        return super().transform(name, self.rotations.output(name, value))

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        yield from self.activations.items()
        yield from self._quantizers.items()
        yield "rotations", self.rotations

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        return {
            "weight_step": [item.step for item in self._quantizers.values()],
            **super().parameters(),
            "rotation": list(self.rotations.parameters()),
        }

    def clamp(self) -> None:
        """Nothing to do: scales have a least value, rotations stay orthogonal."""

    @property
    def names(self) -> list[str]:
        return [*self.activations, *self._quantizers]

    def store(self, table: EncodingTable) -> None:
        """The graph's weights are to be rotated besides: ``LearnedRotations.apply_to_graph``."""
        for name, quantizer in (*self.activations.items(), *self._quantizers.items()):
            table[name] = quantizer.encoding()
