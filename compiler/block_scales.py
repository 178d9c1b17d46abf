"""Scales of blocks as small whole numbers times a scale per channel (LPBQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.quant_types import BLOCK_SCALE_MAX, Encoding, FloatArray, PerBlock, QuantSpec


@dataclass(frozen=True, slots=True, eq=False)
class WholeScales:
    """Blocks of a matrix with their codes, real = code · multiple · scale.

    Attributes:
        multiples: uint8, 1 up to the highest, shape (blocks, channels).
        scale: float32, shape (channels,): real units per LSB of a multiple of 1.
        codes: whole numbers, shape (blocks, size, channels).
        error: squared error of each block, shape (blocks, channels).
    """

    multiples: NDArray[np.uint8]
    scale: NDArray[np.float32]
    codes: NDArray[Any]
    error: NDArray[Any]


def whole_scales(
    real: NDArray[Any],
    scales: NDArray[np.float32],
    low: int,
    high: int,
    top: int = BLOCK_SCALE_MAX,
    importance: NDArray[Any] | None = None,
) -> WholeScales:
    """Rounds block scales to whole numbers over one float scale per channel.

    S[n] = max_b s[b, n] / top. A block's multiple is s / S rounded up or down, whichever gives the
    smaller squared error once its codes are rounded. A block of zeros has no say, and gets 1.

    Args:
        real: shape (blocks, size, channels).
        scales: real units per LSB that each block would have, shape (blocks, channels).
        low, high: codes there are, zero point taken off.
        top: highest multiple.
        importance: what the square of an element counts by its feature, shape (blocks, size).
    """
    wanted = np.where(real.any(axis=1), scales, np.float32(0))
    unit = (wanted.max(axis=0) / np.float32(top)).astype(np.float32)
    unit = np.where(unit < np.finfo(np.float32).tiny, np.float32(1), unit)
    ratio = wanted / unit
    weights = 1 if importance is None else importance[:, :, None]
    found = [_rounded(real, np.clip(r, 1, top), unit, low, high, weights) for r in _ends(ratio)]
    (down, down_codes, down_error), (up, up_codes, up_error) = found
    better = up_error < down_error
    return WholeScales(
        np.where(better, up, down).astype(np.uint8),
        unit,
        np.where(better[:, None], up_codes, down_codes),
        np.minimum(up_error, down_error),
    )


def _ends(ratio: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.floor(ratio), np.ceil(ratio)


def _rounded(
    real: NDArray[Any],
    steps: NDArray[Any],
    unit: NDArray[np.float32],
    low: int,
    high: int,
    weights: NDArray[Any] | int,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Block scales, codes at them, and the squared error of each block."""
    scale = (steps * unit)[:, None].astype(real.dtype)
    codes = np.clip(np.rint(real / scale), low, high)
    return steps, codes, (np.square(codes * scale - real) * weights).sum(axis=1)


def encode_blocks(real: FloatArray, spec: QuantSpec, scales: NDArray[np.float32]) -> Encoding:
    """The encoding of a matrix in blocks, for nearest codes.

    Args:
        real: the matrix.
        spec: per block, symmetric.
        scales: that each block would have, real units per LSB; as the matrix, with one for each
            block along the blocks' axis.

    Raises:
        ValueError: the spec is not per block, or blocks do not divide the matrix.
    """
    granularity = spec.granularity
    if not isinstance(granularity, PerBlock) or not spec.symmetric:
        raise ValueError(f"{spec} has no symmetric blocks")
    if real.shape[granularity.axis] % granularity.size:
        raise ValueError(f"blocks of {granularity.size} do not divide {real.shape}")
    axis = granularity.axis
    blocks = np.moveaxis(real, axis, 0).reshape(-1, granularity.size, real.shape[1 - axis])
    whole = whole_scales(blocks, np.moveaxis(scales, axis, 0), spec.q_min, spec.q_max)
    multiples = np.ascontiguousarray(np.moveaxis(whole.multiples, 0, axis))
    return Encoding(spec, whole.scale, np.zeros(len(whole.scale), np.int32), multiples)
