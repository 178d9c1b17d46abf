"""Greedy text of the integer graphs beside that of the Q/DQ graphs: where do they part, and why?

qnpu-export smollm2-135m --cache --out cached/model.onnx
qnpu-compile cached/model.onnx --scheme w8a16 --context 256 --seq-len 64 --out chat
python -m bench.generation chat

The Q/DQ graphs are run in float32 by ONNX Runtime, node by node, and in float64, where the order of
sums changes nothing: reading the integer graphs' text there shows the first token that would have
been another one. The logits of both tokens are compared: "gap" is by how much the better one's is
greater, in LSB, first in float64, then on integers. "by" names the kinds of operators that lead to
the integer graphs' token when the Q/DQ graphs have the integer form of that kind alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qnpu.compiler.cached_decoder import DECODE_QDQ_NAME, PREFILL_QDQ_NAME
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.models.load import load_onnx, load_tokenizer
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.exact_run import ExactGraph, RealWeights
from qnpu.runtime_check.generate import (
    DECODE_NAME,
    PREFILL_NAME,
    CachedRunner,
    generate,
)
from qnpu.runtime_check.session import Array, Mode

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
    "The three primary colours are",
    "To bake bread you need",
)
_HEADINGS = ("prompt", "= float32", "= float64", "gap, LSB", "by", "tokens/s", "text")


def main(
    folder: Annotated[Path, typer.Argument(help="What qnpu-compile --context wrote.")],
    tokens: Annotated[int, typer.Option(help="To generate for each prompt.")] = 64,
    mode: Annotated[
        str, typer.Option(help="Of the Q/DQ graphs in float32: reference or stock.")
    ] = "reference",
) -> None:
    """Generate from five prompts, and print how many tokens are the same, and what parts them."""
    words = load_tokenizer(str(folder / DECODE_NAME))
    if words is None:
        raise typer.BadParameter(f"no tokenizer in {folder}")
    graphs = Graphs.read(folder)
    integer = CachedRunner(*graphs.integer, (folder / PREFILL_NAME, folder / DECODE_NAME))
    rounded = CachedRunner(*graphs.quantized, mode=Mode(mode))
    table = Table(title=f"greedy, {tokens} tokens", title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for prompt in track(PROMPTS, "generating", console=Console(stderr=True)):
        ids = words.encode(prompt)
        runs = [generate(runner, ids, tokens) for runner in (integer, rounded)]
        found = runs[0].ids
        choices = _rows(graphs.exact(()), [*ids, *found[:-1]])[len(ids) - 1 :].argmax(axis=-1)
        same = _same(found, choices.tolist())
        gaps = "", ""
        if same < len(found):
            read = [*ids, *found[:same]]
            gaps = graphs.explained(integer, read, found[same], int(choices[same]))
        table.add_row(
            prompt,
            str(_same(found, runs[1].ids)),
            str(same),
            *gaps,
            " / ".join(f"{run.decode_rate:.1f}" for run in runs),
            words.decode(found),
        )
    Console().print(table)


@dataclass(frozen=True)
class Graphs:
    """A prefill and a decode graph, twice.

    Attributes:
        integer: on integers alone.
        quantized: Q/DQ, inputs and outputs being codes.
        exact: kinds of operators that are on integers → the Q/DQ graphs in float64.
        kinds: of the operators there are.
    """

    integer: tuple[ir.Model, ir.Model]
    quantized: tuple[ir.Model, ir.Model]
    exact: Callable[[tuple[str, ...]], CachedRunner]
    kinds: Collection[str]

    @classmethod
    def read(cls, folder: Path) -> Graphs:
        """What qnpu-compile wrote."""
        integer = load_onnx(folder / PREFILL_NAME), load_onnx(folder / DECODE_NAME)
        quantized = _codes(folder / PREFILL_QDQ_NAME), _codes(folder / DECODE_QDQ_NAME)
        weights = RealWeights()

        def graph(index: int, kinds: tuple[str, ...]) -> ExactGraph:
            return ExactGraph(quantized[index], integer[index], kinds, weights)

        @cache
        def exact(kinds: tuple[str, ...]) -> CachedRunner:
            return CachedRunner(*quantized, runs=(graph(0, kinds), graph(1, kinds)))

        return cls(integer, quantized, exact, graph(0, ()).kinds)

    def explained(
        self, integer: CachedRunner, read: list[int], ours: int, theirs: int
    ) -> tuple[str, str]:
        """The gap between the two next tokens, in both, and the kinds that lead to ours."""
        exact, whole = (_rows(runner, read)[-1].astype(int) for runner in (self.exact(()), integer))
        kinds = sorted(self.kinds)  # a tie that goes up, not to the even code, leads off, too
        leads = [kind for kind in kinds if _rows(self.exact((kind,)), read)[-1].argmax() == ours]
        gap = f"{exact[theirs] - exact[ours]}, {whole[ours] - whole[theirs]}"
        return gap, ", ".join(leads) or "no kind alone"


def _rows(runner: CachedRunner, ids: list[int]) -> Array:
    """Codes of the logits behind each token of a text."""
    runner.reset()
    return runner.read(ids)


def _codes(path: Path) -> ir.Model:
    model = load_onnx(path)
    LowerIo().run(Compilation(model, stage=Stage.QDQ))
    return model


def _same(one: list[int], other: list[int]) -> int:
    """How many tokens at the start are equal."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


if __name__ == "__main__":
    typer.run(main)
