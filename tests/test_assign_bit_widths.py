"""assign-bit-widths: widths by role, requantize points, and initializers with two roles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qnpu.compiler.bit_choices import BitChoices, LinearBits
from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.op_traits import encoding_groups
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.rotated_weights import mark_rotated_weights
from qnpu.compiler.target import load_target
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.insert_hadamard import InsertHadamard
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import Array, normal, parse

W = "float[2, 2] w = {1, 2, 3, 4}"
MATRIX = "g (float[2, 2] x) => (float[2, 2] y)"
V = "float[2, 2] v = {5, 6, 7, 8}"
S = "int64[2] s = {1, 2}"
WEIGHT = "s8 symmetric per-channel(axis=1)"
U8, U16 = "u8 asymmetric per-tensor", "u16 asymmetric per-tensor"


def planned(text: str, scheme: str, target: str = "onnxruntime") -> tuple[Compilation, int]:
    """Runs the pass, checks what holds of every plan, and a second run."""
    compilation = Compilation(parse(text), load_target(target))
    step = AssignBitWidths(Scheme.parse(scheme))
    count = step.run(compilation)
    compilation.stage = Stage.PLANNED
    verify_stage(compilation)
    for group in encoding_groups(compilation.graph):
        widths = {compilation.bit_plan[v.name].bits for v in group if v.name}
        assert len(widths) == 1, [v.name for v in group]
    before = model_to_text(compilation.model), dict(compilation.bit_plan.specs)
    assert step.run(compilation) == 0
    assert (model_to_text(compilation.model), compilation.bit_plan.specs) == before
    return compilation, count


def specs(compilation: Compilation) -> dict[str, str]:
    return {name: str(spec) for name, spec in compilation.bit_plan.specs.items()}


def body(compilation: Compilation) -> list[str]:
    lines = model_to_text(compilation.model).splitlines()
    return [line.strip() for line in lines[lines.index("{") + 1 : -1]]


NORM_THEN_LINEARS = f"""
    g (float[1, 2] x) => (float[1, 2] out)
    <float[2] gain = {{1, 2}}, {W}, {V}>
    {{
        y = RMSNormalization(x, gain)
        q = MatMul(y, w)
        k = MatMul(y, v)
        a = Relu(q)
        b = Neg(k)
        out = Add(a, b)
    }}
"""


def test_golden_narrow_activations() -> None:
    compilation, count = planned(NORM_THEN_LINEARS, "w8a8")
    assert count == 2  # a requantize point and a new plan
    assert body(compilation) == [
        "y = RMSNormalization(x, gain)",
        "y_requantized = Identity(y)",
        "q = MatMul(y_requantized, w)",
        "k = MatMul(y_requantized, v)",
        "a = Relu(q)",
        "b = Neg(k)",
        "out = Add(a, b)",
    ]
    assert specs(compilation) == {
        "x": U16,
        "gain": U16,
        "w": "s8 symmetric per-channel(axis=1)",
        "v": "s8 symmetric per-channel(axis=1)",
        "y": U16,
        "y_requantized": U8,
        "q": U8,
        "k": U8,
        "a": U16,
        "b": U16,
        "out": U16,
    }


def test_wide_activations_need_no_point() -> None:
    compilation, count = planned(NORM_THEN_LINEARS, "w4a16")
    assert count == 1  # the plan alone
    assert "Identity" not in model_to_text(compilation.model)
    widths = {spec.bits for spec in compilation.bit_plan.specs.values()}
    assert widths == {4, 16}


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_the_last_linear_has_eight_bits(scheme: str) -> None:
    compilation, _ = planned(
        f"""
        g (float[1, 2] x) => (float[1, 2] y) <{W}, {V}>
        {{ a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, v) }}
        """,
        scheme,
    )
    assert compilation.bit_plan["w"].bits == int(scheme[1])
    assert compilation.bit_plan["v"].bits == 8


@pytest.mark.parametrize(
    "tail",
    ["y = Softmax(h)", "t = Tanh(h)  y = Mul(t, c)", "r = Relu(h)  y = Reshape(r, s)"],
)
def test_a_head_may_have_operators_of_one_activation_behind_it(tail: str) -> None:
    compilation, _ = planned(
        f"""
        g (float[1, 2] x) => (float[1, 2] y) <{W}, {V}, float[1] c = {{30}}, int64[2] s = {{1, 2}}>
        {{ a = MatMul(x, w)  b = Relu(a)  h = MatMul(b, v)  {tail} }}
        """,
        "w4a16",
    )
    assert (compilation.bit_plan["w"].bits, compilation.bit_plan["v"].bits) == (4, 8)


def test_what_joins_the_residual_stream_stays_wide() -> None:
    compilation, _ = planned(
        f"""
        g (float[1, 2] x) => (float[1, 2] y)
        <{W}, {V}, int64[2] s = {{1, 2}}, float[2] c = {{1, 2}}>
        {{
            a = MatMul(x, w)
            b = Reshape(a, s)
            r = Add(b, x)
            d = MatMul(r, v)
            e = Add(d, c)
            y = Relu(e)
        }}
        """,
        "w8a8",
    )
    plan = specs(compilation)
    assert (plan["a"], plan["b"], plan["r"]) == (U16, U16, U16)
    assert plan["d"] == U8  # a constant is no residual stream


def test_keys_and_values_are_narrowed_where_they_are_computed() -> None:
    compilation, count = planned(
        f"""
        g (float[1, 2] x) => (float[2, 1] y)
        <{W}, {V}>
        {{
            q = MatMul(x, w)
            query = Transpose<perm: ints = [1, 0]>(q)
            key = Relu(x)
            s = MatMul(query, key)
            u = MatMul(x, v)
            value = Transpose<perm: ints = [1, 0]>(u)
            y = MatMul(s, value)
        }}
        """,
        "w8a16",
    )
    assert count == 3
    assert body(compilation) == [
        "q = MatMul(x, w)",
        "query = Transpose<perm: ints = [1, 0]>(q)",
        "key = Relu(x)",
        "key_requantized = Identity(key)",
        "s = MatMul(query, key_requantized)",
        "u = MatMul(x, v)",
        "u_requantized = Identity(u)",
        "value = Transpose<perm: ints = [1, 0]>(u_requantized)",
        "y = MatMul(s, value)",
    ]
    plan = specs(compilation)
    assert (plan["q"], plan["query"], plan["key"], plan["u"]) == (U16, U16, U16, U16)
    assert (plan["key_requantized"], plan["u_requantized"], plan["value"]) == (U8, U8, U8)


JOINT = f"""
    g (float[1, 2] x) => (float[1, 2] y)
    <float[2, 6] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}, int64[3] thirds = {{2, 2, 2}}, {V}>
    {{
        joint = MatMul(x, w)
        query, k, u = Split<axis: int = 1>(joint, thirds)
        key = Transpose<perm: ints = [1, 0]>(k)
        s = MatMul(query, key)
        p = Softmax(s)
        h = MatMul(p, u)
        y = MatMul(h, v)
    }}
"""


def test_queries_of_a_joint_projection_stay_wide() -> None:
    compilation, _ = planned(JOINT, "w8a16")
    assert body(compilation)[1:5] == [
        "query, k, u = Split<axis: int = 1>(joint, thirds)",
        "u_requantized = Identity(u)",
        "k_requantized = Identity(k)",
        "key = Transpose<perm: ints = [1, 0]>(k_requantized)",
    ]
    plan = specs(compilation)
    assert [plan[name] for name in ("joint", "query", "k", "u")] == [U16] * 4
    assert [plan[name] for name in ("k_requantized", "key", "u_requantized")] == [U8] * 3


def test_a_joint_projection_that_is_narrow_already_needs_no_point() -> None:
    compilation, _ = planned(JOINT, "w8a8")
    plan = specs(compilation)
    assert [plan[name] for name in ("joint", "query", "k", "key", "u")] == [U8] * 5
    assert "k_requantized" not in plan


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_tensor_that_is_query_and_key_stays_wide_as_query(scheme: str) -> None:
    compilation, _ = planned(
        f"""
        g (float[2, 2] x) => (float[2, 2] y) <{W}>
        {{
            n = Relu(x)
            t = Transpose<perm: ints = [1, 0]>(n)
            s = MatMul(n, t)
            y = MatMul(s, w)
        }}
        """,
        scheme,
    )
    plan = specs(compilation)
    assert (plan["n"], plan["t"], plan["t_requantized"]) == (U16, U16, U8)


CACHE = """
    g (float[1, 1, 2, 2] q, float[1, 1, 3, 2] past, float[1, 1, 2, 2] new)
      => (float[1, 1, 2, 5] y, float[1, 1, 5, 2] present)
    {
        k = Relu(new)
        present = Concat<axis: int = 2>(past, k)
        t = Transpose<perm: ints = [0, 1, 3, 2]>(present)
        y = MatMul(q, t)
    }
"""


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_cache_is_narrow_in_and_out(scheme: str) -> None:
    compilation, _ = planned(CACHE, scheme)
    plan = specs(compilation)
    assert [plan[name] for name in ("past", "k_requantized", "present", "t")] == [U8] * 4
    assert plan["k"] == U16
    assert [v.name for v in compilation.graph.inputs] == ["q", "past", "new"]
    assert [v.name for v in compilation.graph.outputs] == ["y", "present"]


@pytest.mark.parametrize(("scheme", "width"), [("w8a16", U16), ("w8a8", U8)])
def test_a_cache_that_a_linear_fills(scheme: str, width: str) -> None:
    compilation, _ = planned(
        f"""
        g (float[2, 1] p, float[1, 2] x) => (float[2, 2] y, float[1, 2] present) <{W}>
        {{ present = MatMul(x, w)  y = MatMul(p, present) }}
        """,
        scheme,
    )
    plan = specs(compilation)
    assert plan["present"] == U8
    assert [v.name for v in compilation.graph.outputs] == ["y", "present"]
    assert plan.get("present_requantized_from", U8) == width


def test_a_cache_written_beside_the_attention_is_narrow_too() -> None:
    """One transpose for the cache, another for the product: both take the narrow tensor."""
    compilation, _ = planned(
        """
        g (float[2, 2] q, float[2, 2] x) => (float[2, 2] y, float[2, 2] present)
        {
            k = Relu(x)
            present = Transpose<perm: ints = [1, 0]>(k)
            key = Transpose<perm: ints = [0, 1]>(k)
            y = MatMul(q, key)
        }
        """,
        "w8a16",
    )
    plan = specs(compilation)
    assert (plan["k"], plan["k_requantized"], plan["present"], plan["key"]) == (U16, U8, U8, U8)


def test_a_constant_that_only_keys_are_made_of_is_narrow() -> None:
    compilation, _ = planned(
        """
        g (float[2, 1] q, float[1, 2] x) => (float[2, 4] y) <float[1, 2] sink = {1, 2}>
        { k = Relu(x)  all = Concat<axis: int = 1>(sink, k)  y = MatMul(q, all) }
        """,
        "w8a16",
    )
    plan = specs(compilation)
    assert [plan[name] for name in ("sink", "k_requantized", "all")] == [U8] * 3


def test_a_narrow_member_of_a_wide_group_is_narrowed_for_its_linear() -> None:
    """a alone would have 8 bits; the Concat ties it to 16, so the linear needs a point."""
    compilation, _ = planned(
        f"""
        g (float[1, 2] x, float[1, 2] r) => (float[1, 2] y, float[1, 4] z) <{W}, {V}>
        {{
            a = MatMul(x, w)
            s = Relu(r)
            z = Concat<axis: int = 1>(a, s)
            y = MatMul(a, v)
        }}
        """,
        "w8a8",
    )
    plan = specs(compilation)
    assert (plan["a"], plan["s"], plan["z"], plan["a_requantized"]) == (U16, U16, U16, U8)
    assert "y = MatMul(a_requantized, v)" in body(compilation)


def test_an_input_whose_copy_is_an_output_is_one_group() -> None:
    compilation, _ = planned(
        "g (float[1, 4] x) => (float[4] y) <int64[1] s = {4}> { y = Reshape(x, s) }", "w8a8"
    )
    assert specs(compilation) == {"x": U16, "y": U16}


def test_an_identity_before_an_output_is_as_wide_as_the_rest() -> None:
    compilation, _ = planned("g (float[4] x) => (float[4] y) { y = Identity(x) }", "w8a16")
    assert specs(compilation) == {"x": U16, "y": U16}


GATED = f"""
    g (float[1, 2] x) => (float[1, 2] out)
    <{W}, {V}, float[2, 2] d = {{2, 1, 1, 3}}, float[2, 2] h = {{1, 1, 2, 3}}, {S},
     float[2] gain = {{1, 2}}>
    {{
        gate = MatMul(x, w)
        up = MatMul(x, v)
        act = Sigmoid(gate)
        product = Mul(act, up)
        same = Reshape(product, s)
        down = MatMul(same, d)
        stream = Add(x, down)
        normed = RMSNormalization(stream, gain)
        out = MatMul(normed, h)
    }}
"""


def test_what_a_down_projection_takes_stays_wide() -> None:
    compilation, _ = planned(GATED, "w8a8")
    plan = specs(compilation)
    assert (plan["product"], plan["same"], plan["down"]) == (U16, U16, U16)
    assert (plan["gate"], plan["up"], plan["normed_requantized"]) == (U8, U8, U8)
    assert "down = MatMul(same, d)" in body(compilation)


def test_a_scheme_may_narrow_down_projections_too() -> None:
    compilation = Compilation(parse(GATED))
    AssignBitWidths(Scheme("all8", 8, 8, 8, down_bits=8)).run(compilation)
    assert "down = MatMul(same_requantized, d)" in body(compilation)
    assert specs(compilation)["same_requantized"] == U8


def test_a_scheme_may_narrow_logits() -> None:
    compilation = Compilation(parse(GATED))
    AssignBitWidths(Scheme("all8", 8, 8, 8, logits_bits=8)).run(compilation)
    plan = specs(compilation)
    assert (plan["out"], plan["down"], plan["stream"]) == (U8, U16, U16)


def test_a_scheme_may_narrow_queries() -> None:
    """Those of scores; what weighs values stays wide."""
    compilation = Compilation(
        parse("""
        g (float[4, 2] p, float[4, 2] q, float[4, 4] k, float[4, 4] v) => (float[4, 4] y)
        {
            first = Relu(p)
            second = Relu(q)
            query = Concat<axis: int = 1>(first, second)
            scores = MatMul(query, k)
            weights = Softmax(scores)
            y = MatMul(weights, v)
        }
        """)
    )
    AssignBitWidths(Scheme("w8a8", 8, 8, 8, query_bits=8)).run(compilation)
    lines = body(compilation)
    assert "query = Concat<axis: int = 1>(first_requantized, second_requantized)" in lines
    assert "y = MatMul(weights, v)" in lines
    plan = specs(compilation)
    assert (plan["first"], plan["first_requantized"], plan["query"]) == (U16, U8, U8)
    assert plan["weights"] == U16
    assert AssignBitWidths(Scheme("w8a8", 8, 8, 8, query_bits=8)).run(compilation) == 0


# two layers; the second one's down projection takes what b multiplies
STACKED = f"""
    g (float[2, 2] x, float[2, 2] b) => (float[2, 2] y)
    <{W}, {V}, float[2, 2] d = {{1, -2, 2, 1}},
     float[2, 2] e = {{1, 3, 2, 1}}, float[2, 2] h = {{1, 1, 2, 1}}, int64[2] shape = {{2, 2}}>
    {{
        one = MatMul(x, w)
        p1 = Relu(one)
        d1 = MatMul(p1, d)
        s1 = Add(x, d1)
        two = MatMul(s1, v)
        p2 = Mul(two, b)
        r2 = Reshape(p2, shape)
        d2 = MatMul(r2, e)
        s2 = Add(s1, d2)
        y = MatMul(s2, h)
    }}
"""
NARROW_DOWN = Scheme("all8", 8, 8, 8, down_bits=8)


def massive(place: float) -> ArraySamples:
    """Samples whose second down projection alone takes one massive number."""
    x, b = normal(8, 2), normal(8, 2, seed=1)
    b[3, 1] = place
    return ArraySamples({"x": np.abs(x) + np.float32(0.5), "b": b})


def promoted(
    text: str, data: ArraySamples | None, share: float, scheme: Scheme = NARROW_DOWN
) -> Compilation:
    """Runs the pass twice; the second run changes nothing, even without data."""
    compilation = Compilation(parse(text))
    AssignBitWidths(scheme, share, data).run(compilation)
    compilation.stage = Stage.PLANNED
    verify_stage(compilation)
    before = model_to_text(compilation.model), compilation.bit_plan.to_json()
    assert AssignBitWidths(scheme, share, data).run(compilation) == 0
    assert (model_to_text(compilation.model), compilation.bit_plan.to_json()) == before
    return compilation


def test_the_most_sensitive_down_projection_keeps_a_wide_input() -> None:
    compilation = promoted(STACKED, massive(1e5), 0.5)
    plan = compilation.bit_plan
    assert list(plan.sensitivities) == ["p1", "r2"]
    assert plan.sensitivities["p1"] < 0.1
    assert plan.sensitivities["r2"] > 0.5
    assert plan.promoted == ("r2",)
    lines = body(compilation)
    assert "d1 = MatMul(p1_requantized, d)" in lines
    assert "d2 = MatMul(r2, e)" in lines
    assert (specs(compilation)["p1_requantized"], specs(compilation)["r2"]) == (U8, U16)
    json_plan = plan.to_json()
    assert json_plan["sensitivities"] == plan.sensitivities
    assert json_plan["promoted"] == ["r2"]


@pytest.mark.parametrize(("share", "names"), [(0.2, ()), (0.5, ("r2",)), (1.0, ("r2", "p1"))])
def test_how_many_are_promoted(share: float, names: tuple[str, ...]) -> None:
    compilation = promoted(STACKED, massive(1e5), share)
    assert compilation.bit_plan.promoted == names
    inputs = [node.inputs[0] for node in compilation.graph if node.name in ("d1", "d2")]
    widths = {specs(compilation)[v.name or ""] for v in inputs if v is not None}
    assert widths <= {U8, U16}
    points = [line for line in body(compilation) if "Identity(p1)" in line or "(r2)" in line]
    assert len(points) == 2 - len(names)


@pytest.mark.parametrize(
    ("share", "data", "scheme"),
    [
        (0.0, massive(1e5), NARROW_DOWN),  # nobody asks
        (0.5, None, NARROW_DOWN),  # nothing to measure on
        (0.5, massive(1e5), Scheme.parse("w8a8")),  # wide already
    ],
)
def test_nothing_is_measured(share: float, data: ArraySamples | None, scheme: Scheme) -> None:
    plan = promoted(STACKED, data, share, scheme).bit_plan
    assert (plan.sensitivities, plan.promoted) == ({}, ())


def test_a_promoted_input_that_is_rotated_online() -> None:
    """Measured behind the rotation, where 8 bits would be; the rotation then hands out 16."""
    compilation = Compilation(parse(STACKED))
    assert InsertHadamard(("r4",)).run(compilation) == 2
    AssignBitWidths(NARROW_DOWN, 0.5, massive(1e5)).run(compilation)
    plan = compilation.bit_plan
    assert len(plan.sensitivities) == 2
    assert plan.promoted == (max(plan.sensitivities, key=plan.sensitivities.__getitem__),)
    for name in plan.sensitivities:
        assert plan[name].bits == (16 if name in plan.promoted else 8)


# two gated layers; the second one's activation function takes what b multiplies
SILU_LAYERS = f"""
    g (float[2, 2] x, float[2, 2] b) => (float[2, 2] y)
    <{W}, {V}, float[2, 2] d = {{1, -2, 2, 1}}, float[2, 2] e = {{1, 3, 2, 1}}>
    {{
        g1 = MatMul(x, w) n1 = Sigmoid(g1) a1 = Mul(g1, n1) u1 = MatMul(x, v) p1 = Mul(a1, u1)
        d1 = MatMul(p1, d) s1 = Add(x, d1)
        h2 = MatMul(s1, w) g2 = Mul(h2, b) n2 = Sigmoid(g2) a2 = Mul(g2, n2)
        u2 = MatMul(s1, v) p2 = Mul(a2, u2)
        d2 = MatMul(p2, e) y = Add(s1, d2)
    }}
"""


def test_activation_functions_may_be_narrow() -> None:
    """In front of down projections, up to the product that those take."""
    scheme = Scheme("w8a8", 8, 8, 8, gate_bits=8)
    compilation = promoted(SILU_LAYERS, None, 0, scheme)
    plan = specs(compilation)
    assert {plan[name] for name in ("n1", "a1", "n2", "a2", "g2")} == {U8}
    assert {plan[name] for name in ("p1", "p2", "s1", "y")} == {U16}
    wide = specs(promoted(SILU_LAYERS, None, 0, Scheme("w8a8", 8, 8, 8)))
    assert {wide[name] for name in ("n1", "a1", "n2", "a2")} == {U16}


def test_the_residual_stream_is_no_gate() -> None:
    """Even where an activation function takes it itself."""
    text = SILU_LAYERS.replace("g2 = Mul(h2, b)", "g2 = Mul(s1, b)")
    plan = specs(promoted(text, None, 0, Scheme("w8a8", 8, 8, 8, gate_bits=8)))
    assert [plan[name] for name in ("s1", "g2", "a2")] == [U16, U8, U8]


def test_an_activation_function_that_loses_most_stays_wide() -> None:
    data = massive(1e3)
    compilation = promoted(SILU_LAYERS, data, 0.5, Scheme("w8a8", 8, 8, 8, gate_bits=8))
    plan = compilation.bit_plan
    assert list(plan.sensitivities) == ["a1", "a2"]
    assert plan.promoted == ("a2",)
    assert [specs(compilation)[name] for name in ("n1", "a1", "n2", "a2")] == [U8, U8, U16, U16]


def test_where_the_input_is_promoted_its_activation_function_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs and functions are ranked apart."""
    ratios = {"p1": 0.1, "p2": 0.9, "a1": 0.8, "a2": 0.2}
    place = "qnpu.passes.assign_bit_widths.relative_errors"
    monkeypatch.setattr(place, lambda *_, **__: dict(ratios))
    scheme = Scheme("w8a8", 8, 8, 8, down_bits=8, gate_bits=8)
    compilation = promoted(SILU_LAYERS, massive(1e3), 0.5, scheme)
    assert compilation.bit_plan.promoted == ("p2", "a1")
    plan = specs(compilation)
    assert [plan[name] for name in ("a1", "a2", "p1_requantized")] == [U16, U16, U8]
    assert "p2_requantized" not in plan


def test_nothing_is_promoted_twice() -> None:
    """One massive number: the input it goes to, and the function that makes most of it."""
    scheme = Scheme("w8a8", 8, 8, 8, down_bits=8, gate_bits=8)
    plan = promoted(SILU_LAYERS, massive(1e3), 0.5, scheme).bit_plan
    assert list(plan.sensitivities) == ["p1", "p2", "a1", "a2"]
    assert plan.promoted == ("p2", "a2")


def test_a_graph_without_down_projections_says_so() -> None:
    data = ArraySamples({"x": normal(1, 2)})
    compilation = promoted(NORM_THEN_LINEARS, data, 0.5)
    assert {item.code for item in compilation.diagnostics} == {"QN505"}
    assert compilation.bit_plan.promoted == ()


def fault(data: dict[str, Array], text: str = STACKED) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        AssignBitWidths(NARROW_DOWN, 0.5, ArraySamples(data)).run(Compilation(parse(text)))
    return caught.value.codes


def test_faults_of_data_and_weights() -> None:
    x = np.ones((2, 2), np.float32)
    assert fault({"x": x}) == ["QN301"]
    assert fault({"x": x, "b": np.full((2, 2), np.inf, np.float32)}) == ["QN304"]
    assert fault({"x": x, "b": x}, STACKED.replace("{1, 3, 2, 1}", "{1, nan, 2, 1}")) == ["QN107"]


@pytest.mark.parametrize(
    "body_text",
    [
        "n = RMSNormalization(x, c)  a = MatMul(n, w)  y = Add(a, x)",  # takes a norm's
        "t = MatMul(x, x)  a = MatMul(t, w)  y = Add(a, x)",  # an attention's
        "t = MatMul(x, v)  a = MatMul(t, w)  y = Add(a, x)",  # another linear's
        "t = Relu(x)  a = MatMul(t, w)  b = Relu(a)  y = Add(b, x)",  # joins no stream
    ],
)
def test_other_linears_take_narrow_inputs(body_text: str) -> None:
    compilation, _ = planned(
        f"g (float[2, 2] x) => (float[2, 2] y) <{W}, {V}, float[2] c = {{1, 2}}> {{ {body_text} }}",
        "w8a8",
    )
    operand = next(node for node in compilation.graph if node.outputs[0].name == "a").inputs[0]
    assert operand is not None
    assert specs(compilation)[operand.name or ""] == U8


def four_bit(text: str, *rotated: str, target: str = "onnxruntime") -> Compilation:
    """Scheme w4a4 on a graph whose weights of these names take rotated inputs; a second run too."""
    compilation = Compilation(parse(text), load_target(target))
    weights = compilation.graph.initializers
    mark_rotated_weights(compilation.model, inputs=[weights[name] for name in rotated])
    step = AssignBitWidths(Scheme.parse("w4a4"))
    step.run(compilation)
    compilation.stage = Stage.PLANNED
    verify_stage(compilation)
    noted = {str(item) for item in compilation.diagnostics}
    before = model_to_text(compilation.model), dict(compilation.bit_plan.specs)
    assert step.run(compilation) == 0
    assert (model_to_text(compilation.model), compilation.bit_plan.specs) == before
    assert {str(item) for item in compilation.diagnostics} == noted
    return compilation


def test_golden_four_bit_inputs() -> None:
    """One requantize point a width; the head's input has 8 bits, the down projection's 16."""
    compilation = four_bit(GATED, "w", "v", "h")
    assert compilation.diagnostics == []
    assert body(compilation)[:3] == [
        "x_requantized = Identity(x)",
        "gate = MatMul(x_requantized, w)",
        "up = MatMul(x_requantized, v)",
    ]
    plan = specs(compilation)
    assert plan["x_requantized"] == "u4 asymmetric per-tensor"
    assert (plan["gate"], plan["up"], plan["product"], plan["down"]) == (U8, U8, U16, U16)
    widths = [compilation.bit_plan[name].bits for name in ("w", "v", "d", "h")]
    assert widths == [4, 4, 4, 8]
    (head,) = [node for node in compilation.graph if node.outputs[0].name == "out"]
    assert head.inputs[0] is not None
    assert plan[head.inputs[0].name or ""] == U8


def test_four_bits_are_refused_where_nothing_is_rotated() -> None:
    """QN506 once, with the number of inputs; a rotated one beside it keeps its 4 bits."""
    compilation = four_bit(GATED, "w")
    plan = specs(compilation)
    inputs = {n.outputs[0].name: n.inputs[0] for n in compilation.graph if n.op_type == "MatMul"}
    assert body(compilation)[:2] == [
        "x_requantized_8 = Identity(x)",
        "x_requantized = Identity(x)",
    ]
    by_output = {name: plan[v.name or ""] for name, v in inputs.items() if v is not None}
    assert by_output["gate"] == "u4 asymmetric per-tensor"
    assert by_output["up"] == U8
    (first, *again) = compilation.diagnostics
    assert {first.code, *(item.code for item in again)} == {"QN506"}
    assert first.location.value == "x"
    assert [d.code for d in four_bit(NORM_THEN_LINEARS).diagnostics[:1]] == ["QN506"]


@pytest.mark.parametrize("target", ["qnn-htp-v75", "mediatek-mdla", "generic-int8"])
def test_a_target_without_four_bit_activations(target: str) -> None:
    """QN507, and the plan of w4a8."""
    compilation = four_bit(GATED, "w", "v", "h", target=target)
    assert {item.code for item in compilation.diagnostics} == {"QN507"}
    narrow = planned(GATED, "w4a8", target)[0]
    assert compilation.bit_plan.specs == narrow.bit_plan.specs
    assert body(compilation) == body(narrow)


def test_a_table_that_is_also_a_weight_gets_two_names() -> None:
    compilation, count = planned(
        f"""
        g (int64[1, 1] ids) => (float[1, 1, 2] y) <{W}>
        {{ x = Gather(w, ids)  y = MatMul(x, w) }}
        """,
        "w8a16",
    )
    assert count == 2
    assert specs(compilation) == {"w": U16, "w_1": WEIGHT, "x": U16, "y": U16}
    tensors = [v.const_value for v in compilation.graph.initializers.values()]
    assert tensors[0] is tensors[1]


def test_a_weight_used_along_two_axes_gets_two_names() -> None:
    compilation, _ = planned(
        f"""
        g (float[1, 2] x) => (float[1, 2] y) <{W}>
        {{ a = Gemm<transB: int = 1>(x, w)  b = Relu(a)  y = MatMul(b, w) }}
        """,
        "w8a16",
    )
    plan = specs(compilation)
    assert plan["w"] == "s8 symmetric per-channel(axis=0)"
    assert plan["w_1"] == "s8 symmetric per-channel(axis=1)"


@pytest.mark.parametrize("named", [True, False])
def test_two_linears_never_share_a_bias(named: bool) -> None:
    text = f"""
        g (float[1, 2] x) => (float[1, 2] y) <{W}, {V}, float[2] b = {{1, 2}}>
        {{ [one] h = Gemm(x, w, b)  a = Relu(h)  [two] y = Gemm(a, v, b) }}
    """
    compilation, count = planned(
        text if named else text.replace("[one]", "").replace("[two]", ""), "w8a16"
    )
    assert count == 2
    plan = specs(compilation)
    assert plan["b"] == plan["b_1"] == "s32 symmetric per-channel(axis=0)"


def test_two_linears_may_share_a_weight() -> None:
    compilation, count = planned(
        f"""
        g (float[1, 2] x) => (float[1, 2] y) <{W}>
        {{ h = MatMul(x, w)  a = Relu(h)  y = MatMul(a, w) }}
        """,
        "w8a16",
    )
    assert (count, specs(compilation)["w"]) == (1, WEIGHT)


@pytest.mark.parametrize(
    ("node", "weight", "axis"),
    [
        ("MatMul(x, w)", "float[2, 3] w = {1, 2, 3, 4, 5, 6}", 1),
        ("MatMul(w, x)", "float[3, 2] w = {1, 2, 3, 4, 5, 6}", 0),
        ("Gemm(x, w)", "float[2, 3] w = {1, 2, 3, 4, 5, 6}", 1),
        ("Gemm<transB: int = 1>(x, w)", "float[3, 2] w = {1, 2, 3, 4, 5, 6}", 0),
        ("Gemm(w, x)", "float[3, 2] w = {1, 2, 3, 4, 5, 6}", 0),
        ("Gemm<transA: int = 1>(w, x)", "float[2, 3] w = {1, 2, 3, 4, 5, 6}", 1),
    ],
)
def test_channel_axis_of_weights(node: str, weight: str, axis: int) -> None:
    rows, columns = (2, 3) if "(x" in node else (3, 2)
    compilation, _ = planned(
        f"g (float[2, 2] x) => (float[{rows}, {columns}] y) <{weight}> {{ y = {node} }}", "w8a16"
    )
    assert specs(compilation)["w"] == f"s8 symmetric per-channel(axis={axis})"


def test_convolutions() -> None:
    compilation, _ = planned(
        """
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        <float[2, 1, 1, 1] w = {1, 2}, float[2] b = {1, 2}, float[2, 1, 1, 1] t = {1, 2}>
        { a = Conv(x, w, b)  c = Relu(a)  y = ConvTranspose(c, t) }
        """,
        "w8a16",
    )
    plan = specs(compilation)
    assert plan["w"] == "s8 symmetric per-channel(axis=0)"
    assert plan["b"] == "s32 symmetric per-channel(axis=0)"
    assert plan["t"] == "s8 symmetric per-channel(axis=1)"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # its bias runs over columns, the weight's channels are rows
        (f"{MATRIX} <{W}, float[2] b = {{1, 2}}> {{ y = Gemm(w, x, b) }}", "b"),
        # not one number per channel
        (f"{MATRIX} <{W}, float[1] b = {{1}}> {{ y = Gemm(x, w, b) }}", "b"),
        # a vector has no output channels
        ("g (float[2, 2] x) => (float[2] y) <float[2] w = {1, 2}> { y = MatMul(x, w) }", "w"),
    ],
)
def test_constants_that_are_neither_weight_nor_bias(text: str, name: str) -> None:
    compilation, _ = planned(text, "w8a16")
    assert specs(compilation)[name] == U16


def test_integers_have_no_place_in_the_plan() -> None:
    compilation, count = planned(
        "g (int64[2, 2] x) => (int64[2, 2] y) <int64[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }",
        "w8a8",
    )
    assert (count, specs(compilation)) == (0, {})


def test_the_target_decides_the_kind() -> None:
    compilation, _ = planned(NORM_THEN_LINEARS, "w8a8", "mediatek-mdla")
    plan = specs(compilation)
    assert plan["x"] == "s16 symmetric per-tensor"
    assert plan["q"] == "s8 symmetric per-tensor"
    assert plan["w"] == "s8 symmetric per-channel(axis=1)"


def test_keys_and_values_are_symmetric_where_the_target_wants_it() -> None:
    text = """
        g (float[2, 4] q, float[4, 2] k) => (float[2, 2] y) {
            a = Relu(q)
            b = Relu(k)
            y = MatMul(a, b)
        }
    """
    usual = specs(planned(text, "w8a16")[0])
    hexagon = specs(planned(text, "w8a16", "qnn-htp-v75")[0])
    assert usual["b_requantized"] == U8
    assert hexagon["b_requantized"] == "u8 symmetric per-tensor"
    assert hexagon["a"] == usual["a"] == U16


TWO_LAYERS = f"""
    g (float[1, 2] x) => (float[1, 2] out)
    <float[2] gain = {{1, 2}}, {W}, {V}, float[2, 2] u = {{1, 0, 0, 1}}>
    {{
        y = RMSNormalization(x, gain)
        q = MatMul(y, w)
        k = MatMul(y, v)
        s = Relu(q)
        t = Add(s, k)
        out = MatMul(t, u)
    }}
"""


def chosen(choices: BitChoices) -> Compilation:
    compilation = Compilation(parse(TWO_LAYERS))
    step = AssignBitWidths(Scheme.parse("w8a8"), choices=choices)
    step.run(compilation)
    compilation.stage = Stage.PLANNED
    verify_stage(compilation)
    assert step.run(compilation) == 0
    return compilation


def test_bits_linear_by_linear() -> None:
    """One input at two widths; the results of linears are as wide as their inputs."""
    compilation = chosen(BitChoices({"w": LinearBits(4, 16), "v": LinearBits(8, 8)}))
    assert body(compilation)[:4] == [
        "y = RMSNormalization(x, gain)",
        "y_requantized = Identity(y)",
        "q = MatMul(y, w)",
        "k = MatMul(y_requantized, v)",
    ]
    plan = compilation.bit_plan
    assert {name: plan[name].bits for name in ("w", "v", "u", "y", "q", "y_requantized")} == {
        "w": 4,
        "v": 8,
        "u": 8,
        "y": 16,
        "q": 16,
        "y_requantized": 8,
    }
    assert plan.choices.linears == {
        "w": LinearBits(4, 16),
        "v": LinearBits(8, 8),
        "u": LinearBits(8, 8),
    }


def test_the_choices_of_a_plan_give_the_same_plan() -> None:
    """Also where they came from roles alone, or from a pass before."""
    first, _ = planned(NORM_THEN_LINEARS, "w4a8")
    again = Compilation(parse(NORM_THEN_LINEARS), bit_choices=first.bit_plan.choices)
    AssignBitWidths(Scheme.parse("w4a8")).run(again)
    assert again.bit_plan == first.bit_plan
    assert body(again) == body(first)


def test_keys_and_values_each_by_their_product() -> None:
    text = f"""
        g (float[1, 2] x) => (float[1, 2] out) <{W}, {V}, float[2, 2] u = {{1, 0, 0, 1}}>
        {{
            q = MatMul(x, w)
            k = MatMul(x, v)
            kt = Transpose(k)
            [scores] s = MatMul(q, kt)
            p = Softmax(s)
            n = Identity(k)
            w2 = MatMul(x, u)
            [mix] m = MatMul(p, w2)
            out = Relu(m)
        }}
    """
    compilation = Compilation(parse(text))
    AssignBitWidths(Scheme.parse("w8a16"), choices=BitChoices(caches={"mix": 16})).run(compilation)
    plan = compilation.bit_plan
    assert plan.choices.caches == {"scores": 8, "mix": 16}
    assert plan["kt"].bits == 8
    assert plan["w2"].bits == 16


@pytest.mark.parametrize(
    "choices", [BitChoices({"other": LinearBits(8, 8)}), BitChoices(caches={"q": 8})]
)
def test_what_is_chosen_for_nothing_is_told(choices: BitChoices) -> None:
    with pytest.raises(DiagnosticError) as caught:
        chosen(choices)
    assert caught.value.codes == ["QN540"]


def test_four_bits_need_a_rotation_whoever_chose_them() -> None:
    compilation = chosen(BitChoices({"w": LinearBits(4, 4)}))
    assert compilation.bit_plan.choices.linears["w"] == LinearBits(4, 8)
    assert {item.code for item in compilation.diagnostics} == {"QN506"}
    assert "instead of 4" in str(compilation.diagnostics[0])


def blocked(
    body: str, *, target: str = "qnn-htp-v75", choices: BitChoices | None = None
) -> tuple[Compilation, dict[str, str]]:
    """The pass at w4a16 in blocks of 16, W of 32 features, V of 24, and a Gemm's."""
    wide = ", ".join(["1"] * 64)
    text = f"""
        g (float[2, 32] x, float[2, 24] z) => (float[2, 2] y)
        <float[32, 2] w = {{{wide}}}, float[24, 2] v = {{{", ".join(["1"] * 48)}}},
         float[32, 2] u = {{{wide}}}, float[32, 2] head = {{{wide}}}>
        {{ {body} }}
    """
    compilation = Compilation(parse(text), load_target(target))
    scheme = replace(Scheme.parse("w4a16"), block=16)
    AssignBitWidths(scheme, choices=choices).run(compilation)
    return compilation, specs(compilation)


BLOCKED = """
    a = MatMul(x, w)  b = MatMul(z, v)  c = Gemm(x, u)
    d = Add(a, b)  e = Add(d, c)  f = MatMul(x, head)  y = Add(e, f)
"""
IN_BLOCKS = "s4 symmetric per-block(axis=0, size=16)"
PER_CHANNEL = "s4 symmetric per-channel(axis=1)"


def test_weights_that_blocks_do_not_fit() -> None:
    compilation, found = blocked(BLOCKED)
    assert found["w"] == IN_BLOCKS
    assert found["v"] == found["u"] == PER_CHANNEL
    (note,) = compilation.diagnostics
    assert note.code == "QN544"
    assert "2 4-bit weights" in str(note)
    bits = compilation.bit_plan.choices.linears
    assert (bits["w"].weight_name, bits["v"].weight_name) == ("4b16", 4)


def test_a_plan_may_have_blocks_of_its_own() -> None:
    choices = BitChoices({"w": LinearBits(4, 16, 32), "u": LinearBits(8, 16)})
    _, found = blocked(BLOCKED, choices=choices)
    assert found["w"] == "s4 symmetric per-block(axis=0, size=32)"
    assert found["u"] == WEIGHT


def test_a_plan_with_blocks_for_a_target_without() -> None:
    with pytest.raises(DiagnosticError) as caught:
        blocked(BLOCKED, target="xdna2")
    assert caught.value.codes == ["QN543"]
