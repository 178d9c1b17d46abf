"""Time and memory of one compile, as the command reports them and as the system saw them.

    python bench/compile_cost.py                            # exports smollm2-135m, then w8a16
    python bench/compile_cost.py --model model.onnx --schemes w8a16,w8a8,w4a16,w4a8

Calibrates on 8 × 512 tokens, no evaluation. Exit code 1 where a limit is exceeded. The limits are
for 2 cores; run nothing else meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_COMMANDS = Path(sys.executable).parent


def _run(name: str, *arguments: str) -> tuple[dict[str, Any], float, int]:
    """What a command printed, its wall time in seconds and its peak RSS in bytes.

    A child of our own with only that command in it, so that RUSAGE_CHILDREN, which is the largest
    of all children so far, is about that command.
    """
    reader, writer = os.pipe()
    started = time.perf_counter()
    process = os.fork()
    if process == 0:
        done = subprocess.run(
            [_COMMANDS / name, *arguments], check=False, stdout=subprocess.PIPE, text=True
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        with os.fdopen(writer, "w") as pipe:
            json.dump({"code": done.returncode, "peak": peak, "stdout": done.stdout}, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = json.load(pipe)
    os.waitpid(process, 0)
    seconds = time.perf_counter() - started
    if answer["code"]:
        sys.exit(answer["code"])
    unit = 1 if sys.platform == "darwin" else 1024
    result: dict[str, Any] = json.loads(answer["stdout"])
    return result, seconds, answer["peak"] * unit


def main(
    model: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "smollm2-135m",
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "w8a16",
    minutes: Annotated[float, typer.Option(help="Limit of wall time.")] = 5.0,
    gibibytes: Annotated[float, typer.Option(help="Limit of peak RSS.")] = 3.0,
) -> None:
    """Export once, compile under each scheme, print one table."""
    console = Console(soft_wrap=True)
    table = Table(
        title=f"{model}, 8 windows of 512 tokens, {os.cpu_count()} cores", title_justify="left"
    )
    for heading in ("", "wall s", "reported s", "peak RSS GiB", "reported GiB", "limits"):
        table.add_column(heading, justify="right" if heading else "left")
    exceeded = False
    with tempfile.TemporaryDirectory() as folder:
        if not model.endswith(".onnx"):
            path = str(Path(folder, "model.onnx"))
            options = ["--seq-len", "512", "--out", path, "--json", "--quiet"]
            result, seconds, peak = _run("qnpu-export", model, *options)
            table.add_row("export", *_numbers(result["seconds"], result, seconds, peak), "")
            model = path
        for scheme in schemes.split(","):
            options = ["--scheme", scheme, "--out", str(Path(folder, scheme)), "--seq-len", "512"]
            options += ["--calib-windows", "8", "--eval-windows", "0", "--json", "--quiet"]
            result, seconds, peak = _run("qnpu-compile", model, *options)
            fits = seconds <= 60 * minutes and peak <= gibibytes * 2**30
            exceeded |= not fits
            row = _numbers(result["seconds"]["total"], result, seconds, peak)
            table.add_row(scheme, *row, "pass" if fits else "FAIL")
    console.print(table)
    console.print(f"limits: {minutes:g} minutes, {gibibytes:g} GiB")
    sys.exit(exceeded)


def _numbers(
    reported: float, result: dict[str, Any], seconds: float, peak: int
) -> tuple[str, str, str, str]:
    return (
        f"{seconds:.1f}",
        f"{reported:.1f}",
        f"{peak / 2**30:.2f}",
        f"{result['peak_rss_bytes'] / 2**30:.2f}",
    )


if __name__ == "__main__":
    typer.run(main)
