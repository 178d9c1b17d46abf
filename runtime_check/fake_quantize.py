"""Quantizers in torch whose scales, zero points and inputs can be learned (LSQ)."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.quant_types import Encoding, PerTensor, QuantSpec, widened
from qnpu.runtime_check.processes import whole

# A learned scale keeps this part of its first value at least: none may vanish or turn negative.
_LEAST_FACTOR = 0.05


class FakeQuantize(torch.autograd.Function):
    """x̂ = s · (clamp(round(x / s) + z, q_min, q_max) - z), straight through where it is not smooth.

    Gradients (quantnpu.md §3; LSQ, LSQ+), summed over what shares a scale::

        ∂x̂/∂x = 1 inside the range, 0 outside
        ∂x̂/∂s = round(x / s) - x / s inside; q_min - z or q_max - z outside
        ∂x̂/∂z = 0 inside, -s outside

    With ``local`` the gradients of scale and zero point are those of local · mean (x̂ - x)² besides,
    x held fixed: the local loss of quantnpu.md §3, without a term of its own to carry about.

    Computed in float32, whatever the type of x: a narrower one cannot tell the codes apart.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        q_min: int,
        q_max: int,
        local: float = 0.0,
    ) -> Tensor:
        """``scale`` and ``zero_point`` broadcast to ``x``; ``zero_point`` holds whole numbers."""
        nearest = torch.div(x.float(), scale).round_()
        low, high = q_min - zero_point, q_max - zero_point
        if any(ctx.needs_input_grad[1:3]):
            ctx.save_for_backward(x, scale, zero_point)
            ctx.range = (q_min, q_max)
            ctx.local = local
            codes = nearest.clamp_(low, high)
        elif ctx.needs_input_grad[0]:
            codes = nearest.clamp(low, high)
            ctx.save_for_backward(codes == nearest)
        else:
            codes = nearest.clamp_(low, high)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not any(ctx.needs_input_grad[1:3]):
            return grad * ctx.saved_tensors[0], None, None, None, None, None
        x, scale, zero_point = ctx.saved_tensors
        x = x.float()
        q_min, q_max = ctx.range
        ratio = x / scale
        nearest = ratio.round()
        clipped = nearest.clamp(q_min - zero_point, q_max - zero_point)
        inside = clipped == nearest
        for_x = grad * inside if ctx.needs_input_grad[0] else None
        grad = grad.float()
        for_scale = for_zero = None
        if ctx.local:
            grad = (clipped * scale).sub_(x).mul_(2.0 * ctx.local / x.numel()).add_(grad)
        if ctx.needs_input_grad[1]:
            slope = clipped.sub_(ratio.mul_(inside))
            for_scale = _sum_to(slope.mul_(grad), scale)
        if ctx.needs_input_grad[2]:
            for_zero = _sum_to(grad.mul(~inside), zero_point) * -scale
        return for_x, for_scale, for_zero, None, None, None


def _sum_to(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient.sum_to_size(parameter.shape) if parameter.dim() else gradient.sum()


def fake_quantized(x: Tensor, encoding: Encoding) -> Tensor:
    """x̂ of a tensor under a fixed encoding; the gradient passes within the range."""
    scale = torch.from_numpy(np.array(encoding.scale)).to(x.device)
    zero = torch.from_numpy(encoding.zero_point.astype(np.float32)).to(x.device)
    scale, zero = (_broadcast_to(x, part, encoding.spec) for part in (scale, zero))
    multiples = _multiples(encoding)
    scale = scale if multiples is None else scale * multiples.to(x.device)
    low, high = encoding.spec.q_min, encoding.spec.q_max
    return _applied(FakeQuantize, x, scale, zero, low, high)


def _applied(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _broadcast_to(x: Tensor, parameter: Tensor, spec: QuantSpec) -> Tensor:
    """Of blocks as if there were none; see ``_multiples``."""
    granularity = spec.granularity
    if isinstance(granularity, PerTensor):
        return parameter
    shape = [1] * x.dim()
    shape[granularity.channel_axis] = -1
    return parameter.reshape(shape)


def _multiples(encoding: Encoding) -> Tensor | None:
    """What the scale is times at each element, uint8; None where there are no blocks."""
    found = encoding.multiples()
    return None if found is None else torch.from_numpy(found)


class _ScaleGradient(torch.autograd.Function):
    """The same number; its gradient times a constant factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


class _RoundThrough(torch.autograd.Function):
    """Nearest whole number, within limits; the gradient passes as if nothing was done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: int, high: int) -> Tensor:
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class Quantizer(torch.nn.Module):
    """A learnable encoding of one tensor.

    Args:
        encoding: to start from.
        relative: learn the logarithm of the scale, so that a step changes it by a part of itself;
            else the scale itself, with its and the zero point's gradients times
            g = 1/√(N·Q_max), N elements per scale (LSQ, quantnpu.md §3).

    Attributes:
        spec: bit width and kind.
        local: weight of the local loss; see ``FakeQuantize``.
        step: parameter, shape () or (channels,): log(scale / first scale), or the scale.
        zero_point: parameter, LSB, same shape; learns only where the spec is asymmetric.
    """

    _first: Tensor

    def __init__(self, encoding: Encoding, *, relative: bool = True) -> None:
        super().__init__()
        self.spec: QuantSpec = encoding.spec
        self.local = 0.0
        first = torch.from_numpy(np.array(encoding.scale))
        zero = torch.from_numpy(np.array(encoding.zero_point, np.float32))
        self.register_buffer("_first", first)
        self.step = torch.nn.Parameter(torch.zeros_like(first) if relative else first.clone())
        self.zero_point = torch.nn.Parameter(zero, requires_grad=not encoding.spec.symmetric)
        self._relative = relative

    @property
    def scale(self) -> Tensor:
        """Real units per LSB, shape () or (channels,)."""
        if self._relative:
            return self._first * torch.exp(self.step)
        return torch.maximum(self.step, self._first * _LEAST_FACTOR)

    def forward(self, x: Tensor) -> Tensor:
        """x̂ of a tensor, in its own type."""
        low, high = self.spec.q_min, self.spec.q_max
        scale = self.scale
        zero = _applied(_RoundThrough, self.zero_point, low, high)
        if not self._relative:
            factor = 1.0 / sqrt(x.numel() / max(scale.numel(), 1) * high)
            scale = _applied(_ScaleGradient, scale, factor)
            zero = _applied(_ScaleGradient, zero, factor)
        scale, zero = (_broadcast_to(x, part, self.spec) for part in (scale, zero))
        return _applied(FakeQuantize, x, scale, zero, low, high, self.local)

    def encoding(self) -> Encoding:
        """The encoding as it stands."""
        zero = whole(self.zero_point).round().clamp(self.spec.q_min, self.spec.q_max)
        scale = whole(self.scale).numpy()
        return Encoding(self.spec, np.array(scale), np.array(zero.numpy(), np.int32))


class LearnedRounding(torch.nn.Module):
    """A weight whose codes move: ŵ = s · clamp(round(v), q_min, q_max), v in LSB.

    The gradient passes the rounding, so that v drifts until a code flips. Starts within the
    interval that rounds to the given code, as near to w / s as that allows: a weight that might as
    well have been rounded the other way flips early. s is learned by its logarithm, and a step of
    it leaves the codes alone.

    Scales of blocks stay the multiples of their channel's scale that they are.

    Args:
        encoding: symmetric, per channel or per block.
        codes: to start from.
        real: w.
        margin: how far from flipping each latent starts at least, LSB: wider where gradients are
            noisy.

    Attributes:
        spec: bit width and kind.
        latent: parameter v, shape of the weight.
        step: parameter, log(scale / first scale), shape (channels,).
    """

    _first: Tensor
    _times: Tensor | None

    def __init__(
        self, encoding: Encoding, codes: NDArray[Any], real: NDArray[Any], margin: float = 0.01
    ) -> None:
        super().__init__()
        self.spec: QuantSpec = encoding.spec
        self.register_buffer("_first", torch.from_numpy(np.array(encoding.scale)))
        self.register_buffer("_times", _multiples(encoding))
        self._encoding = encoding
        middle = torch.from_numpy(widened(codes).astype(np.float32))
        ratio = torch.from_numpy(real.astype(np.float32))
        ratio = ratio / self._steps(_broadcast_to(ratio, self._first, self.spec))
        within = 0.5 - margin
        self.latent = torch.nn.Parameter(ratio.clamp(middle - within, middle + within))
        self.step = torch.nn.Parameter(torch.zeros(encoding.scale.shape))

    def forward(self) -> Tensor:
        """ŵ, float32."""
        scale = self._steps(
            _broadcast_to(self.latent, self._first * torch.exp(self.step), self.spec)
        )
        codes = _applied(_RoundThrough, self.latent, self.spec.q_min, self.spec.q_max)
        return codes * scale

    def _steps(self, scale: Tensor) -> Tensor:
        """Real units per LSB at each element, from those of channels."""
        return scale if self._times is None else scale * self._times

    def clamp(self) -> None:
        """Keeps v within half an LSB of the range: further out it could only come back late."""
        with torch.no_grad():
            self.latent.clamp_(self.spec.q_min - 0.5, self.spec.q_max + 0.5)

    def codes(self) -> tuple[Encoding, NDArray[Any]]:
        """Encoding and codes as they stand."""
        scale = (whole(self._first) * torch.exp(whole(self.step))).numpy()
        low, high = self.spec.q_min, self.spec.q_max
        nearest = whole(self.latent).round().clamp_(low, high).to(torch.int8).numpy()
        return replace(self._encoding, scale=np.array(scale)), nearest.astype(self.spec.code_dtype)
