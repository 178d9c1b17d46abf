"""Learnable quantizers: the numbers of an Encoding, the gradients of LSQ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel, PerTensor, QuantSpec
from qnpu.runtime_check.fake_quantize import LearnedRounding, Quantizer, fake_quantized
from tests.conftest import normal

SPECS = [
    QuantSpec(8, signed=False, symmetric=False),
    QuantSpec(16, signed=False, symmetric=False),
    QuantSpec(8, signed=True, symmetric=True),
    QuantSpec(4, signed=True, symmetric=True, granularity=PerChannel(1)),
    QuantSpec(8, signed=True, symmetric=True, granularity=PerChannel(0)),
]


def encoding_for(spec: QuantSpec, width: int = 6) -> Encoding:
    """Of a range that some of ``normal`` lies outside of."""
    if spec.granularity == PerTensor():
        return Encoding.from_range(spec, -0.7, 1.2)
    return Encoding.from_range(spec, np.linspace(-0.5, -1.5, width), np.linspace(0.5, 1.5, width))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gives_the_numbers_that_the_encoding_gives(spec: QuantSpec) -> None:
    encoding, x = encoding_for(spec), normal(6, 6)
    expected = encoding.dequantize(encoding.quantize(x))
    tensor = torch.from_numpy(x)
    assert np.array_equal(fake_quantized(tensor, encoding).numpy(), expected)
    for relative in (True, False):
        found = Quantizer(encoding, relative=relative)(tensor)
        assert np.array_equal(found.detach().numpy(), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("relative", [True, False])
def test_what_did_not_learn_is_the_encoding_it_started_from(
    spec: QuantSpec, relative: bool
) -> None:
    encoding = encoding_for(spec)
    assert Quantizer(encoding, relative=relative).encoding().same_as(encoding)


def test_gradients_are_those_of_lsq() -> None:
    spec = QuantSpec(8, signed=False, symmetric=False)
    quantizer = Quantizer(Encoding.from_range(spec, -0.7, 1.2), relative=False)
    x = torch.tensor([-2.0, -0.3, 0.111, 0.5, 3.0], requires_grad=True)
    scale, zero = float(quantizer.scale.detach()), float(quantizer.zero_point.detach())
    weight = torch.tensor([1.0, 2.0, -3.0, 0.5, 4.0])
    (quantizer(x) * weight).sum().backward()
    g = 1.0 / np.sqrt(5 * 255)
    ratio = x.detach().numpy().astype(np.float64) / scale
    slopes = np.rint(ratio) - ratio
    slopes[0], slopes[-1] = 0 - zero, 255 - zero
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, -3.0, 0.5, 0.0]
    assert quantizer.step.grad is not None
    assert quantizer.zero_point.grad is not None
    assert float(quantizer.step.grad) == pytest.approx(
        g * (slopes * weight.numpy()).sum(), rel=1e-4
    )
    assert float(quantizer.zero_point.grad) == pytest.approx(g * -scale * (1.0 + 4.0), rel=1e-4)


def test_gradient_of_the_scale_is_the_finite_difference_where_values_clip() -> None:
    """Far outside the range x̂ = s·(q_max - z) is smooth in s, so that the slope can be measured."""
    spec = QuantSpec(8, signed=True, symmetric=True, granularity=PerChannel(0))
    quantizer = Quantizer(encoding_for(spec, 3), relative=True)
    x = torch.tensor([[9.0, -8.0], [7.0, 9.0], [-9.0, -7.0]])
    weight = torch.tensor([[1.0, 0.5], [2.0, -1.0], [3.0, 1.0]])
    (quantizer(x) * weight).sum().backward()
    assert quantizer.step.grad is not None
    for channel in range(3):
        ends = []
        for shift in (-1e-2, 1e-2):
            with torch.no_grad():
                quantizer.step[channel] += shift
                ends.append(float((quantizer(x) * weight).sum()))
                quantizer.step[channel] -= shift
        slope = (ends[1] - ends[0]) / 2e-2
        assert float(quantizer.step.grad[channel]) == pytest.approx(slope, rel=1e-3)


def test_a_symmetric_zero_point_does_not_learn() -> None:
    quantizer = Quantizer(encoding_for(SPECS[2]))
    assert not quantizer.zero_point.requires_grad
    assert Quantizer(encoding_for(SPECS[0])).zero_point.requires_grad


def test_a_scale_of_its_own_cannot_vanish() -> None:
    encoding = encoding_for(SPECS[0])
    quantizer = Quantizer(encoding, relative=False)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    assert 0.0 < float(quantizer.encoding().scale) < float(encoding.scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_rounding_starts_at_its_codes_and_drifts_to_others(bits: int) -> None:
    spec = QuantSpec(bits, signed=True, symmetric=True, granularity=PerChannel(1))
    real = normal(5, 6)
    peak = np.abs(real).max(axis=0)
    encoding = Encoding.from_range(spec, -peak, peak)
    codes = encoding.quantize(real)
    learned = LearnedRounding(encoding, codes, real)
    assert np.array_equal(learned().detach().numpy(), encoding.dequantize(codes))
    found, same = learned.codes()
    assert found.same_as(encoding)
    assert np.array_equal(same, codes)
    assert same.dtype == codes.dtype
    target = torch.from_numpy(encoding.dequantize(codes))
    inwards = -1.0 if codes[0, 0] > 0 else 1.0
    target[0, 0] += 3.2 * inwards * float(encoding.scale[0])
    optimizer = torch.optim.Adam([learned.latent], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (learned() - target).square().sum().backward()
        optimizer.step()
        learned.clamp()
    moved = learned.codes()[1].astype(np.int8) - codes.astype(np.int8)
    assert abs(int(moved[0, 0])) == 3
    assert np.count_nonzero(moved) == 1


def test_a_latent_stays_within_reach_of_the_range() -> None:
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=PerChannel(0))
    encoding = Encoding.from_range(spec, -np.ones(2), np.ones(2))
    learned = LearnedRounding(encoding, encoding.quantize(normal(2, 4)), normal(2, 4))
    with torch.no_grad():
        learned.latent.fill_(30.0)
    learned.clamp()
    assert float(learned.latent.detach().max()) == spec.q_max + 0.5
    assert learned.codes()[1].astype(np.int8).max() == spec.q_max


def test_blocks_learn_their_channels_scales() -> None:
    encoding = Encoding(
        QuantSpec(4, True, True, PerBlock(0, 2)),
        np.array([0.1, 0.2, 0.3], np.float32),
        np.zeros(3, np.int32),
        np.array([[15, 3, 1], [4, 5, 6]], np.uint8),
    )
    real = normal(4, 3, seed=2)
    codes = encoding.quantize(real)
    learned = LearnedRounding(encoding, codes, real)
    np.testing.assert_allclose(learned().detach().numpy(), encoding.dequantize(codes), rtol=1e-6)
    found = fake_quantized(torch.from_numpy(real), encoding).numpy()
    np.testing.assert_allclose(found, encoding.dequantize(codes), rtol=1e-6)
    with torch.no_grad():
        learned.step.add_(0.1)
    learned().sum().backward()
    assert learned.step.grad is not None
    assert learned.step.grad.shape == (3,)
    moved, same = learned.codes()
    assert np.array_equal(same.astype(np.int8), codes.astype(np.int8))
    np.testing.assert_allclose(moved.scale, encoding.scale * np.exp(0.1), rtol=1e-6)
    assert np.array_equal(np.asarray(moved.block_scales), np.asarray(encoding.block_scales))
