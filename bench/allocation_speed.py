"""How long the best bit widths of an 8B model take to find, and what the greedy rule loses.

    python -m bench.allocation_speed
    python -m bench.allocation_speed --seed 1 --layers 80

The model is Llama-3-8B's shape with sensitivities drawn at random: 4 bits of each tensor lose a
log-normal amount, every further bit a quarter of it, and inputs of down projections twenty times as
much. Linears that share their input are one item: bits of the input × bits of each weight. Costs
are bytes, and seconds by peak figures of a prompt of 128 tokens, bound by multiplying, and of 32
tokens more, bound by reading weights. Exit code 1 where a solve takes longer than the limit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.allocation import LOSS, Budget, Choice, Item, Problem, greedy, solve

_HIDDEN, _WIDE, _KEYS = 4096, 14336, 1024
_GROUPS = {
    "qkv": ((_HIDDEN, _HIDDEN), (_HIDDEN, _KEYS), (_HIDDEN, _KEYS)),
    "o": ((_HIDDEN, _HIDDEN),),
    "gate_up": ((_HIDDEN, _WIDE), (_HIDDEN, _WIDE)),
    "down": ((_WIDE, _HIDDEN),),
}
_VOCABULARY, _CONTEXT = 128_256, 4096
_PROMPT, _ANSWER = 128, 32
_BYTES_PER_SECOND, _OPERATIONS_PER_SECOND = 40e9, 10e12
_WIDE_INPUT = 0.6  # of the speed, where inputs have 16 bits


def eight_billion(seed: int, layers: int = 32) -> Problem:
    """Items of a decoder of Llama-3-8B's shape, with random losses; latency in s, size in bytes."""
    random = np.random.default_rng(seed)
    items: list[Item] = []
    for layer in range(layers):
        for group, shapes in _GROUPS.items():
            of_input = 1e-4 * random.lognormal(0, 1.5) * (20 if group == "down" else 1)
            of_weights = 1e-3 * random.lognormal(0, 1, len(shapes))
            items.append(Item(f"{layer}.{group}", list(_choices(shapes, of_input, of_weights))))
        of_cache = 1e-4 * random.lognormal(0, 1)
        caches = [_cache(bits, of_cache) for bits in (8, 16)]
        items.append(Item(f"{layer}.cache", caches))
    head = _VOCABULARY * _HIDDEN
    return Problem(items, {"size": head, "latency": _ANSWER * head / _BYTES_PER_SECOND})


def _choices(
    shapes: tuple[tuple[int, int], ...], of_input: float, of_weights: np.ndarray
) -> Iterator[Choice]:
    for bits in (4, 8, 16):
        for weights in product((4, 8), repeat=len(shapes)):
            loss = of_input * 4.0 ** (4 - bits)
            size = latency = 0.0
            for (rows, columns), weight, of_weight in zip(shapes, weights, of_weights, strict=True):
                stored = rows * columns * weight / 8
                speed = _OPERATIONS_PER_SECOND * (_WIDE_INPUT if bits == 16 else 1)
                loss += float(of_weight) * 4.0 ** (4 - weight)
                size += stored
                latency += 2 * _PROMPT * rows * columns / speed
                latency += _ANSWER * stored / _BYTES_PER_SECOND
            name = f"w{'-'.join(map(str, weights))} a{bits}"
            yield Choice(name, loss, {"latency": latency, "size": size})


def _cache(bits: int, of_cache: float) -> Choice:
    size = 2 * _KEYS * _CONTEXT * bits / 8
    latency = _ANSWER * size / _BYTES_PER_SECOND
    return Choice(f"kv{bits}", of_cache * 4.0 ** (8 - bits), {"latency": latency, "size": size})


def budgets(problem: Problem) -> dict[str, Budget]:
    """Limits at shares of the way from the least to the greatest amount, by name.

    ``both`` limits latency and size; ``loss`` limits that, and latency is to be least.
    """

    def limit(unit: str, share: float) -> float:
        amounts = [
            [choice.loss if unit == LOSS else choice.costs[unit] for choice in item.choices]
            for item in problem.items
        ]
        least, most = sum(map(min, amounts)), sum(map(max, amounts))
        return problem.fixed.get(unit, 0.0) + least + share * (most - least)

    found: dict[str, Budget] = {}
    for share in (0.05, 0.25, 0.5, 0.75):
        for unit in ("latency", "size"):
            found[f"{unit} {share:.0%}"] = Budget({unit: limit(unit, share)})
        both = {unit: limit(unit, share) for unit in ("latency", "size")}
        found[f"both {share:.0%}"] = Budget(both)
    for share in (0.01, 0.1):
        found[f"loss {share:.0%}"] = Budget({LOSS: limit(LOSS, share)}, "latency")
    return found


def main(
    seed: Annotated[int, typer.Option(help="Of the sensitivities.")] = 0,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 32,
    seconds: Annotated[float, typer.Option(help="Limit of CPU time of a solve.")] = 10.0,
) -> None:
    """Solve under several budgets, print one table."""
    problem = eight_billion(seed, layers)
    columns = sum(len(item.choices) for item in problem.items)
    table = Table(
        title=f"{len(problem.items)} items, {columns} choices, seed {seed}", title_justify="left"
    )
    for heading in ("budget", "CPU s", "gap", "best", "greedy ÷ best", "greedy s"):
        table.add_column(heading, justify="left" if heading == "budget" else "right")
    slowest = 0.0
    for name, budget in budgets(problem).items():
        started = time.process_time()
        best = solve(problem, budget)
        solved = time.process_time()
        other = greedy(problem, budget)
        ended = time.process_time()
        slowest = max(slowest, solved - started)
        value = best.amount(budget.least)
        table.add_row(
            name,
            f"{solved - started:.2f}",
            f"{best.gap:.1e}",
            f"{value:.4f}",
            f"{other.amount(budget.least) / value:.6f}",
            f"{ended - solved:.2f}",
        )
    Console(soft_wrap=True).print(table)
    sys.exit(slowest > seconds)


if __name__ == "__main__":
    typer.run(main)
