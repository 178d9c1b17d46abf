"""Runs one integer function on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.integer_arguments import Arguments
from qnpu.compiler.integer_edit import IntegerEditor
from qnpu.compiler.quant_types import Encoding, QuantSpec
from tests.conftest import run_model

Array = NDArray[Any]
U8, S8 = QuantSpec(8, signed=False, symmetric=False), QuantSpec(8, signed=True, symmetric=False)
U16, S16 = QuantSpec(16, signed=False, symmetric=False), QuantSpec(16, signed=True, symmetric=False)
SPECS = (U8, S8, U16, S16)


def result(spec: QuantSpec, scale: float = 1.0, zero: int = 0) -> Encoding:
    """An encoding per tensor."""
    return Encoding(spec, np.array(scale, np.float32), np.array(zero, np.int32))


def call(
    function: str,
    operands: Sequence[Array],
    arguments: Arguments,
    dtype: ir.DataType,
    **attributes: int,
) -> list[Array]:
    """All outputs of the function, as ONNX Runtime computes them."""
    inputs = [
        ir.Value(
            name=f"x{i}",
            type=ir.TensorType(ir.DataType.from_numpy(a.dtype)),
            shape=ir.Shape(a.shape),
        )
        for i, a in enumerate(operands)
    ]
    anchor = ir.node("Identity", [inputs[0]], name="anchor")
    graph = ir.Graph(inputs, [], nodes=[anchor], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    like = ir.Value(name="y", type=ir.TensorType(dtype))
    result = IntegerEditor(model).call(
        function, inputs, arguments, like, before=anchor, **attributes
    )
    producer = result.producer()
    assert producer is not None
    graph.outputs.extend(producer.outputs)
    graph.remove(anchor)
    return run_model(model, {f"x{i}": a for i, a in enumerate(operands)})


def codes(spec: QuantSpec, *shape: int, seed: int = 0) -> Array:
    """Random codes, the extremes among them."""
    found = np.random.default_rng(seed).integers(spec.q_min, spec.q_max + 1, shape)
    flat = found.reshape(-1)
    flat[:1], flat[-1:] = spec.q_min, spec.q_max
    return found.astype(spec.code_dtype)
