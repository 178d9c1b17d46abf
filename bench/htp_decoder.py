"""A decoder on Hexagon's own compiler and emulator: is it integer, and does it compute the same?

    python bench/htp_decoder.py --layers 2 --run             # a cut of two layers, emulated
    python bench/htp_decoder.py --archs 75,79                # all 30 layers, compiled only
    python bench/htp_decoder.py --scheme w8a8 --run          # all layers, one window emulated

Exports SmolLM2-135M with a key-value cache, compiles it for 128 tokens of prefill, checks the file
against the profile, has Qualcomm's compiler compile it for each architecture, and with ``--run``
executes one window on the emulator of the first. Exit code 1 where an operation is in float, an
output of a cut is beyond the profile's tolerance, or the emulator's perplexity is more than 2 %
from the QDQ graph's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.inputs import text_windows
from qnpu.compiler.integer_io import integer_io
from qnpu.compiler.target import load_target
from qnpu.models.export import export_optimum
from qnpu.models.load import load_onnx, load_tokenizer, load_torch, resolve
from qnpu.runtime_check.compare import lsb_difference
from qnpu.runtime_check.htp import HtpCompiler, output_scales, output_type
from qnpu.runtime_check.perplexity import next_token_loss
from qnpu.runtime_check.session import Array, Mode, open_session, run

MODEL = "smollm2-135m"
TOKENS = 128
_COMMANDS = Path(sys.executable).parent


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers to keep; 0: all.")] = 0,
    scheme: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "w4a16",
    archs: Annotated[str, typer.Option(help="Architectures, separated by commas.")] = "75,79",
    calib: Annotated[str, typer.Option(help="Text. Default: the built-in one.")] = "",
    text: Annotated[str, typer.Option(help="To run on. Default: the built-in text.")] = "",
    integer: Annotated[bool, typer.Option("--integer-io", help="Codes in and out.")] = False,
    execute: Annotated[bool, typer.Option("--run", help="Emulate one window.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for all files.")] = Path("htp-out"),
) -> None:
    """Export, compile, check, compile for the NPU, emulate, print."""
    console = Console(soft_wrap=True)
    targets = [f"qnn-htp-v{arch}" for arch in archs.split(",")]
    source = out / f"layers-{layers or 'all'}" / "model.onnx"
    if not source.exists():
        console.print(f"exporting {MODEL} to {source}")
        _export(source, layers)
    folder = source.parent / (f"{scheme}-integer-io" if integer else scheme)
    options = ["--scheme", scheme, "--target", targets[0], "--seq-len", str(TOKENS)]
    options += ["--eval-windows", "0", "--out", str(folder), "--tokenizer", MODEL]
    options += ["--calib", calib] if calib else []
    options += ["--integer-io"] if integer else []
    _command("qnpu-compile", str(source), *options)
    file = folder / "model.qdq.onnx"

    table = Table(title=f"{MODEL}, {layers or 'all'} layers, {scheme}", title_justify="left")
    for heading in (
        "target",
        "check",
        "check s",
        "compiler",
        "operations",
        "float",
        "converts",
        "s",
    ):
        table.add_column(heading, justify="right" if heading != "target" else "left")
    failed = False
    for target in targets:
        started = time.perf_counter()
        said = _command("qnpu-check", str(file), "--target", target)
        seconds = time.perf_counter() - started
        with HtpCompiler(timeout=3600) as htp:
            graph = htp.compile(file, f"v{load_target(target).vendor.arch}")
        failed |= said["verdict"] != "int" or graph.verdict.value != "int"
        counts = [len(graph.ops_within), len(graph.float_ops), len(graph.inserted)]
        row = [target, said["verdict"], f"{seconds:.1f}", graph.verdict.value, *map(str, counts)]
        table.add_row(*row, f"{graph.seconds:.0f}")
    console.print(table)
    if execute:
        failed |= not _emulate(console, file, targets[0], text, whole=not layers)
    sys.exit(int(failed))


def _export(path: Path, layers: int) -> None:
    loaded = load_torch(resolve(MODEL))
    if layers:
        loaded.model.model.layers = loaded.model.model.layers[:layers]
        loaded.model.config.num_hidden_layers = layers
    export_optimum(loaded, path)


def _command(name: str, *arguments: str) -> dict[str, Any]:
    """Runs one of our commands; returns the JSON it prints."""
    command = [_COMMANDS / name, *arguments, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _emulate(console: Console, file: Path, target: str, text: str, *, whole: bool) -> bool:
    """One window on ONNX Runtime and on the emulator; True where they agree."""
    model, profile = load_onnx(file), load_target(target)
    windows, description = text_windows(
        text, "evaluation", load_tokenizer(MODEL), TOKENS, 1, "none"
    )
    ids = np.asarray(windows.windows)
    names = [str(value.name) for value in model.graph.outputs]
    session = open_session(file, Mode.REFERENCE)
    expected = dict(zip(names, run(session, names, {"input_ids": ids}), strict=True))
    del session
    started = time.perf_counter()
    with HtpCompiler(timeout=7200) as htp:
        actual = htp.run(file, f"v{profile.vendor.arch}", {"input_ids": ids})
    console.print(f"emulated {description} in {time.perf_counter() - started:.0f} s")
    agrees = _compare(console, model, profile.tolerance_lsb, expected, actual) or whole
    encoding = integer_io(model).get("logits")
    logits = [found["logits"] for found in (expected, actual)]
    reals = [encoding.dequantize(codes) for codes in logits] if encoding else logits
    first, second = (_perplexity(real, ids) for real in reals)
    console.print(f"perplexity of the window: QDQ {first:.3f}, emulator {second:.3f}")
    console.print(f"emulator / QDQ: {second / first:.4f}")
    return agrees and (not whole or abs(second / first - 1) <= 0.02)


def _compare(
    console: Console,
    model: ir.Model,
    tolerance: dict[str, int],
    expected: dict[str, Array],
    actual: dict[str, Array],
) -> bool:
    """Prints the largest difference of each kind of output; True where all are within."""
    worst: dict[str, tuple[int, float, str]] = {}
    scales = output_scales(model)
    for output in model.graph.outputs:
        name, dtype = name_of(output), output_type(output)
        lsb = np.abs(lsb_difference(expected[name], actual[name], scales[name]))
        found = int(lsb.max()), float(lsb.mean()), name
        worst[dtype] = max(worst.get(dtype, (0, 0.0, "")), found)
    for dtype, (largest, mean, name) in worst.items():
        limit = tolerance.get(f"graph/{dtype}")
        console.print(
            f"{dtype}: up to {largest} LSB at {name} (mean there {mean:.2f}); profile: {limit}"
        )
    return all(largest <= tolerance.get(f"graph/{d}", 0) for d, (largest, _, _) in worst.items())


def _perplexity(logits: Array, ids: Array) -> float:
    return float(np.exp(next_token_loss(logits[0], ids[0]).mean()))


if __name__ == "__main__":
    typer.run(main)
