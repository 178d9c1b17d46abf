"""decompose-attention: Attention-23 in small operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.passes.decompose_attention import DecomposeAttention
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

# Measured: 2.4e-7 at most.
BOUND = 1e-6

FOUR = "float[1, 4, 3, 2] q, float[1, 2, 3, 2] k, float[1, 2, 3, 2] v"
EQUAL = "float[1, 2, 3, 2] q, float[1, 2, 3, 2] k, float[1, 2, 3, 2] v"
THREE = "float[2, 3, 8] q, float[2, 3, 4] k, float[2, 3, 6] v"
PAST = ", float[1, 2, 5, 2] pk, float[1, 2, 5, 2] pv"
KEPT = ", float[1, 2, 8, 2] nk, float[1, 2, 8, 2] nv"
ADDED = "float[3, 3] m = {0, -9, -9, 1, 0, -9, 0.5, 2, 0}"
ALLOWED = "bool[3, 3] m = {1, 0, 1, 1, 1, 0, 0, 0, 1}"
FLAT = "<q_num_heads: int = 4, kv_num_heads: int = 2>"


def attention(
    attributes: str = "",
    inputs: str = "q, k, v",
    operands: str = FOUR,
    held: str = "",
    outputs: tuple[str, str] = ("y", "float[1, 4, 3, 2] y"),
    opset: int = 23,
) -> str:
    names, described = outputs
    constants = f"<{held}>" if held else ""
    header = f'<ir_version: 11, opset_import: ["" : {opset}]>'
    node = f"{names} = Attention{attributes}({inputs})"
    return f"{header} g ({operands}) => ({described}) {constants} {{ {node} }}"


def feeds_of(model: ir.Model) -> Feeds:
    return {
        name_of(value): normal(*(static_shape(value) or ()), seed=index)
        for index, value in enumerate(model.graph.inputs)
    }


def test_golden() -> None:
    assert_rewrites(
        DecomposeAttention(),
        attention("<is_causal: int = 1, scale: float = 0.5>"),
        """
        g (float[1, 4, 3, 2] q, float[1, 2, 3, 2] k, float[1, 2, 3, 2] v)
            => (float[1, 4, 3, 2] y)
        <int64[1] y_each_key_axis = {2}, int64[5] y_each_key_sizes = {1, 2, 2, 3, 2},
         int64[4] y_each_key_shape = {1, 4, 3, 2}, int64[1] y_each_value_axis = {2},
         int64[5] y_each_value_sizes = {1, 2, 2, 3, 2}, int64[4] y_each_value_shape = {1, 4, 3, 2},
         float y_scale = {0.5},
         float[3, 3] attention_mask = {0, -3.4028234663852886e+38, -3.4028234663852886e+38,
                                       0, 0, -3.4028234663852886e+38, 0, 0, 0}>
        {
            y_each_key_group = Unsqueeze(k, y_each_key_axis)
            y_each_key_copies = Expand(y_each_key_group, y_each_key_sizes)
            y_each_key = Reshape(y_each_key_copies, y_each_key_shape)
            y_each_value_group = Unsqueeze(v, y_each_value_axis)
            y_each_value_copies = Expand(y_each_value_group, y_each_value_sizes)
            y_each_value = Reshape(y_each_value_copies, y_each_value_shape)
            y_keys_transposed = Transpose<perm: ints = [0, 1, 3, 2]>(y_each_key)
            y_scores = MatMul(q, y_keys_transposed)
            y_scaled = Mul(y_scores, y_scale)
            y_masked = Add(y_scaled, attention_mask)
            y_weights = Softmax<axis: int = -1>(y_masked)
            y = MatMul(y_weights, y_each_value)
        }
        """,
        count=1,
    )


CASES: dict[str, str] = {
    "plain": attention(),
    "one key head for each": attention(operands=EQUAL, outputs=("y", "float[1, 2, 3, 2] y")),
    "scale": attention("<scale: float = 0.9>"),
    "softcap": attention("<softcap: float = 0.7>"),
    "softcap and scale": attention("<softcap: float = 0.7, scale: float = 2>", operands=FOUR),
    "causal": attention("<is_causal: int = 1>"),
    "mask": attention(inputs="q, k, v, m", held=ADDED),
    "mask at run time": attention(inputs="q, k, v, m", operands=f"{FOUR}, float[1, 1, 3, 3] m"),
    "boolean mask": attention(inputs="q, k, v, m", held=ALLOWED),
    "softcap and mask": attention("<softcap: float = 0.7>", "q, k, v, m", held=ADDED),
    "flat": attention(FLAT, operands=THREE, outputs=("y", "float[2, 3, 12] y")),
    "flat and causal": attention(
        FLAT.replace(">", ", is_causal: int = 1>"),
        operands=THREE,
        outputs=("y", "float[2, 3, 12] y"),
    ),
    "past": attention(
        inputs="q, k, v, , pk, pv",
        operands=FOUR + PAST,
        outputs=("y, nk, nv", "float[1, 4, 3, 2] y" + KEPT),
    ),
    "past and mask": attention(
        inputs="q, k, v, m, pk, pv",
        operands=f"{FOUR}{PAST}, float[3, 8] m",
        outputs=("y, nk, nv", "float[1, 4, 3, 2] y" + KEPT),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay(name: str) -> None:
    model = parse(CASES[name])
    feeds = feeds_of(model)
    expected = run_model(model, feeds)
    assert apply(DecomposeAttention(), model) == 1
    assert "Attention" not in {node.op_type for node in model.graph}
    assert all(static_shape(value) for node in model.graph for value in node.outputs)
    for new, old in zip(run_model(model, feeds), expected, strict=True):
        assert relative_error(new, old) <= BOUND
    assert apply(DecomposeAttention(), model) == 0


def test_causal_behind_a_past_sees_all_of_it() -> None:
    """As ONNX says since its erratum: new token i sees keys up to P + i."""
    text = attention(
        "<is_causal: int = 1>",
        "q, k, v, , pk, pv",
        FOUR + PAST,
        outputs=("y, nk, nv", "float[1, 4, 3, 2] y" + KEPT),
    )
    mask = (
        "float[3, 8] m = {"
        + ", ".join("-1e9" if key > 5 + token else "0" for token in range(3) for key in range(8))
        + "}"
    )
    spelt = attention(
        inputs="q, k, v, m, pk, pv",
        operands=FOUR + PAST,
        held=mask,
        outputs=("y, nk, nv", "float[1, 4, 3, 2] y" + KEPT),
    )
    model = parse(text)
    feeds = feeds_of(model)
    assert apply(DecomposeAttention(), model) == 1
    expected = run_model(parse(spelt), feeds)
    for new, old in zip(run_model(model, feeds), expected, strict=True):
        assert relative_error(new, old) <= BOUND


def test_attentions_share_a_mask() -> None:
    node = "Attention<is_causal: int = 1>"
    model = parse(
        f"g ({EQUAL}) => (float[1, 2, 3, 2] y) {{ a = {node}(q, k, v)  y = {node}(a, k, v) }}"
    )
    assert apply(DecomposeAttention(), model) == 2
    assert [name for name in model.graph.initializers if "mask" in name] == ["attention_mask"]


HIDDEN_ROW = "bool[3, 3] m = {1, 0, 1, 0, 0, 0, 0, 0, 1}"


@pytest.mark.parametrize(
    "text",
    [
        attention(inputs="q, k, v, m", held=HIDDEN_ROW),
        attention("<is_causal: int = 1>", "q, k, v, m", held=ALLOWED.replace("{1, 0", "{0, 1")),
        attention(inputs="q, k, v, m", operands=f"{FOUR}, bool[3, 3] m"),
        attention(operands=FOUR.replace("1, 4, 3", "1, 4, tokens")),
        attention("<is_causal: int = 1>", operands=FOUR.replace("1, 4, 3", "1, 4, 2")),
        attention("<softmax_precision: int = 10>"),
        attention(outputs=("y, , , s", "float[1, 4, 3, 2] y, float[1, 4, 3, 3] s")),
        attention(inputs="q, k, v, , , , n", operands=f"{FOUR}, int64[1] n", opset=24),
        attention().replace("23]", '23, "acme" : 1]').replace("Attention", "acme.Attention"),
    ],
)
def test_other_attentions_stay(text: str) -> None:
    assert_keeps(DecomposeAttention(), text)


def test_an_empty_past_is_no_past() -> None:
    text = attention(
        inputs="q, k, v, , pk, pv",
        operands=FOUR + PAST.replace("5", "0"),
        outputs=("y, nk, nv", "float[1, 4, 3, 2] y" + KEPT.replace("8", "3")),
    )
    model = parse(text)
    feeds = feeds_of(model)
    assert apply(DecomposeAttention(), model) == 1
    assert "Concat" not in {node.op_type for node in model.graph}
    actual = run_model(model, feeds)
    np.testing.assert_array_equal(actual[1], feeds["k"])
