"""block_scales: whole block scales against every other choice, and blocks of zeros."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.block_scales import encode_blocks, whole_scales
from qnpu.compiler.quant_types import PerBlock, PerChannel, QuantSpec
from tests.conftest import Array, normal


def blocks(count: int = 4, size: int = 16, channels: int = 6) -> Array:
    spread = np.geomspace(0.2, 1.0, count, dtype=np.float32)[:, None, None]
    return normal(count, size, channels, seed=1) * spread


def wanted(real: Array) -> Array:
    return np.asarray(np.abs(real).max(axis=1) / 7)


def error(real: Array, steps: Array, weights: Array) -> Array:
    codes = np.clip(np.rint(real / steps[:, None]), -7, 7)
    return np.asarray((np.square(codes * steps[:, None] - real) * weights).sum(axis=1))


@pytest.mark.parametrize("weighted", [False, True])
def test_each_block_takes_the_better_neighbour(weighted: bool) -> None:
    real = blocks()
    scales = wanted(real)
    importance = np.square(normal(4, 16, seed=5)) if weighted else np.ones((4, 16), np.float32)
    found = whole_scales(real, scales, -7, 7, importance=importance if weighted else None)
    np.testing.assert_array_equal(found.scale, scales.max(axis=0) / np.float32(15))
    assert found.multiples.max() == 15
    weights = importance[:, :, None]
    ours = error(real, found.multiples * found.scale, weights)
    ratio = scales / found.scale
    for other in (np.floor(ratio), np.ceil(ratio)):
        theirs = error(real, np.clip(other, 1, 15) * found.scale, weights)
        assert (ours <= theirs * (1 + 1e-6)).all()
    np.testing.assert_allclose(found.error, ours, rtol=1e-6)


def test_zeros_have_no_say_in_the_scale() -> None:
    real = blocks()
    real[1, :, 2] = 0
    real[:, :, 3] = 0
    scales = wanted(real)
    scales[1, 2], scales[:, 3] = 100.0, 1.0  # what a search gives where there is nothing to see
    found = whole_scales(real, scales, -7, 7)
    assert found.multiples[1, 2] == 1
    assert found.scale[2] < 1
    assert found.scale[3] == 1
    assert not found.codes[:, :, 3].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_an_encoding_of_a_matrix(axis: int) -> None:
    real = blocks().reshape(64, 6)
    matrix = real if axis == 0 else np.ascontiguousarray(real.T)
    scales = wanted(blocks())
    spec = QuantSpec(4, True, True, PerBlock(axis, 16))
    encoding = encode_blocks(matrix, spec, scales if axis == 0 else scales.T)
    back = encoding.dequantize(encoding.quantize(matrix))
    steps = wanted(blocks()).max()
    assert np.abs(back - matrix).max() < 0.7 * steps
    flat = whole_scales(blocks(), scales, -7, 7)
    turned = flat.multiples if axis == 0 else flat.multiples.T
    np.testing.assert_array_equal(encoding.block_scales, turned)


def test_what_cannot_be_in_blocks() -> None:
    real = blocks().reshape(64, 6)
    with pytest.raises(ValueError, match="no symmetric blocks"):
        encode_blocks(real, QuantSpec(4, True, True, PerChannel(1)), wanted(blocks()))
    with pytest.raises(ValueError, match="do not divide"):
        encode_blocks(real, QuantSpec(4, True, True, PerBlock(0, 48)), wanted(blocks()))
