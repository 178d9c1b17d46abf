"""Text, token windows and arrays to calibrate and evaluate with."""

from __future__ import annotations

import math
import platform
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import CalibrationUnreadable, MissingFile
from qnpu.models.paths import exists, is_folder
from qnpu.models.quiet import quiet, require

Split = Literal["calibration", "evaluation"]
Bos = Literal["none", "stream", "window"]

KNOWN_DATASETS = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}

_DATASET = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+){0,2}")
_HUB_SPLITS = ("train", "validation", "test")
_TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".md", ".npz", ".raw", ".rst", ".tokens", ".txt"}
_EVERY_THIRD = 3


def read_text(source: str | None, *, split: Split) -> tuple[str, str]:
    """The text to tokenise, and a short description of where it came from.

    Args:
        source: None for the built-in text; a UTF-8 file; ``org/name[:config][:split]`` or a key of
            ``KNOWN_DATASETS`` for a Hugging Face data set, whose rows are joined by blank lines.
        split: the built-in text has a part for each; a data set without a named split gives
            ``train`` for calibration and ``test`` for evaluation. A file is read whole.

    Raises:
        DiagnosticError: QN102 no such file; QN302 not UTF-8, empty, or no such data set;
            QN114 a data set is asked for and ``datasets`` is not installed.
    """
    if source is None:
        return built_in_text(split), f"CPython {platform.python_version()} help topics, {split}"
    path = Path(source)
    dataset = KNOWN_DATASETS.get(source, source)
    is_file = exists(path) or path.suffix.lower() in _TEXT_SUFFIXES
    if not is_file and _DATASET.fullmatch(dataset):
        text, description = _dataset_text(dataset, split)
    else:
        text, description = _file_text(path), source
    if not text.strip():
        raise _unreadable(source, "has no text")
    return text, description


def built_in_text(split: Split) -> str:
    """About 270 kB (calibration) or 140 kB (evaluation) of English technical prose.

    CPython's help topics, in key order: every third topic is for evaluation. Some topics quote
    others whole, so evaluation leaves out each paragraph that calibration holds too.
    """
    keys = sorted(topics)
    evaluation = keys[_EVERY_THIRD - 1 :: _EVERY_THIRD]
    calibration = [key for key in keys if key not in set(evaluation)]
    text = "\n\n".join(topics[key] for key in calibration)
    if split == "calibration":
        return text
    seen = {_squeezed(paragraph) for paragraph in text.split("\n\n")}
    kept = [
        paragraph
        for key in evaluation
        for paragraph in topics[key].split("\n\n")
        if _squeezed(paragraph) not in seen
    ]
    return "\n\n".join(kept)


def token_windows(
    ids: Sequence[int],
    *,
    window: int,
    count: int | None = None,
    bos: Bos = "none",
    bos_id: int | None = None,
    source: str = "text",
) -> NDArray[np.int64]:
    """Cut a token stream into windows that do not overlap; the rest is dropped.

    Args:
        ids: tokens of the whole text, without special tokens.
        window: tokens a window, BOS included.
        count: at most this many windows, from the start; None for all.
        bos: "none"; "stream" puts one BOS before the whole text; "window" puts one first in each
            window, followed by ``window - 1`` tokens of text.
        bos_id: id of the BOS token; needed unless ``bos`` is "none".
        source: names the text in an error.

    Returns:
        int64 ``[N, window]``, N ≥ 1; fewer than ``count`` where the text is short.

    Raises:
        DiagnosticError: QN302 there is not one whole window, or no BOS token to put in it.
        ValueError: ``window`` leaves no room for text, or ``count`` is below one.
    """
    room = window - 1 if bos == "window" else window
    if room < 1 or (count is not None and count < 1):
        raise ValueError(f"cannot cut {count} windows of {window} tokens with bos={bos!r}")
    if bos != "none" and bos_id is None:
        raise _unreadable(source, "the tokenizer has no BOS token")
    stream = np.asarray(ids, dtype=np.int64)
    if bos == "stream":
        stream = np.concatenate([np.array([bos_id], dtype=np.int64), stream])
    whole = len(stream) // room
    rows = whole if count is None else min(count, whole)
    if rows == 0:
        raise _unreadable(source, f"has {len(stream)} tokens, one window takes {room}")
    cut = stream[: rows * room].reshape(rows, room)
    if bos == "window":
        cut = np.concatenate([np.full((rows, 1), bos_id, dtype=np.int64), cut], axis=1)
    return np.ascontiguousarray(cut)


def load_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Every array of an ``.npz`` file by name, in file order. Pickled objects are refused.

    Raises:
        DiagnosticError: QN102 no such file; QN302 not an .npz, cut short, pickled, or empty.
    """
    path = Path(path)
    if not exists(path):
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path)))
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise _unreadable(str(path), "is one bare array, not an .npz of named arrays")
        with loaded:
            _check_sizes(path)
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(str(path), f"is not a readable .npz: {first_line(error)}") from error
    if not arrays:
        raise _unreadable(str(path), "holds no array")
    return arrays


def _check_sizes(path: Path) -> None:
    """Before memory is taken for arrays, of which a few bytes can promise any number.

    Raises:
        DiagnosticError: QN302 an array has fewer bytes than it says, or all do not fit into memory.
        OSError, ValueError, EOFError: it is no .npz.
    """
    total = 0
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = _HEADERS.get(version, np.lib.format.read_array_header_2_0)
                shape, _, dtype = read(file)
                needed, held = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
            if needed > held:
                name = entry.filename.removesuffix(".npy")
                raise _unreadable(str(path), f"has {held} bytes of `{name}`, which needs {needed}")
            total += needed
    free = psutil.virtual_memory().available
    if total > free:
        sizes = f"takes {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
        raise _unreadable(str(path), sizes)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0}


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _file_text(path: Path) -> str:
    if is_folder(path):
        raise _unreadable(str(path), "is a folder")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(str(path), f"is not UTF-8 at byte {error.start}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error


def _dataset_text(dataset: str, split: Split) -> tuple[str, str]:
    require("datasets")
    name, *rest = dataset.split(":")
    hub_split = rest.pop() if rest and rest[-1] in _HUB_SPLITS else None
    hub_split = hub_split or ("train" if split == "calibration" else "test")
    config = rest[0] if rest else None
    description = ":".join(part for part in (name, config, hub_split) if part)
    if len(rest) > 1:
        raise _unreadable(dataset, f"the split is one of {', '.join(_HUB_SPLITS)}")
    with quiet():
        import datasets  # noqa: PLC0415

        try:
            rows = datasets.load_dataset(name, config, split=hub_split)
        except Exception as error:  # the library raises its own, the hub's and requests' kinds
            raise _unreadable(description, first_line(error)) from error
    columns = [key for key, kind in rows.features.items() if getattr(kind, "dtype", "") == "string"]
    if not columns:
        raise _unreadable(description, "has no text column")
    column = "text" if "text" in columns else columns[0]
    return "\n\n".join(row or "" for row in rows[column]), description


def _unreadable(source: str, reason: str) -> DiagnosticError:
    return DiagnosticError(CalibrationUnreadable(source, reason).at(file=source))
