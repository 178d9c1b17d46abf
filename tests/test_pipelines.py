"""Our passes behind other tools': onnxscript's optimizer and rules, ONNX Runtime's optimizer.

The decoder is as optimum exports it: nothing is folded yet, so that the others have work to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import onnxscript.rewriter
import pytest

from qnpu.compiler import CompileConfig, CompileResult, compile_model
from qnpu.compiler.pipeline import canonical_passes
from qnpu.compiler.topology import describe, discover
from qnpu.models.load import load_onnx
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.runtime_check.compare import sqnr_db
from qnpu.runtime_check.feeds import TokenWindows
from tests.conftest import Array, relative_error, run_model
from tests.decoders import LENGTH, exported

Tool = Callable[[ir.Model, Path], ir.Model]

WINDOWS = TokenWindows(np.random.default_rng(0).integers(0, 257, (2, LENGTH)))
CONFIG = CompileConfig(seq_len=LENGTH)
# Measured: the outputs of the two compiles are equal, bit for bit.
SQNR = 60.0


def onnxscripts(model: ir.Model, folder: Path) -> ir.Model:
    """Its optimizer, then the rules that its rewriter has by default."""
    optimized = onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(model))
    assert isinstance(optimized, ir.Model)
    return optimized


def onnxruntimes(model: ir.Model, folder: Path) -> ir.Model:
    """The file that ONNX Runtime writes of a graph optimized offline, at the basic level."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ir.save(model, folder / "plain.onnx")
    onnxruntime.InferenceSession(folder / "plain.onnx", options)
    return load_onnx(folder / "optimized.onnx")


@cache
def plain(architecture: str) -> CompileResult:
    """What becomes of the graph that no other tool has touched."""
    return compile_model(exported(architecture, "optimum"), CONFIG, WINDOWS)


def logits(model: ir.Model) -> Array:
    return run_model(model, WINDOWS.feeds(model.graph.inputs)[0])[0]


def items(model: ir.Model) -> list[tuple[str, str]]:
    """Roles and shapes of a decoder's linears, and why one is blocked; no names."""
    topology = discover(model.graph)
    assert topology is not None
    return sorted((role.partition(" behind ")[0], what) for role, _, what in describe(topology))


@pytest.mark.parametrize("tool", [onnxscripts, onnxruntimes])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3"])
def test_a_graph_that_another_tool_optimized(architecture: str, tool: Tool, tmp_path: Path) -> None:
    untouched = exported(architecture, "optimum")
    model = tool(exported(architecture, "optimum"), tmp_path)
    assert len(model.graph) < 0.7 * len(untouched.graph)
    model = ir.passes.Sequential(*canonical_passes(CONFIG))(model).model
    expected = plain(architecture)
    assert items(model) == items(expected.canonical_model)
    found = compile_model(model, CONFIG, WINDOWS)
    assert found.bit_plan.scheme == expected.bit_plan.scheme
    assert sqnr_db(logits(expected.model), logits(found.model)) >= SQNR


def test_rotation_in_a_sequence_among_passes_of_others(tmp_path: Path) -> None:
    pipeline = ir.passes.Sequential(
        ir.passes.common.CommonSubexpressionEliminationPass(),
        *canonical_passes(CONFIG),
        ir.passes.common.RemoveUnusedNodesPass(),
        FoldNormScale(),
        FuseRotation(seed=1),
        ir.passes.common.CheckerPass(),
    )
    model = pipeline(onnxscripts(exported("llama", "optimum"), tmp_path)).model
    source = plain("llama").source_model
    assert relative_error(logits(model), logits(source)) <= 1e-5
    assert not ir.passes.Sequential(FoldNormScale(), FuseRotation(seed=1))(model).modified
