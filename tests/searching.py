"""A tiny decoder to search bits for, and the data to do it on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx_ir as ir

from qnpu.compiler.bit_items import BitItems, find_items
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.pass_base import Compilation, Stage, no_progress, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.target import TargetProfile, load_target
from qnpu.runtime_check.bit_changes import BitChanges
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.session import Feeds
from tests.decoders import LENGTH, exported

TARGET = "qnn-htp-v75"
WINDOWS = TokenWindows(np.random.default_rng(5).integers(0, 257, (24, LENGTH)))
HELD_OUT = TokenWindows(np.random.default_rng(6).integers(0, 257, (2, LENGTH)))


def rotated(architecture: str = "llama") -> ir.Model:
    """As the passes before the search leave it; a new copy at each call."""
    return _rotated(architecture).clone()


@lru_cache(maxsize=2)
def _rotated(architecture: str) -> ir.Model:
    model = exported(architecture)
    passes = default_passes(CompileConfig(seq_len=LENGTH), WINDOWS)
    floats = [item for item in passes if item.produces is Stage.FLOAT]
    run_passes(floats, Compilation(model), after_pass=lambda done: None)
    return model


def feeds(model: ir.Model, source: TokenWindows = WINDOWS) -> list[Feeds]:
    return source.feeds(model.graph.inputs)


@lru_cache(maxsize=2)
def searched(target: str = TARGET) -> tuple[ir.Model, BitItems, BitChanges]:
    """A model, its items, and what to put in their place; do not change it."""
    model = rotated()
    items = find_items(model)
    return model, items, changes_of(model, items, load_target(target))


def changes_of(model: ir.Model, items: BitItems, target: TargetProfile) -> BitChanges:
    data = feeds(model)
    return BitChanges(model, items, target, data, data, RangeMethod.MSE, no_progress)
