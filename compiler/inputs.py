"""From names on the command line to what the passes work on: a graph and data to run it on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.output import hash_file
from qnpu.compiler.pass_base import ProgressCallback
from qnpu.compiler.rules import NoCalibrationData
from qnpu.models.export import export_cached, export_dynamo, export_optimum
from qnpu.models.load import ModelSource, load_onnx, load_tokenizer, load_torch, resolve
from qnpu.models.token_data import Bos, Split, load_arrays, read_text, token_windows
from qnpu.models.tokenizer import Tokenizer
from qnpu.runtime_check.feeds import ArraySamples, FeedSource, TokenWindows


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A float graph and what came with it.

    Attributes:
        model: as loaded; large weights stay on disk until used.
        tokenizer: None where none was found.
        name: short, for display.
        sha256: of the ONNX file that was read.
        file: that file, resolved; a temporary one after an export.
    """

    model: ir.Model
    tokenizer: Tokenizer | None
    name: str
    sha256: str
    file: Path


@contextmanager
def open_model(
    name: str, config: CompileConfig, progress: ProgressCallback
) -> Iterator[OpenedModel]:
    """Loads an ONNX file, or exports any other model into a folder that lives as long as the body.

    Raises:
        DiagnosticError: QN102 to QN105 the file, QN113 the name, QN114 a package is missing,
            QN115 the export.
    """
    source = resolve(name)
    with TemporaryDirectory(prefix="qnpu-export-") as folder:
        path = Path(source.location)
        tokenizer = _tokenizer(source, config.tokenizer)
        if source.kind != "onnx":
            path = Path(folder, f"{source.name}.onnx")
            export(source, path, config, progress, cached=bool(config.context))
        model = load_onnx(path)
        yield OpenedModel(model, tokenizer, source.name, hash_file(path), path.resolve())


def export(
    source: ModelSource,
    path: Path,
    config: CompileConfig,
    progress: ProgressCallback,
    *,
    cached: bool = False,
) -> None:
    """Writes a float ONNX file of a torch model with the exporter that ``config`` names.

    ``cached``: with dynamic lengths and a key-value cache, as optimum does it anyway.
    """

    def step(name: str, fraction: float) -> None:
        progress("export", fraction)

    loaded = load_torch(source)
    if config.exporter == "optimum":
        export_optimum(loaded, path, progress=step)
    elif cached:
        export_cached(loaded, path, progress=step)
    else:
        export_dynamo(loaded, path, sequence_length=config.seq_len, progress=step)


def _tokenizer(source: ModelSource, named: str) -> Tokenizer | None:
    return load_tokenizer(named or source)


def calibration_data(config: CompileConfig, tokenizer: Tokenizer | None) -> tuple[FeedSource, str]:
    """What to calibrate on, and a description of it.

    Raises:
        DiagnosticError: QN302 unreadable or too short, QN305 text but no tokenizer.
    """
    if config.calib.endswith(".npz"):
        return ArraySamples(load_arrays(config.calib)), config.calib
    source, description = text_windows(
        config.calib, "calibration", tokenizer, config.seq_len, config.all_windows, config.bos
    )
    if config.all_windows > config.calib_windows:
        description += f"; ranges measured on the first {config.calib_windows}"
    return source, description


def named_data(config: CompileConfig) -> FeedSource:
    """What to calibrate on, by the configuration alone: its ``calib`` and ``tokenizer``.

    Raises:
        DiagnosticError: as ``calibration_data``; QN102, QN113, QN114 the tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    return calibration_data(config, tokenizer)[0]


def text_windows(
    text: str,
    split: Split,
    tokenizer: Tokenizer | None,
    window: int,
    count: int | None,
    bos: str,
) -> tuple[TokenWindows, str]:
    """Windows of tokens of a text, and a description of it.

    Args:
        text: file or data set; empty: the built-in text.
        split: which part of the built-in text.
        tokenizer: of the model.
        window: tokens each.
        count: at most; None for all.
        bos: ``none``, ``stream``, ``window``; ``auto``: ``window`` where the tokenizer adds one.

    Raises:
        DiagnosticError: QN302, QN305 as above.
    """
    if tokenizer is None:
        raise DiagnosticError(NoCalibrationData("no tokenizer was found with the model").at())
    content, description = read_text(text or None, split=split)
    place: Bos = _place_of_bos(bos, tokenizer)
    ids = tokenizer.encode(content)
    windows = token_windows(
        ids,
        window=window,
        count=count,
        bos=place,
        bos_id=tokenizer.bos_token_id,
        source=description,
    )
    return TokenWindows(windows), f"{description}; {len(windows)} x {window} tokens, BOS {place}"


def _place_of_bos(bos: str, tokenizer: Tokenizer) -> Bos:
    match bos:
        case "stream":
            return "stream"
        case "window":
            return "window"
        case "auto" if tokenizer.adds_bos:
            return "window"
    return "none"
