"""Edits of a graph on its way to integers: nodes that call integer functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.graph_edit import (
    GraphEditor,
    keeps_name,
    name_of,
    replace_value,
    static_shape,
)
from qnpu.compiler.integer_arguments import Arguments, lookup_arguments
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_functions import DOMAIN, NEEDS, VERSION, integer_function
from qnpu.compiler.quantized_results import stored_type

_HALF = 128  # what int8 codes are less than uint8 codes
_BYTE_MAX = 255
_INT16_MAX = 2**15 - 1


class IntegerEditor(GraphEditor):
    """Adds integer nodes to a model; equal constants of one or few numbers are stored once.

    Args:
        model: changed in place.
        cpu: that it must be right on.
    """

    def __init__(self, model: ir.Model, cpu: Cpu = Cpu.ANY) -> None:
        super().__init__(model.graph)
        self.cpu = cpu
        self._model = model
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._bytes: dict[ir.Value, list[ir.Value]] = {}
        self._unsigned: dict[ir.Value, ir.Value] = {}
        self._whole: dict[ir.Value, ir.Value] = {}

    def call(
        self,
        function: str,
        operands: Sequence[ir.Value],
        arguments: Arguments,
        like: ir.Value,
        *,
        before: ir.Node,
        **attributes: int,
    ) -> ir.Value:
        """The first result of a node that calls an integer function.

        Args:
            function: its name.
            operands: first inputs, codes.
            arguments: constants by parameter name: all other inputs.
            like: what the result is to be like in type and shape; names begin with its name.
            before: place of the node.
            attributes: other than ``to``, the type of the result.

        Raises:
            ValueError: arguments are not those of the function.
        """
        definition = self._define(function)
        wanted = [name_of(item) for item in definition.inputs][len(operands) :]
        if set(wanted) != set(arguments):
            raise ValueError(f"{function} takes {wanted}, not {sorted(arguments)}")
        base = name_of(like)
        constants = [self._argument(f"{base}_{key}", arguments[key]) for key in wanted]
        kind = stored_type(like.dtype or ir.DataType.UNDEFINED)
        if "to" in definition.attributes:
            attributes["to"] = int(kind)
        node = ir.node(
            function,
            [*operands, *constants],
            attributes or None,
            domain=DOMAIN,
            num_outputs=len(definition.outputs),
            name=self.free_name(f"{base}_{function}"),
        )
        for output in node.outputs:
            output.name = self.free_name(base)
            output.shape = like.shape
            output.type = ir.TensorType(kind)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def lookup(
        self, codes: ir.Value, table: NDArray[Any], like: ir.Value, *, before: ir.Node
    ) -> ir.Value:
        """What a table holds for each code, negative ones from its end."""
        arguments = lookup_arguments(table, prod(static_shape(codes) or (0,)))
        return self.call("IntLookup", [codes], arguments, like, before=before)

    def split(self, codes: ir.Value, arguments: Arguments, *, before: ir.Node) -> list[ir.Value]:
        """High and low byte of 16-bit codes; of the same codes only once."""
        if codes not in self._bytes:
            like = ir.Value(
                name=f"{name_of(codes)}_bytes",
                type=ir.TensorType(ir.DataType.UINT8),
                shape=codes.shape,
            )
            high = self.call("IntSplit", [codes], arguments, like, before=before)
            producer = high.producer()
            self._bytes[codes] = list(producer.outputs) if producer is not None else []
        return self._bytes[codes]

    def accumulator(
        self, op_type: str, inputs: Sequence[ir.Value | None], like: ir.Value, *, before: ir.Node
    ) -> ir.Value:
        """The int32 sums of a standard operator, of the shape of ``like``."""
        shape = like.shape.dims if like.shape is not None else None
        sums = self.node(op_type, inputs, f"{name_of(like)}_sums", shape, before=before)
        sums.type = ir.TensorType(ir.DataType.INT32)
        return sums

    def scale(self, array: NDArray[np.float32]) -> ir.Value:
        """Constant scales of an operator that requantizes by its definition."""
        return self._argument("scale", array)

    def codes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        *,
        before: ir.Node,
        domain: str = "",
    ) -> ir.Value:
        """The codes that an operator gives, of the type and shape of ``like``."""
        shape = like.shape.dims if like.shape is not None else None
        result = self.node(op_type, inputs, name_of(like), shape, before=before, domain=domain)
        self._model.opset_imports.setdefault(domain, VERSION)
        maker = result.producer()
        if maker is not None:
            maker.name = self.free_name(f"{name_of(like)}_{op_type}")
        result.type = ir.TensorType(stored_type(like.dtype or ir.DataType.UNDEFINED))
        return result

    def move(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[int | ir.SymbolicDim] | None,
        *,
        before: ir.Node,
        **attributes: Any,
    ) -> ir.Value:
        """A standard operator whose result has the type of its first input; see ``node``."""
        result = self.node(op_type, inputs, name, shape, before=before, **attributes)
        result.type = inputs[0].type if inputs[0] is not None else None
        return result

    def part(
        self, value: ir.Value, axis: int, start: int, end: int, *, before: ir.Node
    ) -> ir.Value:
        """A slice of codes along one axis."""
        base = f"{name_of(value)}_{start}"
        ends = [self._argument(base, np.array([number], np.int64)) for number in (start, end, axis)]
        return self.move("Slice", [value, *ends], base, None, before=before)

    def wide(self, sums: ir.Value, *, before: ir.Node) -> ir.Value:
        """Sums as int64."""
        kind = ir.DataType.INT64
        result = self.node(
            "Cast", [sums], f"{name_of(sums)}_wide", None, before=before, to=int(kind)
        )
        result.type = ir.TensorType(kind)
        return result

    def sum(self, one: ir.Value, other: ir.Value, *, before: ir.Node) -> ir.Value:
        """The sum of two tensors of one type."""
        return self.move("Add", [one, other], f"{name_of(one)}_total", None, before=before)

    def joined(
        self, parts: Sequence[ir.Value], like: ir.Value, *, axis: int, before: ir.Node
    ) -> ir.Value:
        """Parts along an axis, as one."""
        shape = like.shape.dims if like.shape is not None else None
        name = f"{name_of(like)}_joined"
        return self.move("Concat", parts, name, shape, before=before, axis=axis)

    def zero_point(self, number: int, codes: ir.Value) -> ir.Value:
        """A constant zero point in the type of codes."""
        dtype = np.int8 if codes.dtype is ir.DataType.INT8 else np.uint8
        return self._argument("zero_point", np.array(number, dtype))

    def number(self, array: NDArray[Any]) -> ir.Value:
        """A constant; of equal ones there is one."""
        return self._argument("number", array)

    def weight(
        self, value: ir.Value, codes: NDArray[np.int8], *, transposed: bool, before: ir.Node
    ) -> ir.Value:
        """A weight's codes as int8, shape (features, channels); those of 4 bits stay packed."""
        if transposed:
            packed = codes.astype(value.const_value.numpy().dtype) if value.const_value else codes
            value = self.constant(f"{name_of(value)}_transposed", packed, value.dtype)
        if value.dtype is ir.DataType.INT8:
            return value
        return self._cast(value, ir.DataType.INT8, before)

    def whole_weight(self, value: ir.Value, codes: NDArray[np.int8]) -> ir.Value:
        """Codes in blocks times their block scales, of the same codes only once.

        Args:
            value: the codes in the graph.
            codes: int8, shape (features, channels).
        """
        if value not in self._whole:
            name = f"{name_of(value)}_whole"
            self._whole[value] = self.constant(name, np.ascontiguousarray(codes))
        return self._whole[value]

    def beside(
        self,
        first: ir.DataType | None,
        codes: ir.Value,
        zero_point: int,
        *,
        before: ir.Node,
        reach: int = _HALF,
    ) -> tuple[ir.Value, int]:
        """The second operand of a product as its kernel needs it, and its zero point.

        Args:
            first: type of the first operand.
            codes: of 8 bits.
            zero_point: of those.
            before: place of new nodes, of which the same codes have only one.
            reach: greatest |code|, LSB; of two products of small ones the sum fits 16 bits.
        """
        signed = first is ir.DataType.UINT8 and codes.dtype is ir.DataType.INT8
        if self.cpu is not Cpu.ANY or not signed or 2 * _BYTE_MAX * reach <= _INT16_MAX:
            return codes, zero_point
        if codes not in self._unsigned:
            same_bits = self._cast(codes, ir.DataType.UINT8, before)
            half = self.number(np.array(_HALF, np.uint8))
            self._unsigned[codes] = self.move(
                "BitwiseXor",
                [same_bits, half],
                f"{name_of(codes)}_unsigned",
                codes.shape.dims if codes.shape is not None else None,
                before=before,
            )
        return self._unsigned[codes], zero_point + _HALF

    def _cast(self, value: ir.Value, kind: ir.DataType, before: ir.Node) -> ir.Value:
        shape = value.shape.dims if value.shape is not None else None
        name = f"{name_of(value)}_{kind.name.lower()}"
        cast = self.node("Cast", [value], name, shape, before=before, to=int(kind))
        cast.type = ir.TensorType(kind)
        return cast

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Lets everything that reads ``old`` read ``new``, which takes over its name."""
        producer = old.producer()
        replace_value(self.graph, old, new)
        if producer is not None:
            self.graph.remove(producer, safe=True)
        if not keeps_name(new):
            new.name, old.name = old.name, None

    def take_over_all(self, old: Sequence[ir.Value], new: Sequence[ir.Value | None]) -> bool:
        """Takes over each value, where there is one for all of them; says whether it did."""
        made = [value for value in new if value is not None]
        if len(made) < len(old):
            return False
        for before, after in zip(old, made, strict=True):
            self.take_over(before, after)
        return True

    def _define(self, function: str) -> ir.Function:
        functions = self._model.functions
        for name in (function, *NEEDS.get(function, ())):
            if (DOMAIN, name, "") not in functions:
                definition = integer_function(name, self._model.opset_imports[""])
                functions[DOMAIN, name, ""] = definition
                self._model.opset_imports[DOMAIN] = VERSION
        return functions[DOMAIN, function, ""]

    def _argument(self, name: str, array: NDArray[Any]) -> ir.Value:
        key = str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes()
        if key not in self._shared:
            self._shared[key] = self.constant(name, array)
        return self._shared[key]
