"""Rewrites of legalize-target: operators that a target has only spelled out in others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qnpu.compiler.graph_edit import NodeBuilder, constant_array, name_of
from qnpu.compiler.operand_pattern import is_number
from qnpu.compiler.operands import Operand, Operation, input_operand
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.rotary import turn_halves, turn_pairs
from qnpu.compiler.target import OpRule


def pow_to_mul(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Multiplies where the exponent is 2 or 3.

    Before → after::

        Pow(x, 2)       Mul(x, x)
        Pow(x, 3)       Mul(DQ(Q(Mul(x, x))), x)        Q over [0, m²], m = max |x|

    The result keeps its encoding. A square is the same number; a cube differs by the rounding of
    the square, at most m³ / (2 · (2^b - 1)) for codes of b bits.

    Must not fire on other exponents, or a base without one scale.
    """
    if len(operation.inputs) != 2 or not operation.outputs:
        return False
    base, exponent = operation.inputs
    encoding = encoding_of(base) if base is not None else None
    if base is None or encoding is None or exponent is None:
        return False
    power = next((p for p in (2, 3) if _is_exponent(exponent, p)), None)
    shape = operation.outputs[0].shape
    if power is None or base.shape != shape:
        return False
    node, name = operation.node, name_of(operation.node) or name_of(operation.outputs[0].value)
    product = editor.node("Mul", [base.value, base.value], f"{name}_square", shape, before=node)
    if power == 3:
        peak = max(float(-encoding.low), float(encoding.high)) ** 2
        square = Encoding.from_range(encoding.spec, 0.0, peak)
        factors = [editor.pair(product, square), base.value]
        product = editor.node("Mul", factors, f"{name}_cube", shape, before=node)
    editor.replace(node, product)
    return True


def _is_exponent(operand: Operand, number: float) -> bool:
    """A constant of one element; a quantized one within half an LSB."""
    if operand.quantized:
        return operand.constant and is_number(operand, number)
    array = constant_array(operand.value)
    return array is not None and array.size == 1 and float(array.item()) == number


@dataclass(frozen=True, slots=True)
class _Rotary:
    """A RotaryEmbedding with encodings.

    Attributes:
        shape: (B, H, S, D).
        flat: x is (B, S, H · D).
        width: half of the dimensions that are rotated.
        pairs: those lie side by side.
        source, tables, result: encodings of x, of cosine and sine, and of the result.
    """

    shape: tuple[int, int, int, int]
    flat: bool
    width: int
    pairs: bool
    source: Encoding
    tables: tuple[Encoding, Encoding]
    result: Encoding

    @property
    def product(self) -> Encoding:
        """Of a number of x times one of a table."""
        reach = _peak(self.source) * max(_peak(table) for table in self.tables)
        return Encoding.from_range(self.source.spec, -reach, reach)


def decompose_rotary(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Spells out RotaryEmbedding, with derived encodings in between.

    Before → after, x of shape (B, H, S, D), or (B, S, H · D)::

        RotaryEmbedding(DQ(x), cos, sin, positions)

        x1, x2 = Split(x)
        Concat(x1·cos - x2·sin, x2·cos + x1·sin)

    Parts of x, and what is only moved, have the encoding of x; the four products that of
    ±max |x| · max |table|, where tables reach ±1; difference, sum and the whole that of the result.
    Tables that are not quantized become constants of the type of x. Where positions are given, they
    pick rows. Two products are rounded, each to half of their LSB, and their sum once more: the
    result moves by one LSB of a product and one of its own.

    Must not fire where a shape is not known, or an encoding is none or has more than one scale.
    """
    found = _as_rotary(operation)
    source, cos, sin = operation.inputs[:3] if len(operation.inputs) >= 3 else (None, None, None)
    if found is None or source is None or cos is None or sin is None:
        return False
    node = operation.node
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    build = NodeBuilder(editor.graph, node)
    rows = [
        _rows(editor, build, table, encoding, found, positions, node)
        for table, encoding in zip((cos, sin), found.tables, strict=True)
    ]
    start = _by_heads(build, source.value, found) if found.flat else source.value
    turn = turn_pairs if found.pairs else turn_halves
    turned = turn(build, start, found.shape, 2 * found.width, *rows)
    result = _merge_heads(build, turned, found) if found.flat else turned
    editor.take_names(build.nodes)
    build.replace(result)
    for made in build.nodes:
        for output in made.outputs:
            if output is not result:
                editor.encode_between(output, _encoding_for(made, found))
    return True


def _as_rotary(operation: Operation) -> _Rotary | None:
    """The node with its shape and encodings, or None where they are not known."""
    if not operation.outputs or len(operation.inputs) < 3:
        return None
    source, *tables = operation.inputs[:3]
    attributes = operation.node.attributes
    if source is None or source.shape is None or len(source.shape) not in (3, 4):
        return None
    heads = attributes.get_int("num_heads", 0)
    if len(source.shape) == 3 and not heads:
        return None
    shape = source.shape
    if len(shape) == 3:
        shape = (shape[0], heads, shape[1], shape[2] // heads)
    width = (attributes.get_int("rotary_embedding_dim", 0) or shape[3]) // 2
    encoding, result = encoding_of(source), encoding_of(operation.outputs[0])
    encodings = [_table_encoding(table, encoding, width) for table in tables]
    cos, sin = encodings
    if encoding is None or result is None or cos is None or sin is None:
        return None
    b, h, s, d = shape
    pairs = bool(attributes.get_int("interleaved", 0))
    flat = len(source.shape) == 3
    return _Rotary((b, h, s, d), flat, width, pairs, encoding, (cos, sin), result)


def _table_encoding(table: Operand | None, source: Encoding | None, width: int) -> Encoding | None:
    """Its own, or for a float constant one of the type of x; None where it does not fit."""
    if table is None or source is None or not table.shape or table.shape[-1] != width:
        return None
    real = constant_array(table.value)
    if not table.quantized and real is not None:
        return Encoding.from_range(source.spec, real.min(), real.max())
    return encoding_of(table)


def _peak(encoding: Encoding) -> float:
    return max(float(-encoding.low), float(encoding.high))


def _rows(
    editor: QdqEditor,
    build: NodeBuilder,
    table: Operand,
    encoding: Encoding,
    rotary: _Rotary,
    positions: ir.Value | None,
    node: ir.Node,
) -> ir.Value:
    """A table with an axis of heads: (B, 1, S, width), or (B, 1, S · width, 1) for pairs."""
    name, (_, _, tokens, _) = name_of(table.value), rotary.shape
    size = tokens * rotary.width
    real = constant_array(table.value)
    value = table.value
    if not table.quantized and real is not None:
        value = editor.constant_operand(name, real.astype(np.float32), encoding, before=node)
    if positions is not None:
        value = build.add("Gather", [value, positions], f"{name}_at", axis=0)
    place = (-1, 1, size, 1) if rotary.pairs else (-1, 1, tokens, rotary.width)
    return build.add("Reshape", [value, build.integers(f"{name}_shape", *place)], f"{name}_rows")


def _by_heads(build: NodeBuilder, source: ir.Value, rotary: _Rotary) -> ir.Value:
    """(B, S, H · D) → (B, H, S, D)."""
    batch, heads, tokens, size = rotary.shape
    shape = build.integers("heads_shape", batch, tokens, heads, size)
    parted = build.add("Reshape", [source, shape], "heads")
    return build.add("Transpose", [parted], "by_heads", perm=[0, 2, 1, 3])


def _merge_heads(build: NodeBuilder, turned: ir.Value, rotary: _Rotary) -> ir.Value:
    """(B, H, S, D) → (B, S, H · D)."""
    batch, heads, tokens, size = rotary.shape
    back = build.add("Transpose", [turned], "by_tokens", perm=[0, 2, 1, 3])
    shape = build.integers("flat_shape", batch, tokens, heads * size)
    return build.add("Reshape", [back, shape], "flat")


def _encoding_for(node: ir.Node, rotary: _Rotary) -> Encoding:
    """Of what one of the nodes makes; what only moves codes keeps the encoding of its input."""
    if node.op_type == "Mul":
        return rotary.product
    if node.op_type in ("Add", "Sub", "Concat"):
        return rotary.result
    first = node.inputs[0]
    return (encoding_of(input_operand(first)) if first is not None else None) or rotary.source
