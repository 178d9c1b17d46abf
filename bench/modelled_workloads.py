"""The published latencies of W4A8 against W4A16 in blocks, beside what the cost model says.

    python -m bench.modelled_workloads
    python -m bench.modelled_workloads --target qnn-htp-v79 --down-bits 16

Llama 3.2 3B. Published figures are those of Quant.npu (arXiv 2605.20295) on SM8650, that is
qnn-htp-v75. Nothing is fitted to them: chip figures are those of the target's profile. Which
widths some linears had is not published. Here all have those of the scheme's name, the head too;
blocks are of 32 weights and keys and values have 8 bits, as in ExecuTorch's recipe for this model.
Other readings: ``--head-bits 8``, which is that recipe's, and ``--down-bits 16``, which is that of
the paper's accuracy figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.bit_choices import LinearBits
from qnpu.compiler.console import command
from qnpu.compiler.cost_model import Cost, CostModel, ModelShape, Workload
from qnpu.compiler.target import load_target

LLAMA_3_2_3B = ModelShape.llama(
    hidden=3072,
    layers=28,
    heads=24,
    kv_heads=8,
    head_dim=128,
    intermediate=8192,
    vocabulary=128256,
)

PUBLISHED = ((64, 42, -0.9), (536, 46, -4.6), (741, 3, -15.1))
"""Tokens of the prompt, tokens generated, difference of W4A8 in %."""

_KV_BITS = 8
_HEADINGS = ("prompt", "decode", "W4A16 blocks, s", "W4A8, s", "published", "modelled", "apart")


@dataclass(frozen=True)
class Row:
    """One workload. Costs are modelled.

    Attributes:
        workload: tokens.
        published: difference in time of W4A8, %.
        blocks: cost of 4-bit weights in blocks and 16-bit inputs.
        channels: cost of W4A8.
    """

    workload: Workload
    published: float
    blocks: Cost
    channels: Cost

    @property
    def modelled(self) -> float:
        """Difference in time of W4A8, %."""
        return 100 * (self.channels.seconds / self.blocks.seconds - 1)


def rows(
    target: str = "qnn-htp-v75",
    block: int = 32,
    down_bits: int = 8,
    head_bits: int = 4,
    chunk: int = 128,
) -> list[Row]:
    """The three workloads.

    Args:
        target: name of a profile.
        block: input features that share a scale in the baseline.
        down_bits: of inputs of down projections in W4A8.
        head_bits: of the head's weight, in both.
        chunk: tokens of a prefill run.

    Raises:
        DiagnosticError: QN502 unknown target, QN508 its profile has no figures.
    """
    model = CostModel.of(load_target(target))
    shape = LLAMA_3_2_3B
    in_blocks: dict[str, LinearBits] = {s.name: LinearBits(4, 16, block) for s in shape.linears}
    by_channel = {
        s.name: LinearBits(4, down_bits if s.role == "down" else 8) for s in shape.linears
    }
    if head_bits > 4:
        in_blocks["head"], by_channel["head"] = LinearBits(head_bits, 16), LinearBits(head_bits, 8)
    found = []
    for prompt, decode, published in PUBLISHED:
        workload = Workload(prompt, decode, chunk)
        costs = [model.total(shape, bits, _KV_BITS, workload) for bits in (in_blocks, by_channel)]
        found.append(Row(workload, published, *costs))
    return found


def main(
    target: Annotated[str, typer.Option(help="Profile to take figures from.")] = "qnn-htp-v75",
    block: Annotated[int, typer.Option(help="Weights that share a scale in the baseline.")] = 32,
    down_bits: Annotated[int, typer.Option(help="Inputs of down projections in W4A8.")] = 8,
    head_bits: Annotated[int, typer.Option(help="Weight of the head, in both.")] = 4,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill run.")] = 128,
) -> None:
    """Print the three workloads, and the figures that they come from."""
    found = rows(target, block, down_bits, head_bits, chunk)
    console = Console(soft_wrap=True)
    table = Table(title=f"Llama 3.2 3B on {target}, all seconds modelled", title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(
            str(row.workload.prompt),
            str(row.workload.decode),
            f"{row.blocks.seconds:.2f}",
            f"{row.channels.seconds:.2f}",
            f"{row.published:+.1f} %",
            f"{row.modelled:+.1f} %",
            f"{row.modelled - row.published:+.1f} points",
        )
    console.print(table)
    sizes = [cost.weight_bytes / 1e9 for cost in (found[0].blocks, found[0].channels)]
    console.print(f"weights, modelled: {sizes[0]:.2f} GB in blocks, {sizes[1]:.2f} GB in W4A8")
    figures = CostModel.of(load_target(target)).table
    for name, figure in (
        ("bytes/s", figures.bandwidth),
        ("operations/s", figures.throughput),
        ("bytes on chip", figures.on_chip),
    ):
        console.print(f"{figure.value:.3g} {name}: {figure.source}", highlight=False)
    for speed in figures.speeds:
        kind = " in blocks" if speed.block_scale_bits else ""
        console.print(
            f"speed A{speed.input}·W{speed.weight}{kind} {speed.speed:g}: {speed.source}",
            highlight=False,
        )


if __name__ == "__main__":
    typer.run(command(main))
