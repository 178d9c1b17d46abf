"""Rounding with error feedback: against nearest rounding, and against every other choice."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qnpu.compiler.gptq import (
    CodeRange,
    RoundedWeight,
    around,
    block_multiples,
    damped,
    likely_scales,
    quadratic_error,
    round_weight,
)

INT4 = CodeRange(-7, 7)


def correlated(features: int, seed: int = 0) -> Tensor:
    """H of inputs in which neighbouring features say nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    rows = torch.randn(8 * features, features, generator=generator) @ mix
    return (rows.T @ rows).to(torch.float64)


def weight(channels: int, features: int, seed: int = 1) -> Tensor:
    return torch.randn(channels, features, generator=torch.Generator().manual_seed(seed))


def nearest(real: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    return codes.round(real / scale[:, None])


def one_scale(real: Tensor) -> Tensor:
    return (real.abs().amax(dim=1) / INT4.high)[None]


def error_of(real: Tensor, rounded: RoundedWeight, moment: Tensor, damping: float) -> Tensor:
    return quadratic_error(real - rounded.real, damped(moment, damping).to(torch.float32))


def test_features_without_correlation_are_rounded_to_the_nearest() -> None:
    real = weight(6, 200)
    moment = torch.diag(torch.rand(200, dtype=torch.float64) + 0.1)
    rounded = round_weight(real, moment, one_scale(real), INT4)
    assert torch.equal(rounded.codes, nearest(real, rounded.scale, INT4))


@pytest.mark.parametrize("features", [8, 128, 200])
def test_error_is_far_below_that_of_nearest_codes(features: int) -> None:
    real, moment = weight(16, features), correlated(features)
    rounded = round_weight(real, moment, one_scale(real), INT4)
    plain = RoundedWeight(nearest(real, rounded.scale, INT4), rounded.scale, torch.zeros(16))
    ratio = error_of(real, rounded, moment, 0.01).sum() / error_of(real, plain, moment, 0.01).sum()
    assert ratio < 0.8
    assert not torch.equal(rounded.codes, plain.codes)


def test_feedback_alone_gives_the_codes_of_the_plain_algorithm() -> None:
    """Feature by feature over whole rows, in float64: no blocks, no sweeps."""
    real, moment, damping = weight(8, 100), correlated(100), 0.01
    hessian = damped(moment, damping)
    order = torch.argsort(hessian.diagonal(), descending=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = one_scale(real)[0].double()
    rest, codes = real[:, order].double(), torch.empty(8, 100, dtype=torch.float64)
    for feature in range(100):
        codes[:, feature] = INT4.round(rest[:, feature] / scale)
        error = (rest[:, feature] - codes[:, feature] * scale) / upper[feature, feature]
        rest[:, feature + 1 :] -= error[:, None] * upper[feature, feature + 1 :]
    found = round_weight(real, moment, one_scale(real), INT4, damping=damping, sweeps=0)
    same = (found.codes[:, order].double() == codes).double().mean()
    assert same > 0.99  # a tie may fall the other way in float32, and its row follow


def test_the_error_it_tells_is_the_error_there_is() -> None:
    real, moment = weight(16, 40), correlated(40)
    rounded = round_weight(real, moment, one_scale(real), INT4)
    assert torch.allclose(rounded.error, error_of(real, rounded, moment, 0.01), rtol=1e-3)


def test_codes_are_whole_and_within_their_range() -> None:
    real, moment = weight(8, 64) * 100, correlated(64)
    rounded = round_weight(real, moment, one_scale(real) / 3, INT4)
    assert torch.equal(rounded.codes, rounded.codes.round())
    assert rounded.codes.amin() == INT4.low
    assert rounded.codes.amax() == INT4.high


def test_no_single_code_could_be_better_after_enough_sweeps() -> None:
    real, moment = weight(4, 24), correlated(24)
    rounded = round_weight(real, moment, one_scale(real), INT4, sweeps=50)
    hessian = damped(moment, 0.01).to(torch.float32)
    for feature, step in itertools.product(range(24), (-1, 1)):
        moved = rounded.codes.clone()
        moved[:, feature] = torch.clamp(moved[:, feature] + step, INT4.low, INT4.high)
        error = quadratic_error(real - moved * rounded.scale[:, None], hessian)
        assert bool((error >= rounded.error * (1 - 1e-4)).all())


def test_finds_the_best_of_all_codes_of_a_small_weight() -> None:
    codes = CodeRange(-1, 1)
    real, moment = weight(12, 6), correlated(6)
    scale = real.abs().amax(dim=1)[None]
    rounded = round_weight(real, moment, scale, codes, damping=1e-3, sweeps=20)
    hessian = damped(moment, 1e-3).to(torch.float32)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    least = torch.stack(
        [quadratic_error(real[i] - every * rounded.scale[i], hessian).amin() for i in range(12)]
    )
    assert bool((rounded.error >= least * (1 - 1e-4)).all())
    assert (rounded.error <= least * 1.001).sum() >= 8  # local optima in the others


def test_of_several_scales_each_channel_takes_its_own_best() -> None:
    real, moment = weight(8, 64), correlated(64)
    real[0, 0] = 40.0  # an outlier that a smaller scale would clip
    candidates = one_scale(real) * torch.tensor([[1.0], [0.8], [0.6]])
    alone = [
        round_weight(real, moment, candidates[i : i + 1], INT4, sweeps=0).error for i in range(3)
    ]
    together = round_weight(real, moment, candidates, INT4, sweeps=0)
    assert torch.allclose(together.error, torch.stack(alone).amin(dim=0), rtol=1e-4)
    assert len(torch.unique((together.scale / candidates[0]).round(decimals=3))) > 1


def test_a_channel_of_zeros_and_a_feature_that_is_always_zero() -> None:
    real, moment = weight(4, 16), correlated(16)
    real[2] = 0.0
    moment[3] = 0.0
    moment[:, 3] = 0.0
    rounded = round_weight(real, moment, likely_scales(real, moment, INT4), INT4)
    assert bool((rounded.codes[2] == 0).all())
    assert bool(torch.isfinite(rounded.error).all())
    assert torch.equal(rounded.codes[:, 3], nearest(real, rounded.scale, INT4)[:, 3])


def test_scaling_the_moment_changes_nothing() -> None:
    real, moment = weight(8, 64), correlated(64)
    first = round_weight(real, moment, one_scale(real), INT4)
    second = round_weight(real, moment * 2.0**10, one_scale(real), INT4)
    assert torch.equal(first.codes, second.codes)


def test_likely_scales_clip_an_outlier_that_costs_little() -> None:
    real, moment = weight(3, 64), torch.eye(64, dtype=torch.float64)
    real[1, 0] = 6.0
    moment[0, 0] = 1e-6
    real[2] = 0.0
    scales = likely_scales(real, moment, INT4)
    assert scales.shape == (3, 3)
    full = one_scale(real)[0]
    assert scales[1, 1] < 0.6 * full[1]
    moment[0, 0] = 1e6
    assert likely_scales(real, moment, INT4)[1, 1] > 0.8 * full[1]
    assert bool((scales > 0).all())


def in_blocks(real: Tensor, moment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Multiples at each element and candidates of scales."""
    multiples, scale = block_multiples(real, moment, INT4, size)
    return multiples.repeat_interleave(size, dim=1), around(scale)


def test_blocks_of_one_multiple_are_plain_channels() -> None:
    real, moment = weight(8, 64), correlated(64)
    plain = round_weight(real, moment, one_scale(real), INT4)
    same = round_weight(real, moment, one_scale(real) / 4, INT4, multiples=torch.full((8, 64), 4.0))
    assert torch.equal(plain.codes, same.codes)
    assert torch.equal(plain.scale, same.scale * 4)


def test_blocks_lose_less_than_channels_where_features_differ_in_size() -> None:
    real = weight(16, 128) * torch.linspace(0.2, 2.0, 4).repeat_interleave(32)
    moment = correlated(128)
    multiples, scales = in_blocks(real, moment, 32)
    rounded = round_weight(real, moment, scales, INT4, multiples=multiples)
    plain = round_weight(real, moment, likely_scales(real, moment, INT4), INT4)
    assert rounded.error.sum() < 0.6 * plain.error.sum()
    assert rounded.multiples is multiples
    again = error_of(real, rounded, moment, 0.01)
    torch.testing.assert_close(again, rounded.error, rtol=1e-3, atol=1e-3)
    nearest_codes = INT4.round(real / (rounded.scale[:, None] * multiples))
    to_nearest = RoundedWeight(nearest_codes, rounded.scale, torch.zeros(16), multiples)
    assert again.sum() < 0.8 * error_of(real, to_nearest, moment, 0.01).sum()


def test_multiples_go_by_the_least_error_of_their_blocks() -> None:
    """Within a quarter of the error of the best of all multiples, where H is diagonal."""
    real = weight(8, 64) * torch.linspace(0.3, 1.0, 4).repeat_interleave(16)
    moment = torch.diag(torch.rand(64, dtype=torch.float64) + 0.1)
    multiples, scale = block_multiples(real, moment, INT4, 16)
    assert multiples.shape == (8, 4)
    assert int(multiples.min()) >= 1
    assert int(multiples.max()) == 15
    rows = real.reshape(8, 4, 16)
    importance = moment.diagonal().reshape(4, 16).float()

    def loss(whole: Tensor) -> Tensor:
        steps = (whole * scale[:, None])[..., None]
        return ((rows - INT4.round(rows / steps) * steps).square() * importance).sum(dim=-1)

    best = torch.stack([loss(torch.full((8, 4), float(m))) for m in range(1, 16)]).amin(dim=0)
    assert loss(multiples).sum() < 1.25 * best.sum()
