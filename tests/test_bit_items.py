"""bit_items: what a decoder has to choose bits for, found by structure alone."""

from __future__ import annotations

import pytest

from qnpu.compiler.bit_items import KEYS, VALUES, find_items
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import Compilation
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.passes.insert_hadamard import InsertHadamard
from tests.conftest import parse
from tests.decoders import canonical

HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, HEAD_DIM = 64, 128, 257, 2, 4, 16
JOINT = {"gpt2": ["qkv"], "phi3": ["qkv"], "neox": ["qkv"]}
UP = {"gpt2": ["up"], "phi3": ["up"], "neox": ["up"]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_of_every_architecture(architecture: str) -> None:
    model = canonical(architecture)
    items = find_items(model)
    found = [item.linear.node for group in items.groups for item in group.linears]
    assert set(found) == {node for node in model.graph if as_linear(node) is not None}
    assert len(set(found)) == len(found)
    for group in items.groups:
        assert all(item.linear.activation is group.source for item in group.linears)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_roles_layer_by_layer(architecture: str) -> None:
    items = find_items(canonical(architecture))
    for layer in range(LAYERS):
        roles = [item.shape.role for g in items.groups if g.layer == layer for item in g.linears]
        qkv = JOINT.get(architecture, ["q", "k", "v"])
        assert roles == [*qkv, "o", *UP.get(architecture, ["gate", "up"]), "down"]
        assert [c.role for c in items.caches if c.layer == layer] == [KEYS, VALUES]
    (head,) = [group for group in items.groups if group.layer == LAYERS]
    assert [item.shape.role for item in head.linears] == ["head"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sizes_as_the_configuration_has_them(architecture: str) -> None:
    shape = find_items(canonical(architecture)).shape
    assert (shape.layers, shape.heads, shape.head_dim) == (LAYERS, HEADS, HEAD_DIM)
    assert shape.kv_heads == {"llama": 2, "gpt2": 4}[architecture]
    assert (shape.hidden, shape.intermediate) == (HIDDEN, INNER)
    assert shape.embedding == VOCABULARY * HIDDEN
    sizes = {item.role: (item.features, item.channels) for item in shape.linears}
    assert sizes["down"] == (INNER, HIDDEN)
    assert sizes["head"] == (HIDDEN, VOCABULARY)


def test_online_rotations_are_looked_through_and_left_out() -> None:
    model = canonical("llama")
    before = [shape.role for shape in find_items(model).shape.linears]
    added = InsertHadamard(("r3", "r4")).run(Compilation(model))
    assert added
    assert [shape.role for shape in find_items(model).shape.linears] == before


def test_results_that_keep_their_own_bits() -> None:
    """The residual stream and the logits; all others have as many as the input."""
    items = find_items(canonical("llama"))
    wide = {item.shape.role for g in items.groups for item in g.linears if item.shape.wide_output}
    assert wide == {"o", "down", "head"}
    assert all(
        (item.narrow_result is None) == item.shape.wide_output
        for group in items.groups
        for item in group.linears
    )


def test_what_is_no_decoder() -> None:
    model = parse("""
        plain (float[1, 4] x) => (float[1, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        { y = MatMul(x, w) }
    """)
    with pytest.raises(DiagnosticError) as caught:
        find_items(model)
    assert caught.value.codes == ["QN541"]
