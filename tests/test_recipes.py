"""Recipes: what they ask for can be meant, and options win over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.recipes import read_recipe, recipe_names
from tests.commands import call


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_configuration(name: str) -> None:
    options = read_recipe(name)
    assert options
    config = CompileConfig(**options)
    assert {key: getattr(config, key) for key in options} == options


def test_the_paper_learns_rotations_and_scales_of_selected_tensors() -> None:
    config = CompileConfig(**read_recipe("paper"))
    assert (config.weights, config.learn_weights) == ("nearest", "rotations")
    assert (config.learn_tensors, config.distill, config.prefix) == ("rotated", 0.0, "none")
    assert (config.down_bits, config.promote) == (8, 0.1)


def test_an_unknown_recipe() -> None:
    with pytest.raises(DiagnosticError) as error:
        read_recipe("soup")
    assert [diagnostic.code for diagnostic in error.value.diagnostics] == ["QN503"]


def test_options_win_over_a_file_and_a_file_over_the_recipe(
    tiny_file: Path, tmp_path: Path
) -> None:
    """The paper's whole way on a tiny model, in two steps."""
    (tmp_path / "own.toml").write_text('scheme = "w4a8"\nlearn_steps = 2\nlearn_windows = 3\n')
    options = ("--config", "own.toml", "--learn-windows", "4", "--seq-len", "16", "--quiet")
    sizes = ("--calib-windows", "2", "--eval-windows", "1")
    done = call("qnpu-compile", tiny_file, "--recipe", "paper", *options, *sizes, folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "qnpu-out" / "report.json").read_text())["config"]
    assert (config["learn_weights"], config["learn_steps"], config["learn_windows"]) == (
        "rotations",
        2,
        4,
    )
