"""Tiny decoders as Q/DQ graphs and as the integer graphs made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.integer_model import lower_model
from qnpu.compiler.pass_base import Compilation, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.session import Feeds
from tests.decoders import LENGTH, canonical

WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (2, LENGTH)))


@dataclass(frozen=True)
class Lowered:
    """One model twice.

    Attributes:
        qdq: real numbers in and out.
        integer: codes in and out.
        feeds: two batches for either; their inputs are token ids.
    """

    qdq: ir.Model
    integer: ir.Model
    feeds: list[Feeds]


def lowered(architecture: str, scheme: str, *, integer: bool = False) -> Lowered:
    """A tiny decoder; a new copy at each call.

    Args:
        architecture: of ``tests.decoders``.
        scheme: bits.
        integer: scales are snapped for the integer graph.
    """
    made = _lowered(architecture, scheme, integer)
    return Lowered(made.qdq.clone(), made.integer.clone(), made.feeds)


@lru_cache(maxsize=32)
def _lowered(architecture: str, scheme: str, integer: bool) -> Lowered:
    compilation = Compilation(canonical(architecture))
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, weights="nearest", integer=integer)
    passes = default_passes(config, WINDOWS)
    first = [item.name for item in passes].index(FoldNormScale.name)
    run_passes(passes[first:], compilation, after_pass=lambda done: None)
    qdq = compilation.model
    return Lowered(qdq, lower_model(qdq), WINDOWS.feeds(qdq.graph.inputs))
