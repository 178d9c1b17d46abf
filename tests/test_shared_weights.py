"""Tensors of several models in one file: each once, each found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.shared_weights import WEIGHTS_NAME, SharedWeights
from tests.conftest import Array, normal, parse, run_model


def model(weights: Array, bias: Array) -> ir.Model:
    text = f"""
        g (float[1, {len(weights)}] x) => (float[1, {weights.shape[1]}] y)
        <float[1, 1] w, float[1, 1] b> {{ h = MatMul(x, w)  y = Add(h, b) }}
    """.replace("<float[1, 1] w, float[1, 1] b>", "<float[1] w = {0}, float[1] b = {0}>")
    found = parse(text)
    for name, array in (("w", weights), ("b", bias)):
        value = found.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(list(array.shape))
    return found


def test_two_models_share_what_is_equal(tmp_path: Path) -> None:
    weights = normal(40, 30)
    first = model(weights, normal(1, 30, seed=1))
    second = model(weights.copy(), normal(1, 30, seed=2))
    third = model(normal(40, 30, seed=3), normal(1, 30, seed=4))
    models = {"first.onnx": first, "second.onnx": second, "third.onnx": third}
    shared = SharedWeights(list(models.values()))
    shared.write(tmp_path / WEIGHTS_NAME)
    for name, item in models.items():
        shared.save_model(item, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 1500  # the bias is inside, the weight is not
    assert (tmp_path / WEIGHTS_NAME).stat().st_size == 8192 + 4800  # two weights, at 0 and 8192
    feeds = {"x": normal(1, 40, seed=5)}
    for name, item in models.items():
        loaded = ir.load(tmp_path / name)
        np.testing.assert_array_equal(run_model(loaded, feeds)[0], run_model(item, feeds)[0])
    stored = ir.load(tmp_path / "second.onnx").graph.initializers["w"].const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert (stored.location, stored.offset, stored.length) == (WEIGHTS_NAME, 0, 4800)


def test_models_are_left_as_they_are(tmp_path: Path) -> None:
    item = model(normal(40, 30), normal(1, 30))
    before = item.graph.initializers["w"].const_value
    shared = SharedWeights([item])
    shared.write(tmp_path / WEIGHTS_NAME)
    shared.save_model(item, tmp_path / "m.onnx")
    assert item.graph.initializers["w"].const_value is before


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT16, ir.DataType.INT8])
def test_codes_come_back(dtype: ir.DataType, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 8, (64, 65)).astype(dtype.numpy())
    item = parse("g (float[1] x) => (float[1] y) <float[1] w = {0}> { y = Add(x, w) }")
    value = item.graph.initializers["w"]
    value.const_value = ir.tensor(codes, dtype=dtype, name="w")
    value.type, value.shape = ir.TensorType(dtype), ir.Shape([64, 65])
    shared = SharedWeights([item])
    shared.write(tmp_path / WEIGHTS_NAME)
    shared.save_model(item, tmp_path / "m.onnx")
    stored = ir.load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert stored.dtype is dtype
    np.testing.assert_array_equal(stored.numpy(), codes)
