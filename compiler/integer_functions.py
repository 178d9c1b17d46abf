"""Integer operators as model-local functions of domain ``qnpu``, made of standard operators.

Any runtime that knows ONNX functions runs them; a viewer shows one node where a dozen integer
operators stand. Sums are kept modulo 2^64 in uint64, because shifts are defined for unsigned
integers alone: ``qnpu.compiler.integer_arguments`` lifts every sum by 2^62, so that none is
negative, and what is left of that after the shift vanishes in the last cast. Those called Short do
the same in int32, dividing, where ``qnpu.compiler.integer_short`` says that it is enough.

Bodies are in onnxscript; their twins in NumPy are in ``qnpu.runtime_check.reference``.
"""
# onnxscript reads these bodies as ONNX, where a name without a type is a tensor.
# mypy: ignore-errors
# pyright: basic
# ruff: noqa: N802

from __future__ import annotations

import onnx_ir as ir
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN = "qnpu"
VERSION = 1
QNPU = Opset(DOMAIN, VERSION)

_UINT8 = 2  # of TensorProto.DataType
_INT8 = 3
_INT32 = 6
_INT64 = 7
_UINT32 = 12
_UINT64 = 13


@script(QNPU, default_opset=op)
def IntRequantize(x, multiplier, offset, shift, low, high, to: int):
    """y = clip((x·multiplier + offset) >> shift, low, high)."""
    sums = op.Cast(x, to=_UINT64) * multiplier + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRequantizeFine(
    x, multiplier, offset, shift, low, high, fine_multiplier, fine_offset, fine_shift, to: int
):
    """As IntRequantize; (x·fine_multiplier + fine_offset) >> fine_shift is part of the sum."""
    wide = op.Cast(x, to=_UINT64)
    fine = op.BitShift(wide * fine_multiplier + fine_offset, fine_shift, direction="RIGHT")
    sums = wide * multiplier + offset + fine
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRequantizeShort(x, multiplier, offset, step, low, high, to: int):
    """y = clip((x·multiplier + offset) / step, low, high), int32; no sum that counts is negative.

    A division takes as long as a shift alone, and needs no cast to unsigned integers.
    """
    return op.Cast(op.Clip((x * multiplier + offset) / step, low, high), to=to)


@script(QNPU, default_opset=op)
def IntRequantizeInside(x, multiplier, offset, step, to: int):
    """IntRequantizeShort of sums that are never negative, whose results are never clipped."""
    return op.Cast((x * multiplier + offset) / step, to=to)


@script(QNPU, default_opset=op)
def IntSumBytesShort(a, b, multiplier, fine_offset, radix, offset, step, low, high, to: int):
    """y = clip((a·multiplier + (b·multiplier + fine_offset) / radix + offset) / step, low, high).

    int32, of sums of the two bytes of codes; what is divided by ``radix`` is not negative.
    """
    fine = (b * multiplier + fine_offset) / radix
    return op.Cast(op.Clip((a * multiplier + offset + fine) / step, low, high), to=to)


@script(QNPU, default_opset=op)
def IntAddShort(a, b, multiplier_a, multiplier_b, offset, step, low, high, to: int):
    """y = clip((a·multiplier_a + b·multiplier_b + offset) / step, low, high), as before."""
    first = op.Cast(a, to=_INT32) * multiplier_a
    sums = op.Cast(b, to=_INT32) * multiplier_b + offset + first
    return op.Cast(op.Clip(sums / step, low, high), to=to)


@script(QNPU, default_opset=op)
def IntAdd(a, b, multiplier_a, multiplier_b, offset, shift, low, high, to: int):
    """y = clip((a·multiplier_a + b·multiplier_b + offset) >> shift, low, high)."""
    first = op.Cast(a, to=_UINT64) * multiplier_a
    sums = op.Cast(b, to=_UINT64) * multiplier_b + offset + first
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntAddFine(
    a,
    b,
    multiplier_a,
    multiplier_b,
    offset,
    shift,
    low,
    high,
    fine_multiplier_a,
    fine_multiplier_b,
    fine_offset,
    fine_shift,
    to: int,
):
    """As IntAdd; (a·fine_a + b·fine_b + fine_offset) >> fine_shift is part of the sum."""
    one = op.Cast(a, to=_UINT64)
    other = op.Cast(b, to=_UINT64)
    rest = one * fine_multiplier_a + fine_offset + other * fine_multiplier_b
    fine = op.BitShift(rest, fine_shift, direction="RIGHT")
    sums = one * multiplier_a + offset + other * multiplier_b + fine
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntMul(a, b, zero_a, zero_b, multiplier, offset, shift, low, high, to: int):
    """y = clip(((a - zero_a)·(b - zero_b)·multiplier + offset) >> shift, low, high)."""
    product = (op.Cast(a, to=_UINT64) - zero_a) * (op.Cast(b, to=_UINT64) - zero_b)
    sums = product * multiplier + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRotate(a, b, table_a, table_b, offset, shift, low, high, to: int, word: int, unsigned: int):
    """y = clip((a·table_a + b·table_b + offset) >> shift).

    The sum is of type ``word``, and shifted as ``unsigned``, which has as many bits. Zero points
    are in the offset, of which there is one per element.
    """
    turned = op.Cast(b, to=word) * table_b + op.Cast(a, to=word) * table_a
    sums = op.Cast(turned, to=unsigned) + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRotateBy(
    a,
    b,
    cosines,
    sines,
    zero_a,
    zero_b,
    zero_cosines,
    zero_sines,
    sign,
    multiplier,
    offset,
    shift,
    low,
    high,
    to: int,
    word: int,
):
    """IntRequantize of a·cosines + sign·b·sines, each less its zero point; of type ``word``."""
    one = (op.Cast(a, to=word) - zero_a) * (op.Cast(cosines, to=word) - zero_cosines)
    other = (op.Cast(b, to=word) - zero_b) * (op.Cast(sines, to=word) - zero_sines)
    sums = op.Cast(other * sign + one, to=_UINT64) * multiplier + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRotateHalves(
    x, table_a, table_b, offset, shift, low, high, to: int, word: int, unsigned: int
):
    """IntRotate of x and of x with the halves of its last axis swapped."""
    wide = op.Cast(x, to=word)
    first, second = op.Split(wide, axis=-1, num_outputs=2)
    turned = op.Concat(second, first, axis=-1) * table_b + wide * table_a
    sums = op.Cast(turned, to=unsigned) + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRotaryTables(cosines, sines, zero_cosines, zero_sines, word: int):
    """What both halves of a head are multiplied with, of type ``word``: cosines, ∓ sines."""
    one = op.Cast(cosines, to=word) - zero_cosines
    other = op.Cast(sines, to=word) - zero_sines
    return op.Concat(one, one, axis=-1), op.Concat(op.Neg(other), other, axis=-1)


@script(QNPU, default_opset=op)
def IntRotateHalvesBy(
    x, cosines, sines, zero, multiplier, offset, shift, low, high, to: int, word: int
):
    """IntRequantize of c·cosines + t·sines, c = x - zero, t with the halves of c swapped."""
    centred = op.Cast(x, to=word) - zero
    first, second = op.Split(centred, axis=-1, num_outputs=2)
    turned = op.Concat(second, first, axis=-1) * sines + centred * cosines
    sums = op.Cast(turned, to=_UINT64) * multiplier + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntSplit(x, eight):
    """The two bytes of uint16 codes: x = 256·high + low."""
    high = op.Cast(op.BitShift(op.Cast(x, to=_UINT32), eight, direction="RIGHT"), to=_UINT8)
    low = op.Cast(x, to=_UINT8)
    return high, low


@script(QNPU, default_opset=op)
def IntJoin(high, low, radix):
    """Sums of 16-bit codes from those of their bytes: y = radix·high + low."""
    return high * radix + low


@script(QNPU, default_opset=op)
def IntLookup(x, table, copies, rows):
    """y = table[x]; of signed codes the negative ones count from the table's end.

    GatherElements is faster than Gather by far, with threads for rows that each have a table.
    """
    index = op.Reshape(op.Cast(x, to=_INT32), rows)
    found = op.GatherElements(op.Expand(table, copies), index, axis=1)
    return op.Reshape(found, op.Shape(x))


@script(QNPU, default_opset=op)
def IntLookupPair(a, b, radix, table, copies, rows):
    """y = table[radix·a + b], of codes of 8 bits; negative indices count from the table's end."""
    index = op.Cast(a, to=_INT32) * radix + op.Cast(b, to=_INT32)
    found = op.GatherElements(op.Expand(table, copies), op.Reshape(index, rows), axis=1)
    return op.Reshape(found, op.Shape(a))


@script(QNPU, default_opset=op)
def IntSigned(x, half):
    """Codes of 8 bits less 128, int8: kernels multiply those faster. The sum is modulo 256."""
    return op.Cast(x + half, to=_INT8)


@script(QNPU, default_opset=op)
def IntExponentials(scores, mask, axes, half, step, none, last, high, low, copies, rows):
    """Two bytes of e = table[⌊(max x - x + half) / step⌋], x = scores + mask, int32."""
    masked = scores + mask
    distances = (op.ReduceMax(masked, axes, keepdims=1) + half - masked) / step
    index = op.Reshape(op.Clip(distances, none, last), rows)
    shape = op.Shape(scores)
    first = op.Reshape(op.GatherElements(op.Expand(high, copies), index, axis=1), shape)
    second = op.Reshape(op.GatherElements(op.Expand(low, copies), index, axis=1), shape)
    return first, second


@script(QNPU, default_opset=op)
def IntNormalize(x, numerator, offset, shift, least, most, first, last, far, to: int):
    """y = clip((x·⌊numerator / Σe⌋ + offset) >> shift); Σe is x's last column, which y has not."""
    share = numerator / op.Cast(op.Slice(x, last, far, last), to=_INT64)
    sums = op.Cast(x, to=_UINT64) * op.Cast(share, to=_UINT64) + offset
    codes = op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), least, most), to=to)
    return op.Slice(codes, first, last, last)


@script(QNPU, default_opset=op)
def IntNormalizeShort(x, ratio, shift, centre, zero, first, last, far, low, high, to: int):
    """y = clip((x + h·centre - Σe·zero) / 2h), h = Σe·ratio >> shift; Σe as before; int32."""
    total = op.Squeeze(op.Slice(x, last, far, last), last)
    wide = op.Cast(total, to=_UINT64) * ratio
    half = op.Cast(op.BitShift(wide, shift, direction="RIGHT"), to=_INT32)
    sums = x + op.Unsqueeze(half * centre - total * zero, last)
    codes = op.Clip(sums / op.Unsqueeze(half + half, last), low, high)
    return op.Slice(op.Cast(codes, to=to), first, last, last)


@script(QNPU, default_opset=op)
def IntWhere(condition, a, b, to: int):
    """y = a where the condition holds, else b."""
    chosen = op.Where(condition, op.Cast(a, to=_INT32), op.Cast(b, to=_INT32))
    return op.Cast(chosen, to=to)


@script(QNPU, default_opset=op)
def IntSoftmax(x, exponentials, axes, numerator, offset, shift, high, to: int):
    """y = (⌊e·numerator / Σe⌋ + offset) >> shift, at most high; e = exponentials[max x - x]."""
    wide = op.Cast(x, to=_INT32)
    weights = op.Gather(exponentials, op.ReduceMax(wide, axes, keepdims=1) - wide)
    shares = weights * numerator / op.ReduceSum(weights, axes, keepdims=1)
    sums = op.Cast(shares + offset, to=_UINT64)
    return op.Cast(op.Min(op.BitShift(sums, shift, direction="RIGHT"), high), to=to)


@script(QNPU, default_opset=op)
def IntReciprocalRoot(
    n, numerator, powers, fours, twos, start, last, one, two, part, step, coarse, dense
):
    """numerator / √n, of n·4^t, which is near 2^62, t being the most that allows.

    √(n·4^t) = r + f: r, whole, by four steps of Newton's method from ``start``, less one, so that
    f = (n·4^t - r²) / 2r is from 0 to 2. The result is q - q·f/r with q = ⌊numerator·2^t / r⌋.
    powers = 4^j; f has ``part`` steps, f/r ``part``·``step``, and so has coarse·dense.
    """
    above = op.Cast(op.GreaterOrEqual(op.Unsqueeze(n, last), powers), to=_INT64)
    size = op.ReduceSum(above, last, keepdims=0)
    scaled = n * op.Gather(fours, size)
    root1 = (start + scaled / start) / two
    root2 = (root1 + scaled / root1) / two
    root3 = (root2 + scaled / root2) / two
    root = (root3 + scaled / root3) / two - one
    slope = (scaled - root * root) * part / (root * two) * step / root
    whole = numerator / root
    shift = op.Gather(twos, size)
    share = whole * shift + (numerator - whole * root) * shift / root
    return share - share / coarse * slope / dense


@script(QNPU, default_opset=op)
def IntRMSNorm(
    x,
    zero,
    axes,
    epsilon,
    prescale,
    numerator,
    powers,
    fours,
    twos,
    start,
    last,
    one,
    two,
    part,
    step,
    coarse,
    dense,
    gain,
    offset,
    shift,
    low,
    high,
    to: int,
):
    """y = clip((c·gain·⌊numerator / √(prescale·Σc² + epsilon)⌋ + offset) >> shift, low, high).

    c = x - zero.
    """
    centred = op.Cast(x, to=_INT64) - zero
    energy = op.ReduceSum(centred * centred, axes, keepdims=1) * prescale + epsilon
    share = QNPU.IntReciprocalRoot(
        energy, numerator, powers, fours, twos, start, last, one, two, part, step, coarse, dense
    )
    sums = op.Cast(centred * gain * share, to=_UINT64) + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


@script(QNPU, default_opset=op)
def IntRMSNormShort(
    x,
    zero,
    before_last,
    last,
    both,
    epsilon,
    prescale,
    powers,
    rises,
    two,
    numerator,
    offset,
    step,
    low,
    high,
    to: int,
):
    """As IntRMSNorm over the last axis, with gains of 1; the last product in 32 bits.

    Σc² is a product of matrices, (1, n) by (n, 1) for each row: faster than ReduceSum by far. Its
    root comes by three steps of Newton's method, from the middle of the powers around it, which
    rises with each of them. Rows are the last dimension meanwhile: operators would go one by one
    through numbers that are alone in theirs.
    """
    centred = op.Cast(x, to=_INT32) - zero
    wide = op.Cast(centred, to=_INT64)
    squares = op.MatMul(op.Unsqueeze(wide, before_last), op.Unsqueeze(wide, last))
    energy = op.Squeeze(squares, both) * prescale + epsilon
    above = op.Cast(op.GreaterOrEqual(op.Unsqueeze(energy, last), powers), to=_INT64)
    root0 = op.MatMul(above, rises)
    root1 = (root0 + energy / root0) / two
    root2 = (root1 + energy / root1) / two
    root3 = (root2 + energy / root2) / two
    share = op.Unsqueeze(op.Cast(numerator / root3, to=_INT32), last)
    return op.Cast(op.Clip((centred * share + offset) / step, low, high), to=to)


@script(QNPU, default_opset=op)
def IntLayerNorm(
    x,
    finer,
    size,
    half,
    axes,
    epsilon,
    prescale,
    numerator,
    powers,
    fours,
    twos,
    start,
    last,
    one,
    two,
    part,
    step,
    coarse,
    dense,
    gain,
    offset,
    shift,
    low,
    high,
    to: int,
):
    """As IntRMSNorm of c = finer·x - mean(finer·x), the mean whole; x is not negative."""
    fine = op.Cast(x, to=_INT64) * finer
    centred = fine - (op.ReduceSum(fine, axes, keepdims=1) + half) / size
    energy = op.ReduceSum(centred * centred, axes, keepdims=1) * prescale + epsilon
    share = QNPU.IntReciprocalRoot(
        energy, numerator, powers, fours, twos, start, last, one, two, part, step, coarse, dense
    )
    sums = op.Cast(centred * gain * share, to=_UINT64) + offset
    return op.Cast(op.Clip(op.BitShift(sums, shift, direction="RIGHT"), low, high), to=to)


_BODIES = (
    IntRequantize,
    IntRequantizeFine,
    IntRequantizeShort,
    IntRequantizeInside,
    IntAddShort,
    IntSumBytesShort,
    IntAdd,
    IntAddFine,
    IntMul,
    IntRotate,
    IntRotateBy,
    IntRotateHalves,
    IntRotaryTables,
    IntRotateHalvesBy,
    IntSplit,
    IntJoin,
    IntLookup,
    IntLookupPair,
    IntSigned,
    IntExponentials,
    IntNormalize,
    IntNormalizeShort,
    IntWhere,
    IntSoftmax,
    IntReciprocalRoot,
    IntRMSNorm,
    IntRMSNormShort,
    IntLayerNorm,
)
NEEDS = {
    "IntRMSNorm": ("IntReciprocalRoot",),
    "IntLayerNorm": ("IntReciprocalRoot",),
}
"""Function → functions its body calls."""


def named_inputs(node: ir.Node, model: ir.Model) -> dict[str, ir.Value | None]:
    """What a call of a function takes, by the names of its parameters.

    Raises:
        KeyError: the model does not define that function.
    """
    definition = model.functions[node.domain, node.op_type, node.overload]
    names = [value.name or "" for value in definition.inputs]
    return dict(zip(names, node.inputs, strict=True))


def integer_function(name: str, opset: int) -> ir.Function:
    """A function's definition.

    Args:
        name: as in a node's ``op_type``.
        opset: of the model, which functions must share.

    Raises:
        KeyError: there is none of that name.
    """
    body = {item.name: item for item in _BODIES}[name]
    function = ir.serde.deserialize_function(body.to_function_proto())
    function.opset_imports[""] = opset
    return function
