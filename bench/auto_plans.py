"""``--scheme auto`` against the paper's rule and uniform plans, at their own modelled latency.

    python -m bench.auto_plans --model model.onnx --calib wiki.valid.tokens \\
        --text wiki.test.raw --seeds 0,1,2

For each plain plan the search gets its modelled latency (or, with ``--unit size``, its bytes) as
the budget. Both files are compiled as a user would, with everything static and head and caches
quantized, and their perplexity is measured. Then what part of the gain of 16-bit inputs for all
down projections a tenth of them, by the paper's Eq. 4, recovers (its Fig. 4).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.measured import RESULTS, kept, run_command

_PROMOTED = ("--scheme", "w4a8", "--down-bits", "8", "--promote", "0.1")
PLAIN = {
    "w4a8, 10% of down inputs at 16 (paper)": _PROMOTED,
    "w4a16": ("--scheme", "w4a16"),
    "w8a8": ("--scheme", "w8a8"),
}
SHARES = {
    "none": ("--scheme", "w4a8", "--down-bits", "8"),
    "10%": _PROMOTED,
    "all": ("--scheme", "w4a8"),
}


def main(
    model: Annotated[str, typer.Option(help="Float ONNX file, its tokenizer beside it.")],
    calib: Annotated[str, typer.Option(help="Text to calibrate and search on.")],
    text: Annotated[str, typer.Option(help="Text to evaluate on.")],
    windows: Annotated[int, typer.Option(help="Of 512 tokens, to evaluate on.")] = 8,
    target: Annotated[str, typer.Option(help="Whose latency is modelled.")] = "qnn-htp-v75",
    workload: Annotated[str, typer.Option(help="PROMPT/DECODE, tokens.")] = "512/64",
    unit: Annotated[str, typer.Option(help="Of budgets: latency or size.")] = "latency",
    folder: Annotated[Path, typer.Option(help="For results.")] = RESULTS,
    losses: Annotated[Path, typer.Option(help="For losses of tensors.")] = Path("losses"),
    seeds: Annotated[str, typer.Option(help="Of rotations, separated by commas.")] = "0",
) -> None:
    """Compile both kinds at each budget, print their perplexities."""
    console = Console(soft_wrap=True)
    files = {"model": model, "calib": calib, "text": text}
    on: dict[str, object] = {key: Path(value).name for key, value in files.items()}
    on["windows"] = windows
    texts = ("--calib", calib, "--eval-text", text, "--eval-windows", str(windows))

    def measured(options: Sequence[str], seed: str, *more: str) -> dict[str, Any]:
        words = [*options, "--target", target, "--workload", workload, "--bos", "none"]
        words += ["--seed", seed]
        return kept(folder, words, on, lambda: _compiled([model, *words, *texts, *more]))

    table = Table(title=f"{target}, {workload} tokens", title_justify="left")
    for heading in ("budget of", "seed", f"{unit}, modelled", "÷ float", "auto ÷ float", "gap"):
        table.add_column(heading, justify="left" if heading == "budget of" else "right")
    for seed in seeds.split(","):
        for name, options in PLAIN.items():
            console.print(f"{name}, seed {seed}")
            plain = measured(options, seed)
            limit = plain["cost"]["seconds" if unit == "latency" else "bytes"]
            budget = f"{unit}={limit * (1 + 1e-9):.12g}"
            search = ("--scheme", "auto", "--budget", budget)
            auto = measured(search, seed, "--losses", str(losses))
            shown = f"{limit * 1e3:.4g} ms" if unit == "latency" else f"{limit / 1e6:.4g} MB"
            gap = f"{auto['gap']:.1g}"
            table.add_row(name, seed, shown, f"{plain['ratio']:.4f}", f"{auto['ratio']:.4f}", gap)
            console.print(f"{name}, seed {seed}: {plain['ratio']:.4f}, auto {auto['ratio']:.4f}")
        none, tenth, every = (measured(options, seed)["ratio"] for options in SHARES.values())
        part = (none - tenth) / (none - every)
        figures = f"{none:.4f}, {tenth:.4f}, {every:.4f}"
        console.print(f"down inputs at 16: none, 10%, all: {figures}; 10% recovers {part:.0%}")
    console.print(table)


def _compiled(words: Sequence[str]) -> dict[str, Any]:
    """What a compile prints, as far as it is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_command(["qnpu-compile", *words, "--out", f"{folder}/out", "--json"])
    search = done["search"] or {}
    return {
        "ratio": done["perplexity"]["qdq"] / done["perplexity"]["float"],
        "perplexity": done["perplexity"],
        "cost": done["cost"],
        "gap": search.get("gap", 0.0),
        "chosen": search.get("chosen"),
        "trials": search.get("trials"),
        "seconds": done["seconds"],
        "peak_rss_bytes": done["peak_rss_bytes"],
    }


if __name__ == "__main__":
    typer.run(main)
