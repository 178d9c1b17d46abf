"""decompose-contrib: ONNX Runtime's own operators against their standard form, by its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.pass_base import Compilation, Pass, run_passes
from qnpu.compiler.verify import verify_stage
from qnpu.passes.canonicalize import Canonicalize
from qnpu.passes.decompose_attention import DecomposeAttention
from qnpu.passes.decompose_contrib import DecomposeContrib
from qnpu.passes.decompose_rotary import DecomposeRotary
from qnpu.passes.freeze_shapes import FreezeShapes
from qnpu.runtime_check.session import Feeds
from tests.conftest import (
    apply,
    assert_keeps,
    assert_rewrites,
    normal,
    parse,
    relative_error,
    run_model,
)
from tests.genai_decoder import HEAD_DIM, KV_HEADS, genai_decoder, genai_feeds

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
# Measured: 1.1e-6 at most, over a whole decoder.
BOUND = 1e-5
TOKENS = 12


def contrib(body: str, inputs: str, constants: str = "", outputs: str = "float[b, s, w] y") -> str:
    """A graph of ONNX text around operators of com.microsoft."""
    held = f"<{constants}>" if constants else ""
    return f"{HEADER} g ({inputs}) => ({outputs}) {held} {{ {body} }}"


def domains(model: ir.Model) -> set[str]:
    return {node.domain for node in model.graph}


def random_feeds(model: ir.Model, seed: int = 0) -> Feeds:
    return {
        name_of(value): normal(*(static_shape(value) or ()), seed=seed + index)
        for index, value in enumerate(model.graph.inputs)
    }


# --- whole decoders ---


def to_small_operators(model: ir.Model, tokens: int, past: int = 0) -> ir.Model:
    total = tokens + past
    dims = {"past_sequence_length": past, "total_sequence_length": total}
    passes: list[Pass] = [
        FreezeShapes(dims, tokens),
        DecomposeContrib(),
        Canonicalize(),
        DecomposeAttention(),
        DecomposeRotary(),
    ]
    compilation = Compilation(model)
    run_passes(passes, compilation, after_pass=lambda done: verify_stage(compilation))
    return model


DECODERS: dict[str, dict[str, Any]] = {
    "as built": {},
    "older builder": {"opset": 14},
    "separate projections": {"packed": False},
    "sliding window": {"local_window_size": 5},
    "window of one": {"local_window_size": 1},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.5},
    "default scale": {"scale": 0.0},
    "pairs rotated": {"rotary_interleaved": 1},
    "not rotated": {"do_rotary": 0},
}


@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_the_model_builder(name: str, past: int) -> None:
    tokens = 5 if past else TOKENS
    model = genai_decoder(**DECODERS[name])
    feeds = genai_feeds(tokens, past)
    expected = run_model(model, feeds)
    to_small_operators(model, tokens, past)
    assert domains(model) == {""}
    assert {"Attention", "RotaryEmbedding"}.isdisjoint(node.op_type for node in model.graph)
    left = {name_of(value): feeds[name_of(value)] for value in model.graph.inputs}
    actual = run_model(model, left)
    for value, new, old in zip(model.graph.outputs, actual, expected, strict=True):
        assert static_shape(value) == old.shape
        assert relative_error(new, old) <= BOUND, value.name
    np.testing.assert_array_equal(actual[0].argmax(-1), expected[0].argmax(-1))


def test_one_token_behind_a_past() -> None:
    model, feeds = genai_decoder(), genai_feeds(1, 9)
    expected = run_model(model, feeds)
    to_small_operators(model, 1, 9)
    actual = run_model(model, {name_of(v): feeds[name_of(v)] for v in model.graph.inputs})
    for new, old in zip(actual, expected, strict=True):
        assert relative_error(new, old) <= BOUND


def test_a_wrong_mask_or_position_shows() -> None:
    """The bound of these tests is far below what a mistake makes."""
    expected = run_model(genai_decoder(), genai_feeds(TOKENS))[0]
    for changed in ({"local_window_size": TOKENS - 1}, {"scale": 0.26}):
        other = run_model(genai_decoder(**changed), genai_feeds(TOKENS))[0]
        assert relative_error(other, expected) > 100 * BOUND


def test_layers_share_mask_and_tables() -> None:
    model = to_small_operators(genai_decoder(), TOKENS)
    masks = [
        name
        for name, value in model.graph.initializers.items()
        if static_shape(value) == (TOKENS, TOKENS)
    ]
    assert masks == ["causal_mask"]
    rows = [n for n, v in model.graph.initializers.items() if static_shape(v) == (1, 1, TOKENS, 8)]
    assert sorted(rows) == ["cos_cache_rows_row", "sin_cache_rows_row"]


# --- single operators ---


def test_golden() -> None:
    assert_rewrites(
        DecomposeContrib(),
        f"""
        {HEADER}
        g (float[1, 2, 4] x, float[1, 2, 4] s) => (float[1, 2, 4] y, float[1, 2, 4] r)
        <float[4] gain = {{1, 2, 3, 4}}>
        {{ y, mean, deviation, r = com.microsoft.SkipSimplifiedLayerNormalization(x, s, gain) }}
        """.replace("mean, deviation", ", "),
        """
        <ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[1, 2, 4] x, float[1, 2, 4] s) => (float[1, 2, 4] y, float[1, 2, 4] r)
        <float[4] gain = {1, 2, 3, 4}>
        {
            r = Add(x, s)
            y = RMSNormalization<axis: int = -1, epsilon: float = 1e-12>(r, gain)
        }
        """,
        count=1,
    )


ROW = "float[8] g = {1, 2, -1, 0.5, 3, 1, 1, 2}"
BIAS = "float[8] b = {0.1, -2, 1, 0.5, 0, 1, 1, 2}"
GAMMA, BETA = f"{ROW}", "float[8] beta = {1, -1, 2, -2, 0.5, 1, 0, 0}"
X = "float[1, 3, 8] x"
Y = "float[1, 3, 8] y"
OPERATORS: dict[str, str] = {
    "simplified norm": contrib(
        "y = SimplifiedLayerNormalization<axis: int = -1, epsilon: float = 0.1>(x, g)", X, ROW, Y
    ),
    "simplified norm, usual epsilon": contrib("y = SimplifiedLayerNormalization(x, g)", X, ROW, Y),
    "skip simplified norm with bias": contrib(
        "y, , , r = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 0.1>"
        "(x, s, g, b)",
        f"{X}, float[1, 3, 8] s",
        f"{ROW}, {BIAS}",
        f"{Y}, float[1, 3, 8] r",
    ),
    "skip norm": contrib(
        "y = com.microsoft.SkipLayerNormalization<epsilon: float = 0.1>(x, s, g)",
        f"{X}, float[1, 3, 8] s",
        ROW,
        Y,
    ),
    "skip norm with all": contrib(
        "y, , , r = com.microsoft.SkipLayerNormalization<epsilon: float = 0.1>(x, s, g, beta, b)",
        f"{X}, float[3, 8] s",
        f"{ROW}, {BIAS}, {BETA}",
        f"{Y}, float[1, 3, 8] r",
    ),
    "fast gelu": contrib("y = com.microsoft.FastGelu(x)", X, outputs=Y),
    "fast gelu with bias": contrib("y = com.microsoft.FastGelu(x, b)", X, BIAS, Y),
    "bias gelu": contrib("y = com.microsoft.BiasGelu(x, b)", X, BIAS, Y),
    "gelu": contrib("y = com.microsoft.Gelu(x)", X, outputs=Y),
    "quick gelu": contrib("y = com.microsoft.QuickGelu(x)", X, outputs=Y),
    "quick gelu of another slope": contrib(
        "y = com.microsoft.QuickGelu<alpha: float = 0.7>(x)", X, outputs=Y
    ),
}

TABLES = """float[4, 2] cos = {1, 0.5, 0.25, 0.125, 0.9, 0.8, 0.7, 0.6},
    float[4, 2] sin = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}"""


def rotary(shape: str, attributes: str = "", positions: str = "int64[1] at = {1}") -> str:
    node = f"y = com.microsoft.RotaryEmbedding{attributes}(x, at, cos, sin)"
    return contrib(node, f"float[{shape}] x", f"{TABLES}, {positions}", f"float[{shape}] y")


OPERATORS |= {
    "rotation of flat heads": rotary("1, 3, 8"),
    "rotation of heads": rotary("1, 2, 3, 4"),
    "rotation by positions": rotary("1, 2, 3, 4", positions="int64[1, 3] at = {3, 0, 1}"),
    "rotation of pairs": rotary("1, 3, 8", "<interleaved: int = 1>"),
    "rotation of a part": rotary("1, 3, 12", "<rotary_embedding_dim: int = 4, num_heads: int = 2>"),
}


def multi_head(
    attributes: str = "", inputs: str = "q, k, v", more: str = "", held: str = ""
) -> str:
    node = f"y = com.microsoft.MultiHeadAttention<num_heads: int = 2{attributes}>({inputs})"
    operands = "float[1, 3, 8] q, float[1, 3, 8] k, float[1, 3, 8] v"
    return contrib(node, operands + more, held, Y)


BIASES = ", ".join(str(i / 10) for i in range(24))
OPERATORS |= {
    "multi-head": multi_head(),
    "multi-head, causal": multi_head(", unidirectional: int = 1"),
    "multi-head, scaled": multi_head(", scale: float = 0.9"),
    "multi-head with a bias": multi_head(
        inputs="q, k, v, biases", held=f"float[24] biases = {{{BIASES}}}"
    ),
    "multi-head with a mask": multi_head(
        inputs="q, k, v, , , mask", more=", float[1, 1, 3, 3] mask"
    ),
    "multi-head with both masks": multi_head(
        ", unidirectional: int = 1",
        inputs="q, k, v, , , mask",
        more=", float[1, 2, 3, 3] mask",
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_numbers_stay(name: str) -> None:
    model = parse(OPERATORS[name])
    feeds = random_feeds(model)
    expected = run_model(model, feeds)
    assert apply(DecomposeContrib(), model) == 1
    assert domains(model) == {""}
    assert all(static_shape(value) for node in model.graph for value in node.outputs)
    for new, old in zip(run_model(model, feeds), expected, strict=True):
        assert relative_error(new, old) <= BOUND
    assert apply(DecomposeContrib(), model) == 0


# --- must not fire ---


def test_standard_operators_stay() -> None:
    assert_keeps(DecomposeContrib(), f"g ({X}) => ({Y}) {{ y = Gelu(x) }}")


def test_operators_of_others_stay() -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "acme" : 1]>'
    assert_keeps(DecomposeContrib(), f"{header} g ({X}) => ({Y}) {{ y = acme.QuickGelu(x) }}")


def query_attention(inputs: str = "", attributes: str = "", more: str = "", last: str = "2") -> str:
    """Two heads of eight over three tokens, no past."""
    node = (
        f"y, k1, v1 = com.microsoft.GroupQueryAttention<num_heads: int = 2, kv_num_heads: int = 2"
        f"{attributes}>(x, , , , , last, all{inputs})"
    )
    held = f"int32[1] last = {{{last}}}, int32 all = {{3}}, {TABLES}"
    caches = "float[1, 2, 3, 8] k1, float[1, 2, 3, 8] v1"
    return contrib(node, f"float[1, 3, 48] x{more}", held, f"float[1, 3, 16] y, {caches}")


def test_without_a_past_input() -> None:
    model = parse(query_attention())
    feeds = random_feeds(model)
    expected = run_model(model, feeds)
    assert apply(DecomposeContrib(), model) == 1
    for new, old in zip(run_model(model, feeds), expected, strict=True):
        assert relative_error(new, old) <= BOUND


def test_with_a_bias_on_the_scores() -> None:
    more = ", float[1, 2, 3, 3] bias"
    model = parse(query_attention(", , , , bias", more=more))
    feeds = random_feeds(model)
    expected = run_model(model, feeds)
    assert apply(DecomposeContrib(), model) == 1
    for new, old in zip(run_model(model, feeds), expected, strict=True):
        assert relative_error(new, old) <= BOUND


WEIGHT = "uint8[1, 1, 16] w = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, float[1] s = {1}"
REFUSED: dict[str, str] = {
    "weights in four bits": contrib(
        "y = com.microsoft.MatMulNBits<K: int = 32, N: int = 1, bits: int = 4, "
        "block_size: int = 32>(x, w, s)",
        "float[1, 32] x",
        WEIGHT,
        "float[1, 1] y",
    ),
    "smooth softmax": query_attention(attributes=", smooth_softmax: int = 1"),
    "head sink": query_attention(", , , , , sink", more=", float[2] sink"),
    "cache of four bits": query_attention(attributes=", kv_cache_bit_width: int = 4"),
    "padded": query_attention(last="1"),
    "lengths at run time": query_attention()
    .replace("int32[1] last = {2}, ", "")
    .replace("float[1, 3, 48] x", "float[1, 3, 48] x, int32[1] last"),
    "table too short": query_attention(", cos, sin", attributes=", do_rotary: int = 1")
    .replace("[4, 2]", "[2, 2]")
    .replace(", 0.9, 0.8, 0.7, 0.6", "")
    .replace(", 0.5, 0.6, 0.7, 0.8", ""),
    "positions from elsewhere": query_attention(
        ", cos, sin, at", attributes=", do_rotary: int = 1", more=", int64[1, 3] at"
    ),
    "padding mask": multi_head(inputs="q, k, v, , pad", more=", int32[1] pad"),
    "packed": contrib(
        "y = com.microsoft.MultiHeadAttention<num_heads: int = 2>(x)",
        "float[1, 3, 2, 3, 4] x",
        outputs=Y,
    ),
    "mean of a norm": contrib(
        "y, m = com.microsoft.SkipLayerNormalization(x, x, g)",
        X,
        ROW,
        f"{Y}, float[1, 3, 1] m",
    ),
    "positions of a rotation at run time": contrib(
        "y = com.microsoft.RotaryEmbedding(x, at, cos, sin)",
        "float[1, 2, 3, 4] x, int64[1, 3] at",
        TABLES,
        "float[1, 2, 3, 4] y",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        apply(DecomposeContrib(), parse(REFUSED[why]))
    assert caught.value.codes == ["QN117"]


def test_a_buffer_that_is_not_full_is_refused() -> None:
    """A past of 16 places of which 9 are taken, as the genai runtime itself shares it."""
    dims = {"past_sequence_length": 16, "total_sequence_length": 12}
    model = genai_decoder()
    FreezeShapes(dims, 3).run(Compilation(model))
    with pytest.raises(DiagnosticError) as caught:
        apply(DecomposeContrib(), model)
    assert caught.value.codes == ["QN117"]


def test_a_mask_that_stays_an_input_is_refused() -> None:
    model = genai_decoder()
    keep = ("attention_mask",)
    FreezeShapes(sequence_length=TOKENS, keep_inputs=keep).run(Compilation(model))
    with pytest.raises(DiagnosticError) as caught:
        apply(DecomposeContrib(), model)
    assert caught.value.codes == ["QN117"]


def test_the_past_keeps_its_shape() -> None:
    model = to_small_operators(genai_decoder(), 5, 7)
    shapes = {name_of(value): static_shape(value) for value in model.graph.inputs}
    assert shapes.pop("input_ids") == (1, 5)
    assert set(shapes.values()) == {(1, KV_HEADS, 7, HEAD_DIM)}
