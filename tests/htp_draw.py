"""What random cases are drawn with: a source of chance, a chain of steps, forced encodings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tests.qdq_cases import (
    ACTIVATIONS,
    SCALES,
    WEIGHTS,
    Case,
    Operand,
    Shape,
    Step,
    bias,
    code_range,
    const,
    y,
)

_T = TypeVar("_T")


class Draw:
    """A source of chance with the questions that the families ask."""

    def __init__(self, source: random.Random) -> None:
        self.random = source

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one(self, options: Sequence[_T]) -> _T:
        return self.random.choice(options)

    def dtype(self) -> str:
        return self.random.choices(ACTIVATIONS, weights=(3, 2, 4, 2))[0]

    def like(self, dtype: str, probability: float = 0.85) -> str:
        """Mostly the same type."""
        return dtype if self.chance(probability) else self.dtype()

    def shape(self, low: int = 1, high: int = 6) -> Shape:
        lead = [self.one((1, 2, 3, 4, 5, 8)) for _ in range(self.random.randint(low, high) - 1)]
        return (*lead, 1 if self.chance(0.03) else self.one((4, 8, 12, 16, 32)))

    def operand(self, dtype: str, shape: Shape, const_too: bool = False) -> Operand:
        """A graph input, or now and then a constant."""
        constant = const_too and self.chance(0.3)
        return Operand(
            dtype, shape, const=constant, scale=self.scale(dtype), zero_point=self.zero(dtype)
        )

    def result(self, dtype: str) -> Operand:
        return y(dtype, scale=self.scale(dtype), zero_point=self.zero(dtype))

    def scale(self, dtype: str) -> float:
        return SCALES[dtype] * self.one((0.5, 1.0, 1.0, 2.0, 0.73))

    def zero(self, dtype: str) -> int | None:
        """Mostly the middle."""
        if self.chance(0.7):
            return None
        low, high = code_range(dtype)
        return self.one((0, low, (low + 3 * high) // 4, (low + high) // 2 + 7))

    def same(self, operand: Operand) -> Operand:
        """A result in an operand's encoding, or now and then in another one of some type."""
        if self.chance(0.75):
            return y(operand.dtype, scale=operand.scale, zero_point=operand.zero_point)
        return self.result(self.like(operand.dtype, 0.8))

    def weight(self, shape: Shape, channel: int, blocks: int, dtype: str = "") -> Operand:
        """A constant with its output channels and its summed dimension at the axes given."""
        dtype = dtype or self.one(WEIGHTS)
        zero = None if dtype[0] == "u" or self.chance(0.85) else self.one((1, 3))
        kind = self.random.choices(
            ("tensor", "channel", "block", "lpbq", "wrong"), weights=(6, 8, 2, 2, 1)
        )[0]
        if kind in {"block", "lpbq"} and len(shape) >= 2 and shape[blocks] % 16 == 0:
            size = self.one((16, 32)) if shape[blocks] % 32 == 0 else 16
            return const(dtype, *shape, granularity=kind, axis=blocks, block=size, zero_point=zero)
        if kind == "tensor" or len(shape) < 2:
            explicit = dtype[0] == "u" or self.chance(0.8) or zero is not None
            return const(dtype, *shape, zero_point=zero, explicit_zero=explicit)
        axis = blocks if kind == "wrong" else channel
        return const(dtype, *shape, granularity="channel", axis=axis, zero_point=zero)

    def sensible_weight(self, act: str, shape: Shape, channel: int) -> Operand:
        """One that the NPU multiplies this activation type with."""
        kinds = {
            "u8": ("s8", "s4", "u8"),
            "s8": ("s8",),
            "u16": ("s8", "s4", "u8"),
            "s16": ("s8", "s4"),
        }
        granularity = self.one(("channel", "tensor")) if len(shape) == 2 else "channel"
        return const(self.one(kinds[act]), *shape, granularity=granularity, axis=channel)

    def bias(self, act: Operand, weight: Operand, size: int) -> list[Operand]:
        """None, a proper s32 one, or another type or scale."""
        kind = self.random.choices(
            ("none", "s32", "s32 other scale", "f32", "other"), weights=(5, 8, 1, 1, 1)
        )[0]
        if kind == "none":
            return []
        if kind == "other":
            return [const(self.dtype(), size)]
        plain = weight if weight.granularity == "channel" else replace(weight, granularity="tensor")
        return [bias(act, plain, size, kind.split()[0], factor=2.0 if "other" in kind else 1.0)]


def forced(op: str, dtype: str) -> Operand:
    """The encoding that covers the function's range."""
    bits = int(dtype[1:])
    if op == "Tanh" or dtype[0] == "s":
        return y(dtype, scale=2.0 ** (1 - bits))
    return y(dtype, scale=2.0**-bits, zero_point=0)


class Chain:
    """Steps that follow each other, and the shapes of what they give."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.steps: list[Step] = []
        self.opset = 21

    def add(
        self, op: str, inputs: list[Operand | tuple[int, int] | None], result: Operand, **more: Any
    ) -> tuple[int, int]:
        self.steps.append(Step(op, tuple(inputs), (result,), more))
        return len(self.steps) - 1, 0

    def case(self, name: str) -> Case:
        return Case(name, tuple(self.steps), opset=self.opset)
