"""What each way of saving perplexity is worth: runs bench/levers.toml, writes bench/levers.md.

    python -m bench.levers --model model.onnx --calib wiki.valid.tokens \\
        --text wiki.test.raw --other tinyshakespeare.txt
    python -m bench.levers … --only W4A4 --seeds 0,1,2      # rows whose name holds this

Rows that were measured before, whatever their seed, are read from bench/results, so that it can be
run bit by bit.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.measured import RESULTS, Bench, Measured, Texts

_HERE = Path(__file__).parent
_SEEDS = 10


def main(
    model: Annotated[str, typer.Option(help="Float ONNX file, its tokenizer beside it.")],
    calib: Annotated[str, typer.Option(help="Text to calibrate and learn on.")],
    text: Annotated[str, typer.Option(help="Text of the same kind to evaluate on.")],
    other: Annotated[str, typer.Option(help="Text of another kind.")],
    windows: Annotated[int, typer.Option(help="Of 512 tokens, of the first text.")] = 40,
    other_windows: Annotated[int, typer.Option(help="Of the other text.")] = 8,
    bos: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "none",
    rows: Annotated[Path, typer.Option(help="TOML file of rows.")] = _HERE / "levers.toml",
    folder: Annotated[Path, typer.Option(help="For results.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Table to write.")] = _HERE / "levers.md",
    only: Annotated[str, typer.Option(help="Measure rows whose name holds this.")] = "",
    seeds: Annotated[str, typer.Option(help="0 to 9, separated by commas.")] = "0",
) -> None:
    """Measure what is missing, then write the table of all that is there."""
    console = Console(soft_wrap=True)
    bench = Bench(Texts(model, calib, text, other, windows, other_windows, bos), folder)
    found: list[tuple[str, int, Measured]] = []
    for row in tomllib.loads(rows.read_text("utf-8"))["rows"]:
        asked = set(map(int, seeds.split(","))) if only in row["name"] else set()
        for seed in range(_SEEDS):
            options = [*row["options"], *(["--seed", str(seed)] if seed else [])]
            if seed not in asked and not bench.is_done(options):
                continue
            console.print(f"{row['name']}, seed {seed}")
            found.append((row["name"], seed, bench.measure(options)))
    lines = [
        "# What each lever is worth",
        "",
        f"Written by `python -m bench.levers`. Model {Path(model).name}; calibrated and learned on "
        f"{Path(calib).name}; perplexity relative to the float model's on the first {windows} "
        f"windows of 512 tokens of {Path(text).name} (÷ float) and the first {other_windows} of "
        f"{Path(other).name} (other ÷ float); BOS {bos}. The float model has no prefix in any row. "
        "Time is that of the compile on the machine at hand, with whatever else it did.",
        "",
        "| | seed | ÷ float | other ÷ float | min | GiB | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seed, row in found:
        numbers = f"{row.text:.4f} | {row.other:.4f} | {row.seconds / 60:.0f} | {row.gib:.1f}"
        lines.append(f"| {name} | {seed} | {numbers} | `{row.command}` |")
    out.write_text("\n".join(lines) + "\n", "utf-8")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
