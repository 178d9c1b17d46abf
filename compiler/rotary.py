"""Rotary position embedding spelled out in Split, Mul, Sub, Add and Concat."""

from __future__ import annotations

import onnx_ir as ir

from qnpu.compiler.graph_edit import NodeBuilder


def turn_halves(
    build: NodeBuilder,
    source: ir.Value,
    shape: tuple[int, ...],
    rotated: int,
    cos: ir.Value,
    sin: ir.Value,
) -> ir.Value:
    """The first half of the dimensions turned with the second.

    Args:
        build: makes the nodes.
        source: (B, H, S, D).
        shape: its shape.
        rotated: dimensions that take part, from the first on; the others pass through.
        cos, sin: broadcast against (B, H, S, rotated / 2).
    """
    half, rest = rotated // 2, shape[-1] - rotated
    lengths = build.integers("split", half, half, *([rest] if rest else []))
    labels = ["first", "second", *(["rest"] if rest else [])]
    first, second, *kept = build.add_many("Split", [source, lengths], labels, axis=-1)
    return build.add("Concat", [*_turn(build, first, second, cos, sin), *kept], "turned", axis=-1)


def turn_pairs(
    build: NodeBuilder,
    source: ir.Value,
    shape: tuple[int, ...],
    rotated: int,
    cos: ir.Value,
    sin: ir.Value,
) -> ir.Value:
    """Dimensions side by side turned in pairs.

    Args:
        build, source, shape, rotated: as for ``turn_halves``.
        cos, sin: broadcast against (B, H, S · rotated / 2, 1).
    """
    batch, heads, tokens, width = shape
    kept: list[ir.Value] = []
    if width > rotated:
        lengths = build.integers("split", rotated, width - rotated)
        source, *kept = build.add_many("Split", [source, lengths], ["front", "rest"], axis=-1)
    columns = build.integers("pairs_shape", batch, heads, tokens * (rotated // 2), 2)
    pairs = build.add("Reshape", [source, columns], "pairs")
    one_each = build.integers("pair", 1, 1)
    first, second = build.add_many("Split", [pairs, one_each], ["first", "second"], axis=-1)
    turned = build.add("Concat", _turn(build, first, second, cos, sin), "turned_pairs", axis=-1)
    rows = build.integers("turned_shape", batch, heads, tokens, rotated)
    result = build.add("Reshape", [turned, rows], "turned")
    return build.add("Concat", [result, *kept], "whole", axis=-1) if kept else result


def _turn(
    build: NodeBuilder, first: ir.Value, second: ir.Value, cos: ir.Value, sin: ir.Value
) -> list[ir.Value]:
    real = (
        build.add("Mul", [first, cos], "first_cos"),
        build.add("Mul", [second, sin], "second_sin"),
    )
    other = (
        build.add("Mul", [second, cos], "second_cos"),
        build.add("Mul", [first, sin], "first_sin"),
    )
    return [build.add("Sub", real, "turned_first"), build.add("Add", other, "turned_second")]
