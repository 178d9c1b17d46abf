"""fuse-normalization: a norm spelt out in small operators becomes one operator again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.pattern import OrValue

from qnpu.compiler.graph_edit import constant_array, static_shape
from qnpu.compiler.pass_base import Compilation, Pass, Stage


@dataclass(frozen=True)
class FuseNormalization(Pass):
    """Recomposes RMSNormalization and LayerNormalization over the last axis.

    Before → after::

        Mul(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε)))), γ)  → RMSNormalization(x, γ)
        Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2)), ε))), γ), β),
            d = Sub(x, ReduceMean(x))                                    → LayerNormalization(…)

    y = x / sqrt(mean(x²) + ε) · γ, x of shape (…, H), γ of shape (H,) or absent (then ones).

    Why: the squares of massive activations reach 6e8; as a tensor of their own at 16 bits one LSB
    is 9,300 and every normal token becomes zero (quantnpu.md §5).

    Must not fire on a mean over another axis, without keepdims, or with ε that is no scalar.
    """

    name: ClassVar[str] = "fuse-normalization"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        count = 0
        # The widest pattern first: a layer norm holds an RMS norm of x - mean(x).
        for rule in (_LayerNorm(), _RmsNormWithGain(), _RmsNorm()):
            rules = RewriteRuleSet([rule.rule()], commute=True)  # type: ignore[no-untyped-call]
            count += rules.apply_to_model(compilation.model)
        if count:
            common.RemoveUnusedNodesPass()(compilation.model)
        return count


def _mean_square(op: Any, x: Any, axes: Any) -> Any:
    square = OrValue([op.Pow(x, 2.0), op.Mul(x, x)])
    return op.ReduceMean(square, axes, _allow_other_attributes=True, _outputs=["mean_square"])


def _normalize(op: Any, x: Any, rms: Any) -> Any:
    inverse = OrValue([op.Reciprocal(rms), op.Div(1.0, rms)])
    return OrValue([op.Mul(x, inverse), op.Div(x, rms)])


class _RmsNorm(RewriteRuleClassBase):
    """x / sqrt(mean(x²) + ε); the gain, if any, is matched by the subclass first."""

    def pattern(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        inverse = op.Reciprocal(op.Sqrt(op.Add(_mean_square(op, x, axes), epsilon)))
        return op.Mul(x, inverse)

    def check(  # type: ignore[override]
        self, context: Any, x: ir.Value, axes: ir.Value, epsilon: ir.Value, **rest: Any
    ) -> MatchResult:
        result = _check_reduction(x, axes, rest["mean_square"])
        epsilon_array = constant_array(epsilon)
        if epsilon_array is None or epsilon_array.size != 1:
            return result.fail("epsilon is not a constant scalar", epsilon)
        gain = rest.get("gain")
        if gain is not None and not _is_row(gain, x):
            return result.fail("gain is not one number per feature", gain)
        return result

    def rewrite(self, op: Any, x: ir.Value, epsilon: ir.Value, **rest: Any) -> Any:
        gain = rest.get("gain")
        if gain is None:
            gain = op.initializer(
                ir.tensor(np.ones(_features(x), np.float32), name=f"{x.name}_unit_gain")
            )
        return op.RMSNormalization(x, gain, axis=-1, epsilon=_scalar(epsilon))


class _RmsNormWithGain(_RmsNorm):
    def pattern(self, op: Any, x: Any, axes: Any, epsilon: Any, gain: Any) -> Any:  # type: ignore[override]
        rms = op.Sqrt(op.Add(_mean_square(op, x, axes), epsilon))
        return op.Mul(_normalize(op, x, rms), gain)


class _LayerNorm(RewriteRuleClassBase):
    def pattern(
        self, op: Any, x: Any, axes: Any, mean_axes: Any, epsilon: Any, gain: Any, bias: Any
    ) -> Any:
        mean = op.ReduceMean(x, mean_axes, _allow_other_attributes=True, _outputs=["mean"])
        centred = op.Sub(x, mean)
        deviation = op.Sqrt(op.Add(_mean_square(op, centred, axes), epsilon))
        return op.Add(op.Mul(_normalize(op, centred, deviation), gain), bias)

    def check(  # type: ignore[override]
        self,
        context: Any,
        x: ir.Value,
        axes: ir.Value,
        mean_axes: ir.Value,
        epsilon: ir.Value,
        **rest: Any,
    ) -> MatchResult:
        result = _check_reduction(x, axes, rest["mean_square"])
        if not result:
            return result
        result = _check_reduction(x, mean_axes, rest["mean"])
        epsilon_array = constant_array(epsilon)
        if epsilon_array is None or epsilon_array.size != 1:
            return result.fail("epsilon is not a constant scalar", epsilon)
        for row in (rest["gain"], rest["bias"]):
            if not _is_row(row, x):
                return result.fail("gain or bias is not one number per feature", row)
        return result

    def rewrite(
        self, op: Any, x: ir.Value, epsilon: ir.Value, gain: ir.Value, bias: ir.Value, **_: Any
    ) -> Any:
        return op.LayerNormalization(x, gain, bias, axis=-1, epsilon=_scalar(epsilon))


def _check_reduction(x: ir.Value, axes: ir.Value, mean: ir.Value) -> MatchResult:
    """The mean is over the last axis alone and keeps it."""
    result = MatchResult()
    array = constant_array(axes)
    rank = len(x.shape) if x.shape is not None else None
    if array is None or array.size != 1 or rank is None:
        return result.fail("axes are not one constant, or rank is unknown", axes)
    axis = int(array.reshape(()))
    if axis not in (-1, rank - 1):
        return result.fail("mean is not over the last axis", axes)
    node = mean.producer()
    if node is None or node.attributes.get_int("keepdims", 1) != 1:
        return result.fail("mean does not keep its axis", mean)
    return result


def _is_row(value: ir.Value, x: ir.Value) -> bool:
    return value.is_initializer() and static_shape(value) == (_features(x),)


def _features(x: ir.Value) -> int:
    shape = static_shape(x)
    return shape[-1] if shape else 0


def _scalar(value: ir.Value) -> float:
    array = constant_array(value)
    return float(array.reshape(())) if array is not None else 0.0
