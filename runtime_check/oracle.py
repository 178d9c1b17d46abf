"""Asks a vendor's own compiler what it makes of a graph, and its emulator what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.graph_edit import constant_array, name_of, static_shape
from qnpu.compiler.op_traits import is_float
from qnpu.compiler.operands import operations
from qnpu.compiler.target import TargetProfile
from qnpu.compiler.target_rules import CompiledToFloat, EmulatorDiffers, RefusedByCompiler
from qnpu.runtime_check.htp import HtpCompiler, HtpError, HtpGraph, compare_on_emulator, output_type
from qnpu.runtime_check.session import Array, Feeds


@dataclass(frozen=True, slots=True)
class OracleAnswer:
    """What the vendor's compiler made of a graph.

    Attributes:
        graph: the compiled graph.
        faults: QN530 where it was refused, QN531 for each operation in floating point.
    """

    graph: HtpGraph
    faults: list[Diagnostic]

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, for ``--json``."""
        return {
            "arch": self.graph.arch,
            "verdict": self.graph.verdict.value,
            "operations": len(self.graph.ops_within),
            "float": [op.text for op in self.graph.float_ops],
            "inserted": [op.text for op in self.graph.inserted],
            "seconds": round(self.graph.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """One output on the emulator, against ONNX Runtime's.

    Attributes:
        name: of the output.
        largest, mean: absolute difference, LSB of the output.
        share: of elements that differ at all.
    """

    name: str
    largest: int
    mean: float
    share: float


def ask_htp(htp: HtpCompiler, model: Path, target: TargetProfile) -> OracleAnswer:
    """Compiles a file for a Hexagon target.

    Args:
        htp: the compiler.
        model: Q/DQ ONNX with static shapes.
        target: its ``vendor.arch`` is compiled for.

    Raises:
        HtpError: the compiler is missing, died or hung.
    """
    graph = htp.compile(model, f"v{target.vendor.arch}")
    if graph.refusal:
        nodes = graph.unsupported or ("",)
        faults = [RefusedByCompiler(target.id, graph.refusal).at(node=name) for name in nodes]
    else:
        faults = [
            CompiledToFloat(op.text, target.id).at(node=", ".join(op.sources) or op.name)
            for op in graph.float_ops
        ]
    return OracleAnswer(graph, faults)


def run_on_htp(
    htp: HtpCompiler, model: ir.Model, target: TargetProfile, feeds: Feeds
) -> tuple[list[OutputDifference], list[Diagnostic]]:
    """Runs a graph on the emulator and on ONNX Runtime, and compares the outputs.

    The tolerance is the profile's ``graph/<type>``, or, of a single operator, that one's.

    Returns:
        One difference per output, in graph order, and QN532 for each beyond its tolerance.

    Raises:
        HtpError: the compiler is missing, died or hung, or refused the model.
    """
    found = compare_on_emulator(htp, model, f"v{target.vendor.arch}", feeds)
    alone = [operation.op_type for operation in operations(model.graph)]
    differences: list[OutputDifference] = []
    faults: list[Diagnostic] = []
    for output in model.graph.outputs:
        lsb = found.get(name_of(output))
        if lsb is None or not lsb.size:
            continue
        size = np.abs(lsb)
        largest = int(size.max())
        differences.append(
            OutputDifference(name_of(output), largest, float(size.mean()), float((size > 0).mean()))
        )
        tolerance = _tolerance(target, alone, output_type(output))
        if tolerance is not None and largest > tolerance:
            place = name_of(output)
            faults.append(EmulatorDiffers(largest, tolerance, target.id).at(value=place))
    return differences, faults


def _tolerance(target: TargetProfile, operators: list[str], dtype: str) -> int | None:
    key = operators[0] if len(operators) == 1 else "graph"
    return target.tolerance_lsb.get(f"{key}/{dtype}")


def random_feeds(graph: ir.Graph, seed: int = 0) -> Feeds:
    """Numbers for a trial run: floats over the range of their encoding, ids within their table.

    Args:
        graph: its inputs have static shapes.
        seed: of the numbers.

    Raises:
        HtpError: an input has a dynamic shape.
    """
    random = np.random.default_rng(seed)
    return {name_of(value): _random_input(value, random) for value in graph.inputs}


def _random_input(value: ir.Value, random: np.random.Generator) -> Array:
    shape = static_shape(value)
    if shape is None or value.dtype is None:
        raise HtpError(f"input {value.name} has no static shape")
    dtype = value.dtype.numpy()
    if is_float(value):
        low, high = _range(value)
        return random.uniform(low, high, shape).astype(dtype)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(dtype)
    low, high = _codes(value)
    return random.integers(low, high, shape).astype(dtype)


def _range(value: ir.Value) -> tuple[float, float]:
    """The real range of an input's encoding; ±1 without one."""
    for user in value.consumers():
        if user.op_type == "QuantizeLinear" and user.outputs[0].dtype is not None:
            scale, zero = constant_array(user.inputs[1]), constant_array(user.inputs[2])
            if scale is not None and zero is not None and scale.size == 1:
                codes = np.iinfo(user.outputs[0].dtype.numpy())
                step, middle = float(scale.item()), int(zero.item())
                return step * (codes.min - middle), step * (codes.max - middle)
    return -1.0, 1.0


def _codes(value: ir.Value) -> tuple[int, int]:
    """Lowest and highest + 1: rows of the tables that ids look up, else all that codes can be."""
    rows = [_table_rows(user) for user in value.consumers() if user.op_type == "Gather"]
    if rows:
        return 0, min(rows)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
    if dtype.itemsize > 2:
        return 0, 2
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) + 1


def _table_rows(gather: ir.Node) -> int:
    table = gather.inputs[0]
    shape = static_shape(table) if table is not None else None
    return shape[gather.attributes.get_int("axis", 0)] if shape else 2
