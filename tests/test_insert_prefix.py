"""insert-prefix: a graph that holds a prefix gives what one gives that is fed it as tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.verify import verify_stage
from qnpu.passes.insert_prefix import InsertPrefix
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.prefix import Ids
from tests.conftest import Array, relative_error, run_model
from tests.decoders import LENGTH, canonical, serialized, some_tokens

# Measured: 3.4e-7 (qwen2) to 7.1e-7 (phi3 with R3).
BOUND = 3e-6
ROTARY = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"]
WINDOW = 8
"""Tokens that gemma3's sliding layers see, those of the prefix not counted."""

WINDOWS = TokenWindows(np.random.default_rng(1).integers(0, 257, (2, LENGTH)))


def insert(model: ir.Model, ids: Ids | None) -> tuple[int, list[str]]:
    """The count, and codes in order of report."""
    compilation = Compilation(model)
    count = InsertPrefix(WINDOWS, ids).run(compilation)
    verify_stage(compilation)
    return count, [d.code for d in compilation.diagnostics]


def behind(model: ir.Model, ids: Ids, text: Array) -> Array:
    """Logits of a text that stands behind tokens; as many as there is room for."""
    (entry,) = model.graph.inputs
    tokens = np.concatenate([[ids], text], axis=1)[:, : text.shape[1]]
    return run_model(model, {name_of(entry): tokens})[0][:, len(ids) :]


@pytest.mark.parametrize("ids", [(5,), (7, 3, 250)])
@pytest.mark.parametrize("architecture", ROTARY)
def test_same_logits_as_with_the_prefix_as_tokens(architecture: str, ids: Ids) -> None:
    before = canonical(architecture)
    model = before.clone()
    assert insert(model, ids) == (2, ["QN311"])
    feeds = some_tokens(before)
    expected = behind(before, ids, next(iter(feeds.values())))
    seen = WINDOW - len(ids) if architecture == "gemma3" else LENGTH - len(ids)
    actual = run_model(model, feeds)[0]
    assert actual.shape == (1, LENGTH, 257)
    assert relative_error(actual[:, :seen], expected[:, :seen]) <= BOUND
    plain = run_model(before, feeds)[0]
    assert relative_error(plain[:, :seen], expected[:, :seen]) > 0.05  # the prefix does something


def test_learned_positions_leave_the_graph_alone() -> None:
    model = canonical("gpt2")
    before = serialized(model)
    assert insert(model, (5,)) == (0, ["QN310"])
    assert serialized(model) == before
