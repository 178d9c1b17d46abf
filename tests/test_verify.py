"""The verifier: quiet on a sound graph of each stage, and each check fires on its own fault."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import add_initializer
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import normal, parse

TEXT = """
    g (float[1, 4] x) => (float[2, 2] y)
    <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}, int64[2] s = {2, 2}>
    { h = MatMul(x, w)  r = Relu(h)  y = Reshape(r, s) }
"""


def at(stage: Stage) -> Compilation:
    """A sound compilation of TEXT at a stage."""
    compilation = Compilation(parse(TEXT))
    steps = [
        (Stage.PLANNED, AssignBitWidths(Scheme.parse("w8a16"))),
        (Stage.ENCODED, CalibrateRanges(ArraySamples({"x": normal(2, 4)}))),
        (Stage.ENCODED, UnifyEncodings()),
        (Stage.QDQ, InsertQdq()),
    ]
    order = list(Stage)
    for produced, step in steps:
        if order.index(produced) <= order.index(stage):
            step.run(compilation)
    compilation.stage = stage
    return compilation


def node(compilation: Compilation, output: str) -> ir.Node:
    return next(n for n in compilation.graph if n.outputs[0].name == output)


def faults(compilation: Compilation) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        verify_stage(compilation)
    assert set(caught.value.codes) == {"QN903"}
    return [d.location.value or d.location.node for d in caught.value.diagnostics]


@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.PLANNED, Stage.ENCODED, Stage.QDQ])
def test_a_sound_graph_passes(stage: Stage) -> None:
    verify_stage(at(stage))


STAGES = [Stage.FLOAT, Stage.PLANNED, Stage.ENCODED, Stage.QDQ]


@pytest.mark.parametrize("stage", STAGES)
def test_two_values_of_one_name(stage: Stage) -> None:
    compilation = at(stage)
    node(compilation, "h").outputs[0].name = "x"
    assert "x" in faults(compilation)


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_used_before_it_is_made(stage: Stage) -> None:
    compilation = at(stage)
    first = node(compilation, "h")
    compilation.graph.remove(first)
    compilation.graph.append(first)
    assert "h" in faults(compilation)


@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.PLANNED, Stage.ENCODED])
@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
def test_quantizers_too_early(stage: Stage, kind: str) -> None:
    compilation = at(stage)
    compilation.graph.append(ir.node(kind, [compilation.graph.inputs[0]], name="early"))
    assert "early" in faults(compilation)


@pytest.mark.parametrize("stage", [Stage.PLANNED, Stage.ENCODED])
@pytest.mark.parametrize("name", ["x", "w", "h", "y"])
def test_a_tensor_without_a_plan(stage: Stage, name: str) -> None:
    compilation = at(stage)
    del compilation.bit_plan.specs[name]
    assert faults(compilation) == [name]


def test_a_tensor_whose_type_nobody_knows() -> None:
    compilation = at(Stage.PLANNED)
    node(compilation, "h").outputs[0].type = None
    assert faults(compilation) == ["h"]


def without(compilation: Compilation, name: str) -> None:
    table = {n: compilation.encodings[n] for n in compilation.encodings if n != name}
    compilation.encodings = type(compilation.encodings)()
    for key, value in table.items():
        compilation.encodings[key] = value


@pytest.mark.parametrize("name", ["x", "w", "h"])
def test_a_tensor_without_an_encoding(name: str) -> None:
    compilation = at(Stage.ENCODED)
    without(compilation, name)
    assert faults(compilation) == [name]


def test_a_copy_may_wait_for_its_encoding() -> None:
    compilation = at(Stage.ENCODED)
    without(compilation, "y")
    verify_stage(compilation)


def test_an_encoding_of_another_type() -> None:
    compilation = at(Stage.ENCODED)
    compilation.encodings["h"] = Encoding.from_range(QuantSpec(8, False, False), -1.0, 1.0)
    assert faults(compilation) == ["h"]


def skip_pair(compilation: Compilation, user: str, plain: str) -> None:
    """Lets a node take the float value in front of its Q/DQ pair."""
    value = next(v for n in compilation.graph for v in n.outputs if v.name == plain)
    node(compilation, user).replace_input_with(0, value)


def float_input(compilation: Compilation) -> None:
    node(compilation, "h").replace_input_with(0, compilation.graph.inputs[0])


def float_operand(compilation: Compilation) -> None:
    skip_pair(compilation, "r", "h")


def float_weight(compilation: Compilation) -> None:
    plain = add_initializer(compilation.graph, "plain", np.ones((4, 4), np.float32))
    node(compilation, "h").replace_input_with(1, plain)


def float_output(compilation: Compilation) -> None:
    compilation.graph.outputs[0] = node(compilation, "y_unquantized").outputs[0]


def other_encoding_behind_a_layout_operator(compilation: Compilation) -> None:
    other = add_initializer(compilation.graph, "other", np.asarray(0.5, np.float32))
    for name in ("y_quantized", "y"):
        node(compilation, name).replace_input_with(1, other)


def other_zero_point_behind_a_layout_operator(compilation: Compilation) -> None:
    other = add_initializer(compilation.graph, "other", np.asarray(77, np.uint16))
    for name in ("y_quantized", "y"):
        node(compilation, name).replace_input_with(2, other)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (float_input, "x"),
        (float_operand, "h"),
        (float_weight, "plain"),
        (float_output, "y_unquantized"),
        (other_encoding_behind_a_layout_operator, None),
        (other_zero_point_behind_a_layout_operator, None),
    ],
)
def test_faults_of_a_quantized_graph(
    plant: Callable[[Compilation], None], found: str | None
) -> None:
    compilation = at(Stage.QDQ)
    plant(compilation)
    names = faults(compilation)
    assert found is None or found in names


def test_at_most_twenty_faults_are_listed() -> None:
    body = "  ".join(f"v{i + 1} = Neg(v{i})" for i in range(40))
    compilation = Compilation(
        parse(f"g (float[1] v0) => (float[1] v40) {{ {body} }}"), stage=Stage.PLANNED
    )
    assert len(faults(compilation)) == 20
