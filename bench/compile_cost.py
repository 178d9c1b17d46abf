"""Wall time and peak memory of a compile without evaluation, against their limits.

python bench/compile_cost.py --calib wiki.valid.tokens
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_COMMANDS = Path(sys.executable).parent
_MAX_SECONDS = 300.0
_MAX_GIB = 3.0


def main(
    model: Annotated[
        str, typer.Option(help="An .onnx file, or a built-in name to export first.")
    ] = "smollm2-135m",
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "w8a16",
    calib: Annotated[str, typer.Option(help="Default: the built-in text.")] = "",
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
) -> None:
    """Exits with 1 where a compile takes more than 5 minutes or 3 GiB."""
    console = Console(soft_wrap=True)
    table = Table(title=f"{model}, {windows} x {seq_len} calibration tokens", title_justify="left")
    for heading in ("scheme", "seconds", "of these: passes", "checks", "peak RSS GiB", "limits"):
        table.add_column(heading, justify="right")
    exceeded = False
    with TemporaryDirectory(prefix="qnpu-cost-") as folder:
        source = model
        if not model.endswith(".onnx"):
            source = str(Path(folder, "float", "model.onnx"))
            export = ["qnpu-export", model, "--seq-len", str(seq_len), "--out", source, "--quiet"]
            subprocess.run([_COMMANDS / export[0], *export[1:]], check=True)
        for scheme in schemes.split(","):
            options = ["--scheme", scheme, "--out", str(Path(folder, scheme))]
            options += ["--calib-windows", str(windows), "--seq-len", str(seq_len)]
            options += ["--eval-windows", "0", "--json", "--quiet"]
            options += ["--calib", calib] if calib else []
            started = time.perf_counter()
            done = subprocess.run(
                [_COMMANDS / "qnpu-compile", source, *options],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            seconds = time.perf_counter() - started
            result = json.loads(done.stdout)
            gibibytes = result["peak_rss_bytes"] / 2**30
            fits = seconds <= _MAX_SECONDS and gibibytes <= _MAX_GIB
            exceeded |= not fits
            table.add_row(
                scheme,
                f"{seconds:.0f}",
                f"{result['seconds']['compile']:.0f}",
                f"{result['seconds']['check']:.0f}",
                f"{gibibytes:.2f}",
                "kept" if fits else "EXCEEDED",
            )
    console.print(table)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    console.print(f"largest child, as the system counts it: {children:.2f} GiB")
    if exceeded:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
