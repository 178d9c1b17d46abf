"""Which layer a node belongs to, by names of nodes and weights."""

from __future__ import annotations

from collections import Counter

import pytest

from qnpu.compiler.layer_summary import verdicts_by_layer
from qnpu.compiler.target import TargetProfile, Verdict
from qnpu.compiler.target_check import check_target
from tests.conftest import parse

TARGET = TargetProfile.model_validate(
    {"id": "test", "rules": [{"ops": ["*"], "verdict": "int", "island": True}]}
)


def layers(text: str) -> dict[str, Counter[Verdict]]:
    return verdicts_by_layer(check_target(parse(text), TARGET))


def quantized(name: str) -> str:
    """A weight and its DequantizeLinear, in ONNX text."""
    return f'"{name}_d" = DequantizeLinear("{name}", s, z)'


@pytest.mark.parametrize(
    "form", ["model.layers.{}.w", "/model/layers.{}/w", "h.{}.w", "blocks_{}_w", "transformer.h.{}"]
)
def test_weights_name_their_layer(form: str) -> None:
    first, second = form.format(0), form.format(11)
    text = f"""
        g (float[2, 2] x) => (float[2, 2] y)
        <float s = {{1}}, int8 z = {{0}}, int8[2, 2] "{first}" = {{1, 2, 3, 4}},
         int8[2, 2] "{second}" = {{1, 2, 3, 4}}, int8[2, 2] "lm_head.weight" = {{1, 2, 3, 4}}>
        {{
            a = Relu(x)
            {quantized(first)} b = MatMul(a, "{first}_d")
            c = Relu(b)
            {quantized(second)} d = MatMul(c, "{second}_d")
            e = Relu(d)
            {quantized("lm_head.weight")} y = MatMul(e, "lm_head.weight_d")
        }}
    """
    found = layers(text)
    assert {layer: sum(counts.values()) for layer, counts in found.items()} == {
        "-": 1,
        "0": 2,
        "11": 2,
        "head": 1,
    }


def test_constants_without_a_layer_do_not_end_one() -> None:
    """A rotary table that several layers share."""
    text = f"""
        g (float[2, 2] x) => (float[2, 2] y)
        <float s = {{1}}, int8 z = {{0}}, int8[2, 2] "layers.0.w" = {{1, 2, 3, 4}},
         int8[2, 2] "layers.1.w" = {{1, 2, 3, 4}}, int8[2, 2] cos = {{1, 2, 3, 4}}>
        {{
            {quantized("layers.0.w")} a = MatMul(x, "layers.0.w_d")
            {quantized("cos")} b = Mul(a, cos_d)
            {quantized("layers.1.w")} y = MatMul(b, "layers.1.w_d")
        }}
    """
    assert layers(text) == {"0": Counter({Verdict.INT: 2}), "1": Counter({Verdict.INT: 1})}


def test_a_graph_without_layers() -> None:
    assert layers("g (float[2] x) => (float[2] y) { y = Relu(x) }") == {
        "-": Counter({Verdict.INT: 1})
    }
