"""Text of graphs: complete, deterministic, readable by onnx.parser."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import add_initializer
from qnpu.compiler.printer import model_to_text
from tests.conftest import parse

TEXT = """\
<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>
g (float[1, N] x, bool c) => (float[1, N] y)
<float[2] w = {0.1, -inf},
 float s = {1e-12},
 uint16 z = {3},
 bool[2] flags = {1, 0},
 int64[2] order = {1, -1}>
{
  a = acme.Mix<alpha: float = 1.0, name: string = "q\\"uote", sizes: ints = [1, 2], \
steps: floats = [1.0, 0.25], value: tensor = float[2] {1.0, 2.0}>(x, "", w)
  y = If<else_branch: graph = e () => (float[1, N] n) { n = Neg(a) }, \
then_branch: graph = t () => (float[1, N] p) { p = Relu(a) }>(c)
}
"""


def test_text_survives_the_parser() -> None:
    assert model_to_text(parse(TEXT)) == TEXT


def test_four_bit_elements_are_all_printed() -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    codes = np.array([-8, 7, 1, -1, 0]).astype(ml_dtypes.int4)
    add_initializer(model.graph, "w", codes)
    assert "int4[5] w = {-8, 7, 1, -1, 0}" in model_to_text(model)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(ml_dtypes.bfloat16, "{0.5, nan, inf, 2}"), (np.float16, "{0.5, nan, inf, 2.0}")],
)
def test_half_precision(dtype: Any, expected: str) -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    add_initializer(model.graph, "w", np.array([0.5, np.nan, np.inf, 2.0]).astype(dtype))
    assert f"[4] w = {expected}" in model_to_text(model)


def test_values_without_type() -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph.outputs[0].type = None
    model.graph.outputs[0].shape = None
    model.graph.inputs[0].shape = ir.Shape([None])
    assert "(float[?] x) => (undefined[] y)" in model_to_text(model)
