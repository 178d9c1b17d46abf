"""fold-norm-scale: unit gains and RMSNorms with the same logits, and what must stay."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest

from qnpu.compiler.graph_edit import constant_array, name_of, set_constant
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.topology import discover
from qnpu.compiler.verify import verify_stage
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.passes.fold_norm_scale import FoldNormScale
from tests.conftest import (
    HEADER,
    Array,
    apply,
    assert_keeps,
    assert_rewrites,
    parse,
    relative_error,
    run_model,
)
from tests.decoders import (
    SHAPES,
    STREAM_BLOCKED,
    STREAM_FREE,
    TIED,
    Change,
    More,
    canonical,
    exported,
    serialized,
    some_tokens,
    stream_values,
    tensor,
    toy,
    toy_feeds,
)

# Measured: 1.6e-7 (gemma3) to 6.6e-7 (llama, mistral; by optimum too).
BOUND = 3e-6


def gains(model: ir.Model) -> list[Array]:
    topology = discover(model.graph)
    assert topology is not None
    norms = [sink.norm for sink in topology.stream.sinks if sink.norm is not None]
    arrays = [constant_array(norm.inputs[1]) for norm in norms]
    return [array for array in arrays if array is not None]


def check_equal(before: ir.Model, after: ir.Model, bound: float = BOUND) -> None:
    feeds = some_tokens(before)
    for expected, actual in zip(run_model(before, feeds), run_model(after, feeds), strict=True):
        assert relative_error(actual, expected) <= bound
    expected, actual = run_model(before, feeds)[0], run_model(after, feeds)[0]
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("architecture", "exporter"),
    [*((name, "dynamo") for name in ARCHITECTURES), ("llama", "optimum"), ("gpt2", "optimum")],
)
def test_every_tiny_decoder(architecture: str, exporter: str) -> None:
    before = canonical(architecture, exporter)
    model = before.clone()
    compilation = Compilation(model)
    # of four gained norms a layer Gemma has two before linears; Qwen3's q- and k-norms stay as well
    assert FoldNormScale().run(compilation) == 5
    verify_stage(compilation)
    check_equal(before, model)
    assert len(gains(model)) == 5
    assert all((gain == 1).all() for gain in gains(model))
    assert not any(node.op_type == "LayerNormalization" for node in model.graph)
    assert all(value.uses() for value in model.graph.initializers.values())
    once = serialized(model)
    assert FoldNormScale().run(compilation) == 0
    assert serialized(model) == once
    assert compilation.diagnostics == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_in_a_plain_pipeline_after_the_onnxscript_optimizer(architecture: str) -> None:
    model = exported(architecture)
    before = model.clone()
    onnxscript.optimizer.optimize(model)
    result = ir.passes.Sequential(FoldNormScale())(model)
    assert result.modified
    assert all((gain == 1).all() for gain in gains(result.model))
    check_equal(before, result.model)
    assert not ir.passes.Sequential(FoldNormScale())(result.model).modified


def test_the_stream_of_a_layer_norm_decoder_loses_its_mean() -> None:
    model = canonical("gpt2")
    topology = discover(model.graph)
    assert topology is not None
    names = [name_of(value) for value in topology.stream.values]
    feeds = some_tokens(model)
    means = [np.abs(x.mean(-1)).max() for x in stream_values(model, names, feeds)]
    assert min(means) > 1e-2
    apply(FoldNormScale(), model)
    for name, x in zip(names, stream_values(model, names, feeds), strict=True):
        assert np.abs(x.mean(-1)).max() <= 1e-6 * np.abs(x).max(), name


def test_a_snapshot_keeps_its_numbers() -> None:
    model = canonical("gpt2")
    snapshot, before = model.clone(), serialized(model)
    apply(FoldNormScale(), model)
    assert serialized(snapshot) == before
    assert serialized(model) != before


# --- goldens ---

RMS = """
    g (int64[1, 2] ids) => (float[1, 2, 2] y, float[2, 2] z)
    <float[2, 2] t = {1, 2, 3, 4}, float[2] gain = {2, 3}, float[2, 2] w = {1, 2, 3, 4},
     float[2, 2] v = {1, 2, 3, 4}, int64[2] flat = {2, 2}>
    {
        x = Gather(t, ids)
        [n] n = RMSNormalization(x, gain)
        y = MatMul(n, w)
        m = Reshape(n, flat)
        z = Gemm<transB: int = 1>(m, v)
    }
"""


def test_golden_rms_norm() -> None:
    assert_rewrites(
        FoldNormScale(),
        RMS,
        """
        g (int64[1, 2] ids) => (float[1, 2, 2] y, float[2, 2] z)
        <float[2, 2] t = {1, 2, 3, 4}, float[2, 2] w = {2, 4, 9, 12},
         float[2, 2] v = {2, 6, 6, 12}, int64[2] flat = {2, 2}, float[2] n_unit_gain = {1, 1}>
        {
            x = Gather(t, ids)
            n = RMSNormalization(x, n_unit_gain)
            y = MatMul(n, w)
            m = Reshape(n, flat)
            z = Gemm<transB: int = 1>(m, v)
        }
        """,
        count=1,
    )


LAYER = """
    g (int64[1, 2] ids) => (float[2, 2] y)
    <float[2, 2] t = {1, 3, 5, 9}, float[2] gain = {2, 3}, float[2] shift = {1, -1},
     float[2, 2] w = {1, 2, 3, 4}, float[2] c = {10, 20}, int64[2] flat = {2, 2}>
    {
        x = Gather(t, ids)
        [n] n = LayerNormalization<epsilon: float = 0.5>(x, gain, shift)
        m = Reshape(n, flat)
        y = Gemm(m, w, c)
    }
"""


def test_golden_layer_norm() -> None:
    assert_rewrites(
        FoldNormScale(),
        LAYER,
        """
        g (int64[1, 2] ids) => (float[2, 2] y)
        <float[2, 2] t = {-1, 1, -2, 2}, float[2, 2] w = {2, 4, 9, 12}, float[2] c = {8, 18},
         int64[2] flat = {2, 2}, float[2] n_unit_gain = {1, 1}>
        {
            x = Gather(t, ids)
            n_rms = RMSNormalization<axis: int = -1, epsilon: float = 0.5>(x, n_unit_gain)
            m = Reshape(n_rms, flat)
            y = Gemm(m, w, c)
        }
        """,
        count=1,
    )


def test_layer_norm_on_a_blocked_stream_is_folded_but_stays() -> None:
    before = LAYER.replace("(float[2, 2] y)", "(float[2, 2] y, float[1, 2, 2] x)")
    model = assert_rewrites(
        FoldNormScale(),
        before,
        """
        g (int64[1, 2] ids) => (float[2, 2] y, float[1, 2, 2] x)
        <float[2, 2] t = {1, 3, 5, 9}, float[2, 2] w = {2, 4, 9, 12}, float[2] c = {8, 18},
         int64[2] flat = {2, 2}, float[2] n_unit_gain = {1, 1}, float[2] n_no_bias = {0, 0}>
        {
            x = Gather(t, ids)
            n = LayerNormalization<epsilon: float = 0.5>(x, n_unit_gain, n_no_bias)
            m = Reshape(n, flat)
            y = Gemm(m, w, c)
        }
        """,
        count=1,
    )
    feeds = {"ids": np.array([[1, 0]])}
    expected = run_model(parse(before), feeds)[0]
    assert relative_error(run_model(model, feeds)[0], expected) <= 3e-7


def test_before_opset_23_a_layer_norm_stays() -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]>' + LAYER)
    assert apply(FoldNormScale(), model) == 1
    assert "LayerNormalization" in [node.op_type for node in model.graph]
    assert run_model(model, {"ids": np.array([[1, 0]])})


# --- what may stand in a graph, with the same outputs ---


@pytest.mark.parametrize("why", STREAM_FREE)
def test_folds_around(why: str) -> None:
    changes, more = STREAM_FREE[why]
    before, model = toy(*changes, **more), toy(*changes, **more)
    norms = sum(node.op_type == "RMSNormalization" for node in model.graph)
    assert apply(FoldNormScale(), model) == norms
    feeds = toy_feeds(model)
    assert relative_error(run_model(model, feeds)[0], run_model(before, feeds)[0]) <= 5e-7
    assert apply(FoldNormScale(), model) == 0


def layered(*changes: Change, **more: str) -> ir.Model:
    """The toy decoder with LayerNorms that have a bias."""
    norms: list[Change] = [
        (f"n{i} =", f"n{i} = LayerNormalization({x}, g{i}, b{i})") for i, x in enumerate("xyz", 1)
    ]
    biases = "".join(f", {tensor(f'b{i}', 4, seed=20 + i)}" for i in (1, 2, 3))
    constants = more.pop("constants", "") + biases
    texts: More = {"constants": constants, "inputs": more.pop("inputs", "")}
    return toy(*(dict(norms) | dict(changes)).items(), **texts)


LAYERED: dict[str, tuple[list[Change], dict[str, str]]] = {
    "as it is": ([], {}),
    "constant added": (
        [("y =", "xo = Add(x, o)  y = Add(xo, wide)")],
        {"constants": f", {tensor('wide', 3, 4, offset=1.0)}"},
    ),
    "scaled": (
        [("z =", "zs = Add(y, d)  z = Mul(zs, half)")],
        {"constants": ", float half = {0.5}"},
    ),
    "tied to the head": ([("logits =", TIED)], {"constants": SHAPES}),
    "no bias": ([("n2 =", "n2 = LayerNormalization(y, g2)")], {}),
    "gain and bias of two norms": ([("n2 =", "n2 = LayerNormalization(y, g1, b1)")], {}),
    "biases in linears": (
        [
            (
                "u =",
                "n2f = Reshape(n2, flat)  uf = Gemm(n2f, up, c)  u = Reshape(uf, wide)",
            )
        ],
        {"constants": f"{SHAPES}, int64[3] wide = {{1, 3, 8}}, {tensor('c', 8)}"},
    ),
    "empty third input": (
        [("u =", "n2f = Reshape(n2, flat)  uf = Gemm(n2f, up, )  u = Reshape(uf, wide)")],
        {"constants": f"{SHAPES}, int64[3] wide = {{1, 3, 8}}"},
    ),
}


@pytest.mark.parametrize("why", LAYERED)
def test_layer_norms_become_rms_norms(why: str) -> None:
    changes, more = LAYERED[why]
    before, model = layered(*changes, **more), layered(*changes, **more)
    assert apply(FoldNormScale(), model) == 3
    assert not any(node.op_type == "LayerNormalization" for node in model.graph)
    feeds = toy_feeds(model)
    assert relative_error(run_model(model, feeds)[0], run_model(before, feeds)[0]) <= 1e-6
    assert apply(FoldNormScale(), model) == 0


def test_a_dynamic_dimension_does_not_matter() -> None:
    before, model = toy(length="tokens"), toy(length="tokens")
    assert apply(FoldNormScale(), model) == 3
    feeds = toy_feeds(model)
    assert relative_error(run_model(model, feeds)[0], run_model(before, feeds)[0]) <= 5e-7


def test_a_bias_before_an_output_of_dynamic_shape() -> None:
    text = """
        g (int64[1, n] ids) => (float[1, n, 2] y)
        <float[2, 2] t = {1, 3, 5, 9}, float[2] gain = {2, 3}, float[2] shift = {1, -1},
         float[2, 2] w = {1, 2, 3, 4}>
        { x = Gather(t, ids)  n = LayerNormalization(x, gain, shift)  y = MatMul(n, w) }
    """
    model, feeds = parse(text), {"ids": np.array([[1, 0, 1]])}
    compilation = Compilation(model)
    assert FoldNormScale().run(compilation) == 1
    verify_stage(compilation)
    assert [value.name for value in model.graph.outputs] == ["y"]
    expected = run_model(parse(text), feeds)[0]
    assert relative_error(run_model(model, feeds)[0], expected) <= 5e-7


@pytest.mark.parametrize("scale", ["alpha: float = 0.5", "beta: float = 3"])
def test_a_scaling_gemm_takes_a_gain_but_no_bias(scale: str) -> None:
    scaled = LAYER.replace("Gemm(", f"Gemm<{scale}>(")
    assert_keeps(FoldNormScale(), scaled)
    for before in (scaled.replace(", shift)", ")"), scaled.replace("{1, -1}", "{0, 0}")):
        model, feeds = parse(before), {"ids": np.array([[1, 0]])}
        expected = run_model(model, feeds)[0]
        assert apply(FoldNormScale(), model) == 1
        assert relative_error(run_model(model, feeds)[0], expected) <= 5e-7


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_keep_their_type(kind: type) -> None:
    model = parse(RMS)
    for value in model.graph.initializers.values():
        array = constant_array(value)
        if value.dtype == ir.DataType.FLOAT and array is not None:
            set_constant(value, array.astype(kind))
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(kind)))
    assert apply(FoldNormScale(), model) == 1
    for name in ("w", "v", "n_unit_gain"):
        array = constant_array(model.graph.initializers[name])
        assert array is not None and array.dtype == kind
    np.testing.assert_array_equal(
        constant_array(model.graph.initializers["w"]), np.array([[2, 4], [9, 12]], kind)
    )


def test_a_tied_head_takes_the_gain_alone() -> None:
    model = toy(("logits =", TIED), constants=SHAPES)
    table = constant_array(model.graph.initializers["embed"])
    gain = constant_array(model.graph.initializers["g3"])
    assert table is not None and gain is not None
    assert apply(FoldNormScale(), model) == 3
    np.testing.assert_array_equal(constant_array(model.graph.initializers["embed"]), table)
    head = constant_array(model.graph.initializers["embed_untied"])
    np.testing.assert_array_equal(head, table * gain)


# --- must not fire ---


@pytest.mark.parametrize(
    "text",
    [
        RMS.replace("{2, 3}", "{1, 1}"),
        # one weight, two linears
        RMS.replace("(m, v)", "(m, w)"),
        # the norm's result goes elsewhere
        RMS.replace("m = Reshape(n, flat)", "m = Reshape(n, flat)  r = Relu(n)"),
        RMS.replace("float[2, 2] z)", "float[2, 2] z, float[1, 2, 2] n)"),
        # a weight that someone outside sees, or sets
        RMS.replace("float[2, 2] z)", "float[2, 2] z, float[2, 2] w)"),
        RMS.replace("ids)", "ids, float[2, 2] w)", 1),
        # a gain that is not known
        RMS.replace("ids)", "ids, float[2] other)", 1).replace("(x, gain)", "(x, other)"),
        # a gain per token
        RMS.replace("RMSNormalization(", "RMSNormalization<axis: int = 1>(").replace(
            "float[2] gain = {2, 3}", "float[2, 2] gain = {2, 3, 4, 5}"
        ),
        # one gain for all features
        RMS.replace("float[2] gain = {2, 3}", "float[1] gain = {2}"),
        # the activation is the second operand, or transposed
        RMS.replace("MatMul(n, w)", "MatMul(w, n)"),
        RMS.replace("<transB", "<transA: int = 1, transB"),
        # no decoder
        RMS.replace("int64[1, 2] ids", "float[1, 2, 2] ids").replace("Gather(t, ids)", "Relu(ids)"),
        # a bias that is not known
        LAYER.replace("ids)", "ids, float[2] other)", 1).replace("gain, shift", "gain, other"),
        # a linear's bias that cannot take it
        LAYER.replace("ids)", "ids, float[2] other)", 1).replace("w, c)", "w, other)"),
        LAYER.replace("float[2] c = {10, 20}", "float[1, 2] c = {10, 20}"),
        # … or that someone outside sees
        LAYER.replace("float[2, 2] y)", "float[2, 2] y, float[2] c)"),
        # the norm hands out its mean
        LAYER.replace("[n] n =", "n, mean =").replace(
            "float[2, 2] y)", "float[2, 2] y, float[1, 2, 1] mean)"
        ),
    ],
)
def test_must_not_fire(text: str) -> None:
    model = parse(HEADER + text)
    before = serialized(model)
    assert apply(FoldNormScale(), model) == 0
    assert serialized(model) == before


def test_a_bias_that_others_use_is_copied_first() -> None:
    """The Add keeps the old one."""
    text = HEADER + LAYER.replace("y = Gemm(m, w, c)", "y1 = Gemm(m, w, c)  y = Add(y1, c)")
    before, model = parse(text), parse(text)
    assert apply(FoldNormScale(), model) == 2  # a bias, a norm
    feeds = {"ids": np.array([[0, 1]])}
    (expected,), (actual,) = run_model(before, feeds), run_model(model, feeds)
    assert relative_error(actual, expected) <= 5e-7
    assert apply(FoldNormScale(), model) == 0


RUNNABLE = [
    name
    for name in STREAM_BLOCKED
    if "norm" not in name and name != "operator of another domain"  # which no runtime knows
]


@pytest.mark.parametrize("why", RUNNABLE)
def test_a_blocked_stream_keeps_its_outputs(why: str) -> None:
    """Gains fold wherever the linears behind are free; nothing else changes."""
    _, changes, more = STREAM_BLOCKED[why]
    before, model = toy(*changes, **more), toy(*changes, **more)
    assert apply(FoldNormScale(), model) >= 1
    feeds = toy_feeds(model)
    for expected, actual in zip(run_model(before, feeds), run_model(model, feeds), strict=True):
        assert relative_error(actual, expected) <= 5e-7
