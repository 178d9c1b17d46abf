"""ONNX operators in torch: arithmetic, reductions, shapes and layout.

Semantics are those of the ONNX operator specification (opset 13 on); every kernel is checked
against ONNX's own node test cases. ``torch_layers`` holds the operators that have weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from torch import Tensor

from qnpu.runtime_check.torch_operator import (
    Form,
    Kernel,
    Operator,
    Unsupported,
    in_float32,
    normalized,
    plain,
    torch_type,
)

Numbers = list[Any]
Scalar = float | Numbers
"""A number, or a list of one."""


# Arithmetic


def _div(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    if base.is_floating_point() and not exponent.is_floating_point():
        exponent = exponent.to(base.dtype)
    return torch.pow(base, exponent).to(base.dtype)


def _mod(form: Form) -> Kernel:
    return torch.fmod if form.flag("fmod") else torch.remainder


def _clip(form: Form) -> Kernel:
    def kernel(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        if low is not None:
            x = torch.maximum(x, low)
        return x if high is None else torch.minimum(x, high)

    return kernel


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return plain(lambda *xs: reduce(function, xs))


def _mean(*xs: Tensor) -> Tensor:
    return reduce(torch.add, xs) / len(xs)


def _gelu(form: Form) -> Kernel:
    approximate = form.text("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def _swish(form: Form) -> Kernel:
    alpha = form.number("alpha", 1.0)
    return F.silu if alpha == 1.0 else lambda x: x * torch.sigmoid(alpha * x)


def _leaky_relu(form: Form) -> Kernel:
    slope = form.number("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def _elu(form: Form) -> Kernel:
    alpha = form.number("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _hard_sigmoid(form: Form) -> Kernel:
    alpha, beta = form.number("alpha", 0.2), form.number("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _softmax(function: Callable[..., Tensor]) -> Operator:
    """torch sums in float32 whatever the type of its operand."""

    def build(form: Form) -> Kernel:
        axis = form.integer("axis", -1)
        return lambda x: function(x, dim=axis)

    return Operator(build)


def _cast(form: Form) -> Kernel:
    return _cast_to(form, ir.DataType(form.integer("to")))


def _cast_like(form: Form) -> Kernel:
    wanted = form.input_type(1)
    if wanted is None:
        raise Unsupported("an operand of unknown type")
    kernel = _cast_to(form, wanted)
    return lambda x, like: kernel(x)


def _cast_to(form: Form, wanted: ir.DataType) -> Kernel:
    form.only("saturate", 0, 1)  # says something of 8-bit floats alone
    carrier = torch_type(wanted, form.working)
    if wanted in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.UINT2, ir.DataType.UINT4):
        raise Unsupported(f"a cast to {wanted.name}")
    if wanted in (ir.DataType.UINT16, ir.DataType.UINT32):
        mask = 2**wanted.bitwidth - 1
        return lambda x: (x.to(torch.int64) & mask).to(carrier)
    return lambda x: x.to(carrier)


# Reductions


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def build(form: Form) -> Kernel:
        keep = form.flag("keepdims", True)
        idle = form.flag("noop_with_empty_axes")
        given = form.integers("axes")

        def kernel(x: Tensor, axes: Numbers | None = None) -> Tensor:
            chosen = given if axes is None else axes
            if not chosen and idle:
                return function(x, [], keep)
            return function(x, [normalized(a, x.ndim) for a in chosen or range(x.ndim)], keep)

        return kernel

    return Operator(build, parameters=(1,))


def _over(axes: list[int], function: Callable[[], Tensor], x: Tensor) -> Tensor:
    """torch takes an empty list of axes for all of them."""
    return function() if axes else x


def _reduce_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _over(axes, lambda: torch.sum(x, axes, keepdim=keep, dtype=x.dtype), x)


def _reduce_mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return _over(axes, lambda: torch.mean(x, axes, keepdim=keep), x)
    return _div(_reduce_sum(x, axes, keep), torch.tensor(math.prod(x.shape[a] for a in axes)))


def _reduce_prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor], of_nothing: Callable[[torch.dtype], float]) -> Any:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.numel() == 0 and axes:
            dims = [1 if a in axes else d for a, d in enumerate(x.shape) if keep or a not in axes]
            return torch.full(dims, of_nothing(x.dtype), dtype=x.dtype, device=x.device)
        return _over(axes, lambda: function(x, axes, keepdim=keep), x)

    return run


def _lowest(dtype: torch.dtype) -> float:
    if dtype is torch.bool:
        return 0
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    if dtype is torch.bool:
        return 1
    return math.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _reduce_l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    wide = in_float32(x) if x.is_floating_point() else x.float()
    return torch.sqrt(_reduce_sum(wide * wide, axes, keep)).to(x.dtype)


def _reduce_log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _over(axes, lambda: torch.logsumexp(x, axes, keepdim=keep), x)


def _argument(function: Callable[..., Tensor]) -> Operator:
    def build(form: Form) -> Kernel:
        axis, keep = form.integer("axis"), form.flag("keepdims", True)
        last = form.flag("select_last_index")

        def kernel(x: Tensor) -> Tensor:
            if last:
                return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)
            return function(x, dim=axis, keepdim=keep)

        return kernel

    return Operator(build)


def _cumsum(form: Form) -> Kernel:
    exclusive, backwards = form.flag("exclusive"), form.flag("reverse")

    def kernel(x: Tensor, axis: Scalar) -> Tensor:
        along = _number(axis)
        turned = x.flip(along) if backwards else x
        total = torch.cumsum(turned, along, dtype=x.dtype)
        if exclusive:
            total = total - turned
        return total.flip(along) if backwards else total

    return kernel


def _lp_normalization(form: Form) -> Kernel:
    axis, order = form.integer("axis", -1), form.integer("p", 2)

    def kernel(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, order, dim=axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return kernel


# Shapes and constants


def _number(scalar: Scalar | None) -> Any:
    """Zero where none is given."""
    return scalar[0] if isinstance(scalar, list) else scalar or 0


def _constant(form: Form) -> Kernel:
    tensor = form.tensor("value")
    if tensor is None and "value_float" in form.node.attributes:
        tensor = torch.tensor(form.number("value_float"), dtype=form.working)
    if tensor is None and "value_int" in form.node.attributes:
        tensor = torch.tensor(form.integer("value_int"))
    if tensor is None and (numbers := form.numbers("value_floats")) is not None:
        tensor = torch.tensor(numbers, dtype=form.working)
    if tensor is None and (integers := form.integers("value_ints")) is not None:
        tensor = torch.tensor(integers, dtype=torch.int64)
    if tensor is None:
        raise Unsupported("a constant that is no plain tensor")
    result = tensor
    return lambda: result


def _constant_of_shape(form: Form) -> Kernel:
    given = form.tensor("value")
    fill = torch.zeros((), dtype=form.working) if given is None else given.reshape(())
    return fill.expand


def _shape(form: Form) -> Kernel:
    start, end = form.integer("start"), form.integer("end", 2**62)
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _range(form: Form) -> Kernel:
    form.only("stash_type", int(ir.DataType.FLOAT))

    def kernel(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, step = start.item(), delta.item()
        count = max(math.ceil((limit.item() - first) / step), 0)
        wide = torch.float64 if start.is_floating_point() else torch.int64
        return (first + torch.arange(count, dtype=wide) * step).to(start.dtype)

    return kernel


def _reshape(form: Form) -> Kernel:
    keep_zero = form.flag("allowzero")

    def kernel(x: Tensor, shape: Numbers) -> Tensor:
        if not keep_zero:
            shape = [x.shape[a] if d == 0 else d for a, d in enumerate(shape)]
        return x.reshape(shape)

    return kernel


def _transpose(form: Form) -> Kernel:
    order = form.integers("perm")
    return lambda x: x.permute(order if order is not None else tuple(range(x.ndim))[::-1])


def _flatten(form: Form) -> Kernel:
    axis = form.integer("axis", 1)

    def kernel(x: Tensor) -> Tensor:
        front = math.prod(x.shape[: normalized(axis, x.ndim)])
        return x.reshape(front, math.prod(x.shape[normalized(axis, x.ndim) :]))

    return kernel


def _squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    dropped = {normalized(a, x.ndim) for a in axes}
    if any(x.shape[a] != 1 for a in dropped):
        raise RuntimeError(f"shape {tuple(x.shape)} has other than one element along {axes}")
    return x.reshape([d for a, d in enumerate(x.shape) if a not in dropped])


def _unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(normalized(a, rank) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Tensor, shape: Numbers) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, tuple(shape)))


def _tile(x: Tensor, repeats: Numbers) -> Tensor:
    return x.repeat(repeats)


def _concat(form: Form) -> Kernel:
    axis = form.integer("axis")
    return lambda *xs: torch.cat(xs, dim=axis)


def _split(form: Form) -> Kernel:
    axis, count = form.integer("axis"), len(form.node.outputs)
    form.only("num_outputs", count)

    def kernel(x: Tensor, sizes: Numbers | None = None) -> Sequence[Tensor]:
        if sizes is None:
            each = -(-x.shape[axis] // count)
            sizes = [min(each, x.shape[axis] - i * each) for i in range(count)]
        return torch.split_with_sizes(x, sizes, dim=axis)

    return kernel


def _slice(
    x: Tensor,
    starts: Numbers,
    ends: Numbers,
    axes: Numbers | None = None,
    steps: Numbers | None = None,
) -> Tensor:
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = normalized(axes[i], x.ndim) if axes is not None else i
        step = steps[i] if steps is not None else 1
        if step > 0:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
        else:
            picked = range(x.shape[axis])[start:end:step]
            x = x.index_select(axis, torch.tensor(picked, dtype=torch.int64, device=x.device))
    return x


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front."""
    return torch.where(indices < 0, indices + size, indices)


def take(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    """Slices along an axis; indices of any shape, which takes the axis's place in the result."""
    axis = normalized(axis, x.ndim)
    flat = x.index_select(axis, _wrapped(indices.reshape(-1), x.shape[axis]))
    return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather(form: Form) -> Kernel:
    axis = form.integer("axis")
    return lambda x, indices: take(x, axis, indices)


def _gather_elements(form: Form) -> Kernel:
    axis = form.integer("axis")
    return lambda x, indices: torch.gather(x, axis, _wrapped(indices, x.shape[axis]).long())


def _gather_nd(form: Form) -> Kernel:
    batch = form.integer("batch_dims")

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        rank = indices.ndim - 1
        rows = [
            torch.arange(x.shape[a], device=x.device).reshape([-1] + [1] * (rank - a - 1))
            for a in range(batch)
        ]
        return x[(*rows, *indices.long().unbind(-1))]

    return kernel


def _scatter_elements(form: Form) -> Kernel:
    axis = form.integer("axis")
    form.only("reduction", "none")

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return torch.scatter(x, axis, _wrapped(indices, x.shape[axis]).long(), updates)

    return kernel


def _scatter_nd(form: Form) -> Kernel:
    form.only("reduction", "none")

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return x.index_put(indices.long().unbind(-1), updates)

    return kernel


def _one_hot(form: Form) -> Kernel:
    axis = form.integer("axis", -1)

    def kernel(indices: Tensor, depth: Scalar, values: Tensor) -> Tensor:
        size = int(_number(depth))
        classes = torch.arange(size, device=indices.device)
        hot = _wrapped(indices.long(), size).unsqueeze(-1) == classes
        return torch.where(hot, values[1], values[0]).movedim(-1, axis)

    return kernel


def _trilu(form: Form) -> Kernel:
    function = torch.triu if form.flag("upper", True) else torch.tril

    def kernel(x: Tensor, diagonal: Scalar | None = None) -> Tensor:
        return function(x, diagonal=_number(diagonal))

    return kernel


def _depth_to_space(form: Form) -> Kernel:
    b, mode = form.integer("blocksize"), form.text("mode", "DCR")

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        d = c // (b * b)
        if mode == "DCR":
            x = x.reshape(n, b, b, d, h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(n, d, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(n, d, h * b, w * b)

    return kernel


def _space_to_depth(form: Form) -> Kernel:
    b = form.integer("blocksize")
    form.only("mode", "DCR")

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, c * b * b, h // b, w // b)

    return kernel


def _pad(form: Form) -> Kernel:
    mode = form.text("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"`mode` = {mode}")

    def kernel(
        x: Tensor, pads: Numbers, value: Scalar | None = None, axes: Numbers | None = None
    ) -> Tensor:
        chosen = [normalized(a, x.ndim) for a in axes or range(x.ndim)]
        around = {a: (pads[i], pads[i + len(chosen)]) for i, a in enumerate(chosen)}
        if mode == "constant":
            flat = [n for a in reversed(range(x.ndim)) for n in around.get(a, (0, 0))]
            return F.pad(x, flat, value=_number(value))
        for axis, (before, after) in around.items():
            rows = np.arange(x.shape[axis])[max(-before, 0) : x.shape[axis] + min(after, 0)]
            rows = np.pad(rows, (max(before, 0), max(after, 0)), mode=mode)  # type: ignore[call-overload]
            x = x.index_select(axis, torch.from_numpy(rows).to(x.device))
        return x

    return kernel


def _einsum(form: Form) -> Kernel:
    equation = form.text("equation")
    return lambda *xs: torch.einsum(equation, *xs)


def _dropout(form: Form) -> Kernel:
    form.integer("seed")  # of training alone
    form.one_output()
    if form.has_input(2):
        raise Unsupported("training mode")
    return lambda x, ratio=None: x


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Abs": plain(torch.abs),
        "Acos": plain(torch.acos),
        "Add": plain(torch.add),
        "And": plain(torch.logical_and),
        "ArgMax": _argument(torch.argmax),
        "ArgMin": _argument(torch.argmin),
        "Atan": plain(torch.atan),
        "Cast": Operator(_cast),
        "CastLike": Operator(_cast_like),
        "Ceil": plain(torch.ceil),
        "Clip": Operator(_clip),
        "Concat": Operator(_concat),
        "Constant": Operator(_constant),
        "ConstantOfShape": Operator(_constant_of_shape, parameters=(0,)),
        "Cos": plain(torch.cos),
        "CumSum": Operator(_cumsum, parameters=(1,)),
        "DepthToSpace": Operator(_depth_to_space),
        "Div": plain(_div),
        "Dropout": Operator(_dropout),
        "Einsum": Operator(_einsum),
        "Elu": Operator(_elu),
        "Equal": plain(torch.eq),
        "Erf": plain(torch.erf),
        "Exp": plain(torch.exp),
        "Expand": Operator(lambda form: _expand, parameters=(1,)),
        "Flatten": Operator(_flatten),
        "Floor": plain(torch.floor),
        "Gather": Operator(_gather),
        "GatherElements": Operator(_gather_elements),
        "GatherND": Operator(_gather_nd),
        "Gelu": Operator(_gelu),
        "Greater": plain(torch.gt),
        "GreaterOrEqual": plain(torch.ge),
        "HardSigmoid": Operator(_hard_sigmoid),
        "HardSwish": plain(F.hardswish),
        "Identity": plain(lambda x: x),
        "IsNaN": plain(torch.isnan),
        "LeakyRelu": Operator(_leaky_relu),
        "Less": plain(torch.lt),
        "LessOrEqual": plain(torch.le),
        "Log": plain(torch.log),
        "LogSoftmax": _softmax(torch.log_softmax),
        "LpNormalization": Operator(_lp_normalization),
        "Max": _variadic(torch.maximum),
        "Mean": plain(_mean),
        "Min": _variadic(torch.minimum),
        "Mish": plain(F.mish),
        "Mod": Operator(_mod),
        "Mul": plain(torch.mul),
        "Neg": plain(torch.neg),
        "Not": plain(torch.logical_not),
        "OneHot": Operator(_one_hot, parameters=(1,)),
        "Or": plain(torch.logical_or),
        "PRelu": plain(_prelu),
        "Pad": Operator(_pad, parameters=(1, 2, 3)),
        "Pow": plain(_pow),
        "Range": Operator(_range),
        "Reciprocal": plain(torch.reciprocal),
        "ReduceL1": _reduction(lambda x, axes, keep: _reduce_sum(x.abs(), axes, keep)),
        "ReduceL2": _reduction(_reduce_l2),
        "ReduceLogSum": _reduction(lambda x, axes, keep: _reduce_sum(x, axes, keep).log()),
        "ReduceLogSumExp": _reduction(_reduce_log_sum_exp),
        "ReduceMax": _reduction(_extreme(torch.amax, _lowest)),
        "ReduceMean": _reduction(_reduce_mean),
        "ReduceMin": _reduction(_extreme(torch.amin, _highest)),
        "ReduceProd": _reduction(_reduce_prod),
        "ReduceSum": _reduction(_reduce_sum),
        "ReduceSumSquare": _reduction(lambda x, axes, keep: _reduce_sum(x * x, axes, keep)),
        "Relu": plain(torch.relu),
        "Reshape": Operator(_reshape, parameters=(1,)),
        "Round": plain(torch.round),
        "ScatterElements": Operator(_scatter_elements),
        "ScatterND": Operator(_scatter_nd),
        "Shape": Operator(_shape),
        "Sigmoid": plain(torch.sigmoid),
        "Sign": plain(torch.sign),
        "Sin": plain(torch.sin),
        "Size": plain(_size),
        "Slice": Operator(lambda form: _slice, parameters=(1, 2, 3, 4)),
        "Softmax": _softmax(torch.softmax),
        "Softplus": plain(F.softplus),
        "Softsign": plain(F.softsign),
        "SpaceToDepth": Operator(_space_to_depth),
        "Split": Operator(_split, parameters=(1,)),
        "Sqrt": plain(torch.sqrt),
        "Squeeze": Operator(lambda form: _squeeze, parameters=(1,)),
        "Sub": plain(torch.sub),
        "Sum": _variadic(torch.add),
        "Swish": Operator(_swish),
        "Tan": plain(torch.tan),
        "Tanh": plain(torch.tanh),
        "Tile": Operator(lambda form: _tile, parameters=(1,)),
        "Transpose": Operator(_transpose),
        "Trilu": Operator(_trilu, parameters=(1,)),
        "Unsqueeze": Operator(lambda form: _unsqueeze, parameters=(1,)),
        "Where": plain(torch.where),
        "Xor": plain(torch.logical_xor),
    }
)
