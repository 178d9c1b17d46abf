"""Rows of a report by layer: the same tensors as a search lists, and every value's layer."""

from __future__ import annotations

from qnpu.compiler.bit_choices import BitChoices, LinearBits
from qnpu.compiler.bit_items import find_items
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.layer_rows import BEFORE_LAYERS, bit_rows, layers_of_values
from tests.conftest import parse
from tests.decoders import canonical

NO_DECODER = "g (float[2, 3] x) => (float[2, 3] y) { y = Neg(x) }"


def test_bits_of_every_linear_and_cache() -> None:
    model = canonical("llama")
    items = find_items(model)
    linears = {
        item.shape.name: LinearBits(4 if item.shape.role == "up" else 8, 16)
        for group in items.groups
        for item in group.linears
    }
    choices = BitChoices(linears, {cache.name: 8 for cache in items.caches})
    rows = bit_rows(model, choices)
    layer = [
        *("input of q", "q", "k", "v", "input of o", "o"),
        *("input of gate", "gate", "up", "input of down", "down"),
    ]
    linear_rows = [row for row in rows if row.role not in ("keys", "values")]
    assert [row.role for row in linear_rows] == [*layer, *layer, "input of head", "head"]
    assert [row.layer for row in linear_rows] == [0] * 11 + [1] * 11 + [2] * 2
    assert {(row.role, row.layer) for row in rows} >= {("keys", 0), ("values", 1)}
    for row in rows:
        width = 4 if row.role == "up" else 16 if row.role.startswith("input") else 8
        assert (row.bits, dict(row.losses)) == (width, {})


def test_blocks_of_a_weight() -> None:
    model = canonical("llama")
    name = find_items(model).groups[0].linears[0].shape.name
    rows = bit_rows(model, BitChoices({name: LinearBits(4, 16, 32)}))
    (row,) = (row for row in rows if row.name == name)
    assert (row.label, row.words) == ("4b32", "4, blocks of 32")
    assert {other.words for other in rows if other is not row} == {"16"}


def test_what_no_bits_were_chosen_for_is_left_out() -> None:
    assert bit_rows(canonical("llama"), BitChoices()) == ()


def test_a_value_is_of_the_layer_that_makes_it() -> None:
    model = canonical("llama")
    layers = layers_of_values(model)
    assert set(layers) == {name_of(value) for node in model.graph for value in node.outputs}
    for group in find_items(model).groups:
        for item in group.linears:
            assert layers[name_of(item.linear.node.outputs[0])] == group.layer
    assert layers["logits"] == 2
    assert min(layers.values()) == BEFORE_LAYERS


def test_no_decoder_has_no_layers() -> None:
    model = parse(NO_DECODER)
    assert layers_of_values(model) == {}
    assert bit_rows(model, BitChoices()) == ()
