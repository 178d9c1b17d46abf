"""Which nodes of a Q/DQ graph and of the integer graph made of it compute the same codes.

Codes have kept their names. A pair of them, and the nodes that make either of the two from pairs
before, are a unit: both sides of it can be run alone, on the same codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.marks import raised
from qnpu.compiler.op_traits import is_float, layout_inputs
from qnpu.compiler.operands import DEQUANTIZE, QUANTIZE
from qnpu.runtime_check.session import Array

_KINDS = {
    "Add": "add",
    "Div": "multiply",
    "Gemm": "linear",
    "Identity": "layout",
    "LayerNormalization": "norm",
    "MatMul": "linear",
    "Mul": "multiply",
    "Neg": "multiply",
    "RMSNormalization": "norm",
    "Softmax": "softmax",
    "Sub": "add",
    "Where": "layout",
}
EXACT_KINDS = frozenset({"add", "conversion", "layout", "linear"})
"""Kinds of which the integer function gives the Q/DQ graph's codes, every rounding included."""
_KINDS_OF_FUNCTIONS = {
    "IntNormalize": "attention",
    "IntNormalizeShort": "attention",
    "IntRotate": "rotary",
    "IntRotateBy": "rotary",
    "IntRotateHalves": "rotary",
    "IntRotateHalvesBy": "rotary",
}

_ROUNDED_ONCE = frozenset({"attention", "rotary"})


class CodesByName(Protocol):
    """Arrays of codes by name."""

    def __getitem__(self, name: str, /) -> Array: ...


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A tensor of codes in both graphs, and what makes either.

    Attributes:
        reference: in the Q/DQ graph.
        result: in the integer graph.
        reference_nodes: of the Q/DQ graph, without the QuantizeLinear at their end.
        reference_takes: names of what those take.
        nodes: of the integer graph; none where the codes are an input of it.
        takes: what those take → its name in the Q/DQ graph.
    """

    reference: ir.Value
    result: ir.Value
    reference_nodes: tuple[ir.Node, ...]
    reference_takes: tuple[str, ...]
    nodes: tuple[ir.Node, ...]
    takes: Mapping[ir.Value, str]

    @property
    def quantize(self) -> ir.Node | None:
        """What rounds the exact result; None for codes that are merely handed through."""
        return _quantizer(self.reference)

    @property
    def exact(self) -> ir.Value:
        """The result before it is rounded."""
        return _unrounded(self.reference)

    @property
    def operator(self) -> ir.Node | None:
        """The node of the Q/DQ graph that computes; None for a change of encoding."""
        conversions = self._conversions
        before = conversions[-1].inputs[0] if conversions else self.exact
        producer = before.producer() if before is not None else None
        return None if producer is None or producer.op_type == DEQUANTIZE else producer

    @property
    def kind(self) -> str:
        """linear, add, layout, conversion, multiply, softmax, norm, lookup, rotary or attention.

        It is the operator's, but for functions that take the place of several operators.
        """
        for function in {item.op_type for item in self.nodes} & set(_KINDS_OF_FUNCTIONS):
            return _KINDS_OF_FUNCTIONS[function]
        node = self.operator
        if node is None:
            return "conversion"
        return "layout" if layout_inputs(node) else _KINDS.get(node.op_type, "lookup")

    @property
    def skipped(self) -> tuple[ir.Node, ...]:
        """QuantizeLinear nodes within, whose rounding and clipping the integer function leaves out.

        Of a rotation these are both products', of an attention scores and probabilities, of a
        result that is narrowed the wide ones. All other functions do what the Q/DQ graph does,
        inner roundings included.
        """
        if self.kind in EXACT_KINDS:
            return ()
        within = [node for node in self.reference_nodes if node.op_type == QUANTIZE]
        left_out = within if self.kind in _ROUNDED_ONCE else self._conversions
        return tuple(node for node in within if node in left_out)

    def feeds(self, codes: CodesByName) -> dict[str, Array]:
        """What its integer nodes take, by name, in the types they take it in, raised as there.

        Args:
            codes: of the Q/DQ graph, by name.
        """
        return {
            name_of(value): codes[name]
            if value.dtype is None
            else _moved(codes[name].astype(value.dtype.numpy(), copy=False), raised(value))
            for value, name in self.takes.items()
        }

    def codes(self, made: Array) -> Array:
        """The codes that the integer graph has in its result, which may be above them."""
        return _moved(made, -raised(self.result))

    @property
    def _conversions(self) -> list[ir.Node]:
        """QuantizeLinear nodes that a result goes through before its last one, latest first."""
        found: list[ir.Node] = []
        value: ir.Value | None = self.exact
        while value is not None:
            dequantize = value.producer()
            if dequantize is None or dequantize.op_type != DEQUANTIZE:
                break
            codes = dequantize.inputs[0]
            quantize = _quantizer(codes) if codes is not None else None
            if quantize is None or quantize not in self.reference_nodes:
                break
            found.append(quantize)
            value = quantize.inputs[0]
        return found


def units(qdq: ir.Graph, integer: ir.Graph) -> list[Unit]:
    """All units, in the order of the Q/DQ graph; each takes codes of those before it.

    Args:
        qdq: inputs and outputs are real numbers or codes.
        integer: made of it.
    """
    pairs = _pairs(qdq, integer)
    order = {node: index for graph in (qdq, integer) for index, node in enumerate(graph)}
    names = {value: name_of(value) for value in integer.inputs}
    names |= {twin: name_of(value) for value, twin in pairs.items()}
    found: list[Unit] = []
    for value, twin in pairs.items():
        reference_nodes, reference_takes = cone(_unrounded(value), pairs, order)
        nodes, takes = cone(twin, names, order)
        found.append(
            Unit(
                reference=value,
                result=twin,
                reference_nodes=reference_nodes,
                reference_takes=tuple(name_of(item) for item in reference_takes),
                nodes=nodes,
                takes={item: names[item] for item in takes} if nodes else {},
            )
        )
    return found


def _moved(array: Array, by: int) -> Array:
    return array + array.dtype.type(by) if by else array


def _pairs(qdq: ir.Graph, integer: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Codes of the Q/DQ graph → those of the integer graph, in the order of the Q/DQ graph."""
    theirs = {name_of(v): v for v in integer.inputs}
    theirs |= {name_of(v): v for node in integer for v in node.outputs if v.name}
    ends = _ends(qdq)
    pairs: dict[ir.Value, ir.Value] = {}
    for node in qdq:
        for value in node.outputs:
            name = name_of(value)
            if node.op_type != QUANTIZE and name not in ends:
                continue
            twin = theirs.get(name) or theirs.get(ends.get(name, ""))
            if twin is not None and _holds(twin, value) and _fills_bytes(value):
                pairs[value] = twin
    return pairs


def _holds(twin: ir.Value, value: ir.Value) -> bool:
    """True for the same type of codes, and where 32 bits hold those of 16 (widen-sums)."""
    wide = twin.dtype is ir.DataType.INT32 and value.dtype is ir.DataType.UINT16
    return wide or twin.dtype is value.dtype


def _ends(qdq: ir.Graph) -> dict[str, str]:
    """Codes at inputs and outputs → names there, which they may have in the integer graph."""
    ends: dict[str, str] = {}
    for value in qdq.outputs:
        producer = value.producer()
        if producer is None:
            continue
        codes = producer.inputs[0] if producer.op_type == DEQUANTIZE else value
        if codes is not None and not is_float(codes):
            ends[name_of(codes)] = name_of(value)
    for value in qdq.inputs:
        if is_float(value):
            ends |= {name_of(user.outputs[0]): name_of(value) for user in value.consumers()}
    return ends


def _fills_bytes(value: ir.Value) -> bool:
    """Other codes can be neither fed nor read back: NumPy cannot hold them."""
    return value.dtype is not None and value.dtype.bitwidth >= 8


def _quantizer(codes: ir.Value) -> ir.Node | None:
    producer = codes.producer()
    return producer if producer is not None and producer.op_type == QUANTIZE else None


def _unrounded(codes: ir.Value) -> ir.Value:
    quantize = _quantizer(codes)
    before = quantize.inputs[0] if quantize is not None else None
    return codes if before is None else before


def cone(
    value: ir.Value, cuts: Collection[ir.Value], order: Mapping[ir.Node, int]
) -> tuple[tuple[ir.Node, ...], list[ir.Value]]:
    """The nodes that a value is made by, in order, back to the cuts, and what those take.

    Args:
        value: its own producer belongs to them even where it is a cut.
        cuts: values to stop at, beside inputs of the graph and initializers.
        order: place of every node.
    """
    producer = value.producer()
    if producer is None:
        return (), [value]
    nodes: set[ir.Node] = set()
    takes: dict[ir.Value, None] = {}
    pending = [producer]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for item in node.inputs:
            if item is None or item.is_initializer():
                continue
            maker = item.producer()
            if item in cuts or maker is None:
                takes[item] = None
            else:
                pending.append(maker)
    return tuple(sorted(nodes, key=order.__getitem__)), list(takes)
