"""Integer graphs hold no float, and a float is found wherever one is planted."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import add_initializer, name_of
from qnpu.compiler.integer_only import float_faults
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.verify import verify_stage
from qnpu.models.tiny_decoder import ARCHITECTURES
from tests.conftest import parse
from tests.lowered import lowered

FLOAT, UINT8 = int(ir.DataType.FLOAT), int(ir.DataType.UINT8)

HALVES = """
    <ir_version: 10, opset_import: ["" : 21, "qnpu" : 1]>
    g (uint8[4] x) => (uint8[4] y) { y = qnpu.Half(x) }
    <domain: "qnpu", opset_import: ["" : 21, "qnpu" : 1]>
    Half (x) => (y) { r = qnpu.Inner(x)  y = Cast<to: int = 2>(r) }
    <domain: "qnpu", opset_import: ["" : 21]>
    Inner (x) => (r) { TYPE }
"""
FLOATS_WITHIN = "c = Constant<value_float: float = 0.5>()  f = Cast<to: int = 1>(x)  r = Mul(f, c)"
INTEGERS_WITHIN = "c = Constant<value_int: int = 3>()  f = Cast<to: int = 7>(x)  r = Mul(f, c)"


def found(model: ir.Model) -> list[str]:
    """Names of values at fault."""
    return [value for _, _, value in float_faults(model)]


def sound() -> ir.Model:
    return lowered("llama", "w8a8").integer


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders_hold_integers_alone(architecture: str, scheme: str) -> None:
    model = lowered(architecture, scheme).integer
    verify_stage(Compilation(model, stage=Stage.INTEGER))
    assert any(node.domain == "qnpu" for node in model.graph)


def test_the_graph_before_is_full_of_them() -> None:
    model = lowered("llama", "w8a8").qdq
    named = {v.name for n in model.graph for v in n.outputs if v.dtype is ir.DataType.FLOAT}
    assert named < set(found(model))


def test_the_model_is_left_as_it_is() -> None:
    model = sound()
    before, functions = model_to_text(model), len(model.functions)
    assert found(model) == []
    assert model_to_text(model) == before
    assert len(model.functions) == functions > 0
    assert not any(node.metadata_props for node in model.graph)


def detour(model: ir.Model, *, claimed: ir.DataType | None) -> str:
    """Takes the codes of some node through floats; what the file says of them may be a lie."""
    node = next(n for n in model.graph if n.op_type == "Reshape")
    codes = node.inputs[0]
    assert codes is not None
    there = ir.node("Cast", [codes], {"to": FLOAT}, name="there")
    back = ir.node("Cast", [there.outputs[0]], {"to": UINT8}, name="back")
    there.outputs[0].name, back.outputs[0].name = "planted", "codes_again"
    there.outputs[0].type = None if claimed is None else ir.TensorType(claimed)
    back.outputs[0].type = codes.type
    model.graph.insert_before(node, [there, back])
    node.replace_input_with(0, back.outputs[0])
    return "planted"


@pytest.mark.parametrize("claimed", [ir.DataType.FLOAT, ir.DataType.UINT8, None])
def test_a_node_of_the_graph(claimed: ir.DataType | None) -> None:
    model = sound()
    name = detour(model, claimed=claimed)
    assert list(float_faults(model)) == [("holds floats, FLOAT", "there", name)]


def test_inside_a_function_that_a_function_calls() -> None:
    model = parse(HALVES.replace("TYPE", FLOATS_WITHIN))
    model.graph[0].name = "caller"
    faults = list(float_faults(model))
    assert [value for _, _, value in faults] == ["c", "f", "r"]
    assert {node for _, node, _ in faults} == {"caller"}
    assert found(parse(HALVES.replace("TYPE", INTEGERS_WITHIN))) == []


def test_inside_one_of_the_functions_of_a_decoder() -> None:
    model = sound()
    body = next(f for f in model.functions.values() if f.name == "IntRMSNormShort")
    last = body.outputs[0].producer()
    assert last is not None
    there = ir.node("Cast", [last.inputs[0]], {"to": FLOAT}, name="there")
    there.outputs[0].name = "inner"
    body.insert_before(last, there)
    last.replace_input_with(0, there.outputs[0])
    faults = list(float_faults(model))
    calls = [name_of(n) for n in model.graph if n.op_type == "IntRMSNormShort"]
    assert [node for _, node, _ in faults] == calls
    assert all(value.startswith("inner") for _, _, value in faults)


def test_an_initializer_counts_where_it_is_used() -> None:
    model = sound()
    plain = add_initializer(model.graph, "plain", np.ones(1, np.float32))
    assert found(model) == []
    model.graph.append(ir.node("Cast", [plain], {"to": UINT8}, name="reads_it"))
    assert found(model) == ["plain"]


def test_an_output() -> None:
    model = sound()
    codes = model.graph.outputs[0]
    node = ir.node(
        "DequantizeLinear", [codes, add_initializer(model.graph, "s", np.array(2, np.float32))]
    )
    node.name, node.outputs[0].name = "real", "real_logits"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    assert found(model) == ["s", "real_logits"]


def test_an_input() -> None:
    assert found(parse("g (float[2] x) => (uint8[2] y) { y = Cast<to: int = 2>(x) }")) == ["x"]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "double", "float8e4m3fn"])
def test_every_kind_of_float(kind: str) -> None:
    text = f"g ({kind}[2] x) => (uint8[2] y) {{ y = Cast<to: int = 2>(x) }}"
    assert found(parse(text)) == ["x"]


def test_a_branch() -> None:
    text = """
        g (bool c, uint8[2] x) => (uint8[2] y) {
            y = If (c) <
                then_branch = t () => (uint8[2] a) {
                    f = Cast<to: int = 1>(x)
                    a = Cast<to: int = 2>(f)
                },
                else_branch = e () => (uint8[2] b) { b = Identity(x) }
            >
        }
    """
    assert found(parse(text)) == ["f"]


def test_a_type_that_nobody_knows() -> None:
    model = parse("g (uint8[2] x) => (uint8[2] y) { y = Identity(x) }")
    node = ir.node("Secret", [model.graph.inputs[0]], domain="elsewhere", name="secret")
    node.outputs[0].name, node.outputs[0].type = "hidden", ir.TensorType(ir.DataType.UINT8)
    model.graph.opset_imports["elsewhere"] = 1
    model.graph.append(node)
    assert [(n, v) for _, n, v in float_faults(model)] == [("secret", "hidden")]


def test_the_verifier_says_so() -> None:
    model = sound()
    name = detour(model, claimed=ir.DataType.FLOAT)
    with pytest.raises(DiagnosticError) as caught:
        verify_stage(Compilation(model, stage=Stage.INTEGER))
    assert caught.value.codes == ["QN903"]
    assert caught.value.diagnostics[0].location.value == name


QUANTIZED = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (uint8[2, 3] x) => (uint8[2, 2] y)
    <uint8 zx = {7}, int8[3, 2] w = {1, 2, 3, 4, 5, 6}, int8 zw = {0}, uint8 zy = {9},
     float one = {1}, float[2] s = {0.5, 0.25}>
    { y = QLinearMatMul(x, one, zx, w, s, zw, one, zy) MORE }
"""


def test_scales_of_an_operator_on_codes_may_be_floats() -> None:
    assert found(parse(QUANTIZED.replace("MORE", ""))) == []


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("u = Mul(one, one)", "one"),  # something else takes a scale
        ("u = Cast<to: int = 1>(x)", "u"),
    ],
)
def test_any_other_float_beside_them_is_found(more: str, fault: str) -> None:
    assert fault in found(parse(QUANTIZED.replace("MORE", more)))


def test_a_scale_that_is_computed_is_found() -> None:
    text = QUANTIZED.replace("MORE", "").replace("{ y", "{ t = Identity(s) y")
    assert set(found(parse(text.replace("w, s,", "w, t,")))) == {"s", "t"}


def test_a_scale_that_comes_in_or_goes_out_is_found() -> None:
    text = QUANTIZED.replace("MORE", "")
    entering = text.replace("x) =>", "x, float t) =>").replace("w, s,", "w, t,")
    assert found(parse(entering)) == ["t"]
    model = parse(text)
    model.graph.outputs.append(model.graph.initializers["s"])
    assert found(model) == ["s"]
