"""Rounding of a weight with error feedback (GPTQ), scale by scale and then code by code.

Of a linear y = x·Wᵀ, W of shape (channels, features), codes q with steps s make the error
e = (W - s·q)·H·(W - s·q)ᵀ per channel, where H = Σ xᵀx over the inputs that the quantized model
sees. Rounding to the nearest code ignores H; here the error of each feature is passed on to the
features that are correlated with it and not rounded yet (Frantar et al., GPTQ, algorithm 1), and
single codes are then moved as long as that makes e smaller (coordinate descent, as in QuantEase).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qnpu.compiler.block_scales import whole_scales

_BLOCK = 32
# Parts of the greatest weight that a channel's codes may be made to reach, for a first guess.
_GRID = torch.arange(1.0, 0.4, -0.04)
SCALES_AROUND = (0.94, 1.0, 1.06)
"""What is tried around that guess, parts of it."""
_STACKED_ROWS = 8192


@dataclass(frozen=True, slots=True)
class CodeRange:
    """Codes a weight may take.

    Attributes:
        low: least code, LSB.
        high: greatest code, LSB.
    """

    low: int
    high: int

    def round(self, numbers: Tensor) -> Tensor:
        """Nearest codes, half to even, as float."""
        return torch.clamp(torch.round(numbers), self.low, self.high)


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight as codes.

    Attributes:
        codes: float32, whole numbers, shape (channels, features).
        scale: real units per LSB, shape (channels,).
        error: e of each channel, shape (channels,).
        multiples: of blocks, float32, whole: what the scale is times at each element, shape
            (channels, features); None for one scale per channel.
    """

    codes: Tensor
    scale: Tensor
    error: Tensor
    multiples: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """What the codes stand for, shape (channels, features)."""
        return self.codes * steps_of(self.scale, self.multiples)


def steps_of(scale: Tensor, multiples: Tensor | None) -> Tensor:
    """Real units per LSB, shape (channels, 1), or (channels, features) where there are blocks."""
    return scale[:, None] if multiples is None else scale[:, None] * multiples


def damped(moment: Tensor, damping: float) -> Tensor:
    """H + λ·mean(diag H)·I, float64; a feature that is always zero gets a one.

    Args:
        moment: H, shape (features, features).
        damping: λ.
    """
    result = moment.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    diagonal += damping * (mean if mean > 0 else torch.ones_like(mean))
    diagonal[dead] = torch.clamp(diagonal[dead], min=1.0)
    return result


def widest_scale(weight: Tensor, codes: CodeRange) -> Tensor:
    """Each row's scale under which nothing is clipped, without the last axis; 1 for zeros."""
    peak = weight.abs().amax(dim=-1)
    return torch.where(peak > 0, peak / codes.high, torch.ones_like(peak))


def likely_scales(
    weight: Tensor,
    moment: Tensor,
    codes: CodeRange,
    parts: Sequence[float] = SCALES_AROUND,
) -> Tensor:
    """Candidates of each channel's scale, around the one that is best for nearest codes.

    That one has the least Σ H_kk·(w_k - s·q_k)² of a grid of clipped ranges (no correlation, which
    would cost a product with H for each).

    Args:
        weight: shape (channels, features).
        moment: H, shape (features, features).
        codes: range.
        parts: candidates as parts of it.

    Returns:
        Shape (candidates, channels), real units per LSB; of a channel of zeros around 1.
    """
    best = _best_clipped(weight, moment.diagonal().to(weight.dtype), codes)
    return around(best, parts)


def _best_clipped(weight: Tensor, importance: Tensor, codes: CodeRange) -> Tensor:
    """Scale of each row with the least Σ importance·(w - s·q)² over its last axis, of a grid.

    Args:
        weight: shape (channels, features), or (channels, blocks, size).
        importance: without channels.
        codes: range.
    """
    widest = widest_scale(weight, codes)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in _GRID:
        scale = widest * factor
        difference = weight - codes.round(weight / scale[..., None]) * scale[..., None]
        squares = difference.square_()
        if importance.dim() == 1:
            error = squares @ importance
        else:
            error = squares.mul_(importance).sum(dim=-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def block_multiples(
    weight: Tensor, moment: Tensor, codes: CodeRange, size: int
) -> tuple[Tensor, Tensor]:
    """Whole multiples of each channel's scale for blocks of features, and that scale.

    Each block's scale is the best for nearest codes as in ``likely_scales``, then rounded
    (``qnpu.compiler.block_scales``).

    Args:
        weight: shape (channels, features).
        moment: H, shape (features, features).
        codes: range.
        size: of a block; divides the features.

    Returns:
        Multiples, float32, shape (channels, blocks), and scales, shape (channels,).
    """
    blocks = weight.reshape(len(weight), -1, size)
    importance = moment.diagonal().to(weight.dtype).reshape(-1, size)
    scales = _best_clipped(blocks, importance, codes)
    whole = whole_scales(
        blocks.permute(1, 2, 0).numpy(),
        scales.T.numpy(),
        codes.low,
        codes.high,
        importance=importance.numpy(),
    )
    multiples = np.ascontiguousarray(whole.multiples.T).astype(np.float32)
    return torch.from_numpy(multiples), torch.from_numpy(whole.scale)


def around(scale: Tensor, parts: Sequence[float] = SCALES_AROUND) -> Tensor:
    """Candidates about each channel's scale, parts of it; shape (candidates, channels)."""
    return torch.tensor(parts)[:, None] * scale[None, :]


def round_weight(
    weight: Tensor,
    moment: Tensor,
    candidates: Tensor,
    codes: CodeRange,
    *,
    damping: float = 0.01,
    sweeps: int = 2,
    multiples: Tensor | None = None,
) -> RoundedWeight:
    """Rounds a weight so that e is small, with the best of several scales per channel.

    Args:
        weight: float32, shape (channels, features).
        moment: H, shape (features, features), any positive multiple of it.
        candidates: scales to choose from, shape (candidates, channels), real units per LSB.
        codes: range.
        damping: part of the mean of diag H that is added to it.
        sweeps: passes of coordinate descent over all codes afterwards.
        multiples: of blocks, what scales are times at each element, shape (channels, features).
    """
    hessian = damped(moment, damping)
    order = torch.argsort(hessian.diagonal(), descending=True)
    upper = _inverse_factor(hessian[order][:, order])
    ordered = hessian[order][:, order].to(torch.float32)
    ordered_weight = weight[:, order]
    ordered_multiples = None if multiples is None else multiples[:, order]
    best: RoundedWeight | None = None
    for scales in torch.split(candidates, max(1, _STACKED_ROWS // len(weight))):
        rows = ordered_weight.repeat(len(scales), 1)
        repeated = None if ordered_multiples is None else ordered_multiples.repeat(len(scales), 1)
        steps = steps_of(scales.reshape(-1), repeated)
        found = _feed_back(rows, upper, steps, codes)
        error = quadratic_error(rows - found * steps, ordered)
        shape = (len(scales), *weight.shape)
        pick = error.reshape(shape[:2]).argmin(dim=0)
        channel = torch.arange(len(weight))
        chosen = RoundedWeight(
            found.reshape(shape)[pick, channel],
            scales[pick, channel],
            error.reshape(shape[:2])[pick, channel],
            ordered_multiples,
        )
        best = chosen if best is None else _better(best, chosen)
    if best is None:
        raise ValueError("no scale was given")
    for _ in range(sweeps):
        best = _descend(ordered_weight, ordered, best, codes)
    back = torch.argsort(order)
    return RoundedWeight(best.codes[:, back].contiguous(), best.scale, best.error, multiples)


def quadratic_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """d·H·dᵀ of each row d.

    Args:
        difference: shape (channels, features).
        hessian: shape (features, features).
    """
    return (difference @ hessian * difference).sum(dim=1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = H⁻¹, float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(torch.float32)


def _feed_back(rows: Tensor, upper: Tensor, steps: Tensor, codes: CodeRange) -> Tensor:
    """Rounds feature by feature; the rest of each row makes up for the error so far."""
    rest, scales = rows.clone(), _by_feature(steps, rows.shape[1])
    result = torch.empty_like(rows)
    width = rows.shape[1]
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block = rest[:, start:stop].T.contiguous()  # (block, rows): a feature lies in one piece
        errors = torch.empty_like(block)
        for index in range(stop - start):
            feature = start + index
            scale = scales[feature]
            code = codes.round(block[index] / scale)
            errors[index] = (block[index] - code * scale) / upper[feature, feature]
            result[:, feature] = code
            block[index + 1 :] -= upper[feature, feature + 1 : stop, None] * errors[index]
        rest[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return result


def _by_feature(steps: Tensor, features: int) -> Tensor:
    """Steps of shape (rows, 1) or (rows, features), a feature's in one piece."""
    return steps.T.contiguous().expand(features, -1)


def _descend(
    weight: Tensor, hessian: Tensor, rounded: RoundedWeight, codes: CodeRange
) -> RoundedWeight:
    """Moves each code, feature by feature, to where e is least with all others held.

    With g = (w - s·q)·H the best real code of feature k is q_k + g_k / (s·H_kk).
    """
    result = rounded.codes.T.contiguous()
    scales = _by_feature(steps_of(rounded.scale, rounded.multiples), len(result))
    gradient = (hessian @ (weight - rounded.real).T).contiguous()  # (features, channels)
    width = len(result)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        moves = torch.empty_like(result[start:stop])
        for index in range(stop - start):
            feature = start + index
            scale = scales[feature]
            inside = hessian[feature, start:feature] @ moves[:index]
            step = (gradient[feature] - inside) / (scale * hessian[feature, feature])
            code = codes.round(result[feature] + step)
            moves[index] = (code - result[feature]) * scale
            result[feature] = code
        gradient -= hessian[:, start:stop] @ moves
    moved = replace(rounded, codes=result.T.contiguous())
    error = quadratic_error(weight - moved.real, hessian)
    return _better(rounded, replace(moved, error=error))


def _better(first: RoundedWeight, second: RoundedWeight) -> RoundedWeight:
    """Of each channel the one with the smaller error."""
    wins = second.error < first.error
    return RoundedWeight(
        torch.where(wins[:, None], second.codes, first.codes),
        torch.where(wins, second.scale, first.scale),
        torch.where(wins, second.error, first.error),
        first.multiples,
    )
