"""What is being learned of a quantized model, and the quantized model around it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.encodings import EncodingTable
from qnpu.runtime_check.fake_quantize import LearnedRounding, Quantizer, fake_quantized
from qnpu.runtime_check.learning_record import State


class LearnedTensors:
    """Quantizers of the activations and weights that learn; every other value keeps its encoding.

    ``weight`` and ``transform`` are what ``TorchExecutor.run`` takes.

    Args:
        table: encodings and codes to start from.
        activations: names of values whose encodings learn.
        weights: names of constants whose codes and scales learn → their real values.
        narrow: values of more bits than this are left as they are: at 16 bits their error is far
            below what is learned, and half the time would go there.
    """

    def __init__(
        self,
        table: EncodingTable,
        activations: Collection[str],
        weights: Mapping[str, NDArray[Any]],
        *,
        narrow: int = 8,
    ) -> None:
        self._table = table
        self._narrow = narrow
        self.activations = {name: Quantizer(table[name]) for name in activations}
        self.weights = {
            name: LearnedRounding(table[name], table.quantize(name, real), real)
            for name, real in weights.items()
        }

    def weight(self, name: str) -> Tensor | None:
        """The quantized weight of a name; None for any that does not learn."""
        return self.weights[name]() if name in self.weights else None

    def transform(self, name: str, value: Tensor) -> Tensor:
        """A value as its consumers get it."""
        if name in self.activations:
            result: Tensor = self.activations[name](value)
            return result
        if name in self._table and self._table[name].spec.bits <= self._narrow:
            return fake_quantized(value, self._table[name])
        return value

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """``latent`` (LSB), ``weight_step``, ``step`` (log of a scale), ``zero_point`` (LSB)."""
        weights, activations = self.weights.values(), self.activations.values()
        return {
            "latent": [item.latent for item in weights],
            "weight_step": [item.step for item in weights],
            "step": [item.step for item in activations],
            "zero_point": [a.zero_point for a in activations if a.zero_point.requires_grad],
        }

    def clamp(self) -> None:
        """To be called after each step."""
        for item in self.weights.values():
            item.clamp()

    def state(self) -> State:
        """A copy of all parameters."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self._named()}

    def load(self, state: State) -> None:
        """Takes over what ``state`` gave.

        Raises:
            KeyError: it is of other tensors.
        """
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(torch.from_numpy(np.array(state[name])))

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, module in (*self.activations.items(), *self.weights.items()):
            for label, parameter in module.named_parameters():
                yield f"{name}/{label}", parameter

    def store(self, table: EncodingTable) -> None:
        """Writes encodings and codes as they stand."""
        for name, activation in self.activations.items():
            table[name] = activation.encoding()
        for name, weight in self.weights.items():
            table.choose_codes(name, *weight.codes())
        table.mark_learned([*self.activations, *self.weights])
