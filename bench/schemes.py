"""Compiles one model under several schemes, as a user would, and prints what came out.

    python -m bench.schemes                                     # what `make demo` runs
    python -m bench.schemes --schemes w8a16,w8a8,w4a16,w4a8 \\
        --calib wiki.valid.tokens --text wiki.test.raw --windows 40 --bos none
    python -m bench.schemes --schemes w8a8 --down-bits 8 --online r4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.measured import run_command


def main(
    model: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "smollm2-135m",
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "w8a16,w8a8",
    out: Annotated[Path, typer.Option(help="Folder for all files.")] = Path("demo-out"),
    seq_len: Annotated[int, typer.Option(help="Tokens per run.")] = 512,
    calib: Annotated[str, typer.Option(help="Default: the built-in text.")] = "",
    text: Annotated[str, typer.Option(help="To evaluate on. Default: the built-in text.")] = "",
    windows: Annotated[int, typer.Option(help="Windows to evaluate on.")] = 8,
    bos: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "auto",
    rotate: Annotated[bool, typer.Option(help="Fuse R1 and R2 into the weights.")] = True,
    online: Annotated[str, typer.Option(help="Rotations to run online: r3, r4 or r3,r4.")] = "",
    down_bits: Annotated[int, typer.Option(help="Inputs of down projections: 8 or 16.")] = 16,
) -> None:
    """Export once, compile under each scheme, print one table."""
    console = Console(soft_wrap=True)
    source = model
    if not model.endswith(".onnx"):
        path = out / "float" / f"{model}.onnx"
        if not path.exists():
            console.print(f"exporting {model} to {path}")
            run_command(
                ["qnpu-export", model, "--seq-len", str(seq_len), "--out", str(path), "--json"]
            )
        source = str(path)
    rows: dict[str, dict[str, Any]] = {}
    for scheme in schemes.split(","):
        console.print(f"compiling to {scheme}")
        options = ["--scheme", scheme, "--out", str(out / scheme), "--seq-len", str(seq_len)]
        options += ["--eval-windows", str(windows), "--bos", bos, "--json"]
        options += ["--rotate" if rotate else "--no-rotate", "--online", online]
        options += ["--down-bits", str(down_bits)]
        options += ["--calib", calib] if calib else []
        options += ["--eval-text", text] if text else []
        rows[scheme] = run_command(["qnpu-compile", source, *options])
    float_bytes = sum(file.stat().st_size for file in Path(source).parent.glob("*.onnx*"))
    _print(console, model, float_bytes, rows)


def _print(console: Console, model: str, float_bytes: int, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=model, title_justify="left")
    for heading in ("", "perplexity", "÷ float", "MB", "compile s", "total s", "peak RSS GiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    first = next(iter(rows.values()))
    baseline = first["perplexity"]["float"]
    table.add_row("float32", f"{baseline:.3f}", "1.0000", f"{float_bytes / 1e6:.0f}")
    for scheme, row in rows.items():
        seconds = row["seconds"]
        table.add_row(
            scheme,
            f"{row['perplexity']['qdq']:.3f}",
            f"{row['perplexity']['qdq'] / baseline:.4f}",
            f"{row['outputs']['model.qdq.onnx']['bytes'] / 1e6:.0f}",
            f"{seconds['compile']:.0f}",
            f"{seconds['total']:.0f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
        )
    console.print(table)
    console.print(f"evaluated on {first['evaluation']}")
    console.print(f"calibrated on {first['calibration']}")
    for row in rows.values():
        for name in (*row["outputs"], "report.json"):
            console.print(f"wrote {Path(row['out'], name)}")


if __name__ == "__main__":
    typer.run(main)
