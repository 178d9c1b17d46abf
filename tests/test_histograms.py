"""Histograms before and after rotation: what is counted, of which tensors, with which encoding."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.passes.insert_hadamard import InsertHadamard
from qnpu.runtime_check.histograms import (
    LinearInput,
    TensorHistogram,
    linear_inputs,
    tensor_histograms,
)
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Feeds
from tests.conftest import Array, normal, parse
from tests.decoders import canonical, some_tokens

SPEC = QuantSpec(8, signed=False, symmetric=False)
GRAPH = """
    g (float[2, 3] x) => (float[2, 3] z)
    {
        y = Neg(x)
        z = Relu(y)
    }
"""


def counted(
    batches: list[Array], encodings: EncodingTable | None = None, limit: int = 2**20
) -> TensorHistogram:
    """Of y = -x, the same graph twice."""
    feeds: list[Feeds] = [{"x": batch} for batch in batches]
    (found,) = tensor_histograms(
        parse(GRAPH),
        parse(GRAPH),
        feeds,
        feeds,
        encodings or EncodingTable(),
        [LinearInput(0, "q", "y", "y")],
        limit,
    )
    return found


def rotated(model: ir.Model, *, online: bool = False) -> ir.Model:
    compilation = Compilation(model.clone())
    FoldNormScale().run(compilation)
    assert FuseRotation().run(compilation)
    if online:
        assert InsertHadamard(("r3", "r4")).run(compilation)
    return compilation.model


def test_every_element_is_in_its_bin() -> None:
    batches = [normal(2, 3, seed=seed) * 10.0 ** (seed - 2) for seed in range(4)]
    found = counted(batches)
    values = -np.concatenate([batch.reshape(-1) for batch in batches]).astype(np.float64)
    expected, _ = np.histogram(values, found.edges)
    assert found.after.counts == found.before.counts == tuple(expected)
    assert sum(found.after.counts) == values.size
    assert (found.after.low, found.after.high) == (values.min(), values.max())


def test_bins_are_symmetric_and_a_half_octave_wide() -> None:
    edges = np.array(counted([normal(2, 3)]).edges)
    np.testing.assert_array_equal(edges, -edges[::-1])
    positive = edges[edges > 0]
    assert positive[1:] / positive[:-1] == pytest.approx(np.full(positive.size - 1, 2**0.5))
    assert len(edges) == len(counted([normal(2, 3)]).after.counts) + 1


def test_a_massive_element_keeps_the_others_apart() -> None:
    values = np.array([[1.0, -2.0, 0.5], [0.25, -0.1, 4000.0]], np.float32)
    found = counted([values])
    assert sorted(count for count in found.after.counts if count) == [1] * 6


def test_what_is_too_small_to_tell_is_in_the_middle_bin() -> None:
    found = counted([np.array([[0.0, 1e-12, -1e-12], [1e-38, -1e-45, 1.0]], np.float32)])
    middle = len(found.after.counts) // 2
    assert found.after.counts[middle] == 5
    assert found.edges[middle] < 0 < found.edges[middle + 1] < 1e-4


def test_zeros_alone() -> None:
    found = counted([np.zeros((2, 3), np.float32)])
    assert sum(found.after.counts) == 6 and found.after.low == found.after.high == 0.0


def test_what_is_not_finite_is_left_out() -> None:
    found = counted([np.array([[np.inf, -np.inf, np.nan], [1.0, 2.0, 3.0]], np.float32)])
    assert sum(found.after.counts) == 3 and found.after.low == -3.0


def test_a_tensor_without_a_finite_element_is_left_out() -> None:
    feeds: list[Feeds] = [{"x": np.full((2, 3), np.nan, np.float32)}]
    inputs = [LinearInput(0, "q", "y", "y")]
    assert (
        tensor_histograms(parse(GRAPH), parse(GRAPH), feeds, feeds, EncodingTable(), inputs) == []
    )


def test_segments_make_no_difference() -> None:
    batches = [normal(2, 3, seed=seed) for seed in range(3)]
    assert counted(batches, limit=0) == counted(batches)


def test_the_encoding_is_told() -> None:
    table = EncodingTable()
    encoding = Encoding.from_range(SPEC, -1.0, 3.0)
    table["y"] = encoding
    found = counted([normal(2, 3)], table)
    assert (found.bits, found.step) == (8, float(encoding.scale))
    assert (found.range_low, found.range_high) == (float(encoding.low), float(encoding.high))
    assert counted([normal(2, 3)]).bits == 0
    assert json.loads(json.dumps(found.to_json()))["after"]["counts"] == list(found.after.counts)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_inputs_of_every_role_of_a_decoder(architecture: str, online: bool) -> None:
    before = canonical(architecture)
    found = linear_inputs(before, rotated(before, online=online))
    layers = {item.layer for item in found}
    assert layers == {0, 1, 2}  # two layers, and the head behind them
    for layer in (0, 1):
        assert [item.role for item in found if item.layer == layer] == ["q", "o", "gate", "down"]
    assert [item.role for item in found if item.layer == 2] == ["head"]
    renamed = [item for item in found if item.before != item.after]
    assert {item.role for item in renamed} == ({"down"} if online else set())


def test_no_decoder_has_none() -> None:
    assert linear_inputs(parse(GRAPH), parse(GRAPH)) == []


def test_rotation_keeps_energy_and_the_down_input() -> None:
    before = canonical("llama")
    after = rotated(before)
    feeds = some_tokens(before)
    inputs = linear_inputs(before, after)
    found = tensor_histograms(before, after, [feeds], [feeds], EncodingTable(), inputs)
    by_role = {item.role: item for item in found if item.layer == 0}
    down = by_role["down"]
    assert down.before.counts == down.after.counts
    assert by_role["o"].before != by_role["o"].after
    arrays: dict[str, Array] = {}
    for step in SegmentRunner(after, [feeds]).stream({item.after for item in inputs}):
        arrays |= step.values
    for item in found:
        expected, _ = np.histogram(arrays[item.name].astype(np.float64), item.edges)
        assert item.after.counts == tuple(expected)
