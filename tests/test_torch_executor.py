"""Torch runs a graph as ONNX means it, with gradients."""

from __future__ import annotations

import pytest
import torch

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors
from tests.conftest import parse, relative_error, run_model
from tests.decoders import canonical, some_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders(architecture: str) -> None:
    model = canonical(architecture)
    feeds = some_tokens(model)
    names = [name_of(v) for v in model.graph.outputs]
    with torch.no_grad():
        got = TorchExecutor(model.graph).run(feed_tensors(feeds), names)
    for tensor, expected in zip(got.values(), run_model(model, feeds), strict=True):
        assert relative_error(tensor.numpy(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("y = acme.Relu(x)", "acme.Relu"),
        ("y = Multinomial(x)", "Multinomial"),
        ("y = Relu<speed: int = 3>(x)", "speed"),
        ('y = Pad<mode: string = "mirror">(x, two)', "mirror"),
        ("y = Cast<to: int = 8>(x)", "STRING"),
        ("y, z = RotaryEmbedding<warp: int = 1>(x, x, x)", "warp"),
    ],
)
def test_what_torch_cannot_run(line: str, word: str) -> None:
    header = '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'
    model = parse(
        f"{header} g (float[1, 4] x, int64[4] two) => (float[1, 4] y) {{ n = Neg(x) {line} }}"
    )
    with pytest.raises(DiagnosticError) as caught:
        TorchExecutor(model.graph)
    assert caught.value.codes == ["QN307"]
    assert word in str(caught.value)
