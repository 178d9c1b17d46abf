"""lower-attention: against exact numbers, in every form it knows; what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler import quantized_attention
from qnpu.compiler.integer_cpu import Cpu
from qnpu.passes import lower_attention
from qnpu.passes.lower_attention import LowerAttention
from qnpu.runtime_check.session import adds_in_32_bits
from tests.conftest import Array, apply, parse, run_model
from tests.integer_nodes import S8, U8, U16, codes
from tests.lowered import lowered

KINDS = {"uint8": U8, "uint16": U16, "int8": S8}
HEADS, TOKENS, DEPTH = 2, 40, 8
SCALES = {"q": 0.02, "k": 0.015, "v": 0.03, "m": 50 / 65535, "c": 0.35}
ZEROS = {"q": 100, "k": 120, "v": 131}
CAUSAL = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
MASKED, UNMASKED = 0, 65535
NORMALIZE = {False: "IntNormalize", True: "IntNormalizeShort"}


def pair(name: str, step: str = "sw", zero: str = "zw") -> str:
    return f"""{name}_quantized = QuantizeLinear({name}, {step}, {zero})
            {name}_real = DequantizeLinear({name}_quantized, {step}, {zero})"""


def attention(
    body: str,
    *,
    queries: str = "uint16",
    keys: str = "uint8",
    result: str = "uint8",
    constant: bool = True,
    more: str = "",
    shape: str = f"{HEADS}, {TOKENS}, {DEPTH}",
) -> ir.Model:
    """Codes of q, k, v (and of a mask) → attention → codes y."""
    mask = np.where(CAUSAL, MASKED, UNMASKED).reshape(-1)
    kind = f"uint16[{TOKENS}, {TOKENS}] m"
    held = f", {kind} = {{{','.join(map(str, mask))}}}" if constant else ""
    given = "" if constant else f", {kind}"
    step = 0.02 if result == "uint8" else 0.0001
    return parse(f"""
        g ({queries}[{HEADS}, {TOKENS}, {DEPTH}] q, {keys}[{HEADS}, {DEPTH}, {TOKENS}] k,
           uint8[{HEADS}, {TOKENS}, {DEPTH}] v{given}) => ({result}[{shape}] y)
        <float sq = {{{SCALES["q"]}}}, {queries} zq = {{{ZEROS["q"]}}},
         float sk = {{{SCALES["k"]}}}, {keys} zk = {{{ZEROS["k"]}}},
         float sv = {{{SCALES["v"]}}}, uint8 zv = {{{ZEROS["v"]}}},
         float sm = {{{SCALES["m"]}}}, uint16 zm = {{65535}}, float sw = {{0.01}},
         uint16 zw = {{40000}}, float sp = {{0.0000152587890625}}, uint16 zp = {{0}},
         float sy = {{{step}}}, {result} zy = {{{100 if result == "uint8" else 30000}}},
         float sf = {{0.0001}}, uint16 zf = {{30000}},
         uint8 c = {{7}}, float sc = {{0.05}}, uint8 zc = {{0}}{held}>
        {{
            rq = DequantizeLinear(q, sq, zq)
            rk = DequantizeLinear(k, sk, zk)
            rv = DequantizeLinear(v, sv, zv)
            rm = DequantizeLinear(m, sm, zm)
            rc = DequantizeLinear(c, sc, zc)
            scores = MatMul(rq, rk)
            {pair("scores")}
            {body}
            {pair("p", "sp", "zp")}
            mixed = MatMul(p_real, rv)
            {more or "y = QuantizeLinear(mixed, sy, zy)"}
        }}
    """)


FORMS = {
    "scaled, masked": f"""s = Mul(scores_real, rc) {pair("s")}
        a = Add(s_real, rm) {pair("a")} p = Softmax(a_real)""",
    "mask first": f"""s = Add(rm, scores_real) {pair("s")}
        a = Mul(rc, s_real) {pair("a")} p = Softmax(a_real)""",
    "divided": f"""s = Div(scores_real, rc) {pair("s")} p = Softmax<axis = 2>(s_real)""",
    "alone": "p = Softmax(scores_real)",
}


def given(queries: str, keys: str = "uint8") -> dict[str, Array]:
    found = {
        "q": codes(U8, HEADS, TOKENS, DEPTH).astype(KINDS[queries].code_dtype),
        "k": codes(KINDS[keys], HEADS, DEPTH, TOKENS, seed=1),
        "v": codes(U8, HEADS, TOKENS, DEPTH, seed=2),
    }
    if queries == "uint16":  # their low bytes count, too
        found["q"] = (found["q"] * 3 + 5).astype(np.uint16)
    return found


def exact(feeds: dict[str, Array], form: str, mask: Array) -> Array:
    """The attention of the numbers that the codes stand for."""
    q, k, v = (
        np.float64(np.float32(SCALES[n])) * (feeds[n].astype(float) - ZEROS[n]) for n in "qkv"
    )
    factor, scores = float(np.float32(0.05)) * 7, q @ k
    real_mask = (mask.astype(float) - 65535) * np.float32(SCALES["m"])
    scores = {
        "scaled, masked": scores * factor + real_mask,
        "mask first": (scores + real_mask) * factor,
        "divided": scores / factor,
        "alone": scores,
    }[form]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights @ v / weights.sum(axis=-1, keepdims=True))


def functions(model: ir.Model) -> list[str]:
    return list(dict.fromkeys(n.op_type for n in model.graph if n.domain == "qnpu"))


@pytest.mark.parametrize(("queries", "keys"), [("uint8", "uint8"), ("uint16", "int8")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("cpu", list(Cpu))
def test_forms(
    form: str, queries: str, keys: str, many: bool, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_attention, "_MANY_QUERIES", TOKENS + (0 if many else 1))
    model = attention(FORMS[form], queries=queries, keys=keys)
    feeds = given(queries, keys)
    assert apply(LowerAttention(cpu), model) == 1
    assert apply(LowerAttention(cpu), model) == 0
    assert set(functions(model)) >= {"IntExponentials", NORMALIZE[many]}
    signed = [many, many or keys == "int8"] if cpu is Cpu.VNNI else [False]
    products = [node for node in model.graph if node.op_type == "MatMulInteger"]
    kinds = {value.dtype for node in products if (value := node.inputs[1])}
    assert kinds == {ir.DataType.INT8 if item else ir.DataType.UINT8 for item in signed}
    assert ("IntSigned" in functions(model)) == (cpu is Cpu.VNNI and many)
    assert ("IntLookup" in functions(model)) == (form in ("scaled, masked", "mask first"))
    assert not {"Softmax", "MatMul"} & {node.op_type for node in model.graph}
    if any(signed) and not adds_in_32_bits():
        return
    found = run_model(model, feeds)[0].astype(float)
    real = exact(feeds, form, np.where(CAUSAL, MASKED, UNMASKED))
    expected = np.clip(real / np.float32(0.02) + 100, 0, 255)
    assert np.abs(found - expected).max() < 0.52
    assert len(np.unique(found)) > 100


def test_keys_that_a_mask_hides_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 queries at a time, which see 16, 32 and 40 keys."""
    monkeypatch.setattr(quantized_attention, "_BLOCK", 16)
    model = attention(FORMS["scaled, masked"])
    feeds = given("uint16")
    assert apply(LowerAttention(), model) == 1
    shapes = [
        tuple(n.outputs[0].shape or ())[-2:] for n in model.graph if n.op_type == "IntExponentials"
    ]
    assert shapes == [(16, 16), (16, 32), (8, 40)]
    found = run_model(model, feeds)[0].astype(float)
    real = exact(feeds, "scaled, masked", np.where(CAUSAL, MASKED, UNMASKED))
    assert np.abs(found - np.clip(real / np.float32(0.02) + 100, 0, 255)).max() < 0.52


def test_keys_are_kept_where_all_or_most_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_attention, "_BLOCK", 16)
    for body, constant in ((FORMS["alone"], True), (FORMS["scaled, masked"], False)):
        model = attention(body, constant=constant)
        assert apply(LowerAttention(), model) == 1
        assert [n.op_type for n in model.graph].count("IntExponentials") == 1
    monkeypatch.setattr(quantized_attention, "_BLOCK", 32)  # of 40: 91 % of all are seen
    model = attention(FORMS["scaled, masked"])
    assert apply(LowerAttention(), model) == 1
    assert [n.op_type for n in model.graph].count("IntExponentials") == 1


def test_a_mask_that_comes_in() -> None:
    """Whole rows may be masked, and every bit of the mask counts."""
    model = attention(FORMS["scaled, masked"], constant=False)
    mask = np.random.default_rng(0).integers(0, 65536, (TOKENS, TOKENS)).astype(np.uint16)
    mask[3] = 0
    feeds = given("uint16")
    assert apply(LowerAttention(), model) == 1
    found = run_model(model, feeds | {"m": mask})[0].astype(float)
    real = exact(feeds, "scaled, masked", mask)
    expected = np.clip(real / np.float32(0.02) + 100, 0, 255)
    assert np.abs(found - expected).max() < 0.52


def test_heads_that_serve_several_are_not_copied() -> None:
    """Of a decoder whose two heads of keys and values serve four of queries."""
    made = lowered("llama", "w8a8")
    assert [node.op_type for node in made.qdq.graph].count("Expand") == 4
    assert "Expand" not in [node.op_type for node in made.integer.graph]
    shapes = [n.outputs[0].shape for n in made.integer.graph if n.op_type == "IntExponentials"]
    assert [tuple(shape or ())[:3] for shape in shapes] == [(1, 2, 2)] * 2


def test_codes_that_are_moved_and_narrowed() -> None:
    """They are rounded once, to the narrow type."""
    more = f"""{pair("mixed", "sf", "zf")}
        t = Transpose<perm = [1, 0, 2]>(mixed_real)
        {pair("t", "sf", "zf")}
        y = QuantizeLinear(t_real, sy, zy)"""
    shape = f"{TOKENS}, {HEADS}, {DEPTH}"
    model = attention(FORMS["alone"], more=more, shape=shape)
    feeds = given("uint16")
    assert apply(LowerAttention(), model) == 1
    assert [n.op_type for n in model.graph][-2:] == ["IntNormalizeShort", "Transpose"]
    found = run_model(model, feeds)[0].astype(float)
    real = exact(feeds, "alone", CAUSAL).transpose(1, 0, 2)
    assert np.abs(found - np.clip(real / np.float32(0.02) + 100, 0, 255)).max() < 0.52


def test_codes_that_stay_wide_are_left_alone() -> None:
    narrowed = f"""{pair("mixed", "sf", "zf")}
        y = QuantizeLinear(mixed_real, sy, zy)
        other = Identity(mixed_quantized)"""
    read_elsewhere = attention(FORMS["alone"], more=narrowed)
    read_elsewhere.graph.outputs.extend(
        n.outputs[0] for n in read_elsewhere.graph if n.op_type == "Identity"
    )
    for model in (read_elsewhere, attention(FORMS["alone"], result="uint16")):
        assert apply(LowerAttention(), model) == 0
        assert not functions(model)


@pytest.mark.parametrize(
    "body",
    [
        f"s = Tanh(scores_real) {pair('s')} p = Softmax(s_real)",
        f"s = Neg(scores_real) {pair('s')} p = Softmax(s_real)",
        f"s = Add(scores_real, rm) {pair('s')} a = Add(s_real, rm) {pair('a')} p = Softmax(a_real)",
        "p = Softmax<axis = 1>(scores_real)",
        "p = Softmax(scores_real) twice = Identity(scores_quantized)",
    ],
    ids=["a function", "negated", "two masks", "axis", "read elsewhere"],
)
def test_must_not_fire(body: str) -> None:
    model = attention(body)
    model.graph.outputs.extend(n.outputs[0] for n in model.graph if n.op_type == "Identity")
    before = [node.op_type for node in model.graph]
    assert apply(LowerAttention(), model) == 0
    assert [node.op_type for node in model.graph] == before


def test_sums_that_could_leave_32_bits() -> None:
    model = attention(FORMS["alone"])
    for node in model.graph:
        if node.op_type == "MatMul":
            break
    queries = node.inputs[0]
    assert queries is not None
    producer = queries.producer()
    assert producer is not None and producer.inputs[0] is not None
    producer.inputs[0].shape = ir.Shape((HEADS, TOKENS, 1000 * DEPTH))
    assert apply(LowerAttention(), model) == 0
