"""Rounds the weights of linears one run of nodes after another, on inputs as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.gptq import (
    SCALES_AROUND,
    CodeRange,
    around,
    block_multiples,
    likely_scales,
    round_weight,
    steps_of,
)
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import Linear, layout_inputs
from qnpu.compiler.pass_base import ProgressCallback
from qnpu.compiler.quant_types import Encoding, PerBlock, QuantSpec
from qnpu.compiler.scale_grid import FLOAT32_BITS, WEIGHT_BITS, few_bits_above, weight_factor
from qnpu.compiler.seqmse import clip_weight
from qnpu.runtime_check.quantized_run import advance
from qnpu.runtime_check.segments import Segment, segments_of
from qnpu.runtime_check.session import Feeds
from qnpu.runtime_check.torch_executor import feed_tensors

# A token of more than this many times the median energy counts as if it had that much.
_MOST_ENERGY = 16.0

Linears = Mapping[ir.Node, Linear]


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """How to round; see ``qnpu.compiler.gptq.round_weight``.

    Attributes:
        nearest: to nearest codes, scales as in ``qnpu.compiler.seqmse``; the rest is for GPTQ.
        damping: part of the mean of diag H that is added to it.
        sweeps: passes of coordinate descent.
        scales: what is tried of each channel's scale, parts of the likeliest one.
    """

    nearest: bool = False
    damping: float = 0.01
    sweeps: int = 2
    scales: tuple[float, ...] = SCALES_AROUND


def round_linears(
    graph: ir.Graph,
    linears: Linears,
    table: EncodingTable,
    feeds: Sequence[Feeds],
    options: RoundingOptions,
    progress: ProgressCallback,
) -> None:
    """Chooses codes and scales of the linears' weights, and writes them into the table.

    Args:
        graph: float, topologically sorted.
        linears: node → linear, of weights that are in the table.
        table: encodings of activations and weights; every one that is there is applied.
        feeds: one per run of the graph.
        options: of the rounding.
        progress: called with fraction done.
    """
    segments = _cut_before(graph, linears)
    last = max(i for i, s in enumerate(segments) if any(node in linears for node in s.nodes))
    batches = [feed_tensors(run) for run in feeds]
    with torch.no_grad():
        for index in range(last + 1):
            segment, later = segments[index], segments[index + 1 : last + 1]
            _round(segment, linears, batches, table, options)
            if later:
                advance(segment, later, batches, table)
            progress("round weights", (index + 1) / (last + 1))


def _round(
    segment: Segment,
    linears: Linears,
    batches: Sequence[dict[str, Tensor]],
    table: EncodingTable,
    options: RoundingOptions,
) -> None:
    # Linears that share an input share H, and are rounded as one: a third fewer small products.
    groups: dict[tuple[str, CodeRange, int], list[Linear]] = {}
    for node in segment.nodes:
        linear = linears.get(node)
        if linear is None or table.has_codes(name_of(linear.weight)):
            continue
        spec = table[name_of(linear.weight)].spec
        key = name_of(linear.activation), CodeRange(spec.q_min, spec.q_max), _block_size(spec)
        groups.setdefault(key, []).append(linear)
    moments: dict[str, Tensor] = {}
    for (source, codes, block), group in groups.items():
        if source not in moments:
            moments[source] = _moment([rows_of(batch[source]) for batch in batches])
        by_name = {name_of(linear.weight): linear for linear in group}  # a weight may be shared
        _choose(list(by_name.values()), codes, block, moments[source], table, options)


def _block_size(spec: QuantSpec) -> int:
    """Features that share a block scale; 0 where there are no blocks."""
    return spec.granularity.size if isinstance(spec.granularity, PerBlock) else 0


def _choose(
    linears: Sequence[Linear],
    codes: CodeRange,
    block: int,
    moment: Tensor,
    table: EncodingTable,
    options: RoundingOptions,
) -> None:
    parts = [_channels(linear) for linear in linears]
    factors = [snapped_factor(linear, table) for linear in linears]
    rows = torch.cat(parts)
    blocks = block_multiples(rows, moment, codes, block) if block else None
    multiples = None if blocks is None else blocks[0].repeat_interleave(block, dim=1)
    if options.nearest:
        clipped = clip_weight(rows, moment, codes, multiples)
        scale = _snapped(clipped.scale, parts, factors)
        if not torch.equal(scale, clipped.scale):
            nearest = codes.round(rows / steps_of(scale, multiples))
            clipped = replace(clipped, scale=scale, codes=nearest)
        rounded = clipped
    else:
        if blocks is None:
            likely = likely_scales(rows, moment, codes, options.scales)
        else:
            likely = around(blocks[1], options.scales)
        scales = _snapped(likely, parts, factors)
        rounded = round_weight(
            rows,
            moment,
            scales,
            codes,
            damping=options.damping,
            sweeps=options.sweeps,
            multiples=multiples,
        )
    sizes = [len(part) for part in parts]
    split = torch.split(rounded.scale, sizes), torch.split(rounded.codes, sizes)
    of_blocks = [None] * len(sizes) if blocks is None else torch.split(blocks[0], sizes)
    for linear, scale, whole, some in zip(linears, *split, of_blocks, strict=True):
        name = name_of(linear.weight)
        spec = table[name].spec
        found = _as_stored(whole, linear).astype(np.int8)
        zero = np.zeros(len(scale), np.int32)
        steps = None if some is None else _as_stored(some, linear).astype(np.uint8)
        encoding = Encoding(spec, scale.numpy().copy(), zero, steps)
        table.choose_codes(name, encoding, found.astype(spec.code_dtype))


def _as_stored(rows: Tensor, linear: Linear) -> NDArray[np.float32]:
    """Rows of channels as the linear's weight has them."""
    return np.ascontiguousarray(np.moveaxis(rows.numpy(), 0, linear.channel_axis))


def _channels(linear: Linear) -> Tensor:
    """A linear's weight, float32, shape (channels, features)."""
    array = constant_array(linear.weight)
    if array is None:
        raise ValueError(f"initializer {linear.weight.name} has no data")
    return torch.from_numpy(np.moveaxis(array, linear.channel_axis, 0).astype(np.float32))


def _snapped(scales: Tensor, parts: Sequence[Tensor], factors: Sequence[int | None]) -> Tensor:
    """Scales of each part's channels, the last axis, on the part's grid where it has one."""
    split = torch.split(scales, [len(part) for part in parts], dim=-1)
    made = (s if t is None else _on_grid(s, t) for s, t in zip(split, factors, strict=True))
    return torch.cat(list(made), dim=-1)


def snapped_factor(linear: Linear, table: EncodingTable) -> int | None:
    """t where the scales a weight has now are n·t·2^e of few bits (snap-scales); else None."""
    values = (_source(linear.activation, table), linear.node.outputs[0], linear.weight)
    if any(name_of(value) not in table for value in values):
        return None
    taken, given, weight = (table[name_of(value)] for value in values)
    if taken.scale.size > 1 or given.scale.size > 1:
        return None
    factor = weight_factor(taken, given)
    if factor.bit_length() + WEIGHT_BITS > FLOAT32_BITS:
        return None
    snapped = few_bits_above(weight.scale, WEIGHT_BITS, factor)
    return factor if np.array_equal(snapped, weight.scale) else None


def _source(value: ir.Value, table: EncodingTable) -> ir.Value:
    """What layout operators copy a value from, where the value itself has no encoding yet."""
    producer = value.producer()
    while name_of(value) not in table and producer is not None and layout_inputs(producer):
        value = layout_inputs(producer)[0]
        producer = value.producer()
    return value


def _on_grid(scales: Tensor, factor: int) -> Tensor:
    return torch.from_numpy(few_bits_above(scales.numpy(), WEIGHT_BITS, factor))


def _moment(parts: Sequence[Tensor]) -> Tensor:
    """H of what arrives; its diagonal alone where there are not two tokens for each feature.

    Correlations are then chance for the most part, and making up for errors along them harms.
    """
    moment = second_moment(parts)
    enough = sum(map(len, parts)) >= 2 * len(moment)
    return moment if enough else torch.diag(moment.diagonal())


def second_moment(parts: Iterable[Tensor]) -> Tensor:
    """Σ_t c_t · x_tᵀ·x_t over all parts, each (tokens, features); float64, (features, features)."""
    total: Tensor | None = None
    for rows in parts:
        energy = token_energy(rows)
        shares = token_shares(energy, _MOST_ENERGY * energy.median())
        scaled = rows * shares.sqrt()[:, None]
        moment = (scaled.T @ scaled).to(torch.float64)
        total = moment if total is None else total.add_(moment)
    if total is None:
        raise ValueError("no data")
    return total


def rows_of(tensor: Tensor) -> Tensor:
    """One row for each token, shape (tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def token_energy(tensor: Tensor) -> Tensor:
    """|x|² of each token, at least a little, shape (tokens,)."""
    return rows_of(tensor).square().sum(dim=1).clamp(min=1e-30)


def token_shares(energy: Tensor, most: Tensor) -> Tensor:
    """What each token counts, min(1, most / energy): massive ones as if they had the most."""
    return torch.clamp(most / energy, max=1.0)


def _cut_before(graph: ir.Graph, linears: Linears) -> list[Segment]:
    """Cuts so that what a linear takes is made in an earlier segment."""
    runs: list[list[ir.Node]] = [[]]
    made: set[ir.Value] = set()
    for node in graph:
        if node in linears and linears[node].activation in made:
            runs.append([])
            made.clear()
        runs[-1].append(node)
        made.update(node.outputs)
    return segments_of(runs)
