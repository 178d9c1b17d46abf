"""Greedy text of the integer graphs beside that of the Q/DQ graphs: where do they part?

qnpu-export smollm2-135m --cache --out cached/model.onnx
qnpu-compile cached/model.onnx --scheme w8a16 --context 256 --seq-len 64 --out chat
python -m bench.generation chat
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.cached_decoder import DECODE_QDQ_NAME, PREFILL_QDQ_NAME
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.models.load import load_onnx, load_tokenizer
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.generate import (
    DECODE_NAME,
    PREFILL_NAME,
    CachedRunner,
    Generation,
    generate,
)
from qnpu.runtime_check.session import Mode

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
    "The three primary colours are",
    "To bake bread you need",
)


def main(
    folder: Annotated[Path, typer.Argument(help="What qnpu-compile --context wrote.")],
    tokens: Annotated[int, typer.Option(help="To generate for each prompt.")] = 64,
    mode: Annotated[
        str, typer.Option(help="Of the Q/DQ graphs: reference or stock.")
    ] = "reference",
) -> None:
    """Generate from five prompts with both, and print how many tokens are the same."""
    words = load_tokenizer(str(folder / DECODE_NAME))
    if words is None:
        raise typer.BadParameter(f"no tokenizer in {folder}")
    integer = CachedRunner(
        load_onnx(folder / PREFILL_NAME),
        load_onnx(folder / DECODE_NAME),
        (folder / PREFILL_NAME, folder / DECODE_NAME),
    )
    quantized = CachedRunner(
        *(_codes(folder / name) for name in (PREFILL_QDQ_NAME, DECODE_QDQ_NAME)), mode=Mode(mode)
    )
    table = Table(title=f"greedy, {tokens} tokens", title_justify="left")
    for heading in ("prompt", "same tokens", "integer tokens/s", "Q/DQ tokens/s", "text"):
        table.add_column(heading, overflow="fold")
    for prompt in PROMPTS:
        ids = words.encode(prompt)
        one, other = (generate(runner, ids, tokens) for runner in (integer, quantized))
        rates = (f"{item.decode_rate:.1f}" for item in (one, other))
        table.add_row(prompt, str(_same(one, other)), *rates, words.decode(one.ids))
    Console().print(table)


def _codes(path: Path) -> ir.Model:
    model = load_onnx(path)
    LowerIo().run(Compilation(model, stage=Stage.QDQ))
    return model


def _same(one: Generation, other: Generation) -> int:
    """How many tokens at the start are equal."""
    for index, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)):
        if a != b:
            return index
    return min(len(one.ids), len(other.ids))


if __name__ == "__main__":
    typer.run(main)
