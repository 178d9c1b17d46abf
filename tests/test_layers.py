"""Who may import whom, read from the source, and what a plain import of the command line loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "passes", "runtime_check", "models")
FILES = {
    f"qnpu.{folder}.{path.stem}": path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.stem != "__init__"
}

# Folder → what of ours its modules must not import.
FORBIDDEN = {
    "passes": {
        "qnpu.compiler.pipeline",
        "qnpu.compiler.cached_decoder",
        "qnpu.compiler.quantized_model",
        "qnpu.compiler.cli",
        "qnpu.compiler.cli_check",
        "qnpu.compiler.inputs",
        "qnpu.compiler.console",
    },
    "runtime_check": {
        *(name for name in FILES if name.startswith("qnpu.passes.")),
        "qnpu.compiler.pipeline",
        "qnpu.compiler.cached_decoder",
        "qnpu.compiler.quantized_model",
        "qnpu.compiler.cli",
        "qnpu.compiler.cli_check",
        "qnpu.compiler.inputs",
        "qnpu.compiler.console",
    },
    "models": {
        *(name for name in FILES if not name.startswith("qnpu.models.")),
    }
    - {"qnpu.compiler.diagnostics", "qnpu.compiler.rules"},
}
MAY_IMPORT_PASSES = {
    "qnpu.compiler.pipeline",
    "qnpu.compiler.quantized_model",
    "qnpu.compiler.integer_model",
    "qnpu.compiler.cached_decoder",
    "qnpu.compiler.cli_eval",
}
MAY_IMPORT_MODELS = {
    "qnpu.compiler.inputs",
    "qnpu.compiler.cli",
    "qnpu.compiler.cli_check",
    "qnpu.compiler.cli_eval",
    "qnpu.compiler.cli_run",
}
HEAVY = ("transformers", "optimum", "datasets", "sentencepiece", "gguf", "accelerate")


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports, at its top level or in functions too; not for typing alone."""
    tree = ast.parse(path.read_text("utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} is a relative import"
            assert node.module is not None
            yield node.module
            # "from qnpu.compiler import rules" imports a module as well
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def ours(name: str, *, everywhere: bool = True) -> set[str]:
    return {found for found in imports(FILES[name], everywhere=everywhere) if found in FILES}


@pytest.mark.parametrize("name", FILES)
def test_direction(name: str) -> None:
    folder = name.split(".")[1]
    assert not ours(name) & FORBIDDEN.get(folder, set())
    if folder == "compiler":
        used = {found.split(".")[1] for found in ours(name)}
        assert "passes" not in used or name in MAY_IMPORT_PASSES
        assert "models" not in used or name in MAY_IMPORT_MODELS


def test_the_table_of_forbidden_modules_names_real_ones() -> None:
    assert all(names <= set(FILES) for names in FORBIDDEN.values())
    assert set(FILES) >= MAY_IMPORT_PASSES | MAY_IMPORT_MODELS


def test_no_cycles() -> None:
    """Not through functions either: a late import hides a cycle, it does not break it."""
    try:
        TopologicalSorter({name: ours(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_folders_are_only_known_as_parts_of_qnpu() -> None:
    for path in [*FILES.values(), *(ROOT / "tests").glob("*.py")]:
        tops = {name.split(".")[0] for name in imports(path, everywhere=True)}
        assert not tops & set(FOLDERS), path.name


def test_the_readers_of_imports_sees_them(tmp_path: Path) -> None:
    """Of this file: the checks above would pass on anything if it saw nothing."""
    path = tmp_path / "x.py"
    path.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    import g\nclass H:\n    from i import j\n"
    )
    assert set(imports(path, everywhere=True)) == {"a.b", "c", "c.d", "g", "i", "i.j"}
    assert set(imports(path, everywhere=False)) == {"a.b", "c", "c.d", "i", "i.j"}
    path.write_text("from . import x\n")
    with pytest.raises(AssertionError):
        list(imports(path, everywhere=True))


def test_exporters_are_imported_late() -> None:
    for name, path in FILES.items():
        tops = {found.split(".")[0] for found in imports(path, everywhere=False)}
        assert not tops & set(HEAVY), name


def test_the_command_line_loads_no_exporter() -> None:
    code = "import sys, qnpu.compiler.cli; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    tops = {line.split(".")[0] for line in done.stdout.splitlines()}
    assert "qnpu" in tops
    assert not tops & set(HEAVY)
