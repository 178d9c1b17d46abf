"""The paper's ladder (section 6): each of its ideas put on top of those before, at W4A8.

    python -m bench.ablation --model model.onnx --calib wiki.valid.tokens \\
        --text wiki.test.raw --other tinyshakespeare.txt --seeds 0,1,2

Rotations, scales and zero points learn end to end with cross-entropy, codes are the nearest, as in
``--recipe paper``; ``--steps`` says for how long. In the first two steps every tensor of 8 bits or
fewer learns, then only inputs and merged weights of rotated linears.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.measured import RESULTS, Bench, Texts

_START = ("--scheme", "w4a8", "--recipe", "paper", "--promote", "0")
LADDER = {
    "static joint": ("--range-method", "min-max", "--learn-tensors", "all"),
    "+ init": ("--range-method", "table", "--learn-tensors", "all"),
    "+ selective": (
        "--range-method",
        "table",
    ),
    "+ 10% of down inputs at 16": ("--range-method", "table", "--promote", "0.1"),
}


def main(
    model: Annotated[str, typer.Option(help="Float ONNX file, its tokenizer beside it.")],
    calib: Annotated[str, typer.Option(help="Text to calibrate and learn on.")],
    text: Annotated[str, typer.Option(help="Text of the same kind to evaluate on.")],
    other: Annotated[str, typer.Option(help="Text of another kind.")],
    windows: Annotated[int, typer.Option(help="Of 512 tokens, of the first text.")] = 8,
    other_windows: Annotated[int, typer.Option(help="Of the other text.")] = 8,
    bos: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "none",
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 64,
    weights: Annotated[str, typer.Option(help="nearest, as in the paper, or gptq.")] = "nearest",
    folder: Annotated[Path, typer.Option(help="For results.")] = RESULTS,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
) -> None:
    """Climb the ladder with each seed, print each step."""
    console = Console(soft_wrap=True)
    bench = Bench(Texts(model, calib, text, other, windows, other_windows, bos), folder)
    table = Table(title=f"W4A8, {steps} steps, weights {weights}", title_justify="left")
    for heading in ("", "seed", "÷ float", "other ÷ float", "min", "GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for seed in seeds.split(","):
        for name, options in LADDER.items():
            console.print(f"{name}, seed {seed}")
            more = ("--learn-steps", str(steps), "--weights", weights, "--seed", seed)
            row = bench.measure([*_START, *options, *more])
            numbers = (row.text, row.other, row.seconds / 60, row.gib)
            shown = (f"{x:.{d}f}" for x, d in zip(numbers, (4, 4, 0, 1), strict=True))
            table.add_row(name, seed, *shown)
            console.print(f"{name}, seed {seed}: {row.text:.4f} of float")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
