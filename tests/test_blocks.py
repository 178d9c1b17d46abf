"""A decoder is cut into its layers."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors
from tests.conftest import parse, run_model
from tests.decoders import canonical, some_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_block_before_one_a_layer_one_for_the_head(architecture: str) -> None:
    model = canonical(architecture)
    first, *layers, head = cut_blocks(model.graph)
    assert len(layers) == 2
    assert not any(as_linear(node) for node in first.nodes)
    assert [sum(as_linear(node) is not None for node in layer.nodes) for layer in layers] == [
        sum(as_linear(node) is not None for node in layers[0].nodes)
    ] * 2
    assert sum(as_linear(node) is not None for node in head.nodes) == 1
    for layer in layers:  # the residual stream, and what all layers share
        assert sum(value in layer.takes for value in first.hands_on) >= len(layer.takes) - 1
    assert sum(len(block.nodes) for block in (first, *layers, head)) == len(list(model.graph))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_blocks_run_one_after_another_are_the_graph(architecture: str) -> None:
    model = canonical(architecture)
    feeds = some_tokens(model)
    values = feed_tensors(feeds)
    outputs = [name_of(value) for value in model.graph.outputs]
    for block in cut_blocks(model.graph):
        made = {name_of(value) for node in block.nodes for value in node.outputs}
        wanted = [*(name_of(v) for v in block.hands_on), *(n for n in outputs if n in made)]
        values |= TorchExecutor(block.nodes).run(
            {name_of(value): values[name_of(value)] for value in block.takes}, wanted
        )
    for name, expected in zip(outputs, run_model(model, feeds), strict=True):
        assert np.allclose(values[name].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_that_is_no_decoder_is_cut_by_bytes() -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["" : 20]>
        g (float[1, 4] x) => (float[1, 4] y) <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0,
        0, 0, 0, 1}> { h = MatMul(x, w)  y = Relu(h) }
    """)
    assert [len(block.nodes) for block in cut_blocks(model.graph)] == [2]
