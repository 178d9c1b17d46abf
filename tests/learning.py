"""What tests of learning work on: tiny decoders with chosen codes, and how far they are off."""

from __future__ import annotations

import numpy as np

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.quant_types import widened
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.runtime_check.feeds import TokenWindows
from tests.conftest import Array, run_model
from tests.decoders import LENGTH, canonical, some_tokens

WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (8, LENGTH)))


class KilledError(Exception):
    """What a progress callback raises to stand for a kill."""


def rounded(scheme: str = "w4a8") -> Compilation:
    """A tiny decoder with encodings and chosen codes."""
    compilation = Compilation(canonical("llama"))
    passes = default_passes(CompileConfig(scheme=scheme, seq_len=LENGTH), WINDOWS)
    early = [item for item in passes if item.name in ("fold-norm-scale", "fuse-rotation")]
    late = [item for item in passes if item.produces in (Stage.PLANNED, Stage.ENCODED)]
    run_passes([*early, *late], compilation, after_pass=lambda done: None)
    return compilation


def logits_error(compilation: Compilation) -> float:
    """Mean squared error of the logits on fresh tokens."""
    other = Compilation(compilation.model.clone())
    other.encodings, other.stage = compilation.encodings, Stage.ENCODED
    InsertQdq().run(other)
    errors = []
    for seed in range(200, 208):
        feeds = some_tokens(compilation.model, seed=seed)
        expected, found = (run_model(m, feeds)[0] for m in (compilation.model, other.model))
        errors.append(float(np.mean((expected - found) ** 2)))
    return float(np.mean(errors))


def numbers(compilation: Compilation) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Scale, zero point and codes of every tensor."""
    table, found = compilation.encodings, {}
    for name in table:
        value = compilation.graph.initializers.get(name)
        array: Array | None = constant_array(value)
        codes = b""
        if array is not None and table[name].spec.bits < 32:
            codes = widened(table.quantize(name, array)).tobytes()
        found[name] = (table[name].scale.tobytes(), table[name].zero_point.tobytes(), codes)
    return found
