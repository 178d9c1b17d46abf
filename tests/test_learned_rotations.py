"""Rotations that learn: the graph computes the same whatever they are, and gradients are right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.pass_base import Compilation
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.runtime_check.learned_rotations import LearnedRotations
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors
from tests.conftest import run_model
from tests.decoders import canonical, some_tokens, toy


def rotated(architecture: str) -> ir.Model:
    """A tiny decoder with R1 and R2 in its weights."""
    model = canonical(architecture)
    compilation = Compilation(model)
    FoldNormScale().run(compilation)
    FuseRotation().run(compilation)
    return model


def turn(rotations: LearnedRotations, seed: int = 0) -> None:
    """Sets every matrix to some rotation."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in rotations.matrices.values():
            q, _ = torch.linalg.qr(torch.randn(matrix.shape, generator=random))
            matrix.copy_(q)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_model_computes_the_same_under_any_rotation(architecture: str) -> None:
    model = rotated(architecture)
    feeds = some_tokens(model)
    expected = run_model(model, feeds)[0]
    rotations = LearnedRotations(model.graph)
    assert rotations.matrices
    turn(rotations)
    found = TorchExecutor(list(model.graph)).run(
        feed_tensors(feeds), ["logits"], weights=rotations.weight, transform=rotations.output
    )["logits"]
    assert np.abs(found.detach().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert rotations.apply_to_graph() == len(rotations.rotated)
    changed = {
        n for n, value in model.graph.initializers.items() if value.const_value is not before[n]
    }
    assert changed == rotations.rotated
    again = run_model(model, feeds)[0]
    assert np.abs(again - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gradients_of_the_rotations_are_finite_differences() -> None:
    """Of a loss that does change: weights through a cube, which no rotation commutes with."""
    model = rotated("llama")
    rotations = LearnedRotations(model.graph).double()
    names = sorted(rotations.weights)

    def loss() -> torch.Tensor:
        weights = [rotations.weight(name) for name in names]
        return torch.stack([w.double().pow(3).sum() for w in weights if w is not None]).sum()

    loss().backward()  # type: ignore[no-untyped-call]
    for key, matrix in rotations.matrices.items():
        assert matrix.grad is not None
        direction = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)).double()
        ends = []
        start = matrix.detach().clone()
        with torch.no_grad():
            for step in (1e-2, -1e-2):
                matrix.copy_(start + step * direction)
                ends.append(float(loss()))
            matrix.copy_(start)
        slope = (ends[0] - ends[1]) / 2e-2
        assert float((matrix.grad * direction).sum()) == pytest.approx(slope, rel=1e-2), key


def test_a_stream_that_a_gain_blocks_does_not_rotate() -> None:
    rotations = LearnedRotations(toy().graph)
    assert "r1" not in rotations.matrices
    assert name_of(next(iter(toy().graph.inputs))) not in rotations.rotated
