"""Where ONNX Runtime's own operators on codes (com.microsoft) give exact codes.

They round half to even, as QuantizeLinear does, with float32 inside. A product of two codes is one
of at most 2^16 pairs, and a function of one code one of 256 numbers, so all of them are tried.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qnpu.compiler.quant_types import FloatArray
from qnpu.compiler.quantized_results import CodedInput, CodedResult

DOMAIN = "com.microsoft"
_ULPS = (0, 1, -1, 2, -2)  # of the ratio, which is tried next to the nearest float32 as well
_SIGMOID_ERROR = 2.0**-20  # real; ONNX Runtime's is within 2^-22


def product_ratio(one: CodedInput, other: CodedInput, result: CodedResult) -> np.float32 | None:
    """s_a·s_b/s_y as a float32 with which QLinearMul gives the codes of all pairs; None: no such.

    QLinearMul: y = clamp(⌊(a - z_a)·(b - z_b)·ratio⌉ + z), where the product of the codes is exact.
    Kernels add z before they round or after, with a rounding of its own or none (FMA): whatever one
    does, the codes must be right.
    """
    products = np.outer(one.numbers, other.numbers).astype(np.float64)
    exact = products * (one.scale * other.scale / result.scale)
    wanted = [_codes(np.floor(exact + 0.5), result), _codes(np.rint(exact), result)]
    nearest = np.float32(one.scale * other.scale / result.scale)
    for ulps in _ULPS:
        ratio = np.float32(nearest + np.float32(ulps) * np.spacing(nearest))
        ways = _ways_to_round(products, ratio, result.zero_point)
        found = [_codes(nearest, result) for nearest in ways]
        if all(((codes == wanted[0]) | (codes == wanted[1])).all() for codes in found):
            return ratio
    return None


def _ways_to_round(
    products: FloatArray, ratio: np.float32, zero_point: int
) -> Iterator[NDArray[np.float64]]:
    """Products times a ratio, rounded to whole numbers as kernels do it, less the zero point."""
    fused = products * np.float64(ratio)  # exact: 16 and 24 bits
    scaled = fused.astype(np.float32)
    yield np.rint(scaled).astype(np.float64)
    yield np.rint(scaled + np.float32(zero_point)).astype(np.float64) - zero_point
    yield np.rint((fused + zero_point).astype(np.float32)).astype(np.float64) - zero_point


def is_exact_sigmoid(operand: CodedInput, result: CodedResult) -> bool:
    """True where no sigmoid lies so close to halfway between two codes that QLinearSigmoid errs."""
    exact = sigmoid(operand.numbers * operand.scale)
    ends = [(exact + error) / result.scale for error in (-_SIGMOID_ERROR, _SIGMOID_ERROR)]
    return bool((_codes(np.rint(ends[0]), result) == _codes(np.rint(ends[1]), result)).all())


def sigmoid(numbers: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), of any numbers."""
    found: FloatArray = np.exp(-np.logaddexp(0.0, -numbers))
    return found


def _codes(nearest: FloatArray, result: CodedResult) -> NDArray[np.float64]:
    spec = result.encoding.spec
    codes: NDArray[np.float64] = np.clip(nearest + result.zero_point, spec.q_min, spec.q_max)
    return codes
