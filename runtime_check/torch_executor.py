"""Runs nodes of an onnx_ir graph in torch, with autograd.

Any initializer can be replaced by an expression to learn (a rotated, fake-quantized weight), any
activation can be changed on its way (a fake-quantizer). Weights that are not replaced share memory
with the graph. A value is dropped after its last use; autograd keeps what a gradient needs, and
``CheckpointedExecutor`` keeps only what crosses between blocks and computes the rest anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import FLOAT_TYPES, is_standard
from qnpu.compiler.rules import NotRunInTorch
from qnpu.runtime_check import torch_layers, torch_ops
from qnpu.runtime_check.session import Feeds
from qnpu.runtime_check.torch_operator import (
    OLDEST_OPSET,
    Form,
    Kernel,
    Operator,
    Unsupported,
    shared,
    tensor_of,
    torch_type,
)

Tensors = Mapping[str, Tensor]
Weights = Tensors | Callable[[str], Tensor | None]
"""Name of an initializer → what stands in its place; None, or no entry, for the graph's own."""
Transform = Callable[[str, Tensor], Tensor]
"""Name of a float value and the value → what its consumers get."""

_NO_WEIGHTS: Tensors = MappingProxyType({})


def feed_tensors(feeds: Feeds) -> dict[str, Tensor]:
    """Feeds as tensors that share memory with the arrays."""
    return {name: shared(array) for name, array in feeds.items()}


@dataclass(frozen=True, slots=True)
class _Step:
    """One node, ready to run."""

    node: ir.Node
    operator: Operator
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class _Plan:
    """Steps that wanted values need, and the names that each step is the last to use."""

    steps: tuple[tuple[_Step, tuple[str, ...]], ...]
    takes: tuple[ir.Value, ...]


class TorchExecutor:
    """Runs consecutive, topologically sorted nodes: a whole graph, or one decoder layer.

    Args:
        nodes: opset 13 or later.
        dtype: what float32 values are computed in; norms and softmax keep float32 statistics, and
            Q/DQ nodes float32 scales. Values of other types keep theirs.
        device: where floats live. Shape arithmetic stays in main memory.

    Raises:
        DiagnosticError: QN307 for each node that torch cannot run as ONNX means it.
    """

    def __init__(
        self,
        nodes: Iterable[ir.Node],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._dtype = dtype
        self._device = torch.device(device)
        self._steps = _build(nodes, dtype)
        self._initializers: dict[str, ir.Value] = {}
        self._produced: dict[str, int] = {}
        for index, step in enumerate(self._steps):
            self._produced |= {name_of(v): index for v in step.node.outputs if v.name}
            self._initializers |= {
                name_of(v): v for v in step.node.inputs if v is not None and v.is_initializer()
            }
        self._plans: dict[tuple[frozenset[str], frozenset[str]], _Plan] = {}
        self._constants: dict[tuple[str, torch.dtype], tuple[ir.TensorProtocol | None, Tensor]] = {}
        self._literals: dict[str, tuple[ir.TensorProtocol | None, Any]] = {}

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes, in the order they run."""
        return [step.node for step in self._steps]

    def run(
        self,
        inputs: Tensors,
        wanted: Collection[str],
        *,
        weights: Weights = _NO_WEIGHTS,
        transform: Transform | None = None,
    ) -> dict[str, Tensor]:
        """Computes values, and only what they need.

        Args:
            inputs: value name → tensor, for every value the nodes take from outside. One given for
                a value that the nodes make, or for an initializer, takes its place.
            wanted: names of values to return, in any order; inputs and initializers too.
            weights: called, or looked up, once per run for each float or integer initializer that
                is data; not for shapes and axes.
            transform: called with every float graph input and every float output of a node, right
                after it is there. Not with values that come in from another run of nodes, which
                were its outputs.

        Returns:
            ``wanted`` name → tensor, which may share memory with an input or a weight. Codes of a
            QuantizeLinear are float tensors of whole numbers, so that gradients pass.

        Raises:
            ValueError: an input is missing, or a wanted value is none of these nodes'.
        """
        plan = self._plan(frozenset(wanted), frozenset(inputs))
        run = _Run(self._constant, self._literal, weights, self._device)
        for value in plan.takes:
            run.values[name_of(value)] = self._taken(value, inputs[name_of(value)], transform)
        for step, last in plan.steps:
            self._run_step(step, run, transform)
            for name in last:
                run.values.pop(name, None)
        return {
            name: run.values[name]
            if name in run.values
            else run.initializer(self._initializers[name], self._dtype)
            for name in wanted
        }

    def _run_step(self, step: _Step, run: _Run, transform: Transform | None) -> None:
        try:
            result = step.kernel(*run.inputs(step, self._dtype))
        except Unsupported as error:
            raise DiagnosticError(_fault(step.node, str(error))) from error
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            error.add_note(f"at node `{name_of(step.node)}` ({step.node.op_type})")
            raise
        outputs = [result] if isinstance(result, Tensor) else result
        for value, tensor in zip(step.node.outputs, outputs, strict=False):
            name = name_of(value)
            if not name:
                continue
            if transform is not None and _is_float(value, tensor):
                tensor = transform(name, tensor)  # noqa: PLW2901
            run.values[name] = tensor

    def _taken(self, value: ir.Value, tensor: Tensor, transform: Transform | None) -> Tensor:
        dtype = tensor.dtype
        if tensor.is_floating_point() and value.dtype in (ir.DataType.FLOAT, None):
            dtype = self._dtype
        tensor = tensor.to(device=self._device, dtype=dtype)
        if transform is not None and value.is_graph_input() and _is_float(value, tensor):
            return transform(name_of(value), tensor)
        return tensor

    def _constant(self, value: ir.Value, dtype: torch.dtype) -> Tensor:
        """An initializer as it is in the graph now."""
        key = name_of(value), dtype
        source, tensor = self._constants.get(key, (None, None))
        if tensor is None or source is not value.const_value:
            if value.const_value is None:
                raise ValueError(f"initializer {key[0]} has no data")
            device = self._device if value.dtype in FLOAT_TYPES else "cpu"
            tensor = tensor_of(value.const_value, dtype, device)
            self._constants[key] = value.const_value, tensor
        return tensor

    def _literal(self, value: ir.Value) -> Any:
        """An initializer as Python numbers."""
        source, numbers = self._literals.get(name_of(value), (None, None))
        if source is None or source is not value.const_value:
            if value.const_value is None:
                raise ValueError(f"initializer {name_of(value)} has no data")
            numbers = value.const_value.numpy().tolist()
            self._literals[name_of(value)] = value.const_value, numbers
        return numbers

    def _plan(self, wanted: frozenset[str], given: frozenset[str]) -> _Plan:
        key = wanted, given
        if key not in self._plans:
            self._plans[key] = self._make_plan(wanted, given)
        return self._plans[key]

    def _make_plan(self, wanted: frozenset[str], given: frozenset[str]) -> _Plan:
        needed = set(wanted)
        takes: dict[str, ir.Value] = {}
        steps: list[tuple[_Step, tuple[str, ...]]] = []
        seen = set(wanted)
        for step in reversed(self._steps):
            node = step.node
            made = [name_of(v) for v in node.outputs if v.name]
            takes |= {name_of(v): v for v in node.outputs if v.name in given and v.name in needed}
            if not any(name in needed and name not in given for name in made):
                continue
            used = {name_of(v): v for v in node.inputs if v is not None}
            last = [name for name in (*used, *made) if name not in seen]
            seen.update(used, made)
            needed.update(used)
            takes |= {name: v for name, v in used.items() if name in given}
            steps.append((step, tuple(last)))
        known = given | set(self._produced) | set(self._initializers)
        if missing := sorted(needed - known):
            raise ValueError(f"no value given for {', '.join(missing)}")
        for name in needed & given - set(takes):  # wanted, yet nothing here uses it
            takes[name] = self._outside(name)
        return _Plan(tuple(reversed(steps)), tuple(takes.values()))

    def _outside(self, name: str) -> ir.Value:
        for step in self._steps:
            graph = step.node.graph
            for value in graph.inputs if graph is not None else ():
                if value.name == name:
                    return value
        return ir.Value(name=name)


class _Run:
    """Values of one run."""

    def __init__(
        self,
        constant: Callable[[ir.Value, torch.dtype], Tensor],
        literal: Callable[[ir.Value], Any],
        weights: Weights,
        device: torch.device,
    ) -> None:
        self.values: dict[str, Tensor] = {}
        self._constant = constant
        self._literal = literal
        self._replace = weights if callable(weights) else weights.get
        self._device = device

    def inputs(self, step: _Step, working: torch.dtype) -> list[Any]:
        """What a kernel is called with."""
        items: list[Any] = []
        for index, value in enumerate(step.node.inputs):
            if value is None:
                items.append(None)
            elif index in step.operator.parameters:
                known = self.values.get(name_of(value))
                items.append(self._literal(value) if known is None else known.tolist())
            elif index in step.operator.precise and working.itemsize < 4:
                items.append(self._tensor(value, torch.float32))
            else:
                items.append(self._tensor(value, working))
        return self._together(items)

    def initializer(self, value: ir.Value, dtype: torch.dtype) -> Tensor:
        """What stands in an initializer's place, which every later use gets as well."""
        replaced = self._replace(name_of(value))
        if replaced is None:
            return self._constant(value, dtype)
        if replaced.is_floating_point() and value.dtype is ir.DataType.FLOAT:
            replaced = replaced.to(dtype)
        self.values[name_of(value)] = replaced
        return replaced

    def _tensor(self, value: ir.Value, dtype: torch.dtype) -> Tensor:
        known = self.values.get(name_of(value))
        return self.initializer(value, dtype) if known is None else known

    def _together(self, items: list[Any]) -> list[Any]:
        """Constant indices and masks go where the data is."""
        if self._device.type == "cpu":
            return items
        tensors = [item for item in items if isinstance(item, Tensor)]
        if all(item.device.type == "cpu" for item in tensors):
            return items
        return [item.to(self._device) if isinstance(item, Tensor) else item for item in items]


class CheckpointedExecutor:
    """Runs nodes block by block; a backward pass computes each block's values anew.

    Peak memory of a forward and backward pass is what crosses between blocks plus one block's
    values. The last block's are kept: they are the first that the way back needs. ``weights`` and
    ``transform`` run again in the backward pass, and must give the same again: they may not count,
    collect or draw unseeded random numbers (torch's own are restored).

    Args:
        blocks: runs of nodes that follow each other, all together in topological order.
        dtype, device: see ``TorchExecutor``.

    Raises:
        DiagnosticError: QN307, of all blocks at once.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[ir.Node]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        faults: list[Diagnostic] = []
        self._executors: list[TorchExecutor] = []
        for nodes in blocks:
            try:
                self._executors.append(TorchExecutor(nodes, dtype=dtype, device=device))
            except DiagnosticError as error:
                faults += error.diagnostics
        if faults:
            raise DiagnosticError(faults)
        self._made = [{name_of(v) for n in nodes for v in n.outputs if v.name} for nodes in blocks]
        self._used = [
            {name_of(v) for n in nodes for v in n.inputs if v is not None and v.name}
            for nodes in blocks
        ]

    def run(
        self,
        inputs: Tensors,
        wanted: Collection[str],
        *,
        weights: Weights = _NO_WEIGHTS,
        transform: Transform | None = None,
    ) -> dict[str, Tensor]:
        """See ``TorchExecutor.run``; inputs may not stand in for values that blocks make."""
        values = dict(inputs)
        for index, executor in enumerate(self._executors):
            later = set(wanted).union(*self._used[index + 1 :])
            out = sorted(self._made[index] & later)
            if not out:
                continue
            taken = sorted(self._used[index] & set(values))
            again = torch.is_grad_enabled() and index < len(self._executors) - 1
            tensors = [values[name] for name in taken]
            made = _run_block(executor, taken, tensors, out, weights, transform, again=again)
            values |= zip(out, made, strict=True)
            values = {name: t for name, t in values.items() if name in later}
        missing = sorted(set(wanted) - set(values))
        if missing:
            raise ValueError(f"no block makes {', '.join(missing)}")
        return {name: values[name] for name in wanted}


def _run_block(
    executor: TorchExecutor,
    names: list[str],
    tensors: list[Tensor],
    wanted: list[str],
    weights: Weights,
    transform: Transform | None,
    *,
    again: bool,
) -> tuple[Tensor, ...]:
    def compute(*taken: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(names, taken, strict=True))
        made = executor.run(inputs, wanted, weights=weights, transform=transform)
        return tuple(made[name] for name in wanted)

    if not again:
        return compute(*tensors)
    result: tuple[Tensor, ...] = checkpoint(compute, *tensors, use_reentrant=False)
    return result


def _build(nodes: Iterable[ir.Node], dtype: torch.dtype) -> list[_Step]:
    steps: list[_Step] = []
    faults: list[Diagnostic] = []
    for node in nodes:
        try:
            steps.append(_step(node, dtype))
        except Unsupported as error:
            faults.append(_fault(node, str(error)))
    if faults:
        raise DiagnosticError(faults)
    return steps


def _step(node: ir.Node, dtype: torch.dtype) -> _Step:
    if is_standard(node):
        operator = torch_ops.OPERATORS.get(node.op_type) or torch_layers.OPERATORS.get(node.op_type)
    elif node.domain == "com.microsoft":
        operator = torch_layers.CONTRIB_OPERATORS.get(node.op_type)
    else:
        operator = None
    if operator is None:
        raise Unsupported("no such operator here")
    form = Form(node, dtype)
    if is_standard(node) and _is_old(node.op_type, form.version):
        raise Unsupported(f"opset {form.version} is older than {OLDEST_OPSET}")
    for value in node.outputs:
        if value.dtype is not None:
            torch_type(value.dtype, dtype)
    kernel = operator.build(form)
    if unread := form.unread():
        raise Unsupported(f"attribute `{unread[0]}`")
    return _Step(node, operator, kernel)


def _is_old(op_type: str, version: int) -> bool:
    """True where an operator changed between an opset and the first that is known here."""
    if version >= OLDEST_OPSET or op_type == "SimplifiedLayerNormalization":  # ONNX Runtime's own
        return False
    first, then = (onnx.defs.get_schema(op_type, v) for v in (version, OLDEST_OPSET))
    return bool(first.since_version != then.since_version)


def _fault(node: ir.Node, reason: str) -> Diagnostic:
    operator = node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"
    return NotRunInTorch(operator, reason).at(node=name_of(node))


def _is_float(value: ir.Value, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and (value.dtype is None or value.dtype in FLOAT_TYPES)
