"""Runs a Q/DQ graph in float64, and single kinds of its operators as the integer graph has them.

ONNX Runtime runs a Q/DQ graph in float32, whose sums round: now and then a code falls to the other
side of a tie. In float64 the graph gives the codes that it means. Where the integer graph differs
from those, putting its own functions in the place of one kind of operator tells which kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qnpu.compiler.graph_edit import name_of, subgraph_proto
from qnpu.compiler.operands import DEQUANTIZE
from qnpu.runtime_check.paired_nodes import Unit, units
from qnpu.runtime_check.parity import code_tensor, exponents
from qnpu.runtime_check.session import Array, Feeds, Mode, open_session, run
from qnpu.runtime_check.torch_executor import TorchExecutor

_Step = Callable[[Feeds], Array]
"""Codes made so far, by name → those of one more tensor."""


@dataclass(slots=True)
class RealWeights:
    """Weights as float64 numbers, for graphs that share them.

    Attributes:
        known: name of a DequantizeLinear's result → its codes and the numbers.
    """

    known: dict[str, tuple[Array, Tensor]] = field(default_factory=dict)

    def of(self, unit: Unit, executor: TorchExecutor) -> dict[str, Tensor]:
        """What a unit's DequantizeLinear nodes make of initializers, by name."""
        found: dict[str, Tensor] = {}
        for node in unit.reference_nodes:
            codes = node.inputs[0]
            if node.op_type != DEQUANTIZE or codes is None or codes.const_value is None:
                continue
            name, array = name_of(node.outputs[0]), codes.const_value.numpy()
            known = self.known.get(name)
            if known is None or not np.array_equal(known[0], array):
                known = array, executor.run({}, [name])[name]
                self.known[name] = known
            found[name] = known[1]
        return found


class ExactGraph:
    """A Q/DQ graph in float64, tensor by tensor of codes.

    Args:
        qdq: inputs and outputs are codes; typed, topologically sorted.
        integer: made of it; codes have kept their names.
        on_integers: kinds of operators (see ``Unit.kind``) to run as ``integer`` has them.
        weights: keeps the weights' numbers, for other graphs with the same ones.

    Raises:
        DiagnosticError: QN307 an operator does not run in torch; QN116 ONNX Runtime refuses a node
            of ``integer``.

    Attributes:
        kinds: of the operators there are.
    """

    def __init__(
        self,
        qdq: ir.Model,
        integer: ir.Model,
        on_integers: Collection[str] = (),
        weights: RealWeights | None = None,
    ) -> None:
        weights = weights if weights is not None else RealWeights()
        pairs = units(qdq.graph, integer.graph)
        self.kinds = frozenset(unit.kind for unit in pairs)
        self._steps: list[tuple[str, _Step]] = []
        for unit in pairs:
            on_runtime = unit.kind in on_integers and unit.nodes
            step = _integer_step(unit, integer) if on_runtime else _exact_step(unit, weights)
            self._steps.append((name_of(unit.reference), step))

    def __call__(self, names: Sequence[str], feeds: Feeds) -> list[Array]:
        """Outputs of the graph, which are codes.

        Args:
            names: of the outputs.
            feeds: input name → array.

        Raises:
            KeyError: an output is no tensor of codes that both graphs have.
        """
        codes = dict(feeds)
        for name, step in self._steps:
            codes[name] = step(codes)
        return [codes[name] for name in names]


def _exact_step(unit: Unit, weights: RealWeights) -> _Step:
    """The Q/DQ graph's own nodes."""
    quantize, name = unit.quantize, name_of(unit.reference)
    nodes = [*unit.reference_nodes, *([quantize] if quantize is not None else [])]
    executor = TorchExecutor(dict.fromkeys(nodes), dtype=torch.float64)
    constants = weights.of(unit, executor) | exponents(unit)
    dtype = unit.reference.dtype
    assert dtype is not None  # else it would be no pair

    def step(codes: Feeds) -> Array:
        taken = {key: code_tensor(codes[key]) for key in unit.reference_takes}
        with torch.inference_mode():
            made = executor.run(taken | constants, [name])[name]
        return made.numpy().astype(dtype.numpy())

    return step


def _integer_step(unit: Unit, integer: ir.Model) -> _Step:
    """The integer graph's nodes in their place."""
    proto = subgraph_proto(unit.nodes, list(unit.takes), [unit.result], integer)
    session = open_session(proto, Mode.REFERENCE)
    dtype = unit.reference.dtype
    assert dtype is not None  # else it would be no pair

    def step(codes: Feeds) -> Array:
        feeds = unit.feeds(codes)
        made = unit.codes(run(session, [name_of(unit.result)], feeds)[0])
        return made.astype(dtype.numpy(), copy=False)

    return step
