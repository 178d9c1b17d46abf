"""Every torch operator against ONNX's own node test cases, and its gradient against differences."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.runtime_check import torch_layers, torch_ops
from qnpu.runtime_check.torch_executor import TorchExecutor
from qnpu.runtime_check.torch_operator import Unsupported, tensor_of
from tests.conftest import parse

CASES_THAT_RUN = 1180
NO_CASE = {
    "SimplifiedLayerNormalization",  # ONNX Runtime's own name of RMSNormalization
}
REFUSED: dict[str, Callable[[str], bool]] = {
    "sequences and optional values": lambda reason: reason == "no tensor",
    "operators": lambda reason: reason == "no such operator here",
    "types": lambda reason: reason.startswith(("type ", "codes of type", "a cast to")),
    "opsets": lambda reason: reason.startswith("opset "),
    "forms": lambda reason: True,
}


@lru_cache(maxsize=1)
def node_cases() -> list[Any]:
    """ONNX's node test cases that come with a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    return [case for case in cases if case.model is not None]


def test_node_cases() -> None:
    """Each case is right or refused by a coded diagnostic; of each operator at least one is run."""
    ran, wrong, refused = 0, list[str](), Counter[str]()
    covered: set[str] = set()
    for case in node_cases():
        model = ir.serde.deserialize_model(case.model)
        try:
            faults = run_case(case, model)
        except (DiagnosticError, Unsupported) as error:
            reason = str(error)
            if isinstance(error, DiagnosticError):
                assert set(error.codes) == {"QN307"}, case.name
                reason = error.diagnostics[0].rule.reason  # type: ignore[attr-defined]
            refused[next(name for name, fits in REFUSED.items() if fits(reason))] += 1
            continue
        wrong += [f"{case.name}: {fault}" for fault in faults]
        ran += 1
        covered |= {node.op_type for node in model.graph}
    print(f"{ran} cases run; refused: {dict(refused)}")
    assert wrong == []
    assert ran >= CASES_THAT_RUN
    assert set(torch_ops.OPERATORS) | set(torch_layers.OPERATORS) == (
        covered & (set(torch_ops.OPERATORS) | set(torch_layers.OPERATORS)) | NO_CASE
    )


def run_case(case: Any, model: ir.Model) -> list[str]:
    """What is wrong with the outputs; a case's own tolerances, wider for 16-bit floats."""
    if len(model.graph) > 1:  # an operator alone has typed outputs
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    executor = TorchExecutor(model.graph)
    faults: list[str] = []
    for inputs, outputs in case.data_sets:
        feeds = {
            name_of(value): tensor(item, value.dtype)
            for value, item in zip(model.graph.inputs, inputs, strict=True)
        }
        got = executor.run(feeds, [name_of(value) for value in model.graph.outputs])
        for value, item in zip(model.graph.outputs, outputs, strict=True):
            expected, actual = tensor(item, value.dtype), got[name_of(value)]
            short = expected.dtype in (torch.float16, torch.bfloat16)
            rtol, atol = (1e-2, 1e-3) if short else (case.rtol, case.atol)
            if actual.shape != expected.shape:
                faults.append(f"{value.name} has shape {tuple(actual.shape)}")
            elif not np.allclose(
                actual.double().numpy(), expected.double().numpy(), rtol, atol, equal_nan=True
            ):
                faults.append(f"{value.name} differs")
    return faults


def tensor(item: Any, dtype: ir.DataType | None) -> torch.Tensor:
    """An item of a data set, which is an array or, for odd types, a protobuf."""
    if isinstance(item, onnx.TensorProto):
        return tensor_of(ir.serde.deserialize_tensor(item), torch.float32)
    if not isinstance(item, np.ndarray | np.generic) or item.dtype.kind in "OU":
        raise Unsupported("no tensor")
    return tensor_of(ir.tensor(np.asarray(item), dtype=dtype), torch.float32)


X, ROW, PICTURE = "float[2, 3, 4] x", "float[4] r", "float[1, 2, 5, 5] x"
GRADIENTS: dict[str, tuple[str, str]] = {
    # name → (typed inputs, line); every float input is checked
    "Abs": (X, "y = Abs(x)"),
    "Add": (f"{X}, {ROW}", "y = Add(x, r)"),
    "Attention": (
        "float[1, 4, 3, 2] x, float[1, 2, 3, 2] k, float[1, 2, 3, 2] v",
        "y = Attention<is_causal: int = 1, softcap: float = 2.0>(x, k, v)",
    ),
    "AveragePool": (PICTURE, "y = AveragePool<kernel_shape: ints = [2, 2]>(x)"),
    "BatchNormalization": (
        "float[1, 2, 5, 5] x, float[2] g, float[2] b, float[2] m, float[2] positive",
        "y = BatchNormalization(x, g, b, m, positive)",
    ),
    "Clip": (X, "low = Constant<value_float: float = -0.5>() y = Clip(x, low)"),
    "Concat": (f"{X}, float[2, 1, 4] z", "y = Concat<axis: int = 1>(x, z)"),
    "Conv": (
        f"{PICTURE}, float[4, 1, 3, 3] w, float[4] b",
        "y = Conv<group: int = 2, pads: ints = [1, 0, 1, 2], strides: ints = [2, 1]>(x, w, b)",
    ),
    "ConvTranspose": (
        f"{PICTURE}, float[2, 3, 3, 3] w, float[3] b",
        "y = ConvTranspose<pads: ints = [1, 0, 1, 2], strides: ints = [2, 1]>(x, w, b)",
    ),
    "CumSum": (X, "a = Constant<value_int: int = 1>() y = CumSum<reverse: int = 1>(x, a)"),
    "DequantizeLinear": ("float[4] s", "y = DequantizeLinear(codes, s)"),
    "Div": (f"{X}, float[4] positive", "y = Div(x, positive)"),
    "Erf": (X, "y = Erf(x)"),
    "Exp": (X, "y = Exp(x)"),
    "Expand": (ROW, "s = Constant<value_ints: ints = [3, 1]>() y = Expand(r, s)"),
    "Gather": (X, "i = Constant<value_ints: ints = [1, -1]>() y = Gather<axis: int = 1>(x, i)"),
    "Gelu": (X, 'y = Gelu<approximate: string = "tanh">(x)'),
    "Gemm": (
        "float[3, 2] a, float[4, 3] b, float[4] c",
        "y = Gemm<transA: int = 1, transB: int = 1, alpha: float = 0.5, beta: float = 2.0>"
        "(a, b, c)",
    ),
    "LayerNormalization": (
        f"{X}, {ROW}, float[4] b",
        "y = LayerNormalization(x, r, b)",
    ),
    "Log": ("float[4] positive", "y = Log(positive)"),
    "LogSoftmax": (X, "y = LogSoftmax<axis: int = 1>(x)"),
    "MatMul": (f"{X}, float[4, 5] w", "y = MatMul(x, w)"),
    "MaxPool": (PICTURE, "y = MaxPool<kernel_shape: ints = [2, 2], pads: ints = [1, 0, 0, 1]>(x)"),
    "Min": (f"{X}, {ROW}", "y = Min(x, r)"),
    "Pad": (
        ROW,
        'p = Constant<value_ints: ints = [2, 1]>() y = Pad<mode: string = "reflect">(r, p)',
    ),
    "Pow": (
        "float[4] positive",
        "e = Constant<value_float: float = 1.5>() y = Pow(positive, e)",
    ),
    "RMSNormalization": (f"{X}, {ROW}", "y = RMSNormalization(x, r)"),
    "ReduceL2": (X, "y = ReduceL2(x)"),
    "ReduceLogSumExp": (X, "y = ReduceLogSumExp(x)"),
    "ReduceMax": (X, "a = Constant<value_ints: ints = [1]>() y = ReduceMax(x, a)"),
    "ReduceMean": (X, "a = Constant<value_ints: ints = [0, 2]>() y = ReduceMean(x, a)"),
    "ReduceProd": (X, "a = Constant<value_ints: ints = [0, 2]>() y = ReduceProd(x, a)"),
    "Resize": (
        PICTURE,
        "s = Constant<value_ints: ints = [1, 2, 8, 3]>()"
        ' y = Resize<mode: string = "linear">(x, , , s)',
    ),
    "RotaryEmbedding": (
        "float[1, 2, 3, 4] x, float[1, 3, 2] c, float[1, 3, 2] s",
        "y = RotaryEmbedding(x, c, s)",
    ),
    "Sigmoid": (X, "y = Sigmoid(x)"),
    "Slice": (
        X,
        "b = Constant<value_ints: ints = [-1]>() e = Constant<value_ints: ints = [-9]>()"
        " a = Constant<value_ints: ints = [2]>() s = Constant<value_ints: ints = [-2]>()"
        " y = Slice(x, b, e, a, s)",
    ),
    "Softmax": (X, "y = Softmax(x)"),
    "Split": (X, "z, y = Split<axis: int = 2, num_outputs: int = 2>(x)"),
    "Sqrt": ("float[4] positive", "y = Sqrt(positive)"),
    "Swish": (X, "y = Swish<alpha: float = 1.5>(x)"),
    "Tanh": (X, "y = Tanh(x)"),
    "Tile": (ROW, "n = Constant<value_ints: ints = [3]>() y = Tile(r, n)"),
    "Transpose": (X, "y = Transpose<perm: ints = [1, 0, 2]>(x)"),
    "Where": (f"{X}, {ROW}", "c = Less(x, r) y = Where(c, x, r)"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    """Against finite differences, in float64, with respect to every input."""
    inputs, line = GRADIENTS[name]
    header = '<ir_version: 11, opset_import: ["" : 24]>'
    codes = "<int8[2, 4] codes = {-128, -3, 0, 1, 2, 3, 5, 127}>"
    model = parse(f"{header} g ({inputs}) => (float[N] y) {codes} {{ {line} }}")
    executor = TorchExecutor(model.graph, dtype=torch.float64)
    names = [name_of(v) for v in model.graph.inputs if v.name != "codes"]
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for value in model.graph.inputs:
        if value.name == "codes":
            continue
        shape = static_shape(value) or ()
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = noise.abs() + 0.5 if value.name == "positive" else noise
        tensors.append(noise.requires_grad_())

    def function(*items: torch.Tensor) -> torch.Tensor:
        return executor.run(dict(zip(names, items, strict=True)), ["y"])["y"]

    assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_a_gradient_that_is_only_assumed_is_noticed() -> None:
    """What gradcheck is worth: it fails where a gradient is wrong."""
    x = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(torch_layers.rounded, [x + 0.1], raise_exception=False)


QDQ = """
    g (float[5] x) => (float[5] y, int8[5] q) <float s = {0.5}, int8 z = {3}> {
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, z)
    }
"""


def test_gradients_of_a_quantizer() -> None:
    """Straight through inside the range; with respect to the scale as in LSQ."""
    executor = TorchExecutor(parse(QDQ).graph)
    x = torch.tensor([-100.0, -0.6, 0.25, 0.9, 100.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    got = executor.run({"x": x}, ["y", "q"], weights={"s": scale})
    assert got["q"].tolist() == [-128, 2, 3, 5, 127]
    assert got["y"].tolist() == [-65.5, -0.5, 0.0, 1.0, 62.0]
    (slope, by_scale) = torch.autograd.grad(got["y"].sum(), [x, scale])
    assert slope.tolist() == [0, 1, 1, 1, 0]
    inside = (-1 + 1.2) + (0 - 0.5) + (2 - 1.8)  # round(x/s) - x/s
    assert by_scale.item() == pytest.approx(-131 + 124 + inside, abs=1e-4)
