"""The compiler: types, the pass infrastructure, the pipeline and the command line.

``from qnpu.compiler import CompileConfig, compile_model`` is the Python interface; the names are
looked up when first used, so that the package alone imports nothing slow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnpu.compiler.config import CompileConfig
    from qnpu.compiler.pass_base import Compilation, Pass, Stage
    from qnpu.compiler.pipeline import CompileResult, compile_model

__all__ = [
    "Compilation",
    "CompileConfig",
    "CompileResult",
    "Pass",
    "Stage",
    "compile_model",
]

_PLACES = {
    "Compilation": "pass_base",
    "CompileConfig": "config",
    "CompileResult": "pipeline",
    "Pass": "pass_base",
    "Stage": "pass_base",
    "compile_model": "pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
