"""Recipes: options that belong together, as data (compiler/recipes/*.toml)."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from qnpu.compiler.config import read_config
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InvalidConfig


def recipe_names() -> list[str]:
    """All there are, sorted."""
    files = [file.name for file in _folder().iterdir()]
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Keys and values for ``CompileConfig``.

    Raises:
        DiagnosticError: QN503 there is no such recipe.
    """
    if name not in recipe_names():
        reason = f"`{name}` is not one of {', '.join(recipe_names())}"
        raise DiagnosticError(InvalidConfig("recipe", reason).at())
    return read_config(_folder().joinpath(f"{name}.toml"))


def _folder() -> Traversable:
    return resources.files("qnpu.compiler").joinpath("recipes")
