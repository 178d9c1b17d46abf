"""Topology: what is found in every tiny decoder, and each thing that must block a rotation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.topology import (
    as_feature_linear,
    describe,
    discover,
    input_axis,
    linears_behind,
    own_biases,
    untie,
)
from qnpu.models.tiny_decoder import ARCHITECTURES, HEAD_DIM
from tests.conftest import parse
from tests.decoders import (
    SHAPES,
    STREAM_BLOCKED,
    STREAM_FREE,
    TIED,
    VALUES_BLOCKED,
    VALUES_CACHED,
    Change,
    canonical,
    canonicalized,
    embedded,
    exported,
    fused,
    shared_biases,
    tensor,
    toy,
)
from tests.genai_decoder import genai_decoder


@dataclass(frozen=True)
class Found:
    """What is expected of an architecture of two layers, 64 wide, 4 heads, 2 key heads."""

    sources: str = "Gather MatMul MatMul MatMul MatMul"
    sinks: tuple[int, ...] = (3, 2, 3, 2, 1)  # linears behind each norm
    columns: tuple[int, int] = (0, 32)
    norm: str = "RMSNormalization"
    blocked_norms: int = 0


FOUND = {
    "llama": Found(),
    "mistral": Found(),
    "qwen2": Found(),
    "qwen3": Found(),
    "phi3": Found(sinks=(1, 1, 1, 1, 1), columns=(96, 128)),
    "gemma3": Found(sources="Gather", blocked_norms=4),
    "gpt2": Found(
        sources="Gather Add Gemm Gemm Gemm Gemm",
        sinks=(1, 1, 1, 1, 1),
        columns=(128, 192),
        norm="LayerNormalization",
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tiny_decoder(architecture: str) -> None:
    expected = FOUND[architecture]
    topology = discover(canonical(architecture).graph)
    assert topology is not None
    stream = topology.stream
    assert stream.width == 64
    assert " ".join(source.node.op_type for source in stream.sources) == expected.sources
    assert tuple(len(sink.linears) for sink in stream.sinks) == expected.sinks
    assert {sink.norm.op_type for sink in stream.sinks if sink.norm} == {expected.norm}
    for source in stream.sources:
        shape = source.weight.shape
        assert shape is not None and shape[source.axis] == 64
        assert (source.bias is not None) == (source.node.op_type == "Gemm")
    for sink in stream.sinks:
        for linear in sink.linears:
            shape = linear.weight.shape
            assert shape is not None and shape[input_axis(linear)] == 64
    assert len(topology.value_paths) == 2
    for path in topology.value_paths:
        assert path.columns == expected.columns
        assert path.head_dim == HEAD_DIM
        shape = path.output.weight.shape
        assert shape is not None and shape[input_axis(path.output)] == 64
        # V is a linear behind a norm on the stream; what takes the heads writes to the stream
        assert path.value.node in [linear.node for sink in stream.sinks for linear in sink.linears]
        if architecture != "gemma3":
            assert path.output.node in [source.node for source in stream.sources]
    assert topology.value_blockers == []
    norms = [blocker.where for blocker in stream.blockers]
    assert len(norms) == expected.blocked_norms
    kinds = {name_of(node): node.op_type for node in canonical(architecture).graph}
    assert all(kinds[name] == "RMSNormalization" for name in norms)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_optimum_export_hands_its_values_out(architecture: str) -> None:
    topology = discover(canonical(architecture, "optimum").graph)
    assert topology is not None
    assert topology.value_blockers == []
    caches = [[name_of(cache) for cache in path.caches] for path in topology.value_paths]
    assert caches == [["present.0.value"], ["present.1.value"]]
    assert [path.layer for path in topology.value_paths] == [0, 1]


def test_a_decode_step_takes_its_values_in_and_hands_them_out() -> None:
    topology = discover(canonicalized(exported("llama", "optimum"), 2, 5).graph)
    assert topology is not None
    caches = [{name_of(cache) for cache in path.caches} for path in topology.value_paths]
    assert caches == [{f"present.{i}.value", f"past_key_values.{i}.value"} for i in (0, 1)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("past", [0, 5])
def test_a_graph_of_the_genai_builder(packed: bool, past: int) -> None:
    topology = discover(canonicalized(genai_decoder(packed=packed), 3, past).graph)
    assert topology is not None
    assert topology.stream.blockers == topology.value_blockers == []
    linears = (1, 2, 1, 2, 1) if packed else (3, 2, 3, 2, 1)
    assert tuple(len(sink.linears) for sink in topology.stream.sinks) == linears
    assert len(topology.stream.sources) == 5
    assert [path.columns for path in topology.value_paths] == [(96, 128) if packed else (0, 32)] * 2
    assert [path.head_dim for path in topology.value_paths] == [16, 16]
    assert all(len(path.caches) == 1 + bool(past) for path in topology.value_paths)


@pytest.mark.parametrize("why", VALUES_CACHED)
def test_caches_of_values(why: str) -> None:
    changes, more, names = VALUES_CACHED[why]
    topology = discover(toy(*changes, **more).graph)
    assert topology is not None
    (path,) = topology.value_paths
    assert {name_of(cache) for cache in path.caches} == names


def test_an_attention_in_one_operator_blocks_the_values() -> None:
    node = "a = Attention<q_num_heads: int = 1, kv_num_heads: int = 1>(q, k, v)"
    topology = discover(toy(("kt =", ""), ("s =", ""), ("p =", ""), ("a =", node)).graph)
    assert topology is not None
    assert [blocker.where for blocker in topology.value_blockers] == ["a"]
    assert topology.value_paths == []


def test_rows_that_describe_a_decoder() -> None:
    topology = discover(toy().graph)
    assert topology is not None
    rows = list(describe(topology))
    assert [row[1] for row in rows] == ["x", "o", "d", "q", "k", "v", "u", "logits", "v", "o"]
    assert rows[2] == ("stream source", "d", "(8, 4)")


def stream_blockers(model: ir.Model) -> set[str]:
    topology = discover(model.graph)
    assert topology is not None
    return {blocker.where for blocker in topology.stream.blockers}


@pytest.mark.parametrize("why", STREAM_BLOCKED)
def test_what_blocks_the_stream(why: str) -> None:
    where, changes, more = STREAM_BLOCKED[why]
    assert where in stream_blockers(toy(*changes, **more))


def test_a_subgraph_that_reads_the_stream_blocks_it() -> None:
    branches = """
        t = If(yes) <
            then_branch = a () => (float[1, 3, 4] ta) {
                na = RMSNormalization(x, g1)
                ta = MatMul(na, other)
            },
            else_branch = b () => (float[1, 3, 4] tb) { tb = Identity(o) }
        >
    """
    other = f", {tensor('other', 4, 4)}"
    model = toy(("y =", f"{branches}  y = Add(x, o)"), inputs=", bool yes", constants=other)
    assert stream_blockers(model)


def test_an_operator_of_another_domain_is_unknown_whatever_its_name() -> None:
    _, changes, more = STREAM_BLOCKED["operator of another domain"]
    model = toy(*changes, **more)
    values = {name_of(v): v for node in model.graph for v in node.outputs}
    values["t"].shape = values["x"].shape
    assert "t" in stream_blockers(model)


@pytest.mark.parametrize("why", STREAM_FREE)
def test_what_does_not_block_the_stream(why: str) -> None:
    changes, more = STREAM_FREE[why]
    assert stream_blockers(toy(*changes, **more)) == set()


def test_only_the_last_dimension_need_be_static() -> None:
    topology = discover(toy(length="tokens").graph)
    assert topology is not None
    assert topology.stream.blockers == topology.value_blockers == []
    assert len(topology.stream.sources) == len(topology.stream.sinks) == 3
    assert len(topology.value_paths) == 1


def test_a_table_of_angles_is_not_the_embedding() -> None:
    change = ("x =", "c = Gather(cosines, ids)  x = Gather(embed, ids)")
    rotated = ("q =", "q1 = MatMul(n1, wq)  q = Mul(q1, c)")
    topology = discover(toy(change, rotated, constants=f", {tensor('cosines', 5, 4)}").graph)
    assert topology is not None
    assert name_of(topology.stream.sources[0].node) == "x"
    assert topology.stream.blockers == []


def values_blocked(model: ir.Model) -> bool:
    topology = discover(model.graph)
    assert topology is not None
    assert len(topology.value_paths) + len(topology.value_blockers) == 1
    assert [b.where for b in topology.value_blockers] in ([], ["a"], ["ac"], ["wv"], ["wo"], ["v1"])
    return bool(topology.value_blockers)


@pytest.mark.parametrize("why", VALUES_BLOCKED)
def test_what_blocks_the_values(why: str) -> None:
    changes, more = VALUES_BLOCKED[why]
    assert values_blocked(toy(*changes, **more))


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ([], (8, 12)),
        ([("v =", "v = Slice(qkv, minus4, c12, last)")], (8, 12)),
        (
            [("v =", "v = Slice(qkv, lower, c4, last)"), ("q =", "q = Slice(qkv, c8, c12, last)")],
            (0, 4),
        ),
        (
            [("q =", ""), ("k =", ""), ("v =", "q, k, v = Split<axis: int = 2>(qkv, three)")],
            (8, 12),
        ),
        (
            [("q =", ""), ("k =", ""), ("v =", "k, v, q = Split<axis: int = -1>(qkv, three)")],
            (4, 8),
        ),
        ([("k =", "k = Slice(qkv, c0, c4, last)")], (8, 12)),
    ],
)
def test_columns_of_a_fused_linear(changes: list[Change], columns: tuple[int, int]) -> None:
    topology = discover(fused(*changes).graph)
    assert topology is not None
    (path,) = topology.value_paths
    assert path.columns == columns
    assert path.head_dim == 4


FUSED_BLOCKED: dict[str, tuple[list[Change], str]] = {
    "a step": (
        [("k =", "k = Slice(qkv, c0, c4, last)"), ("v =", "v = Slice(qkv, c4, c12, last, step)")],
        "",
    ),
    "an overlap": (
        [("k =", "k = Slice(qkv, minus8, minus4, last)  o2 = Slice(qkv, c8, c12, last)")],
        "",
    ),
    "no axis named": ([("v =", "v1 = Slice(qkv, c0, c12)  v = Slice(v1, c8, c12, last)")], ""),
    "another reader": ([("o =", "o1 = MatMul(qkv, mix)  o = MatMul(a, wo)")], ""),
    "a reshape beside": ([("o =", "o1 = Squeeze(qkv)  o = MatMul(a, wo)")], ""),
    "an output": ([], ", float[1, 3, 12] qkv"),
    "a slice behind a slice": (
        [("v =", "v1 = Slice(qkv, c4, c12, last)  v = Slice(v1, c4, c8, last)")],
        "",
    ),
    "read before the slice": (
        [("qkv =", "q0 = MatMul(n1, fused)  e = Exp(q0)  qkv = Identity(q0)")],
        "",
    ),
}


@pytest.mark.parametrize("why", FUSED_BLOCKED)
def test_what_blocks_the_values_of_a_fused_linear(why: str) -> None:
    changes, outputs = FUSED_BLOCKED[why]
    assert values_blocked(fused(*changes, outputs=outputs))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }",
        # a table, and nothing that a decoder has
        f"""
        g (int64[2] i) => (float[2, 4] y) <{tensor("t", 3, 4)}>
        {{ x = Gather(t, i)  y = Exp(x) }}
        """,
        # columns, not rows, are looked up
        f"""
        g (int64[2] i) => (float[3, 4] y) <{tensor("t", 3, 4)}, {tensor("w", 2, 4)}>
        {{ x = Gather<axis: int = 1>(t, i)  y = MatMul(x, w) }}
        """,
    ],
)
def test_no_decoder(text: str) -> None:
    assert discover(parse(text).graph) is None


def test_a_linear_runs_from_last_axis_to_last_axis() -> None:
    model = parse(
        f"""
        g (float[4, 4] x, float[1, 4, 4] c) => (float[4, 4] y)
        <{tensor("w", 4, 4)}, {tensor("k", 4, 4, 1)}>
        {{
            right = MatMul(x, w)
            left = MatMul(w, x)
            gemm = Gemm<transB: int = 1>(x, w)
            turned = Gemm<transA: int = 1>(x, w)
            first = Gemm(w, x)
            conv = Conv(c, k)
            y = Identity(right)
        }}
        """
    )
    feature = [name_of(n.outputs[0]) for n in model.graph if as_feature_linear(n) is not None]
    assert feature == ["right", "gemm"]
    assert sum(as_linear(node) is not None for node in model.graph) == 6


def test_linears_behind_looks_through_reshapes() -> None:
    graph = toy(
        *STREAM_FREE["one norm, weights stored both ways"][0],
        constants=SHAPES + ", int64[3] b = {1, 3, 4}",
    ).graph
    values = {name_of(v): v for node in graph for v in node.outputs}
    found = linears_behind(values["n1"])
    assert found is not None
    assert sorted(name_of(linear.node) for linear in found) == ["kf", "q", "v"]
    assert linears_behind(values["p"]) is None
    assert linears_behind(values["logits"]) is None


def test_untie_gives_the_head_its_own_weight() -> None:
    graph = toy(("logits =", TIED), constants=SHAPES).graph
    topology = discover(graph)
    assert topology is not None
    (head,) = topology.stream.sinks[-1].linears
    own = untie(graph, head)
    table = graph.initializers["embed"]
    assert own.weight is graph.initializers["embed_untied"]
    assert head.node.inputs[1] is own.weight
    assert [name_of(node) for node in table.consumers()] == ["x"]
    np.testing.assert_array_equal(constant_array(own.weight), constant_array(table))
    assert untie(graph, own) is own


def test_a_transpose_of_the_features_blocks_the_values() -> None:
    # three tokens and heads of three: the shape alone does not tell
    transposed = "vt = Transpose<perm: ints = [0, 2, 1]>(v)  a = MatMul(p, vt)"
    assert not values_blocked(toy(width=3))
    assert values_blocked(toy(("a =", transposed), width=3))


def test_a_graph_that_takes_embeddings_has_its_values_alone() -> None:
    topology = discover(embedded().graph)
    assert topology is not None
    assert (topology.stream.width, topology.stream.sources, topology.stream.sinks) == (0, [], [])
    assert [blocker.where for blocker in topology.stream.blockers] == ["embeddings"]
    assert len(topology.value_paths) == 1


def test_linears_that_share_a_bias_get_one_each() -> None:
    model = shared_biases()
    graph = model.graph
    gemms = [node for node in graph if node.op_type == "Gemm"]
    assert len(gemms) == 3
    assert {name_of(node.inputs[2]) for node in gemms if node.inputs[2]} == {"zeros"}
    assert "zeros" in stream_blockers(model)
    assert own_biases(graph) == 2
    assert len({node.inputs[2] for node in gemms}) == 3
    assert stream_blockers(model) == set()
    assert own_biases(graph) == 0
