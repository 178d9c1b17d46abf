"""From what the user names to a model: files, folders, Hugging Face ids and built-ins."""

from __future__ import annotations

import difflib
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import MissingFile, UnknownModel
from qnpu.models.built_ins import BUILT_INS, BuiltIn, gguf_file
from qnpu.models.gguf_header import MAGIC, read_header
from qnpu.models.gguf_tokenizer import tokenizer_from_gguf
from qnpu.models.onnx_file import load_onnx
from qnpu.models.paths import is_file, is_folder
from qnpu.models.quiet import quiet, require
from qnpu.models.tiny_decoder import tiny_decoder
from qnpu.models.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    ByteTokenizer,
    Tokenizer,
    tokenizer_from_json,
    tokenizer_from_transformers,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "BUILT_INS",
    "BuiltIn",
    "LoadedModel",
    "ModelSource",
    "Tokenizer",
    "load_onnx",
    "load_tokenizer",
    "load_torch",
    "resolve",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "spiece.model")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found but not read.

    Attributes:
        kind: how to load it.
        location: a file, a folder, a Hugging Face id, or a key of ``BUILT_INS``.
        name: short, fit for a file name and for display.
    """

    kind: Literal["onnx", "gguf", "hf", "builtin"]
    location: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A float torch model ready for export.

    Attributes:
        model: transformers causal language model; eval mode, eager attention, no gradients.
        tokenizer: None where the model comes without one.
        name: short, fit for a file name.
    """

    model: Any
    tokenizer: Tokenizer | None
    name: str


def resolve(model: str) -> ModelSource:
    """Find what a name on the command line means; the first of these that fits.

    1. a file that exists, or a name that ends in ``.onnx`` or ``.gguf``;
    2. a folder with config.json and weights, or with exactly one .onnx or .gguf file;
    3. a key of ``BUILT_INS``;
    4. a Hugging Face id ``org/name`` whose config.json can be fetched or is cached.

    Raises:
        DiagnosticError: QN102 the file does not exist; QN113 nothing fits; QN114 an id needs
            transformers, which is not installed.
    """
    path = Path(model)
    suffix = path.suffix.lower()
    if model and is_folder(path):
        return _resolve_folder(path)
    if is_file(path) or suffix in (".onnx", ".gguf"):
        return _resolve_file(path)
    if model in BUILT_INS:
        return ModelSource("builtin", model, model)
    if _HUB_ID.fullmatch(model):
        _check_hub(model)
        return ModelSource("hf", model, model.rpartition("/")[2])
    near = difflib.get_close_matches(model, BUILT_INS, n=1, cutoff=0.5)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise _unknown(model, f"no such file, folder, built-in or org/name id{hint}")


def load_torch(source: ModelSource, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load the float model and its tokenizer; GGUF weights are dequantized.

    Args:
        source: of any kind but "onnx".
        dtype: of the weights, float32 by default.

    Raises:
        DiagnosticError: QN113 the model cannot be loaded, with the reason; QN114 a package is
            missing; QN102 a file is.
        ValueError: the source is an ONNX file.
    """
    if source.kind == "onnx":
        raise ValueError("an ONNX file is read with load_onnx")
    require("torch", "transformers")
    import torch  # noqa: PLC0415

    dtype = dtype or torch.float32
    built_in = BUILT_INS[source.location] if source.kind == "builtin" else None
    if built_in and built_in.architecture:
        model = tiny_decoder(built_in.architecture).to(dtype)
    else:
        folder, options = source.location, _hub_options(source)
        if source.kind != "hf":
            require("gguf", "accelerate")
            file = _gguf_path(source)
            read_header(file)  # a clear error before a slow load
            folder, options = str(file.parent), {**options, "gguf_file": file.name}
        model = _from_pretrained(source.location, folder, {**options, "dtype": dtype})
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, load_tokenizer(source), source.name)


def load_tokenizer(source: ModelSource | str | Path) -> Tokenizer | None:
    """The tokenizer of a model, without loading the model.

    Args:
        source: a resolved model, or anything ``resolve`` takes, or a tokenizer.json, or a folder
            with one. For an ONNX file it is looked for in the same folder.

    Returns:
        None where an ONNX file or a folder has no tokenizer files.

    Raises:
        DiagnosticError: QN102, QN113 or QN114, as for models.
    """
    if not isinstance(source, ModelSource):
        path = Path(source)
        if path.suffix.lower() == ".json":
            return tokenizer_from_json(_existing(path))
        if is_folder(path):
            return _folder_tokenizer(path)
        source = resolve(str(source))
    if source.kind in ("gguf", "builtin"):
        seeded = source.kind == "builtin" and BUILT_INS[source.location].architecture
        return ByteTokenizer() if seeded else tokenizer_from_gguf(_gguf_path(source))
    path = Path(source.location)
    if source.kind == "hf" and not is_folder(path):
        return tokenizer_from_transformers(source.location, **_hub_options(source))
    return _folder_tokenizer(path if is_folder(path) else path.parent)


def _unknown(model: str, reason: str) -> DiagnosticError:
    return DiagnosticError(UnknownModel(model, reason).at())


def _existing(path: Path) -> Path:
    if not is_file(path):
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path)))
    return path


def _resolve_file(path: Path) -> ModelSource:
    with _existing(path).open("rb") as file:
        gguf = file.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".gguf"
    return ModelSource("gguf" if gguf else "onnx", str(path), path.stem)


def _resolve_folder(path: Path) -> ModelSource:
    name = path.resolve().name
    weights = any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS)
    if weights and (path / "config.json").is_file():
        return ModelSource("hf", str(path), name)
    for kind in ("onnx", "gguf"):
        found = sorted(path.glob(f"*.{kind}"))
        if len(found) == 1:
            return _resolve_file(found[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise _unknown(str(path), f"the folder holds several models ({names}); name one")
    reason = "the folder has neither config.json with weights nor exactly one .onnx or .gguf file"
    raise _unknown(str(path), reason)


def _check_hub(model: str) -> None:
    require("transformers")
    reachable = _hub_reachable()
    with quiet():
        from huggingface_hub import hf_hub_download  # noqa: PLC0415

        try:
            hf_hub_download(model, "config.json", local_files_only=not reachable)
        except Exception as error:  # of huggingface_hub, requests and the system
            where = "Hugging Face" if reachable else "the Hugging Face cache (the hub is offline)"
            reason = f"no such folder, and not from {where}: {first_line(error)}"
            raise _unknown(model, reason) from error


def _hub_reachable() -> bool:
    """Whether to try the hub: offline it would retry for 23 seconds for each file."""
    from huggingface_hub import constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return not constants.HF_HUB_OFFLINE
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _hub_options(source: ModelSource) -> dict[str, Any]:
    local = source.kind != "hf" or Path(source.location).is_dir() or not _hub_reachable()
    return {"local_files_only": local}


def _gguf_path(source: ModelSource) -> Path:
    return gguf_file(source.location) if source.kind == "builtin" else Path(source.location)


def _from_pretrained(shown: str, folder: str, options: dict[str, Any]) -> Any:
    with quiet():
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", **options
            )
        except Exception as error:  # a wrong file fails anywhere in transformers
            raise _unknown(shown, first_line(error)) from error


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / TOKENIZER_JSON).is_file():
        return tokenizer_from_json(folder / TOKENIZER_JSON)
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return tokenizer_from_transformers(str(folder))
    return None
