"""The parity certificate: what an integer graph computes against its Q/DQ graph, node by node.

Each node of the integer graph is run alone on ONNX Runtime, on the codes of the Q/DQ graph, so that
errors do not add up; helpers between two tensors of codes (MatMulInteger, IntSplit, Cast) count as
one with it. The Q/DQ graph's own node is computed in float64 on the same codes. What is compared
are the codes that both make, in LSB. Memory holds the operands and results of one node, and codes
that later nodes take.

Now and then the exact result lies halfway between two codes. QuantizeLinear then takes the even
one, integer functions the upper one: both count as right, and such places are counted.

An integer function that rounds once where the Q/DQ graph rounds several times is measured against
the exact result rounded once; how far it is from the Q/DQ graph is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnpu.compiler.graph_edit import constant_array, last_dimension, name_of, subgraph_proto
from qnpu.compiler.integer_functions import named_inputs
from qnpu.compiler.operands import QUANTIZE, input_operand
from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.compiler.quant_types import widened
from qnpu.compiler.quantized_results import real_constant
from qnpu.runtime_check.paired_nodes import EXACT_KINDS, Unit, cone, units
from qnpu.runtime_check.session import Array, Feeds, Mode, open_session, run
from qnpu.runtime_check.torch_executor import TorchExecutor
from qnpu.runtime_check.torch_operator import shared

_CHUNK = 2**20
_MOST_LSB = 4
_SUM_BITS = 31
_JOIN = "IntJoin"
_WITHIN = "QLinearMatMul"  # makes sums that it does not hand out
_ACCUMULATORS = ("MatMulInteger", _JOIN, _WITHIN)
_OPERANDS = {_WITHIN: (0, 3, 2, 5)}
"""Operator → where it takes two operands and the zero points of either."""


@dataclass(frozen=True, slots=True)
class TensorParity:
    """One tensor of codes.

    Attributes:
        name: in the integer graph.
        operator: of the Q/DQ graph that makes it; ``Convert`` for a change of encoding.
        node: name of that node.
        functions: operators of the integer graph in its place, in order.
        kind: see ``Unit``.
        bits: of a code.
        elements: compared, over all batches.
        histogram: how many codes are 0, 1, 2, 3, 4 and more LSB off.
        max_lsb: of the code that is farthest off.
        beyond: by how much codes that are off are farther than half an LSB from the exact result;
            LSB, of the farthest; 0 where none is off.
        ties: places where the exact result lies halfway and the two ways to round differ.
        skipped: codes of the Q/DQ graph whose rounding and clipping the function leaves out; they
            are left out of the exact result, too.
        max_lsb_rounded: of the code that is farthest off what the Q/DQ graph gives with them.
    """

    name: str
    operator: str
    node: str
    functions: tuple[str, ...]
    kind: str
    bits: int
    elements: int
    histogram: tuple[int, ...]
    max_lsb: int
    beyond: float
    ties: int
    skipped: tuple[str, ...]
    max_lsb_rounded: int

    @property
    def limit(self) -> int:
        """LSB that a code may be off; none where the integer function is exact."""
        if self.kind in EXACT_KINDS:
            return 0
        return 1 if self.bits <= 8 else 4

    @property
    def passed(self) -> bool:
        return self.max_lsb <= self.limit


@dataclass(frozen=True, slots=True)
class AccumulatorParity:
    """Sums that are int32.

    Attributes:
        node: what makes them.
        operator: MatMulInteger, QLinearMatMul, which requantizes them at once, or IntJoin, which
            adds those of high and low bytes.
        constant: one operand is a weight, whose codes give the bound; else the depth gives it.
        bound_bits: of the greatest magnitude that any input can lead to.
        seen_bits: of the greatest magnitude there was.
    """

    node: str
    operator: str
    constant: bool
    bound_bits: int
    seen_bits: int

    @property
    def passed(self) -> bool:
        return self.bound_bits <= _SUM_BITS


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All tensors of one kind of operator.

    Attributes:
        kind: as in ``TensorParity``.
        tensors: how many.
        elements: of all of them.
        equal: share of codes that are not off.
        max_lsb: of the code that is farthest off.
        max_lsb_rounded: see ``TensorParity``, as ``ties``.
        passed: every tensor is within its limit.
        histogram: codes that are 0, 1, 2, 3, 4 and more LSB off.
    """

    kind: str
    tensors: int
    elements: int
    equal: float
    max_lsb: int
    max_lsb_rounded: int
    ties: int
    passed: bool
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParityCertificate:
    """How an integer graph compares with the Q/DQ graph that it was made of.

    Attributes:
        tensors: in the order of the Q/DQ graph.
        accumulators: in the order of the integer graph.
        unmatched: codes of the Q/DQ graph that the integer graph has not, or that do not fill
            bytes: nodes on both sides of them were compared as one.
        unchecked: nodes of the integer graph that were not run.
    """

    tensors: tuple[TensorParity, ...]
    accumulators: tuple[AccumulatorParity, ...]
    unmatched: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Every node was run, every tensor is within its limit, no sum can overflow."""
        parts: list[TensorParity | AccumulatorParity] = [*self.tensors, *self.accumulators]
        return bool(self.tensors) and not self.unchecked and all(item.passed for item in parts)

    def summary(self) -> list[KindSummary]:
        """By kind of operator, in the order of their names."""
        kinds = sorted({tensor.kind for tensor in self.tensors})
        return [_summary(kind, [t for t in self.tensors if t.kind == kind]) for kind in kinds]

    def to_json(self) -> dict[str, object]:
        """For parity.json; the same for the same graphs and batches."""
        return {
            "format": "qnpu-parity",
            "version": 1,
            "passed": self.passed,
            "summary": [asdict(item) for item in self.summary()],
            "tensors": [
                asdict(t) | {"beyond": float(f"{t.beyond:.3g}"), "limit": t.limit}
                for t in self.tensors
            ],
            "accumulators": [asdict(item) for item in self.accumulators],
            "unmatched": list(self.unmatched),
            "unchecked": list(self.unchecked),
        }


def _summary(kind: str, tensors: Sequence[TensorParity]) -> KindSummary:
    elements = sum(tensor.elements for tensor in tensors)
    return KindSummary(
        kind=kind,
        tensors=len(tensors),
        elements=elements,
        equal=sum(tensor.histogram[0] for tensor in tensors) / max(elements, 1),
        max_lsb=max(tensor.max_lsb for tensor in tensors),
        max_lsb_rounded=max(tensor.max_lsb_rounded for tensor in tensors),
        ties=sum(tensor.ties for tensor in tensors),
        passed=all(tensor.passed for tensor in tensors),
        histogram=tuple(map(sum, zip(*(tensor.histogram for tensor in tensors), strict=True))),
    )


def parity_certificate(
    qdq: ir.Model,
    integer: ir.Model,
    batches: Sequence[Feeds],
    progress: ProgressCallback = no_progress,
) -> ParityCertificate:
    """Compares every node of an integer graph with what the Q/DQ graph says there.

    Args:
        qdq: typed, topologically sorted; inputs and outputs are real numbers or codes.
        integer: made of it; codes have kept their names.
        batches: what ``qdq`` takes.
        progress: called with fraction done.

    Raises:
        DiagnosticError: QN307 an operator of ``qdq`` does not run in torch; QN116 ONNX Runtime
            refuses a node of ``integer``.
    """
    pairs = units(qdq.graph, integer.graph)
    held = [_Codes(feeds, pairs) for feeds in batches]
    sums = _Sums()
    tensors: list[TensorParity] = []
    for index, unit in enumerate(pairs):
        found = _compare(unit, integer, held, sums)
        if found is not None:
            tensors.append(found)
        for codes in held:
            codes.drop_used(index)
        progress("parity", (index + 1) / len(pairs))
    run_nodes = {node for unit in pairs for node in unit.nodes}
    matched = {unit.reference for unit in pairs}
    made = [node.outputs[0] for node in qdq.graph if node.op_type == QUANTIZE]
    return ParityCertificate(
        tensors=tuple(tensors),
        accumulators=tuple(sums.found(integer)),
        unmatched=tuple(name_of(value) for value in made if value not in matched),
        unchecked=tuple(name_of(node) for node in integer.graph if node not in run_nodes),
    )


class _Codes:
    """Codes of the Q/DQ graph for one batch, for as long as a later unit takes them."""

    def __init__(self, feeds: Feeds, pairs: Sequence[Unit]) -> None:
        self._arrays: dict[str, Array] = dict(feeds)
        self._last: dict[str, int] = {}
        for index, unit in enumerate(pairs):
            for name in (*unit.reference_takes, *unit.takes.values()):
                self._last[name] = index

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __setitem__(self, name: str, array: Array) -> None:
        self._arrays[name] = array

    def drop_used(self, index: int) -> None:
        """Drops what no unit after this one takes."""
        for name in [name for name in self._arrays if self._last.get(name, -1) <= index]:
            del self._arrays[name]


def _compare(
    unit: Unit, integer: ir.Model, held: Sequence[_Codes], sums: _Sums
) -> TensorParity | None:
    """Runs both sides of a unit on every batch, and keeps the Q/DQ graph's codes.

    Returns:
        None where the codes are an input of the integer graph.
    """
    grid, tally, rounded = _Grid.of(unit), _Tally(), _Tally()
    executor = TorchExecutor(unit.reference_nodes, dtype=torch.float64)
    products = sums.new(unit.nodes)
    watched = [value for value in _watched(products) if value not in unit.takes]
    outputs = list(dict.fromkeys([unit.result, *watched]))
    session = None
    if unit.nodes:
        proto = subgraph_proto(unit.nodes, list(unit.takes), outputs, integer)
        session = open_session(proto, Mode.REFERENCE)
    for codes in held:
        inputs = _inputs(unit, codes)
        exact = _run(executor, inputs, unit.exact) / grid.scale
        codes[name_of(unit.reference)] = grid.rounded(exact, unit.reference)
        if session is not None:
            feeds = unit.feeds(codes)
            got = dict(feeds)
            names = [name_of(value) for value in outputs]
            got |= zip(names, run(session, names, feeds), strict=True)
            for node in products:
                sums.see(node, got)
            made = unit.codes(got[name_of(unit.result)])
            rounded.add_all(exact, made, grid)
            if unit.skipped:
                exact = _run(executor, _unrounded(unit, executor, inputs), unit.exact) / grid.scale
                tally.add_all(exact, made, grid)
    if not unit.nodes:
        return None
    return _tensor_parity(unit, tally if unit.skipped else rounded, rounded.max_lsb)


def _tensor_parity(unit: Unit, tally: _Tally, max_lsb_rounded: int) -> TensorParity:
    node = unit.operator
    return TensorParity(
        name=name_of(unit.result),
        operator=node.op_type if node is not None else "Convert",
        node=name_of(node or unit.quantize or unit.result),
        functions=tuple(dict.fromkeys(item.op_type for item in unit.nodes)),
        kind=unit.kind,
        bits=unit.reference.dtype.bitwidth if unit.reference.dtype is not None else 0,
        elements=int(tally.histogram.sum()),
        histogram=tuple(tally.histogram.tolist()),
        max_lsb=tally.max_lsb,
        beyond=tally.beyond,
        ties=tally.ties,
        skipped=tuple(name_of(item.outputs[0]) for item in unit.skipped),
        max_lsb_rounded=max_lsb_rounded,
    )


def _inputs(unit: Unit, codes: _Codes) -> dict[str, Tensor]:
    """What the Q/DQ graph's nodes take."""
    return {name: code_tensor(codes[name]) for name in unit.reference_takes} | exponents(unit)


def _run(
    executor: TorchExecutor, inputs: Mapping[str, Tensor], value: ir.Value
) -> NDArray[np.float64]:
    """A value before it is rounded, real units."""
    with torch.inference_mode():
        found = executor.run(inputs, [name_of(value)])[name_of(value)]
        real: NDArray[np.float64] = found.double().numpy()
    return real


def _unrounded(
    unit: Unit, executor: TorchExecutor, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs, and in the place of each skipped pair's result what went into the pair."""
    known = dict(inputs)
    for quantize in unit.skipped:
        real = quantize.inputs[0]
        if real is not None:
            tensor = torch.from_numpy(_run(executor, known, real))
            users = quantize.outputs[0].consumers()
            known |= {name_of(dequantize.outputs[0]): tensor for dequantize in users}
    return known


def code_tensor(array: Array) -> Tensor:
    """Codes as torch can take them: its 16-bit ones have a sign."""
    return shared(array.astype(np.int32) if array.dtype == np.uint16 else array)


def exponents(unit: Unit) -> dict[str, Tensor]:
    """Exponents as DequantizeLinear makes them, in float32: 3, where float64 says 2.99999998.

    Of a negative number the power would not exist.
    """
    found: dict[str, Tensor] = {}
    for node in unit.reference_nodes:
        value = node.inputs[1] if node.op_type == "Pow" else None
        constant = real_constant(input_operand(value)) if value is not None else None
        if value is not None and constant is not None:
            found[name_of(value)] = torch.from_numpy(np.asarray(constant, np.float32)).double()
    return found


@dataclass(frozen=True, slots=True)
class _Grid:
    """An encoding.

    Attributes:
        scale: real units per LSB.
        zero_point: LSB.
        low, high: ends of the codes, LSB from the zero point.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, unit: Unit) -> _Grid:
        """That of a unit's result; the numbers themselves where they have none."""
        kind = unit.reference.dtype
        ends = np.iinfo(kind.numpy() if kind is not None and kind.is_integer() else np.uint8)
        scale, zero = 1.0, 0
        if unit.quantize is not None:
            known = [constant_array(value) for value in unit.quantize.inputs[1:]]
            scale = float(known[0].item()) if known[0] is not None else 1.0
            zero = int(known[1].item()) if len(known) > 1 and known[1] is not None else 0
        return cls(scale, zero, int(ends.min) - zero, int(ends.max) - zero)

    def rounded(self, exact: NDArray[np.float64], like: ir.Value) -> Array:
        """Codes as QuantizeLinear makes them."""
        codes = np.clip(np.rint(exact), self.low, self.high) + self.zero_point
        return codes.astype(like.dtype.numpy() if like.dtype is not None else np.uint8)


@dataclass(slots=True)
class _Tally:
    """Differences of codes, counted: see ``TensorParity``."""

    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MOST_LSB + 2, np.int64))
    max_lsb: int = 0
    beyond: float = 0.0
    ties: int = 0

    def add_all(self, exact: NDArray[np.float64], codes: Array, grid: _Grid) -> None:
        """Counts a tensor, in chunks: of no more than that copies are made."""
        if exact.shape != codes.shape:
            raise ValueError(f"shapes {exact.shape} and {codes.shape} of one tensor")
        one, other = exact.reshape(-1), codes.reshape(-1)
        for start in range(0, one.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            self._add(one[chunk], other[chunk].astype(np.float64) - grid.zero_point, grid)

    def _add(self, exact: NDArray[np.float64], codes: NDArray[np.float64], grid: _Grid) -> None:
        lower = np.floor(exact)
        halfway = exact - lower == 0.5
        even = np.clip(np.rint(exact), grid.low, grid.high)
        upper = np.clip(lower + 1, grid.low, grid.high)
        distance = np.abs(codes - even)
        distance = np.where(halfway, np.minimum(distance, np.abs(codes - upper)), distance)
        self.ties += int(np.count_nonzero(halfway & (even != upper)))
        within = np.minimum(distance, _MOST_LSB + 1).astype(np.int64)
        self.histogram += np.bincount(within, minlength=_MOST_LSB + 2)
        off = distance > 0
        if off.any():
            away = np.abs(codes - np.clip(exact, grid.low, grid.high))[off]
            self.max_lsb = max(self.max_lsb, int(distance.max()))
            self.beyond = max(self.beyond, float(away.max()) - 0.5)


def _watched(products: Sequence[ir.Node]) -> list[ir.Value]:
    """What must be seen of nodes that make sums: those, or both operands."""
    found: dict[ir.Value, None] = {}
    for node in products:
        operands = [node.inputs[index] for index in _OPERANDS.get(node.op_type, ())[:2]]
        made = [value for value in operands if value is not None and value.producer() is not None]
        found |= dict.fromkeys(made if node.op_type == _WITHIN else node.outputs)
    return list(found)


def _sums_within(node: ir.Node, arrays: Mapping[str, Array]) -> NDArray[np.float64]:
    """Sums of a QLinearMatMul, whole numbers below 2^53."""
    factors: list[NDArray[np.float64]] = []
    for operand in (0, 1):
        value = node.inputs[_OPERANDS[_WITHIN][operand]]
        held = constant_array(value)
        codes = arrays[name_of(value)] if held is None and value is not None else held
        if codes is None:
            raise ValueError(f"{name_of(node)} lacks an operand")
        factors.append(widened(codes).astype(np.float64) - _zero_point(node, operand))
    return np.asarray(factors[0] @ factors[1])


class _Sums:
    """Greatest sums of every node that makes some and was run."""

    def __init__(self) -> None:
        self._seen: dict[ir.Node, int] = {}

    def new(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """Those of some nodes that make sums and have not been run yet."""
        kinds = [n for n in nodes if n.op_type in _ACCUMULATORS and n not in self._seen]
        return [n for n in kinds if n.outputs[0].dtype is not ir.DataType.INT64]

    def see(self, node: ir.Node, arrays: Mapping[str, Array]) -> None:
        """Notes sums of a node.

        Args:
            node: that makes sums.
            arrays: what ``_watched`` says of it, by name.
        """
        if node.op_type == _WITHIN:
            sums = _sums_within(node, arrays)
        else:
            sums = arrays[name_of(node.outputs[0])]
        greatest = max(int(sums.max(initial=0)), -int(sums.min(initial=0)))
        self._seen[node] = max(self._seen.get(node, 0), greatest)

    def found(self, model: ir.Model) -> list[AccumulatorParity]:
        """All of them, in graph order."""
        nodes = [node for node in model.graph if node in self._seen]
        return [self._found(node, _Product.of(node, model)) for node in nodes]

    def _found(self, node: ir.Node, product: _Product) -> AccumulatorParity:
        return AccumulatorParity(
            node=name_of(node),
            operator=node.op_type,
            constant=product.weight is not None,
            bound_bits=product.bound.bit_length(),
            seen_bits=self._seen[node].bit_length(),
        )


@dataclass(frozen=True, slots=True)
class _Product:
    """What is known of a product of codes before it is run.

    Attributes:
        reaches: greatest distance of either operand's codes from their zero point, LSB.
        depth: products per sum.
        weight: codes of a constant second operand less their zero point, shape (depth, channels).
    """

    reaches: tuple[int, int]
    depth: int
    weight: NDArray[np.int64] | None

    @classmethod
    def of(cls, node: ir.Node, model: ir.Model) -> _Product:
        """That of a product of codes, or of the two whose sums an IntJoin adds.

        Raises:
            ValueError: depth is not static.
        """
        halves = [v.producer() for v in node.inputs[:2] if v] if node.op_type == _JOIN else [node]
        parts = [half for half in halves if half is not None]
        first, second = (parts[0].inputs[i] for i in _operands(parts[0])[:2])
        weight = _constant(second, model)
        depth = last_dimension(first) or (weight.shape[-2] if weight is not None else None)
        if depth is None:
            raise ValueError(f"depth of {name_of(node)} is not known")
        zero = 0
        for part in parts:
            zero = 256 * zero + _zero_point(part, 0)
        own = _zero_point(parts[0], 1)
        bits = 8 * len(parts)
        signed = first is not None and first.dtype is ir.DataType.INT8
        reach = _peak(parts, model) or _reach(bits, zero, signed=signed)
        other = _reach(8, own, signed=second is not None and second.dtype is ir.DataType.INT8)
        return cls((reach, other), depth, None if weight is None else weight - own)

    @property
    def bound(self) -> int:
        """Greatest magnitude of a sum, whatever comes in."""
        reach, other = self.reaches
        if self.weight is not None:
            return int(np.abs(self.weight).sum(axis=-2).max()) * reach
        return self.depth * reach * other


def _reach(bits: int, zero_point: int, *, signed: bool) -> int:
    low = -(1 << (bits - 1)) if signed else 0
    return max(low + (1 << bits) - 1 - zero_point, zero_point - low)


def _peak(parts: Sequence[ir.Node], model: ir.Model) -> int:
    """The greatest of the exponentials whose bytes are multiplied; 0 where they are not that."""
    peak = 0
    for part in parts:
        first = part.inputs[_operands(part)[0]]
        maker = first.producer() if first is not None else None
        if first is None or maker is None or maker.op_type != "IntExponentials":
            return 0
        part_of = "high" if first is maker.outputs[0] else "low"
        table = _constant(named_inputs(maker, model)[part_of], model)
        if table is None:
            return 0
        peak = 256 * peak + int(table[0] if len(parts) > 1 else table.max())
    return peak


def _operands(node: ir.Node) -> tuple[int, ...]:
    return _OPERANDS.get(node.op_type, (0, 1, 2, 3))


def _zero_point(node: ir.Node, index: int) -> int:
    place = _operands(node)[index + 2]
    zero = constant_array(node.inputs[place]) if len(node.inputs) > place else None
    return 0 if zero is None else int(zero.item())


def _constant(value: ir.Value | None, model: ir.Model) -> NDArray[np.int64] | None:
    """A weight's codes: an initializer, or what Cast and Slice make of one; else None."""
    codes = constant_array(value)
    if value is None or codes is not None:
        return None if codes is None else widened(codes).astype(np.int64)
    nodes, takes = cone(value, (), {node: index for index, node in enumerate(model.graph)})
    if takes:
        return None
    session = open_session(subgraph_proto(nodes, [], [value], model), Mode.REFERENCE)
    return run(session, [name_of(value)], {})[0].astype(np.int64)
