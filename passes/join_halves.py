"""join-halves: both halves of a head are turned at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.integer_arguments import Arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.integer_functions import DOMAIN, named_inputs
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage

_ROTATIONS = {"IntRotate": 2, "IntRotateBy": 4}  # how many first inputs are codes
_BY_ELEMENT = ("table_a", "table_b", "offset")  # of IntRotate; all else is one number
_TablesKey = tuple[ir.Value, ir.Value, int, int, int]


@dataclass(frozen=True)
class JoinHalves(Pass):
    """Puts one rotation of whole heads in the place of one for each half.

    Before → after::

        Split(x) → a, b
        qnpu.IntRotate(a, b), qnpu.IntRotate(b, a) → Concat    qnpu.IntRotateHalves(x)
        … qnpu.IntRotateBy, by tables of positions             qnpu.IntRotateHalvesBy(x)

    The same codes, from half as many operators, which is what counts in a graph of one token.
    Tables of positions are put together once, by qnpu.IntRotaryTables, for all heads of all layers.

    Must not fire where halves have other sizes, are read elsewhere, or are turned or rounded
    differently, nor on an axis that is not the last one.
    """

    name: ClassVar[str] = "join-halves"
    consumes: ClassVar[Stage] = Stage.INTEGER
    produces: ClassVar[Stage] = Stage.INTEGER

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        editor, count = IntegerEditor(model), 0
        tables: dict[_TablesKey, tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            pair = _Pair.of(node, model)
            made = pair.joined(editor, tables) if pair is not None else None
            if made is not None:
                editor.take_over(node.outputs[0], made)
                count += 1
        if count:
            common.RemoveUnusedNodesPass()(model)
        return count


@dataclass(frozen=True, slots=True, eq=False)
class _Rotation:
    """A rotation of one half.

    Attributes:
        node: a call of IntRotate or IntRotateBy.
        arguments: its constants by parameter name.
    """

    node: ir.Node
    arguments: Arguments

    @classmethod
    def of(cls, value: ir.Value | None, model: ir.Model) -> _Rotation | None:
        node = value.producer() if value is not None and len(value.uses()) == 1 else None
        if node is None or node.domain != DOMAIN or node.op_type not in _ROTATIONS:
            return None
        if node.outputs[0].is_graph_output():
            return None
        held = {name: constant_array(v) for name, v in named_inputs(node, model).items()}
        found = {name: array for name, array in held.items() if array is not None}
        complete = len(found) == len(node.inputs) - _ROTATIONS[node.op_type]
        return cls(node, found) if complete else None

    def same(self, other: _Rotation, *but: str) -> bool:
        """True where both round alike: all arguments but some are equal, and attributes are."""
        mine, theirs = ({k: a.value for k, a in r.node.attributes.items()} for r in (self, other))
        return (
            self.node.op_type == other.node.op_type
            and mine == theirs
            and all(
                np.array_equal(array, other.arguments[name])
                for name, array in self.arguments.items()
                if name not in but
            )
        )

    def number(self, name: str) -> int:
        """An argument that is one number."""
        return int(self.arguments[name].item())


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Rotations of both halves of codes, put together again.

    Attributes:
        node: the Concat.
        whole: the codes before they were split.
        first, second: the rotations.
    """

    node: ir.Node
    whole: ir.Value
    first: _Rotation
    second: _Rotation

    @classmethod
    def of(cls, node: ir.Node, model: ir.Model) -> _Pair | None:
        if not is_standard(node) or node.op_type != "Concat" or len(node.inputs) != 2:
            return None
        first, second = (_Rotation.of(value, model) for value in node.inputs)
        if first is None or second is None:
            return None
        (a, b), swapped = first.node.inputs[:2], second.node.inputs[:2]
        split = a.producer() if a is not None else None
        if a is None or b is None or split is None or tuple(split.outputs) != (a, b):
            return None
        whole, shape = split.inputs[0], static_shape(a)
        if split.op_type != "Split" or whole is None or not shape or shape != static_shape(b):
            return None
        axes = {n.attributes.get_int("axis", 0) for n in (node, split)}
        if tuple(swapped) != (b, a) or not axes <= {-1, len(shape) - 1}:
            return None
        return cls(node, whole, first, second)

    def joined(
        self, editor: IntegerEditor, tables: dict[_TablesKey, tuple[ir.Value, ir.Value]]
    ) -> ir.Value | None:
        """The whole, turned; None where its halves are not turned alike."""
        attributes = {k: a.as_int() for k, a in self.first.node.attributes.items() if k != "to"}
        if self.first.node.op_type == "IntRotate":
            arguments = self._of_both_halves()
            function, codes = "IntRotateHalves", [self.whole]
        else:
            arguments = self._of_either_half()
            function, codes = "IntRotateHalvesBy", [self.whole]
            if arguments is not None:
                codes += self._tables(editor, tables, attributes["word"])
        if arguments is None:
            return None
        like = self.node.outputs[0]
        return editor.call(function, codes, arguments, like, before=self.node, **attributes)

    def _of_both_halves(self) -> Arguments | None:
        one, other = self.first, self.second
        if not one.same(other, *_BY_ELEMENT):
            return None
        parts = {
            name: [self._of_each(rotation.arguments[name]) for rotation in (one, other)]
            for name in _BY_ELEMENT
        }
        if any(first.shape != second.shape for first, second in parts.values()):
            return None
        return one.arguments | {name: np.concatenate(p, axis=-1) for name, p in parts.items()}

    def _of_each(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """An argument for each element of the last axis, which may have been one for all."""
        width = (static_shape(self.first.node.outputs[0]) or (1,))[-1]
        return (
            np.broadcast_to(array, (*array.shape[:-1], width))
            if array.ndim
            else np.full(width, array)
        )

    def _of_either_half(self) -> Arguments | None:
        one, other = self.first, self.second
        if not one.same(other, "sign") or one.node.inputs[2:4] != other.node.inputs[2:4]:
            return None
        signs = one.number("sign"), other.number("sign")
        if signs != (-1, 1) or one.number("zero_a") != one.number("zero_b"):
            return None
        kept = ("multiplier", "offset", "shift", "low", "high")
        return {"zero": one.arguments["zero_a"]} | {name: one.arguments[name] for name in kept}

    def _tables(
        self,
        editor: IntegerEditor,
        tables: dict[_TablesKey, tuple[ir.Value, ir.Value]],
        word: int,
    ) -> tuple[ir.Value, ir.Value]:
        """What whole heads are multiplied with; made once."""
        cosines, sines = self.first.node.inputs[2:4]
        if cosines is None or sines is None:
            raise ValueError(f"{name_of(self.first.node)} lacks a table")
        zeros = {name: self.first.arguments[name] for name in ("zero_cosines", "zero_sines")}
        one, other = (int(zero.item()) for zero in zeros.values())
        key = cosines, sines, one, other, word
        if key not in tables:
            shape = static_shape(cosines)
            like = ir.Value(
                name=f"{name_of(cosines)}_halves",
                type=ir.TensorType(ir.DataType(word)),
                shape=ir.Shape([*shape[:-1], 2 * shape[-1]]) if shape else None,
            )
            made = editor.call(
                "IntRotaryTables", [cosines, sines], zeros, like, before=self.node, word=word
            )
            maker = made.producer()
            if maker is None:
                raise ValueError("a call has no node")
            tables[key] = maker.outputs[0], maker.outputs[1]
        return tables[key]
