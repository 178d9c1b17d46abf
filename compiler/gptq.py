"""Rounding of a weight with error feedback (GPTQ), scale by scale and then code by code.

Of a linear y = x·Wᵀ, W of shape (channels, features), codes q with steps s make the error
e = (W - s·q)·H·(W - s·q)ᵀ per channel, where H = Σ xᵀx over the inputs that the quantized model
sees. Rounding to the nearest code ignores H; here the error of each feature is passed on to the
features that are correlated with it and not rounded yet (Frantar et al., GPTQ, algorithm 1), and
single codes are then moved as long as that makes e smaller (coordinate descent, as in QuantEase).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    codes: Tensor
    scale: Tensor
    error: Tensor

    @property
    def real(self) -> Tensor:
        """What the codes stand for, shape (channels, features)."""
        return self.codes * self.scale[:, None]


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
    """Each channel's scale under which nothing is clipped, shape (channels,); 1 for zeros."""
    peak = weight.abs().amax(dim=1)
    return torch.where(peak > 0, peak / codes.high, torch.ones_like(peak))


def likely_scales(
    weight: Tensor,
    moment: Tensor,
    codes: CodeRange,
    around: Sequence[float] = SCALES_AROUND,
) -> Tensor:
    """Candidates of each channel's scale, around the one that is best for nearest codes.

    That one has the least Σ H_kk·(w_k - s·q_k)² of a grid of clipped ranges (no correlation, which
    would cost a product with H for each).

    Args:
        weight: shape (channels, features).
        moment: H, shape (features, features).
        codes: range.
        around: candidates as parts of it.

    Returns:
        Shape (candidates, channels), real units per LSB; of a channel of zeros around 1.
    """
    diagonal = moment.diagonal().to(weight.dtype)
    widest = widest_scale(weight, codes)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in _GRID:
        scale = widest * factor
        difference = weight - codes.round(weight / scale[:, None]) * scale[:, None]
        error = difference.square() @ diagonal
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return torch.tensor(around)[:, None] * best[None, :]


def round_weight(
    weight: Tensor,
    moment: Tensor,
    candidates: Tensor,
    codes: CodeRange,
    *,
    damping: float = 0.01,
    sweeps: int = 2,
) -> RoundedWeight:
    """Rounds a weight so that e is small, with the best of several scales per channel.

    Args:
        weight: float32, shape (channels, features).
        moment: H, shape (features, features), any positive multiple of it.
        candidates: scales to choose from, shape (candidates, channels), real units per LSB.
        codes: range.
        damping: part of the mean of diag H that is added to it.
        sweeps: passes of coordinate descent over all codes afterwards.
    """
    hessian = damped(moment, damping)
    order = torch.argsort(hessian.diagonal(), descending=True)
    upper = _inverse_factor(hessian[order][:, order])
    ordered = hessian[order][:, order].to(torch.float32)
    best: RoundedWeight | None = None
    for scales in torch.split(candidates, max(1, _STACKED_ROWS // len(weight))):
        rows = weight[:, order].repeat(len(scales), 1)
        found = _feed_back(rows, upper, scales.reshape(-1), codes)
        error = quadratic_error(rows - found * scales.reshape(-1, 1), ordered)
        shape = (len(scales), *weight.shape)
        pick = error.reshape(shape[:2]).argmin(dim=0)
        channel = torch.arange(len(weight))
        chosen = RoundedWeight(
            found.reshape(shape)[pick, channel],
            scales[pick, channel],
            error.reshape(shape[:2])[pick, channel],
        )
        best = chosen if best is None else _better(best, chosen)
    if best is None:
        raise ValueError("no scale was given")
    for _ in range(sweeps):
        best = _descend(weight[:, order], ordered, best, codes)
    back = torch.argsort(order)
    return RoundedWeight(best.codes[:, back].contiguous(), best.scale, best.error)


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


def _feed_back(rows: Tensor, upper: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Rounds feature by feature; the rest of each row makes up for the error so far."""
    rest = rows.clone()
    result = torch.empty_like(rows)
    width = rows.shape[1]
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block = rest[:, start:stop].T.contiguous()  # (block, rows): a feature lies in one piece
        errors = torch.empty_like(block)
        for index in range(stop - start):
            feature = start + index
            code = codes.round(block[index] / scale)
            errors[index] = (block[index] - code * scale) / upper[feature, feature]
            result[:, feature] = code
            block[index + 1 :] -= upper[feature, feature + 1 : stop, None] * errors[index]
        rest[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return result


def _descend(
    weight: Tensor, hessian: Tensor, rounded: RoundedWeight, codes: CodeRange
) -> RoundedWeight:
    """Moves each code, feature by feature, to where e is least with all others held.

    With g = (w - s·q)·H the best real code of feature k is q_k + g_k / (s·H_kk).
    """
    scale, result = rounded.scale, rounded.codes.T.contiguous()
    gradient = (hessian @ (weight - rounded.real).T).contiguous()  # (features, channels)
    width = len(result)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        moves = torch.empty_like(result[start:stop])
        for index in range(stop - start):
            feature = start + index
            inside = hessian[feature, start:feature] @ moves[:index]
            step = (gradient[feature] - inside) / (scale * hessian[feature, feature])
            code = codes.round(result[feature] + step)
            moves[index] = (code - result[feature]) * scale
            result[feature] = code
        gradient -= hessian[:, start:stop] @ moves
    moved = result.T.contiguous()
    error = quadratic_error(weight - moved * scale[:, None], hessian)
    return _better(rounded, RoundedWeight(moved, scale, error))


def _better(first: RoundedWeight, second: RoundedWeight) -> RoundedWeight:
    """Of each channel the one with the smaller error."""
    wins = second.error < first.error
    return RoundedWeight(
        torch.where(wins[:, None], second.codes, first.codes),
        torch.where(wins, second.scale, first.scale),
        torch.where(wins, second.error, first.error),
    )
