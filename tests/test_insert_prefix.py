"""insert-prefix: a graph that holds a prefix gives what one gives that is fed it as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.attention import find_attention
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array, name_of, set_constant, static_shape
from qnpu.compiler.handout import make_handout
from qnpu.compiler.pass_base import Compilation, run_passes
from qnpu.compiler.pipeline import canonical_passes, check_result, compile_model
from qnpu.compiler.prefix import prefix_of
from qnpu.compiler.target import Verdict, load_target
from qnpu.compiler.target_check import check_target
from qnpu.compiler.verify import verify_stage
from qnpu.passes.insert_hadamard import InsertHadamard
from qnpu.passes.insert_prefix import InsertPrefix
from qnpu.runtime_check import prefix as prefix_module
from qnpu.runtime_check.feeds import ArraySamples, TokenWindows
from qnpu.runtime_check.prefix import (
    Ids,
    Outliers,
    PrefixSearch,
    Spread,
    TokenFeeds,
    count_outliers,
    measure_turn,
)
from qnpu.runtime_check.session import Feeds
from tests.conftest import Array, normal, relative_error, run_model
from tests.decoders import (
    LENGTH,
    Change,
    More,
    canonical,
    canonicalized,
    embedded,
    exported,
    serialized,
    some_tokens,
    tensor,
    toy,
)
from tests.genai_decoder import genai_decoder

# Measured: 3.4e-7 (qwen2) to 7.1e-7 (phi3 with R3); with a cache 6.5e-7.
BOUND = 3e-6
ROTARY = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"]
SLIDING = 8
"""Tokens that gemma3's first layer sees."""

WINDOWS = TokenWindows(np.random.default_rng(1).integers(0, 257, (2, LENGTH)))


@dataclass(frozen=True)
class AnyIds:
    """Two runs of a graph whose only input may have any name."""

    vocabulary: int = 5

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        rng = np.random.default_rng(2)
        return [
            {name_of(v): rng.integers(0, self.vocabulary, static_shape(v)) for v in inputs}
            for _ in range(2)
        ]


def insert(model: ir.Model, transform: InsertPrefix) -> tuple[int, list[str]]:
    """The count, and codes in order of report."""
    compilation = Compilation(model)
    count = transform.run(compilation)
    verify_stage(compilation)
    return count, [d.code for d in compilation.diagnostics]


def logits_behind(model: ir.Model, ids: Ids, text: Array) -> Array:
    """Logits of a text that stands behind tokens; as many as there is room for."""
    (entry,) = model.graph.inputs
    length = (static_shape(entry) or ())[-1]
    tokens = np.concatenate([[ids], text], axis=1)[:, :length]
    return run_model(model, {name_of(entry): tokens})[0][:, len(ids) :]


# --- the tiny decoders ---


@pytest.mark.parametrize("ids", [(5,), (7, 3, 250)])
@pytest.mark.parametrize("architecture", ROTARY)
def test_same_logits_as_with_the_prefix_as_tokens(architecture: str, ids: Ids) -> None:
    before = canonical(architecture)
    model = before.clone()
    assert insert(model, InsertPrefix(WINDOWS, ids)) == (2, ["QN311"])
    check_same_logits(before, model, ids, SLIDING if architecture == "gemma3" else LENGTH)
    found = prefix_of(model)
    assert found is not None
    assert found.ids == ids
    assert found.error <= BOUND
    once = serialized(model)
    assert insert(model, InsertPrefix(WINDOWS, ids)) == (0, [])
    assert serialized(model) == once


def check_same_logits(before: ir.Model, after: ir.Model, ids: Ids, room: int) -> None:
    """Of a text; a sliding window lets the first ``room`` tokens see each other."""
    feeds = some_tokens(before)
    seen = room - len(ids)
    expected = logits_behind(before, ids, next(iter(feeds.values())))[:, :seen]
    actual = run_model(after, feeds)[0]
    assert actual.shape == (1, LENGTH, 257)
    assert relative_error(actual[:, :seen], expected) <= BOUND
    plain = run_model(before, feeds)[0]
    assert relative_error(plain[:, :seen], expected) > 0.05  # the prefix does something


@pytest.mark.parametrize("whole_up_to", [128, 8])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_keys_that_are_rotated_online(architecture: str, whole_up_to: int) -> None:
    """R3 as one matrix of 16, and as (4, 4)."""
    before = canonical(architecture)
    model = before.clone()
    InsertHadamard(("r3", "r4"), whole_up_to=whole_up_to).run(Compilation(model))
    assert insert(model, InsertPrefix(WINDOWS, (7, 3))) == (2, ["QN311"])
    check_same_logits(before, model, (7, 3), SLIDING if architecture == "gemma3" else LENGTH)


def test_inputs_and_outputs_stay_as_they_are() -> None:
    """The caches that an optimum export hands out are those of the text alone."""
    before = canonical("llama", "optimum")
    model = before.clone()
    assert insert(model, InsertPrefix(WINDOWS, (7, 3)))[0] == 2
    for old, new in zip(
        [*before.graph.inputs, *before.graph.outputs],
        [*model.graph.inputs, *model.graph.outputs],
        strict=True,
    ):
        assert (old.name, old.shape, old.dtype) == (new.name, new.shape, new.dtype)
    feeds = some_tokens(before)
    first_keys = [name_of(v) for v in before.graph.outputs].index("present.0.key")
    np.testing.assert_array_equal(
        run_model(model, feeds)[first_keys], run_model(before, feeds)[first_keys]
    )


@pytest.mark.parametrize("source", ["llama", "phi3", "genai"])
def test_in_front_of_a_cache(source: str) -> None:
    """Six tokens, then six more behind their cache: as fourteen at once, the first two of them."""

    def fresh(length: int, past: int = 0) -> ir.Model:
        model = genai_decoder() if source == "genai" else exported(source, "optimum")
        return canonicalized(model, length, past)

    rng = np.random.default_rng(3)
    ids, text = (7, 3), rng.integers(0, 257, (1, 12))
    expected = logits_behind(fresh(14), ids, text)
    first, second = fresh(6), fresh(6, 6)
    assert insert(first, InsertPrefix(TokenWindows(text[:, :6]), ids)) == (2, ["QN311"])
    samples: dict[str, Array] = {
        name_of(v): normal(*(static_shape(v) or ())) for v in second.graph.inputs
    }
    samples["input_ids"] = text[:, :6]
    assert insert(second, InsertPrefix(ArraySamples(samples), ids)) == (2, ["QN311"])

    names = [name_of(v) for v in first.graph.outputs]
    early = dict(zip(names, run_model(first, {"input_ids": text[:, :6]}), strict=True))
    assert relative_error(early["logits"], expected[:, :6]) <= BOUND
    feeds: Feeds = {
        name_of(v): early[name_of(v).replace("past_key_values", "present")]
        for v in second.graph.inputs
        if v.name != "input_ids"
    }
    late = run_model(second, feeds | {"input_ids": text[:, 6:]})
    assert relative_error(late[0], expected[:, 6:]) <= BOUND
    assert late[1].shape == (1, 2, 12, 16)


# --- the graph after ---

MASK = [[0.0, -50.0, -50.0], [0.0, 0.0, -50.0], [0.0, 0.0, 0.0]]
ADDED: Change = ("p =", "sm = Add(s, mask)  p = Softmax(sm)")
CAUSAL = ", float[1, 3, 3] mask = {0, -50, -50, 0, 0, -50, 0, 0, 0}"


def causal(*changes: Change, constants: str = "") -> ir.Model:
    """The toy decoder, where a token sees those before it; it knows no positions."""
    return toy(*(changes or [ADDED]), constants=CAUSAL + constants)


def test_the_graph_after() -> None:
    model = causal()
    by_name = {name_of(v): v for node in model.graph for v in node.outputs}
    before = [node.op_type for node in model.graph]
    assert insert(model, InsertPrefix(AnyIds(), (2, 4))) == (1, ["QN311"])
    after = [node.op_type for node in model.graph]
    assert sorted(after) == sorted([*before, "Concat", "Concat"])
    (item,) = find_attention(model.graph)[0]
    for value, axis, shape in ((item.keys, 2, (1, 4, 5)), (item.values, 1, (1, 5, 4))):
        node = value.producer()
        assert node is not None
        assert node.op_type == "Concat"
        assert node.attributes.get_int("axis", 0) == axis
        assert static_shape(value) == shape
        prefix, rest = node.inputs
        assert prefix is not None
        assert prefix.is_initializer()
        assert rest in (by_name["kt"], by_name["v"])
    mask = next(node for node in model.graph if node.name == "sm").inputs[1]
    expected = np.concatenate([np.zeros((3, 2)), MASK], axis=1)
    np.testing.assert_array_equal(constant_array(mask), expected[None])
    for name in ("s", "sm", "p"):
        assert static_shape(by_name[name]) == (1, 3, 5)
    assert static_shape(by_name["a"]) == (1, 3, 4)


TWO_LAYERS: list[Change] = [
    ("p =", "sm = Add(s, m)  p = Softmax(sm)"),
    ("x =", "x = Gather(embed, ids)  m = Mul(mask, one)"),
    (
        "n3 =",
        "k2 = MatMul(z, wk)  kt2 = Transpose<perm: ints = [0, 2, 1]>(k2)  s2 = MatMul(z, kt2)"
        "  sm2 = Add(m, s2)  p2 = Softmax(sm2)  a2 = MatMul(p2, z)  z2 = Add(z, a2)"
        "  n3 = RMSNormalization(z2, g3)",
    ),
]


def test_a_computed_mask_of_two_layers_is_widened_once() -> None:
    before = causal(*TWO_LAYERS, constants=", float[1] one = {1}")
    model = before.clone()
    assert insert(model, InsertPrefix(AnyIds(), (2,))) == (2, ["QN311"])
    assert [node.op_type for node in model.graph].count("Concat") == 5
    text = np.array([[3, 0, 4]])
    expected = logits_behind(before, (2,), text)
    assert relative_error(run_model(model, {"ids": text})[0][:, :2], expected) <= BOUND


LOWER = ", bool[1, 3, 3] sees = {1, 0, 0, 1, 1, 0, 1, 1, 1}, float low = {-50}"
UPPER = ", bool[3, 3] hides = {0, 1, 1, 0, 0, 1, 0, 0, 0}, float[1, 1, 3] low = {-50, -50, -50}"


@pytest.mark.parametrize(
    ("changes", "constants"),
    [
        ([("p =", "sm = Where(sees, s, low)  p = Softmax(sm)")], LOWER),
        ([("p =", "sm = Where(hides, low, s)  p = Softmax(sm)")], UPPER),
        ([("p =", "s2 = Div(s, two)  sm = Sub(s2, against)  p = Softmax(sm)")],
         ", float[1] two = {2}, float[1, 3, 3] against = {0, 50, 50, 0, 0, 50, 0, 0, 0}"),
        ([("p =", "t = Tanh(s)  s2 = Mul(ten, t)  sm = Add(mask, s2)  p = Softmax(sm)")],
         ", float ten = {10}"),
    ],
    ids=["where", "where not", "subtracted", "capped"],
)  # fmt: skip
def test_other_masks(changes: list[Change], constants: str) -> None:
    before = causal(*changes, constants=constants)
    model = before.clone()
    assert insert(model, InsertPrefix(AnyIds(), (2,))) == (1, ["QN311"])
    text = np.array([[3, 0, 4]])
    expected = logits_behind(before, (2,), text)
    assert relative_error(run_model(model, {"ids": text})[0][:, :2], expected) <= BOUND


# --- where it must not fire ---

LEFT_OUT: dict[str, tuple[list[Change], More]] = {
    "every token sees every other": ([("p =", "p = Softmax(s)")], {}),
    "no attention": ([("p =", "p = Relu(s)")], {}),
    "scores handed out": ([ADDED], {"outputs": ", float[1, 3, 3] s"}),
    "probabilities read elsewhere": (
        [ADDED, ("z =", "e = Exp(p)  z = Add(y, d)")],
        {},
    ),
    "weighted by key": (
        [("p =", "sm = Add(s, mask)  sw = Mul(sm, mask)  p = Softmax(sw)")],
        {},
    ),
    "taken from a mask": ([("p =", "sm = Sub(mask, s)  p = Softmax(sm)")], {}),
    "softmax over queries": ([("p =", "sm = Add(s, mask)  p = Softmax<axis: int = 1>(sm)")], {}),
    "sorted": (
        [("p =", "sm = Add(s, mask)  sc = CumSum(sm, at)  p = Softmax(sc)")],
        {"constants": ", int64 at = {2}"},
    ),
    "bias by distance": (
        [("p =", "sm = Add(s, slope)  p = Softmax(sm)")],
        {"constants": ", float[1, 3, 3] slope = {0, -50, -50, -9, 0, -50, -18, -9, 0}"},
    ),
    "learned positions": (
        [ADDED, ("x =", "e = Gather(embed, ids)  x = Add(e, places)")],
        {"constants": f", {tensor('places', 3, 4)}"},
    ),
    "positions added to keys": (
        [ADDED, ("k =", "k0 = MatMul(n1, wk)  k = Add(k0, places)")],
        {"constants": f", {tensor('places', 3, 4)}"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", LEFT_OUT)
def test_graphs_it_leaves_alone(label: str) -> None:
    changes, more = LEFT_OUT[label]
    model = toy(*changes, **(more | {"constants": CAUSAL + more.get("constants", "")}))
    before = serialized(model)
    assert insert(model, InsertPrefix(AnyIds(), (2,))) == (0, ["QN310"])
    assert serialized(model) == before


@pytest.mark.parametrize("ids", [(2, 1, 0), ()])
def test_too_many_tokens_or_none(ids: Ids) -> None:
    assert insert(causal(), InsertPrefix(AnyIds(), ids)) == (0, ["QN310"])


def test_learned_positions_leave_the_graph_alone() -> None:
    model = canonical("gpt2")
    before = serialized(model)
    assert insert(model, InsertPrefix(WINDOWS, (5,))) == (0, ["QN310"])
    assert serialized(model) == before


def test_a_graph_that_takes_embeddings() -> None:
    assert insert(embedded(), InsertPrefix(AnyIds(), (2,))) == (0, ["QN310"])


def test_a_graph_of_one_token_at_a_time() -> None:
    model = exported("llama", "optimum")
    dims = {"sequence_length": 1, "past_sequence_length": 6}
    run_passes(
        canonical_passes(CompileConfig(freeze_dims=dims)),
        Compilation(model),
        after_pass=lambda done: None,
    )
    samples = {name_of(v): normal(*(static_shape(v) or ())) for v in model.graph.inputs}
    samples["input_ids"] = np.zeros((1, 1), np.int64)
    assert insert(model, InsertPrefix(ArraySamples(samples), (5,))) == (0, ["QN310"])


def test_a_token_that_is_not_in_the_vocabulary() -> None:
    with pytest.raises(DiagnosticError) as caught:
        insert(causal(), InsertPrefix(AnyIds(), (5,)))
    assert caught.value.codes == ["QN503"]


# --- RoPE as measured ---


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("rotated", [8, 4])
def test_layouts_of_rotary_embeddings(pairs: str, rotated: int) -> None:
    angles = 100.0 ** -np.linspace(0, 1, rotated // 2)
    order = np.arange(rotated)
    first, second = order.reshape(2, -1) if pairs == "halves" else order.reshape(-1, 2).T
    start = normal(2, 3, 8, seed=4).astype(np.float64)

    def at(position: int) -> Array:
        turned = start.copy()
        a, b = start[..., first], start[..., second]
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
        return turned

    keys = np.stack([at(p) for p in range(12)], axis=-2)
    turn = measure_turn(keys.astype(np.float32))
    assert turn.error < 1e-6
    np.testing.assert_allclose(turn.apply(at(2), -5), at(-3), rtol=0, atol=1e-5)


def test_keys_that_no_rotation_explains() -> None:
    assert measure_turn(normal(2, 12, 8)).error > 0.1


# --- which tokens ---


def craving() -> ir.Model:
    """A token's down input is massive until it has seen token 2, which all attend to alike.

    Feature 0 is on in every token, feature 1 in token 2 alone.
    """
    model = causal()
    values = model.graph.initializers
    table = np.zeros((5, 4), np.float32)
    table[:, 0], table[2, 1], table[:, 2] = 1, 1, (0.0, 0.1, 0.2, 0.3, 0.4)
    seen = np.zeros((4, 4), np.float32)
    seen[1, 1] = 1
    up = normal(4, 8, seed=5) * 0.1 + 0.1
    up[:, 0] = (1000, -1e6, 0, 0)
    arrays: dict[str, Array] = {
        "embed": table,
        "wq": np.zeros((4, 4)),
        "wv": seen,
        "wo": np.eye(4) * 1e-2,
        "up": up,
        "down": normal(8, 4, seed=6) * 1e-3,
        "g1": np.ones(4),
        "g2": np.ones(4),
    }
    for name, array in arrays.items():
        set_constant(values[name], array.astype(np.float32))
    return model


@dataclass(frozen=True)
class Fixed:
    """One window of ids."""

    ids: Ids

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        return [{"ids": np.array([self.ids])}]


def test_outliers_are_counted_by_token() -> None:
    feeds = TokenFeeds(Fixed((3, 4, 2)).feeds(()), "ids")
    without, behind, beside = count_outliers(craving(), feeds, [(), (2,), (1,)], ratio=8)
    assert (without.count, dict(without.ids)) == (0, {})  # two of three: the median is massive
    assert behind.count == 0
    assert without.worst > 0
    assert beside.spreads.keys() == {"r"}


def test_the_search_finds_the_token_that_helps() -> None:
    """Token 2 is in no text: special tokens are tried too."""
    wide = craving_long()
    search = PrefixSearch(special=(0, 1, 2), ratio=8)
    model = wide.clone()
    text = (2, 0, 3, 4, 1, 0, 3, 4, 1, 3)
    assert insert(model, InsertPrefix(Fixed((3, *text)), search=search)) == (1, ["QN311"])
    found = prefix_of(model)
    assert found is not None
    assert found.ids == (2,)
    assert (found.outliers_before, found.outliers_after) == (1, 0)
    assert insert(wide, InsertPrefix(Fixed((2, *text)), search=search)) == (0, ["QN310"])


def craving_long(length: int = 11) -> ir.Model:
    model = craving()
    hidden = np.where(np.arange(length) > np.arange(length)[:, None], -50, 0)[None]
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, length])
    for node in model.graph:
        for value in node.outputs:
            dims = [length if dim == 3 else dim for dim in value.shape or ()]
            value.shape = ir.Shape(dims)
    set_constant(model.graph.initializers["mask"], hidden.astype(np.float32))
    return model


def test_the_search_is_greedy_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewest outliers first, then least noise; a token that does not help ends it."""
    counts: dict[Ids, int] = {(): 9, (0,): 4, (1,): 4, (2,): 5, (1, 0): 3, (1, 0, 2): 3}
    noises: dict[Ids, float] = {(0,): 7.0, (1,): 6.0}
    asked: list[Ids] = []

    def fake(
        model: ir.Model, feeds: TokenFeeds, prefixes: list[Ids], **_: object
    ) -> list[Outliers]:
        asked.extend(prefixes)
        return [
            Outliers(counts.get(ids, 9), spreads={"x": Spread(0, noises.get(ids, 9.0), [1.0])})
            for ids in prefixes
        ]  # fmt: skip

    monkeypatch.setattr(prefix_module, "count_outliers", fake)
    feeds = TokenFeeds(Fixed((0, 1, 0, 1, 2, 0)).feeds(()), "ids")
    assert PrefixSearch(special=()).search(causal(), feeds) == (1, 0)
    assert asked[:4] == [(), (0,), (1,), (2,)]
    assert PrefixSearch(special=(), most=1).search(causal(), feeds) == (1,)
    counts[()] = 0
    assert PrefixSearch(special=()).search(causal(), feeds) == ()


def test_nothing_stands_out_in_a_random_decoder() -> None:
    assert insert(canonical("llama"), InsertPrefix(WINDOWS)) == (0, ["QN310"])


# --- what comes behind ---


@pytest.mark.parametrize(
    ("architecture", "scheme", "target"),
    [("llama", "w8a16", "onnxruntime"), ("gemma3", "w8a8", "qnn-htp-v75")],
)
def test_compiled(architecture: str, scheme: str, target: str) -> None:
    """Constants are as narrow as the cache, share its encoding, and nothing runs in float."""
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, prefix="7,3", target=target)
    result = compile_model(exported(architecture), config, WINDOWS)
    assert result.rewrites["insert-prefix"] == 2
    constants = [name for name in result.bit_plan.specs if name.endswith(("_keys", "_values"))]
    constants = [name for name in constants if "_prefix" in name]
    assert len(constants) == 8  # keys, values, and each joined, of two layers
    for name in constants:
        assert result.bit_plan[name].bits == 8
    encodings = make_handout(result.model).encodings
    for item in find_attention(result.float_model.graph)[0]:
        for value in (item.keys, item.values):
            node = value.producer()
            assert node is not None
            for operand in node.inputs:
                assert encodings[name_of(operand)].same_as(encodings[name_of(value)])  # type: ignore[arg-type]
    checks = check_result(result, WINDOWS.feeds(result.float_model.graph.inputs)[0], [])
    assert checks.source_error < 1e-5
    (logits,) = [tensor for tensor in checks.tensors if tensor.name == "logits"]
    assert logits.sqnr_db > 25
    if target != "onnxruntime":
        report = check_target(result.model, load_target(target))
        assert {node.verdict for node in report.nodes} == {Verdict.INT}


def test_a_weight_that_is_not_finite_is_told_as_ever() -> None:
    model = exported("llama")
    bad = next(v for n, v in model.graph.initializers.items() if "layers.1.mlp.up_proj" in n)
    array = np.array(constant_array(bad))
    array[0, 0] = np.nan
    set_constant(bad, array)
    with pytest.raises(DiagnosticError) as caught:
        compile_model(model, CompileConfig(seq_len=LENGTH, prefix="5"), WINDOWS)
    assert set(caught.value.codes) == {"QN107"}
