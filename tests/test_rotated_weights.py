"""Which weights a rotation reached: noted by fuse-rotation, and read off after other passes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.rotated_weights import MARK, mark_rotated_weights, rotated_weights
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.passes.insert_hadamard import InsertHadamard
from tests.conftest import apply, parse
from tests.decoders import canonical, toy

R1_INPUTS = {"wq", "wk", "wv", "up", "head"}


def rotated(residual: bool, values: bool) -> ir.Model:
    model = toy()
    apply(FoldNormScale(), model)
    apply(FuseRotation(residual=residual, values=values), model)
    return model


@pytest.mark.parametrize(
    ("residual", "values", "inputs", "outputs"),
    [
        (True, False, R1_INPUTS, {"wo", "down"}),
        (False, True, {"wo"}, {"wv"}),
        (True, True, R1_INPUTS | {"wo"}, {"wo", "down", "wv"}),
        (False, False, set(), set()),
    ],
)
def test_weights_of_one_layer(
    residual: bool, values: bool, inputs: set[str], outputs: set[str]
) -> None:
    """The embedding is rotated as well, but is no linear's weight."""
    model = rotated(residual, values)
    found = rotated_weights(model)
    assert found.inputs == inputs
    assert found.outputs == outputs
    assert (MARK in model.metadata_props) == bool(inputs)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_all_but_down_projections_take_rotated_inputs(architecture: str) -> None:
    """Also behind requantize points, and in a copy of the model."""
    model = canonical(architecture)
    apply(FoldNormScale(), model)
    apply(FuseRotation(), model)
    apply(AssignBitWidths(Scheme.parse("w8a8")), model)
    model = model.clone()
    marked = rotated_weights(model)
    linears = [linear for node in model.graph if (linear := as_linear(node)) is not None]
    others = [linear for linear in linears if not marked.takes_rotated(linear)]
    assert len(others) == 2  # one down projection a layer
    assert all(marked.is_merged(linear) for linear in linears)


def test_a_rotation_that_runs_online() -> None:
    model = toy()
    assert apply(InsertHadamard(("r4",)), model) == 1
    marked = rotated_weights(model)
    found = {
        name_of(linear.weight): (marked.takes_rotated(linear), marked.is_merged(linear))
        for node in model.graph
        if (linear := as_linear(node)) is not None
    }
    assert found["down"] == (True, True)
    assert found["up"] == (False, False)


def test_notes_add_up() -> None:
    model = parse(
        "g (float[1] x) => (float[1] y) <float[1] a = {1}, float[1] b = {2}> { y = Add(a, b) }"
    )
    first, second = model.graph.initializers.values()
    mark_rotated_weights(model)
    assert MARK not in model.metadata_props
    mark_rotated_weights(model, inputs=[second])
    mark_rotated_weights(model, inputs=[first], outputs=[second])
    found = rotated_weights(model)
    assert found.inputs == {"a", "b"}
    assert found.outputs == {"b"}
