"""ONNX operators in torch: linears, norms, attention, pooling, resizing and Q/DQ.

Semantics are those of the ONNX operator specification; every kernel is checked against ONNX's own
node test cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray
from torch import Tensor

from qnpu.runtime_check.torch_operator import (
    Form,
    Kernel,
    Operator,
    Unsupported,
    in_float32,
    normalized,
    plain,
)
from qnpu.runtime_check.torch_ops import take

# Linears


def _gemm(form: Form) -> Kernel:
    alpha, beta = form.number("alpha", 1.0), form.number("beta", 1.0)
    first, second = form.flag("transA"), form.flag("transB")

    def kernel(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if first else a
        b = b.t() if second else b
        if a.is_floating_point():
            if c is not None:
                return torch.addmm(c, a, b, beta=beta, alpha=alpha)
            product = a @ b
            return product if alpha == 1.0 else product * alpha
        if alpha != 1.0 or beta != 1.0:
            raise Unsupported("integers times `alpha` or `beta`")
        return a @ b if c is None else a @ b + c

    return kernel


class _Window:
    """Kernel size, strides, dilations and padding of a convolution or pool."""

    def __init__(self, form: Form) -> None:
        self._auto = form.text("auto_pad", "NOTSET")
        if self._auto not in ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"):
            raise Unsupported(f"`auto_pad` = {self._auto}")
        self.size = form.integers("kernel_shape")
        self._strides = form.integers("strides")
        self._dilations = form.integers("dilations")
        self._pads = form.integers("pads")

    def strides(self, rank: int) -> list[int]:
        return self._strides or [1] * rank

    def dilations(self, rank: int) -> list[int]:
        return self._dilations or [1] * rank

    def spans(self, size: Sequence[int]) -> list[int]:
        """Elements that a dilated kernel reaches over, along each axis."""
        dilations = self.dilations(len(size))
        return [(k - 1) * d + 1 for k, d in zip(size, dilations, strict=True)]

    def pads(self, lengths: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
        """(before, after) along each spatial axis."""
        rank = len(size)
        if self._auto.startswith("SAME"):
            strides, spans = self.strides(rank), self.spans(size)
            total = [
                max((-(-n // s) - 1) * s + k - n, 0)
                for n, s, k in zip(lengths, strides, spans, strict=True)
            ]
            return self.shared(total)
        if self._auto == "VALID" or self._pads is None:
            return [(0, 0)] * rank
        return list(zip(self._pads[:rank], self._pads[rank:], strict=True))

    def shared(self, total: Sequence[int]) -> list[tuple[int, int]]:
        """Padding in all, shared between both ends; the odd one goes where ``auto_pad`` says."""
        if self._auto == "SAME_UPPER":
            return [(n // 2, n - n // 2) for n in total]
        return [(n - n // 2, n // 2) for n in total]

    @property
    def is_same(self) -> bool:
        """True where the padding follows from the lengths."""
        return self._auto.startswith("SAME")


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(form: Form) -> Kernel:
    window, groups = _Window(form), form.integer("group", 1)

    def kernel(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        pads = window.pads(x.shape[2:], w.shape[2:])
        even = all(before == after >= 0 for before, after in pads)
        return torch.convolution(
            x if even else _padded(x, pads, 0.0),
            w,
            bias,
            window.strides(rank),
            [before for before, _ in pads] if even else [0] * rank,
            window.dilations(rank),
            False,
            [0] * rank,
            groups,
        )

    return kernel


def _conv_transpose(form: Form) -> Kernel:
    window, groups = _Window(form), form.integer("group", 1)
    extra, lengths = form.integers("output_padding"), form.integers("output_shape")

    def kernel(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        strides, more = window.strides(rank), extra or [0] * rank
        dilations, none = window.dilations(rank), [0] * rank
        whole = torch.convolution(x, w, None, strides, none, dilations, True, none, groups)
        wanted = lengths
        if wanted is None and window.is_same:
            wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        if wanted is None:
            cut = window.pads(x.shape[2:], w.shape[2:])
            pads = [(-before, m - after) for (before, after), m in zip(cut, more, strict=True)]
        else:
            axes = list(zip(whole.shape[2:], more, wanted, strict=True))
            cut = window.shared([max(n + m - want, 0) for n, m, want in axes])
            starts = [before for before, _ in cut]
            pads = [(-b, want + b - n) for b, (n, _, want) in zip(starts, axes, strict=True)]
        whole = _padded(whole, pads, 0.0)
        return whole if bias is None else whole + bias.reshape([-1] + [1] * rank)

    return kernel


# Pools


def _pool_pads(
    window: _Window, lengths: Sequence[int], ceiling: bool
) -> tuple[list[tuple[int, int]], list[int]]:
    """Padding that windows see, and how far the last window reaches past it (or stays behind)."""
    size = window.size or []
    pads = window.pads(lengths, size)
    beyond: list[int] = []
    axes = zip(lengths, pads, window.strides(len(size)), window.spans(size), strict=True)
    for n, (before, after), stride, span in axes:
        room = n + before + after - span
        count = (-(-room // stride) if ceiling else room // stride) + 1
        if ceiling and (count - 1) * stride >= n + before:  # it would start in the padding
            count -= 1
        beyond.append((count - 1) * stride + span - (n + before + after))
    return pads, beyond


def _max_pool(form: Form) -> Kernel:
    window, ceiling = _Window(form), form.flag("ceil_mode")
    form.only("storage_order", 0, 1)
    form.one_output()
    size = window.size or []
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(size) - 1]

    def kernel(x: Tensor) -> Tensor:
        pads, beyond = _pool_pads(window, x.shape[2:], ceiling)
        around = [
            (before, after + more) for (before, after), more in zip(pads, beyond, strict=True)
        ]
        lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        padded = _padded(x, around, lowest)
        rank = len(size)
        return pool(padded, size, window.strides(rank), dilation=window.dilations(rank))

    return kernel


def _average_pool(form: Form) -> Kernel:
    window, ceiling = _Window(form), form.flag("ceil_mode")
    with_pads = form.flag("count_include_pad")
    size = window.size or []

    def sums(x: Tensor) -> Tensor:
        rank = len(size)
        flat = x.reshape(-1, 1, *x.shape[2:])
        ones = x.new_ones(1, 1, *size)
        none = [0] * rank
        strides, dilations = window.strides(rank), window.dilations(rank)
        total = torch.convolution(flat, ones, None, strides, none, dilations, False, none, 1)
        return total.reshape(*x.shape[:2], *total.shape[2:])

    def kernel(x: Tensor) -> Tensor:
        pads, beyond = _pool_pads(window, x.shape[2:], ceiling)
        ends = [(0, more) for more in beyond]
        counted = _padded(x.new_ones(1, 1, *x.shape[2:]), pads, float(with_pads))
        total = sums(_padded(_padded(x, pads, 0.0), ends, 0.0))
        return total / sums(_padded(counted, ends, 0.0))

    return kernel


def _over_space(function: Any) -> Operator:
    return plain(lambda x: function(x, tuple(range(2, x.ndim)), keepdim=True))


# Norms


def _rms_normalization(form: Form) -> Kernel:
    axis, epsilon = form.integer("axis", -1), form.number("epsilon", 1e-5)
    form.only("stash_type", 1)
    form.one_output()

    def kernel(x: Tensor, gain: Tensor) -> Tensor:
        dims = tuple(range(normalized(axis, x.ndim), x.ndim))
        wide = in_float32(x)
        inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
        return (wide * inverse).to(x.dtype) * gain

    return kernel


def _layer_normalization(form: Form) -> Kernel:
    axis, epsilon = form.integer("axis", -1), form.number("epsilon", 1e-5)
    form.only("stash_type", 1)
    more = form.outputs > 1

    def kernel(x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor | Sequence[Tensor]:
        first = normalized(axis, x.ndim)
        shape = x.shape[first:]
        if gain.shape != shape:
            gain = gain.expand(shape)
        if bias is not None and bias.shape != shape:
            bias = bias.expand(shape)
        y = F.layer_norm(x, shape, gain, bias, epsilon)
        if not more:
            return y
        dims = tuple(range(first, x.ndim))
        variance, mean = torch.var_mean(in_float32(x), dims, correction=0, keepdim=True)
        return y, mean, torch.rsqrt(variance + epsilon)

    return kernel


def _batch_normalization(form: Form) -> Kernel:
    epsilon = form.number("epsilon", 1e-5)
    form.only("training_mode", 0)
    form.number("momentum")  # of training alone
    form.one_output()

    def kernel(x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scale = gain * torch.rsqrt(in_float32(variance) + epsilon).to(gain.dtype)
        shape = [-1] + [1] * (x.ndim - 2)
        return x * scale.reshape(shape) + (bias - mean * scale).reshape(shape)

    return kernel


def _instance_normalization(form: Form) -> Kernel:
    epsilon = form.number("epsilon", 1e-5)
    return lambda x, gain, bias: F.instance_norm(x, weight=gain, bias=bias, eps=epsilon)


def _group_normalization(form: Form) -> Kernel:
    epsilon, groups = form.number("epsilon", 1e-5), form.integer("num_groups")
    form.only("stash_type", 1)
    if form.version < 21:
        raise Unsupported("gains per group, which opset 21 replaced")
    return lambda x, gain, bias: F.group_norm(x, groups, gain, bias, epsilon)


# Attention


def _rotary_embedding(form: Form) -> Kernel:
    interleaved = form.flag("interleaved")
    heads, part = form.integer("num_heads"), form.integer("rotary_embedding_dim")

    def kernel(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        shape = x.shape
        if x.ndim == 3:
            x = x.reshape(*shape[:2], heads, -1).transpose(1, 2)
        if positions is not None:
            cos, sin = take(cos, 0, positions), take(sin, 0, positions)
        width = part or x.shape[-1]
        cos, sin = (table[..., : width // 2].unsqueeze(1) for table in (cos, sin))
        turned, rest = x[..., :width], x[..., width:]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        real, imaginary = a * cos - b * sin, a * sin + b * cos
        if interleaved:
            turned = torch.stack((real, imaginary), dim=-1).flatten(-2)
        else:
            turned = torch.cat((real, imaginary), dim=-1)
        result = torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
        return result.transpose(1, 2).reshape(shape) if len(shape) == 3 else result

    return kernel


class _Attention:
    """Scores = Q·Kᵀ·scale, then soft cap, mask and softmax, then times V; opset 23."""

    def __init__(self, form: Form) -> None:
        self._causal = form.flag("is_causal")
        self._query_heads = form.integer("q_num_heads")
        self._heads = form.integer("kv_num_heads")
        self._scale = form.number("scale", 0.0)
        self._cap = form.number("softcap", 0.0)
        self._shown = form.integer("qk_matmul_output_mode")
        self._outputs = form.outputs
        form.only("softmax_precision", int(ir.DataType.FLOAT))
        if form.has_input(6):
            raise Unsupported("input `nonpad_kv_seqlen`")

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        past_keys: Tensor | None = None,
        past_values: Tensor | None = None,
    ) -> list[Tensor]:
        flat = query.ndim == 3
        if flat:
            query = self._split(query, self._query_heads)
            keys, values = self._split(keys, self._heads), self._split(values, self._heads)
        past = 0
        if past_keys is not None and past_values is not None:
            past = past_keys.shape[2]
            keys = torch.cat((past_keys, keys), dim=2)
            values = torch.cat((past_values, values), dim=2)
        groups = query.shape[1] // keys.shape[1]
        wide_keys, wide_values = (
            item.repeat_interleave(groups, dim=1) if groups > 1 else item for item in (keys, values)
        )
        scale = math.sqrt(self._scale or 1.0 / math.sqrt(query.shape[-1]))
        scores = (query * scale) @ (wide_keys * scale).transpose(-1, -2)
        capped = self._cap * torch.tanh(scores / self._cap) if self._cap else scores
        masked = self._masked(capped, mask, past)
        weights = _softmax_of_masked(masked)
        y = weights @ wide_values
        if flat:
            y = y.transpose(1, 2).flatten(2)
        return [y, keys, values, (scores, capped, masked, weights)[self._shown]][: self._outputs]

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def _masked(self, scores: Tensor, mask: Tensor | None, past: int) -> Tensor:
        if mask is not None:
            if mask.dtype is torch.bool:
                mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
            missing = scores.shape[-1] - mask.shape[-1]
            if missing:
                mask = F.pad(mask, (0, missing), value=-math.inf)
            scores = scores + mask
        if self._causal:
            rows, columns = scores.shape[-2:]
            allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(past)
            scores = scores.masked_fill(~allowed, -math.inf)
        return scores


def _softmax_of_masked(scores: Tensor) -> Tensor:
    """A row that is masked altogether gives zeros, and no NaN in its gradient."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


# Resize


def _source_positions(mode: str, length: int, wanted: int, scale: float) -> NDArray[np.float64]:
    """Where each output element comes from, in elements of the input."""
    x = np.arange(wanted, dtype=np.float64)
    match mode:
        case "half_pixel":
            return (x + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjustment = wanted / (scale * length)
            centre = length / 2
            return centre * (1 - adjustment) + (x + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5 if wanted > 1 else np.zeros(wanted)
        case "align_corners":
            if abs(length * scale - wanted) > 1e-6 * wanted:  # ONNX and its users differ on it
                raise Unsupported("align_corners where a length is no whole number")
            return x * (length - 1) / (wanted - 1) if wanted > 1 else np.zeros(wanted)
        case "asymmetric":
            return x / scale
    raise Unsupported(f"`coordinate_transformation_mode` = {mode}")


_ROUNDINGS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(form: Form) -> Kernel:
    mode = form.text("mode", "nearest")
    transform = form.text("coordinate_transformation_mode", "half_pixel")
    rounding = form.text("nearest_mode", "round_prefer_floor")
    given = form.integers("axes")
    form.only("antialias", 0)
    form.only("exclude_outside", 0)
    form.only("keep_aspect_ratio_policy", "stretch")
    form.number("cubic_coeff_a")
    form.number("extrapolation_value")  # of tf_crop_and_resize, which is refused
    if mode not in ("nearest", "linear") or rounding not in _ROUNDINGS:
        raise Unsupported(f"`mode` = {mode}, `nearest_mode` = {rounding}")
    _source_positions(transform, 2, 2, 1.0)

    def kernel(
        x: Tensor,
        region: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        for i, axis in enumerate(given or range(x.ndim)):
            axis = normalized(axis, x.ndim)  # noqa: PLW2901
            length = x.shape[axis]
            if sizes:
                wanted, scale = sizes[i], sizes[i] / length
            else:
                scale = (scales or [])[i]
                wanted = math.floor(length * scale)
            if wanted == length and scale == 1.0:
                continue
            source = _source_positions(transform, length, wanted, scale)
            if mode == "nearest":
                x = _picked(x, axis, _ROUNDINGS[rounding](source))
                continue
            below = np.floor(source)
            weight = torch.from_numpy(source - below).to(x)
            weight = weight.reshape([-1] + [1] * (x.ndim - axis - 1))
            x = _picked(x, axis, below) * (1 - weight) + _picked(x, axis, below + 1) * weight
        return x

    return kernel


def _picked(x: Tensor, axis: int, indices: NDArray[np.float64]) -> Tensor:
    rows = np.clip(indices, 0, x.shape[axis] - 1).astype(np.int64)
    return x.index_select(axis, torch.from_numpy(rows).to(x.device))


# Quantization


_CODE_TYPES = frozenset(
    {
        *(ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8, ir.DataType.INT16),
        *(ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT16),
    }
)


def code_range(dtype: ir.DataType) -> tuple[int, int]:
    """Smallest and largest code of an integer type."""
    bits = dtype.bitwidth
    if dtype.name.startswith("UINT"):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def rounded(x: Tensor) -> Tensor:
    """Half to even; its gradient is taken for one."""
    return x + (torch.round(x) - x).detach()


class _Grid:
    """Spreads a scale or zero point over the tensor that it belongs to."""

    def __init__(self, form: Form) -> None:
        self._axis = form.integer("axis", 1)
        self._block = form.integer("block_size")

    def spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        if self._block:
            axis = normalized(self._axis, x.ndim)
            wide = parameter.repeat_interleave(self._block, dim=axis)
            return wide.narrow(axis, 0, x.shape[axis])
        if parameter.ndim != 1 or parameter.numel() == 1:
            return parameter.reshape(()) if parameter.numel() == 1 else parameter
        after = x.ndim - normalized(self._axis, x.ndim) - 1
        return parameter.reshape([-1] + [1] * after)


def _quantize_linear(form: Form) -> Kernel:
    """Codes stay float tensors of whole numbers: an integer tensor carries no gradient."""
    grid = _Grid(form)
    form.only("saturate", 0, 1)  # says something of 8-bit floats alone
    form.only("precision", 0, int(ir.DataType.FLOAT))
    named = form.integer("output_dtype")
    kind = form.input_type(2) or ir.DataType(named or ir.DataType.UINT8)
    if kind not in _CODE_TYPES:
        raise Unsupported(f"codes of type {kind.name}")
    low, high = code_range(kind)

    def kernel(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        codes = rounded(in_float32(x) / grid.spread(in_float32(scale), x))
        if zero is not None:
            codes = codes + grid.spread(zero, x)
        return torch.clamp(codes, low, high)

    return kernel


def _dequantize_linear(form: Form) -> Kernel:
    grid = _Grid(form)
    form.only("output_dtype", 0, int(ir.DataType.FLOAT))
    kind = form.input_type(0)
    if kind not in (*_CODE_TYPES, ir.DataType.INT32, None):
        raise Unsupported(f"codes of type {kind.name if kind else 'unknown'}")
    working = form.working if form.input_type(1) in (ir.DataType.FLOAT, None) else None

    def kernel(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        if zero is not None:  # int8 less int8 may need nine bits
            wide = codes if codes.is_floating_point() else codes.int()
            codes = wide - grid.spread(zero, codes)
        real = codes.to(in_float32(scale).dtype) * grid.spread(in_float32(scale), codes)
        return real.to(working or scale.dtype)

    return kernel


_QUANTIZE = Operator(_quantize_linear, precise=(0, 1))
_DEQUANTIZE = Operator(_dequantize_linear, precise=(1,))

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Attention": Operator(_Attention),
        "AveragePool": Operator(_average_pool),
        "BatchNormalization": Operator(_batch_normalization),
        "Conv": Operator(_conv),
        "ConvTranspose": Operator(_conv_transpose),
        "DequantizeLinear": _DEQUANTIZE,
        "Gemm": Operator(_gemm),
        "GlobalAveragePool": _over_space(torch.mean),
        "GlobalMaxPool": _over_space(torch.amax),
        "GroupNormalization": Operator(_group_normalization),
        "InstanceNormalization": Operator(_instance_normalization),
        "LayerNormalization": Operator(_layer_normalization),
        "MatMul": plain(torch.matmul),
        "MaxPool": Operator(_max_pool),
        "QuantizeLinear": _QUANTIZE,
        "RMSNormalization": Operator(_rms_normalization),
        "Resize": Operator(_resize, parameters=(1, 2, 3)),
        "RotaryEmbedding": Operator(_rotary_embedding),
        "SimplifiedLayerNormalization": Operator(_rms_normalization),
    }
)
"""Of the default domain."""

CONTRIB_OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "DequantizeLinear": _DEQUANTIZE,
        "QuantizeLinear": _QUANTIZE,
        "SimplifiedLayerNormalization": Operator(_rms_normalization),
    }
)
"""Of com.microsoft, where they mean the same."""
