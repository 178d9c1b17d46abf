"""Rounding to nearest codes, with the scale of each channel that its outputs suffer least from.

Sequential MSE (SeqMSE), as AIMET names it: of clipped ranges the one is taken with the least
e = (W - s·q)·H·(W - s·q)ᵀ, where H = Σ xᵀx over inputs as the model quantized so far gives them.
Codes stay the nearest ones, so that nothing of one feature is passed on to others, as GPTQ does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnpu.compiler.gptq import (
    CodeRange,
    RoundedWeight,
    quadratic_error,
    steps_of,
    widest_scale,
)

_PARTS = torch.arange(1.0, 0.4, -0.03)
"""Of the greatest weight that a channel's codes may be made to reach."""


def clip_weight(
    weight: Tensor, moment: Tensor, codes: CodeRange, multiples: Tensor | None = None
) -> RoundedWeight:
    """Rounds a weight to the nearest codes under the best of several scales per channel.

    Args:
        weight: float32, shape (channels, features).
        moment: H, shape (features, features), any positive multiple of it.
        codes: range.
        multiples: of blocks, what a channel's scale is times at each element, shape (channels,
            features).
    """
    hessian = (moment / moment.diagonal().mean().clamp(min=1e-30)).to(torch.float32)
    widest = widest_scale(weight if multiples is None else weight / multiples, codes)
    scale, least = widest, torch.full_like(widest, torch.inf)
    for part in _PARTS:
        tried = widest * part
        steps = steps_of(tried, multiples)
        error = quadratic_error(weight - codes.round(weight / steps).mul_(steps), hessian)
        scale = torch.where(error < least, tried, scale)
        least = torch.minimum(error, least)
    return RoundedWeight(codes.round(weight / steps_of(scale, multiples)), scale, least, multiples)
