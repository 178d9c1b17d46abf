"""freeze-shapes: bind every dynamic dimension, and the inputs that a fixed shape decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qnpu.compiler.caches import PAST_PREFIXES
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import dynamic_dimensions
from qnpu.compiler.graph_edit import name_of, register_tensor, static_shape
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rules import InputBound, InvalidConfig

_BATCH_NAMES = frozenset({"batch", "batch_size"})
_TOKEN_INPUTS = frozenset({"input_ids", "inputs_embeds", "position_ids", "token_type_ids"})


@dataclass(frozen=True)
class FreezeShapes(Pass):
    """Makes every shape static.

    Before::

        input_ids [batch_size, sequence_length], attention_mask [batch_size, past + sequence],
        past_key_values.0.key [batch_size, 3, past, 64]

    After::

        input_ids [1, 512]

    A dimension takes its size from, in this order: ``dims`` by the dimension's name or by
    ``input:axis``; the usual names of decoder inputs (batch 1, ``sequence_length``,
    ``past_length``). A past cache of length zero holds nothing and becomes an empty constant. With
    shapes fixed and no padding, ``attention_mask`` is all ones, ``position_ids`` counts up from the
    length of the past and ``token_type_ids`` is zero: they become constants too, unless named in
    ``keep_inputs``.

    Must not fire on static inputs. Source: ONNX exports of optimum and of torch.onnx.

    Attributes:
        dims: size by dimension name or ``input:axis``.
        sequence_length: tokens per run.
        past_length: tokens in the key/value cache before the run, where neither the graph nor
            ``dims`` says.
        keep_inputs: inputs that stay inputs.
    """

    name: ClassVar[str] = "freeze-shapes"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    dims: Mapping[str, int] = field(default_factory=dict)
    sequence_length: int = 512
    past_length: int = 0
    keep_inputs: tuple[str, ...] = ()

    def run(self, compilation: Compilation) -> int:
        """Raises: DiagnosticError: QN101 for each dimension left, QN503 for an unused name."""
        graph = compilation.graph
        self._check_names(graph)
        past = self._past_length(graph)
        by_name = self._conventional_sizes(graph, past)
        by_name |= self.dims
        bound = 0
        for value in graph.inputs:
            bound += self._bind(value, by_name)
        missing = dynamic_dimensions(graph)
        if missing:
            raise DiagnosticError(missing)
        for value in list(graph.inputs):
            content = self._constant_content(value, past)
            if content is not None:
                array, description = content
                name = name_of(value)
                compilation.diagnostics.append(InputBound(name, description).at(value=name))
                _bind_input(graph, value, array)
                bound += 1
        if bound:
            _forget_symbolic_shapes(graph)
            common.ShapeInferencePass(strict_mode=False, check_type=False)(compilation.model)
        return bound

    def _check_names(self, graph: ir.Graph) -> None:
        known = {v.name for v in graph.inputs}
        symbols = {
            str(dim.value)
            for value in graph.inputs
            for dim in value.shape or ()
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
        }
        symbols |= {f"{v.name}:{axis}" for v in graph.inputs for axis in range(len(v.shape or ()))}
        faults = [
            InvalidConfig(f"--freeze-dim {name}", "no input has this dimension")
            for name in self.dims
            if name not in symbols
        ]
        faults += [
            InvalidConfig(f"--keep-input {name}", "the graph has no such input")
            for name in self.keep_inputs
            if name not in known
        ]
        if faults:
            raise DiagnosticError([fault.at() for fault in faults])

    def _past_length(self, graph: ir.Graph) -> int:
        """Tokens in the caches that come in."""
        for value in graph.inputs:
            if name_of(value).startswith(PAST_PREFIXES) and value.shape and len(value.shape) > 2:
                dim = value.shape[2]
                known = [dim] if isinstance(dim, int) else []
                known += [self.dims[k] for k in (f"{value.name}:2", str(dim)) if k in self.dims]
                if known:
                    return known[0]
        return self.past_length

    def _conventional_sizes(self, graph: ir.Graph, past: int) -> dict[str, int]:
        """Sizes by ``input:axis`` for the usual decoder inputs, and by name for batches."""
        total = self.sequence_length + past
        sizes = dict.fromkeys(_BATCH_NAMES, 1)
        for value in graph.inputs:
            name = name_of(value)
            if name in _TOKEN_INPUTS:
                sizes |= {f"{name}:0": 1, f"{name}:1": self.sequence_length}
            elif name == "attention_mask":
                sizes |= {f"{name}:0": 1, f"{name}:1": total}
            elif name.startswith(PAST_PREFIXES):
                sizes |= {f"{name}:0": 1, f"{name}:2": past}
        return sizes

    def _bind(self, value: ir.Value, sizes: Mapping[str, int]) -> int:
        dims = list(value.shape or ())
        bound = 0
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                continue
            symbol = str(dim.value)
            explicit = [self.dims.get(f"{value.name}:{axis}"), self.dims.get(symbol)]
            usual = [sizes.get(f"{value.name}:{axis}"), sizes.get(symbol)]
            size = next((s for s in (*explicit, *usual) if s is not None), None)
            if size is None:
                continue
            dims[axis] = size
            bound += 1
        value.shape = ir.Shape(dims)
        return bound

    def _constant_content(
        self, value: ir.Value, past: int
    ) -> tuple[NDArray[np.generic], str] | None:
        """What an input always is once its shape is fixed, or None for a real input."""
        shape = static_shape(value)
        if shape is None or value.dtype is None or value.name in self.keep_inputs:
            return None
        dtype = value.dtype.numpy()
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype), "of no elements"
        match value.name:
            case "attention_mask" if len(shape) == 2:
                return np.ones(shape, dtype), "1 everywhere"
            case "position_ids" if len(shape) == 2:
                row = np.arange(past, past + shape[1], dtype=dtype)
                return np.broadcast_to(row, shape), f"{past} … {past + shape[1] - 1}"
            case "token_type_ids":
                return np.zeros(shape, dtype), "0 everywhere"
        return None


def _bind_input(graph: ir.Graph, value: ir.Value, array: NDArray[np.generic]) -> None:
    graph.inputs.remove(value)
    name, value.name = value.name, f"{value.name}_unbound"
    constant = register_tensor(graph, ir.tensor(np.ascontiguousarray(array), name=name))
    value.replace_all_uses_with(constant, replace_graph_outputs=True)


def _forget_symbolic_shapes(graph: ir.Graph) -> None:
    """Inference keeps a stale symbolic dimension where it could find the number."""
    for node in graph:
        for value in node.outputs:
            if static_shape(value) is None:
                value.shape = None
