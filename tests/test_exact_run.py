"""Q/DQ graphs in float64, whole or with integer functions in the place of some operators.

Bounds, in LSB of the 16-bit logits: with every kind on integers the codes are those of the
integer graph; alone they are ONNX Runtime's to 20 but for what an early tie moves (as in
test_cached_decoder).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.operands import input_operand
from qnpu.runtime_check.exact_run import ExactGraph, RealWeights
from qnpu.runtime_check.generate import CachedRunner
from qnpu.runtime_check.paired_nodes import units
from qnpu.runtime_check.session import Feeds, Mode
from tests.conftest import Array
from tests.test_cached_decoder import (
    FLIPPED_LSB,
    FLIPPED_SHARE,
    QDQ_LSB,
    TEXT,
    compiled,
    with_codes,
)

SCHEME = "w8a16"
architectures = pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])


def logits(architecture: str, *, on_integers: bool) -> Array:
    """Codes at each token of the text, from prefill and decode graph in turn.

    Args:
        architecture: of the tiny decoder.
        on_integers: every kind of operator is; else none.
    """
    made, weights = compiled(architecture, SCHEME), RealWeights()
    pairs = (
        (with_codes(made.prefill.model), made.integer_prefill),
        (with_codes(made.decode), made.integer_decode),
    )
    kinds = {unit.kind for unit in units(pairs[0][0].graph, pairs[0][1].graph)}
    assert {"norm", "linear"} <= kinds
    runs = [ExactGraph(*pair, kinds if on_integers else (), weights) for pair in pairs]
    assert runs[0].kinds == kinds
    runner = CachedRunner(pairs[0][0], pairs[1][0], runs=(runs[0], runs[1]))
    return np.concatenate([runner.read(TEXT[:16]), *(runner.read([t]) for t in TEXT[16:])])


def differences(one: Array, other: Array) -> Array:
    """The largest of each token, LSB."""
    distance: Array = np.abs(one.astype(np.int64) - other.astype(np.int64)).max(axis=-1)
    return distance


@architectures
def test_with_every_kind_on_integers_it_is_the_integer_graph(architecture: str) -> None:
    made = compiled(architecture, SCHEME)
    runner = CachedRunner(made.integer_prefill, made.integer_decode)
    np.testing.assert_array_equal(logits(architecture, on_integers=True), runner.read(TEXT))


@architectures
def test_alone_it_is_the_graph_of_float32_without_its_rounding(architecture: str) -> None:
    made = compiled(architecture, SCHEME)
    runner = CachedRunner(
        with_codes(made.prefill.model), with_codes(made.decode), mode=Mode.REFERENCE
    )
    found = logits(architecture, on_integers=False)
    worst = differences(found, runner.read(TEXT))
    assert (worst > QDQ_LSB[SCHEME]).mean() <= FLIPPED_SHARE
    assert worst.max() <= FLIPPED_LSB
    assert np.ptp(found.astype(np.int64)) > 40_000


def test_a_text_cut_otherwise_is_the_same() -> None:
    """In float64 there is nothing left that depends on the order of sums."""
    made = compiled("llama", SCHEME)
    pair = with_codes(made.decode), made.integer_decode
    runner = CachedRunner(
        with_codes(made.prefill.model), pair[0], runs=(_refused, ExactGraph(*pair))
    )
    alone = np.concatenate([runner.read([token]) for token in TEXT])
    np.testing.assert_array_equal(alone, logits("llama", on_integers=False))


def _refused(names: object, feeds: object) -> list[Array]:
    raise AssertionError("the prefill graph is not asked")


def test_weights_of_another_graph_are_not_taken_for_its_own() -> None:
    made = compiled("llama", SCHEME)
    one, weights = with_codes(made.decode), RealWeights()
    other = one.clone()
    feeds: Feeds = {}
    for value in one.graph.inputs:
        kind = value.dtype
        assert kind is not None
        feeds[name_of(value)] = np.ones(static_shape(value) or (), kind.numpy())
    first, again, third = (
        ExactGraph(model, made.integer_decode, weights=weights)(["logits"], feeds)[0]
        for model in (one, one, negated_head(other))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != third).any()


def negated_head(model: ir.Model) -> ir.Model:
    """The model itself, with the codes of its last linear negated; names stay."""
    matrices = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    weight = matrices[-1].inputs[1]
    assert weight is not None
    codes = input_operand(weight).codes
    assert codes is not None and codes.const_value is not None
    codes.const_value = ir.tensor(-codes.const_value.numpy(), name=codes.name)
    return model
