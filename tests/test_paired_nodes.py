"""Units: each takes the codes of those before it, and together they are the whole graph."""

from __future__ import annotations

from collections import Counter

import pytest

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.pass_base import Compilation
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.paired_nodes import Unit, units
from tests.conftest import parse
from tests.lowered import lowered


def functions(unit: Unit) -> list[str]:
    return [node.op_type for node in unit.nodes]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_units_cover_both_graphs(architecture: str) -> None:
    made = lowered(architecture, "w8a8")
    found = units(made.qdq.graph, made.integer.graph)
    quantizers = [n for n in made.qdq.graph if n.op_type == "QuantizeLinear"]
    ends = [unit.quantize for unit in found]
    assert [node for node in quantizers if node in ends] == ends
    assert {node for unit in found for node in unit.nodes} == set(made.integer.graph)
    computed = {node for unit in found for node in unit.reference_nodes} | set(ends)
    last = made.qdq.graph.outputs[0].producer()
    assert set(made.qdq.graph) - computed == {last}
    assert name_of(found[-1].result) == "logits"


def test_units_take_what_is_there() -> None:
    made = lowered("llama", "w8a8")
    ready = {name_of(value) for value in made.qdq.graph.inputs}
    for unit in units(made.qdq.graph, made.integer.graph):
        assert {*unit.reference_takes, *unit.takes.values()} <= ready
        ready.add(name_of(unit.reference))


def test_helpers_belong_to_the_node_behind_them() -> None:
    made = lowered("llama", "w8a16")
    found = units(made.qdq.graph, made.integer.graph)
    forms = {tuple(functions(unit)) for unit in found if unit.kind == "linear"}
    products = ("MatMulInteger", "MatMulInteger")
    weight = {("IntSplit", "Cast", "BitwiseXor", *products), ("IntSplit", *products)}
    starts = {form[: form.index("MatMulInteger") + len(products)] for form in forms}
    assert starts == weight  # keys and values are uint8 already
    assert all(form[form.index("MatMulInteger") + len(products) :] for form in forms)
    assert all(len(unit.nodes) == 1 for unit in found if unit.kind != "linear")


def test_an_attention_is_one_unit() -> None:
    made = lowered("llama", "w8a8")
    found = units(made.qdq.graph, made.integer.graph)
    forms = [functions(unit) for unit in found if unit.kind == "attention"]
    assert len(forms) == 2
    assert all(form.count("MatMulInteger") == 4 for form in forms)
    assert all({"IntExponentials", "IntNormalize"} <= set(form) for form in forms)


def test_kinds() -> None:
    made = lowered("gpt2", "w8a8")
    found = units(made.qdq.graph, made.integer.graph)
    kinds = Counter(unit.kind for unit in found)
    operators = Counter(n.op_type for n in made.qdq.graph)
    assert kinds["linear"] == operators["MatMul"] + operators["Gemm"]
    assert kinds["softmax"] == operators["Softmax"]
    assert kinds["norm"] == operators["RMSNormalization"] > 0
    assert kinds["add"] == operators["Add"] + operators["Sub"]
    assert kinds["lookup"] >= operators["Pow"] + operators["Tanh"] > 0
    assert kinds["conversion"] == sum(unit.operator is None for unit in found) > 0


QDQ = """
    g (float[2, 4] x) => (float[8] y) <float s = {0.5}, uint8 z = {3}, int64[1] all = {-1}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        h = Reshape(d, all)
        k = QuantizeLinear(h, s, z)
        y = DequantizeLinear(k, s, z)
    }
"""
INTEGER = """
    g (uint8[2, 4] x) => (uint8[8] y) <int64[1] all = {-1}> { y = Reshape(x, all) }
"""


def test_ends_that_are_real_numbers_in_one_graph() -> None:
    given, moved = units(parse(QDQ).graph, parse(INTEGER).graph)
    assert (name_of(given.reference), name_of(given.result)) == ("q", "x")
    assert given.reference_takes == ("x",)
    assert not given.nodes
    assert not given.takes
    assert (name_of(moved.reference), name_of(moved.result)) == ("k", "y")
    assert [(name_of(value), name) for value, name in moved.takes.items()] == [("x", "q")]


def test_ends_that_are_codes_in_both() -> None:
    qdq = parse(QDQ)
    assert LowerIo().run(Compilation(qdq)) == 2
    (moved,) = units(qdq.graph, parse(INTEGER).graph)
    assert name_of(moved.reference) == name_of(moved.result) == "y"
    assert list(moved.takes.values()) == ["x"]


CHAIN = """
    g (uint8[2] a) => (uint8[2] c)
    <float s = {0.5}, KIND z = {3}, float t = {0.25}, uint8 y = {1}>
    {
        d = DequantizeLinear(a, s, y)
        r = Relu(d)
        b = QuantizeLinear(r, s, z)
        e = DequantizeLinear(b, s, z)
        m = Sigmoid(e)
        c = QuantizeLinear(m, t, y)
    }
"""
TWIN = (
    "g (uint8[2] a) => (uint8[2] c) { NAME = Cast<to: int = CODE>(a)  c = Cast<to: int = 2>(NAME) }"
)


@pytest.mark.parametrize(
    ("kind", "name", "code", "found"),
    [
        ("uint8", "b", "2", ["b", "c"]),
        ("uint8", "b", "3", ["c"]),  # int8 is another type
        ("uint4", "b", "21", ["c"]),
        ("uint8", "other", "2", ["c"]),
    ],
)
def test_a_unit_reaches_across_codes_that_make_no_pair(
    kind: str, name: str, code: str, found: list[str]
) -> None:
    qdq = parse(CHAIN.replace("KIND", kind))
    integer = parse(TWIN.replace("NAME", name).replace("CODE", code))
    made = units(qdq.graph, integer.graph)
    assert [name_of(unit.reference) for unit in made] == found
    assert len(made[-1].nodes) == (1 if len(found) == 2 else 2)
    assert len(made[-1].reference_nodes) == (2 if len(found) == 2 else 5)
