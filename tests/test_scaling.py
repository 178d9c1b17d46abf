"""The Llamas of bench/scaling: understood as decoders, of the size they say, computed rightly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.scaling import SHAPES, Cost, Shape, draw, per_layer, write_llama
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.pipeline import find_topology
from qnpu.models.load import load_onnx
from qnpu.runtime_check.session import open_session, run

TINY = Shape(2, 64, 128, 4, 2, 16, 50, tied=True)


def cost(layers: int, seconds: float) -> Cost:
    return Cost(layers, 4000, 1000, {"total": seconds}, seconds, {}, 2**20 * layers)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_understood_and_of_the_size_it_says(tmp_path: Path, tied: bool) -> None:
    shape = dataclasses.replace(TINY, tied=tied)
    path = tmp_path / "model.onnx"
    write_llama(path, shape, tokens=8)
    model = load_onnx(path)
    weights = [
        value for value in model.graph.initializers.values() if "weight" in (value.name or "")
    ]
    sizes = [value.const_value.nbytes for value in weights if value.const_value is not None]
    assert sum(sizes) == shape.float_bytes
    topology = find_topology(model, CompileConfig(seq_len=8))
    assert topology is not None
    assert not topology.stream.blockers
    assert not topology.value_blockers
    assert len(topology.value_paths) == 2


def test_llama_is_causal(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_llama(path, TINY, tokens=8)
    ids = np.arange(8)[None]
    other = np.where(np.arange(8) == 5, 49, ids)
    session = open_session(path)
    first, second = (run(session, None, {"input_ids": item})[0] for item in (ids, other))
    np.testing.assert_allclose(first[:, :5], second[:, :5], rtol=1e-5, atol=1e-6)
    assert (np.abs(first[:, 5:] - second[:, 5:]).max(axis=-1) > 1e-4).all()


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "m.onnx"
        write_llama(path, TINY, tokens=8, seed=seed)
        contents.append(path.read_bytes() + path.with_name("m.onnx.data").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_llama_1b_has_as_many_weights_as_the_real_one() -> None:
    assert SHAPES["1b"].float_bytes == 4 * 1_235_814_400


def test_cost_of_a_layer_and_plot(tmp_path: Path) -> None:
    costs = [cost(2, 10.0), cost(4, 14.0), cost(8, 28.0)]
    assert list(per_layer(costs, [item.cpu for item in costs])) == [(4, 2.0), (8, 3.0)]
    draw(costs, tmp_path / "plot.svg", "title")
    assert "each added layer, s" in (tmp_path / "plot.svg").read_text("utf-8")
