"""Names of caches, and graphs with a cache that text feeds: the same as without, bit plan included.

Bounds: logits of equal tokens within 1e-4 of their peak (measured: 5e-7), perplexity within 1e-5.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.caches import is_past, past_length, present_name, take_hub_names
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.perplexity import stream_perplexity
from tests.conftest import parse, relative_error, run_model
from tests.decoders import exported

TOKENS, PAST = 8, 24
WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (3, TOKENS)))


def encoded(architecture: str, past: int) -> Compilation:
    """A tiny decoder with encodings from text, mask and positions being inputs if it has a past."""
    model = exported(architecture, "optimum")
    names = {value.name for value in model.graph.inputs}
    kept = ("attention_mask", "position_ids") if past else ()
    config = CompileConfig(
        scheme="w8a8",
        seq_len=TOKENS,
        freeze_dims={"past_sequence_length": past},
        keep_inputs=tuple(name for name in kept if name in names),
    )
    compilation = Compilation(model)
    passes = [item for item in default_passes(config, WINDOWS) if item.produces is not Stage.QDQ]
    run_passes(passes, compilation, after_pass=lambda done: None)
    return compilation


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_an_empty_cache_changes_nothing(architecture: str) -> None:
    plain, cached = encoded(architecture, 0), encoded(architecture, PAST)
    assert past_length(cached.graph.inputs) == PAST
    feeds = [WINDOWS.feeds(compilation.graph.inputs) for compilation in (plain, cached)]
    expected, actual = (
        run_model(compilation.model, data[0])[0]
        for compilation, data in zip((plain, cached), feeds, strict=True)
    )
    assert relative_error(actual, expected) <= 1e-4
    ratio = (
        stream_perplexity(cached.model, feeds[1]).value
        / stream_perplexity(plain.model, feeds[0]).value
    )
    assert ratio == pytest.approx(1, abs=1e-5)


def test_ranges_are_those_without_a_cache() -> None:
    """A cache of zeros has no range of its own; it takes that of what joins it."""
    plain, cached = encoded("llama", 0), encoded("llama", PAST)
    common = [name for name in plain.encodings if name in cached.encodings]
    assert len(common) >= len(plain.encodings) - 3
    for name in common:
        one, other = plain.encodings[name], cached.encodings[name]
        np.testing.assert_allclose(one.scale, other.scale, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(one.zero_point, other.zero_point, atol=1, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_past_and_present_share_an_encoding(architecture: str) -> None:
    cached = encoded(architecture, PAST)
    caches = [value.name or "" for value in cached.graph.inputs if is_past(value)]
    assert len(caches) == 4
    for name in caches:
        assert cached.encodings[name].spec.bits == 8
        assert cached.encodings[name].same_as(cached.encodings[present_name(name)])


def test_names() -> None:
    assert present_name("past_key_values.0.key") == "present.0.key"
    assert present_name("past_value_3") == "present_value_3"
    assert present_name("past_value_3_in") == "past_value_3_out"
    graph = parse("""
        g (float[1, 2, 5, 4] past_key_0, float[1, 5] past_key_length) => (float[1, 5] y)
        { y = Neg(past_key_length) }
    """).graph
    assert [is_past(value) for value in graph.inputs] == [True, False]
    assert past_length(graph.inputs) == 5
    assert past_length(list[ir.Value]()) == 0


def test_names_of_the_hub() -> None:
    """Rank tells a cache; a value that has its new name makes room."""
    graph = parse("""
        g (float[1, 2, 5, 4] a, float[1, 5] b) => (float[1, 2, 6, 4] c, float[1, 5] d)
        <float[1, 2, 1, 4] new = {1, 2, 3, 4, 5, 6, 7, 8}>
        { past_key_7_in = Identity(new)  c = Concat<axis: int = 2>(a, past_key_7_in)  d = Neg(b) }
    """).graph
    exported_names = "past_key_values.7.key past_key_values.7.value present.7.key present.7.value"
    for value, name in zip((*graph.inputs, *graph.outputs), exported_names.split(), strict=True):
        value.name = name
    take_hub_names(graph)
    assert [v.name for v in graph.inputs] == ["past_key_7_in", "past_key_values.7.value"]
    assert [v.name for v in graph.outputs] == ["past_key_7_out", "present.7.value"]
    assert graph.node(0).outputs[0].name == "past_key_7_in_inner"
