"""What a quantized tensor is: bit width, signedness, granularity, scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index along ``axis`` (never negative)."""

    axis: int

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return self.axis

    def __str__(self) -> str:
        return f"per-channel(axis={self.axis})"


@dataclass(frozen=True, slots=True)
class PerBlock:
    """Of a matrix: one scale for each ``size`` indices along ``axis``, channel by channel.

    The channels lie along the other axis. A block's scale is a small whole number times its
    channel's scale (LPBQ, low-power blockwise quantization).
    """

    axis: int
    size: int

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return 1 - self.axis

    def __str__(self) -> str:
        return f"per-block(axis={self.axis}, size={self.size})"


Granularity = PerTensor | PerChannel | PerBlock

BLOCK_SCALE_MAX = 15
"""Highest whole number of a block's scale: 4 bits, so that codes of 4 bits times it fit 8."""


_DTYPES = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (16, True): ir.DataType.INT16,
    (16, False): ir.DataType.UINT16,
    (32, True): ir.DataType.INT32,
}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """What the bit plan asks of a tensor; no numbers yet.

    Attributes:
        bits: 4, 8, 16, or 32 for biases.
        signed: codes are two's complement.
        symmetric: zero sits at the middle code. Signed symmetric codes leave out the lowest one
            (-128), so that a negated tensor fits its own encoding.
        granularity: per tensor, per channel or per block.
    """

    bits: int
    signed: bool
    symmetric: bool
    granularity: Granularity = PerTensor()

    def __post_init__(self) -> None:
        if (self.bits, self.signed) not in _DTYPES:
            kind = "signed" if self.signed else "unsigned"
            raise ValueError(f"no ONNX type for {self.bits}-bit {kind} codes")

    @property
    def dtype(self) -> ir.DataType:
        """ONNX element type of the codes."""
        return _DTYPES[self.bits, self.signed]

    @property
    def code_dtype(self) -> np.dtype[np.generic]:
        """NumPy type of the codes; ml_dtypes' int4 for 4 bits."""
        return np.dtype(self.dtype.numpy())

    @property
    def q_min(self) -> int:
        """Lowest code in use, LSB."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.symmetric)

    @property
    def q_max(self) -> int:
        """Highest code, LSB."""
        return (1 << (self.bits - int(self.signed))) - 1

    def __str__(self) -> str:
        kind = "s" if self.signed else "u"
        shape = "symmetric" if self.symmetric else "asymmetric"
        return f"{kind}{self.bits} {shape} {self.granularity}"


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """``real = scale * (q - zero_point)``; of blocks ``scale * block_scale * (q - zero_point)``.

    Attributes:
        spec: bit width and kind.
        scale: real units per LSB, of blocks per LSB of a block scale of 1, float32, shape ``()``
            per tensor or ``(channels,)``.
        zero_point: LSB, int32, same shape.
        block_scales: of blocks, uint8, at least 1; as the matrix, with one for each block along
            the blocks' axis. None for any other granularity.
    """

    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    block_scales: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            raise ValueError("scale and zero point differ in shape")
        if isinstance(self.spec.granularity, PerBlock) != (self.block_scales is not None):
            raise ValueError("block scales go with blocks")
        if self.block_scales is not None and self.block_scales.min(initial=1) < 1:
            raise ValueError("a block scale is at least 1")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("scale must be finite and positive")

    @property
    def reach(self) -> int:
        """Greatest distance of a code in use from its zero point, LSB."""
        zero = self.zero_point
        return int(np.maximum(self.spec.q_max - zero, zero - self.spec.q_min).max())

    @classmethod
    def from_range(
        cls, spec: QuantSpec, low: float | FloatArray, high: float | FloatArray
    ) -> Encoding:
        """The encoding whose codes span ``[low, high]``, widened to hold zero.

        Symmetric (quantnpu §Setting): s = max(|low|, |high|) / (2^(b-1) - 1), z at the middle.
        Asymmetric (Max-Min, §2): s = (high - low) / (q_max - q_min), z = round(q_min - low / s).
        An empty range gets s = 1.

        Args:
            spec: what to encode to; not per block (see ``qnpu.compiler.block_scales``).
            low: real, shape ``()`` or ``(channels,)``.
            high: as ``low``.
        """
        low64 = np.minimum(np.asarray(low, np.float64), 0.0)
        high64 = np.maximum(np.asarray(high, np.float64), 0.0)
        if spec.symmetric:
            span = np.maximum(-low64, high64)
            steps = 2 ** (spec.bits - 1) - 1
        else:
            span = high64 - low64
            steps = spec.q_max - spec.q_min
        scale = _positive_float32(span / steps)
        if spec.symmetric:
            zero = np.full(scale.shape, 0 if spec.signed else 2 ** (spec.bits - 1))
        else:
            zero = np.clip(np.rint(spec.q_min - low64 / scale), spec.q_min, spec.q_max)
        return cls(spec, scale, np.asarray(zero).astype(np.int32))  # 0-d stays an array

    @property
    def low(self) -> NDArray[np.float64]:
        """Lowest real value the codes reach, of blocks those of each channel's widest."""
        return self._widest * (self.spec.q_min - self.zero_point)

    @property
    def high(self) -> NDArray[np.float64]:
        """Highest real value the codes reach, of blocks those of each channel's widest."""
        return self._widest * (self.spec.q_max - self.zero_point)

    @property
    def _widest(self) -> NDArray[np.float64]:
        scale = self.scale.astype(np.float64)
        if self.block_scales is None or not isinstance(self.spec.granularity, PerBlock):
            return scale
        most: NDArray[np.uint8] = self.block_scales.max(axis=self.spec.granularity.axis)
        return scale * most

    @property
    def zero_point_codes(self) -> NDArray[np.generic]:
        """The zero point in the type of the codes, as QuantizeLinear takes it; one per block."""
        zero: NDArray[Any] = self.zero_point
        if self.block_scales is not None:
            zero = np.broadcast_to(self._channelwise(2)[1], self.block_scales.shape)
        narrow = zero.astype(np.int8) if self.spec.bits == 4 else zero
        return narrow.astype(self.spec.code_dtype)

    def same_as(self, other: Encoding) -> bool:
        """True where both give every real number the same code."""
        return (
            self.spec == other.spec
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and (
                self.block_scales is None
                or other.block_scales is None
                or np.array_equal(self.block_scales, other.block_scales)
            )
        )

    def multiples(self) -> NDArray[np.uint8] | None:
        """The block scale of each element of the matrix; None where there are no blocks."""
        if self.block_scales is None or not isinstance(self.spec.granularity, PerBlock):
            return None
        return np.repeat(self.block_scales, self.spec.granularity.size, self.spec.granularity.axis)

    def integers(self, codes: NDArray[np.generic]) -> NDArray[np.int64]:
        """What codes stand for in steps of ``scale``, LSB: q - z, of blocks times their scales."""
        _, zero = self._channelwise(codes.ndim)
        steps, whole = self.multiples(), widened(codes).astype(np.int64) - zero.astype(np.int64)
        return whole if steps is None else whole * steps

    def quantize(self, real: FloatArray) -> NDArray[np.generic]:
        """Codes of a real tensor, rounding half to even as ONNX QuantizeLinear does."""
        scale, zero = self._broadcast(real.ndim)
        # 2^31 - 1 is no float32: codes of biases are made, and clipped, in double precision.
        work = np.float64 if self.spec.bits == 32 else np.float32
        codes = np.asarray(np.divide(real, scale, dtype=work))
        np.rint(codes, out=codes)
        codes += zero
        np.clip(codes, self.spec.q_min, self.spec.q_max, out=codes)
        if self.spec.bits == 4:  # ml_dtypes converts from int8, not from float, without a detour
            return codes.astype(np.int8).astype(self.spec.code_dtype)
        return codes.astype(self.spec.code_dtype)

    def dequantize(self, codes: NDArray[np.generic]) -> NDArray[np.float32]:
        """Real values of codes, float32."""
        scale, zero = self._broadcast(codes.ndim)
        return ((widened(codes).astype(np.float32) - zero) * scale).astype(np.float32)

    def _broadcast(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scale, zero = self._channelwise(rank)
        multiples = self.multiples()
        return (scale if multiples is None else scale * multiples.astype(np.float32)), zero

    def _channelwise(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        zero, granularity = self.zero_point.astype(np.float32), self.spec.granularity
        if isinstance(granularity, PerTensor):
            return self.scale, zero
        shape = [1] * rank
        shape[granularity.channel_axis] = -1
        return self.scale.reshape(shape), zero.reshape(shape)


def widened(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes of fewer than eight bits, ml_dtypes' own types, as int8; others as they are."""
    return codes if codes.dtype.kind in "iu" else codes.astype(np.int8)


def _positive_float32(scale: FloatArray) -> NDArray[np.float32]:
    """Float32 scales; zero, or too small for a float32 reciprocal, becomes 1."""
    as_float32 = np.asarray(scale).astype(np.float32)
    return np.where(as_float32 < np.finfo(np.float32).tiny, np.float32(1.0), as_float32)
