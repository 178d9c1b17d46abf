"""SeqMSE: nearest codes, and no other scale of the grid would serve the outputs better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnpu.compiler.gptq import CodeRange, quadratic_error, widest_scale
from qnpu.compiler.seqmse import clip_weight

INT4 = CodeRange(-7, 7)
INT8 = CodeRange(-127, 127)


def heavy(channels: int, features: int, seed: int = 1) -> Tensor:
    """Weights with a few large ones, which a clipped range gives up."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(channels, features, generator=generator)
    real[:, 0] *= 3.0
    return real


def moment(features: int, seed: int = 0) -> Tensor:
    rows = torch.randn(8 * features, features, generator=torch.Generator().manual_seed(seed))
    return (rows.T @ rows).to(torch.float64)


@pytest.mark.parametrize("codes", [INT4, INT8])
def test_codes_are_the_nearest(codes: CodeRange) -> None:
    real = heavy(6, 50)
    rounded = clip_weight(real, moment(50), codes)
    assert torch.equal(rounded.codes, codes.round(real / rounded.scale[:, None]))


def test_outputs_suffer_less_than_under_the_widest_scale() -> None:
    real, second = heavy(16, 64), moment(64)
    rounded = clip_weight(real, second, INT4)
    widest = widest_scale(real, INT4)[:, None]
    plain = quadratic_error(real - INT4.round(real / widest) * widest, second.float())
    found = quadratic_error(real - rounded.real, second.float())
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.9 * plain.sum()


def test_what_inputs_lean_on_is_not_clipped() -> None:
    """The same large weight: behind a feature that is hardly ever there, or one that dominates."""
    real, quiet, loud = heavy(8, 64), moment(64), moment(64)
    real[:, 0] = 12.0
    quiet[0], quiet[:, 0] = quiet[0] * 1e-3, quiet[:, 0] * 1e-3
    loud[0], loud[:, 0] = loud[0] * 1e3, loud[:, 0] * 1e3
    widest = widest_scale(real, INT4)
    assert (clip_weight(real, quiet, INT4).scale < 0.7 * widest).all()
    assert (clip_weight(real, loud, INT4).scale > 0.9 * widest).all()


def test_a_channel_of_zeros_and_inputs_of_zeros() -> None:
    real = heavy(3, 16)
    real[1] = 0.0
    for second in (moment(16), torch.zeros(16, 16, dtype=torch.float64)):
        rounded = clip_weight(real, second, INT4)
        assert torch.isfinite(rounded.real).all()
        assert (rounded.scale > 0).all()
        assert (rounded.codes[1] == 0).all()


def test_blocks_share_a_channels_scale() -> None:
    real, second = heavy(8, 64), moment(64)
    multiples = torch.tensor([5.0, 15.0, 9.0, 12.0]).repeat_interleave(16).expand(8, -1)
    rounded = clip_weight(real * multiples, second, INT4, multiples)
    steps = rounded.scale[:, None] * multiples
    assert torch.equal(rounded.codes, INT4.round(real * multiples / steps))
    torch.testing.assert_close(rounded.real, rounded.codes * steps)
    widest = widest_scale(real, INT4)
    assert (rounded.scale <= widest).all()
    assert (rounded.scale < 0.9 * widest).any()
