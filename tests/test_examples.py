"""Every block of every example runs, in order, in one folder with a tiny decoder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.commands import BIN, call
from tests.markdown import Block, blocks

FOLDER = Path(__file__).parents[1] / "compiler" / "examples"
INDEX = FOLDER / "README.md"
PAGES = {path.name: path for path in sorted(FOLDER.glob("*.md")) if path != INDEX}

# What a page leaves behind, at least.
MADE = {
    "edit_bit_plan.md": {"first/report.html", "edited.json", "second/bit_plan.json"},
    "generate_text.md": {"cached/model.onnx", "chat/weights.bin", "chat/decode.int.onnx"},
    "hexagon.md": {
        "hexagon/model.qdq.onnx",
        "hexagon/model.float.onnx",
        "hexagon/model.1.0.0.encodings",
        "hexagon/HANDOFF.md",
        "hexagon/report.html",
    },
    "olive.md": {
        "out/model.qdq.onnx",
        "out/model_config.json",
        "out/encodings.json",
        "out/bit_plan.json",
        "out/report.json",
        "out/report.html",
        "out/HANDOFF.md",
    },
    "onnx_ir_pipeline.md": {"rotated.onnx", "model.qdq.onnx"},
    "own_pass.md": {"out/model.qdq.onnx"},
}
# A page is for a model of use; the test has a tiny one of 16 tokens.
SMALLER = (
    ("smollm2-135m", "tiny"),
    ("--seq-len 512", "--seq-len 16"),
    ("seq_len=512", "seq_len=16"),
    ('"seq_len": 512', '"seq_len": 16'),
    ("--context 256 --seq-len 64", "--context 64 --seq-len 16"),
    ("pip install .", "python -m pip install -q --no-deps --no-build-isolation --target site ."),
)
# What stands in a block → the module that it needs.
NEEDS = (("--oracle htp", "onnxruntime_qnn"), ("olive", "olive"), ("pip install", "setuptools"))
TEXT = "It is a truth that a page of text, said again, makes windows enough to calibrate on. "


@pytest.fixture
def home(tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, its tokenizer beside it, and a text."""
    home = Path(shutil.copytree(tiny_file.parent, tmp_path / "home"))
    (home / "my.txt").write_text(TEXT * 20)
    monkeypatch.chdir(home)
    return home


def smaller(text: str) -> str:
    for large, small in SMALLER:
        text = text.replace(large, small)
    return text


def missing(block: Block) -> str:
    """A module that the block needs and that is not there; empty for none."""
    needed = [module for mark, module in NEEDS if mark in block.text]
    return next((module for module in needed if not importlib.util.find_spec(module)), "")


def run_commands(text: str, folder: Path) -> None:
    """All of a console block, in one shell that stops at the first failure."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = call(
        *("/bin/bash", "-ec", text),
        folder=folder,
        PATH=path,
        PYTHONPATH="site",
        CI="1",
        OLIVE_DISABLE_TELEMETRY="1",
    )
    assert done.exit_code == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.slow
def test_a_page(name: str, home: Path) -> None:
    names: dict[str, object] = {"__name__": name}
    left_out = ""
    for block in blocks(PAGES[name]):
        left_out = missing(block)
        if left_out:
            break
        text = smaller(block.text)
        if block.file:
            (home / block.file).write_text(text)
        elif block.language == "console":
            run_commands(text, home)
        else:
            assert block.language == "python"
            exec(compile(text, name, "exec"), names)
    if left_out != "olive":
        assert {path for path in MADE[name] if not (home / path).is_file()} == set()
    if left_out:
        pytest.skip(f"a block needs {left_out}")


def test_what_the_test_makes_smaller_is_in_the_pages() -> None:
    texts = [block.text for page in PAGES.values() for block in blocks(page)]
    for large, _ in SMALLER:
        assert any(large in text for text in texts), large
    for mark, _ in NEEDS:
        assert any(mark in text for text in texts), mark


def test_the_index_names_every_page() -> None:
    named = re.findall(r"\[([\w.]+)\]\(\1\)", INDEX.read_text("utf-8"))
    assert sorted(named) == list(PAGES)
    assert set(MADE) == set(PAGES)


def test_no_block_is_overlooked() -> None:
    for page in PAGES.values():
        fences = page.read_text("utf-8").count("```")
        assert fences == 2 * len(blocks(page)), page.name
        assert len(page.read_text("utf-8").splitlines()) <= 75
