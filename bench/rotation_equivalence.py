"""Folding and rotating leave a model what it is: float perplexity, logits, time and memory.

    python bench/rotation_equivalence.py smollm2-135m --text wiki.test.raw --bos none
    python bench/rotation_equivalence.py gemma3-270m --text wiki.test.raw --bos window
    python bench/rotation_equivalence.py model.onnx --online r3,r4

Time and peak RSS are those of fold-norm-scale, fuse-rotation and, where asked for, insert-hadamard;
they run before anything else but loading and the canonical passes. Exit code 1 where a limit is
exceeded; run nothing else meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.console import peak_rss_bytes
from qnpu.compiler.inputs import text_windows
from qnpu.compiler.pass_base import Compilation, Pass, run_passes
from qnpu.compiler.pipeline import LOGITS, canonical_passes
from qnpu.models.load import load_onnx, load_tokenizer, resolve
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.passes.insert_hadamard import InsertHadamard
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.perplexity import Perplexity, next_token_loss
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Array, Feeds

_EXPORT = Path(sys.executable).parent / "qnpu-export"
_DIGITS = 5e-5  # half a unit of the fourth digit behind the first
_DELTA = 1e-4


@dataclass(frozen=True)
class Equivalence:
    """Two graphs on the same windows.

    Attributes:
        before, after: perplexities.
        delta: max |Δlogit| / max |logit|.
        agreement: share of positions whose largest logit is the same.
        margin: largest gap, relative to max |logit|, between first and second logit where not.
    """

    before: Perplexity
    after: Perplexity
    delta: float
    agreement: float
    margin: float


def main(
    model: Annotated[str, typer.Argument(help="As for qnpu-compile.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="Default: the built-in text.")] = "",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    bos: Annotated[str, typer.Option(help="As for qnpu-compile.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the rotations.")] = 0,
    online: Annotated[str, typer.Option(help="Rotations to run online: r3, r4 or r3,r4.")] = "",
    seconds: Annotated[float, typer.Option(help="Limit of the passes' time.")] = 60.0,
    gibibytes: Annotated[float, typer.Option(help="Limit of peak RSS.")] = 2.5,
) -> None:
    """Rotate, note the cost, then run the graph as loaded beside the rotated one."""
    console = Console(soft_wrap=True)
    kinds = tuple(online.split(",") if online else ())
    config = CompileConfig(seq_len=seq_len, seed=seed, online=kinds)
    source = resolve(model)
    with TemporaryDirectory(prefix="qnpu-rotation-") as folder:
        path = Path(source.location)
        if source.kind != "onnx":
            path = Path(folder, f"{source.name}.onnx")
            # in a process of its own, whose memory is not counted here
            options = ["--seq-len", str(seq_len), "--out", str(path), "--json"]
            subprocess.run([_EXPORT, model, *options], check=True, stdout=subprocess.DEVNULL)
        # read again for the comparison: the first copy's old weights must be free to go
        compilation = _canonical(path, config)
        loaded = peak_rss_bytes()
        started = time.perf_counter()
        counts = _run(_rotations(config), compilation)
        spent, peak = time.perf_counter() - started, peak_rss_bytes()
        before = _canonical(path, config).model
        found, about = text_windows(
            text, "evaluation", load_tokenizer(source), seq_len, windows, bos
        )
        result = _compare(before, compilation.model, found)
    same = abs(result.after.value / result.before.value - 1) < _DIGITS
    checks = {
        "perplexity, float": (f"{result.before.value:.5f}", ""),
        "perplexity, rotated": (f"{result.after.value:.5f}", _verdict(same)),
        "max |Δlogit| / max |logit|": (f"{result.delta:.2e}", _verdict(result.delta <= _DELTA)),
        "argmax the same": (f"{result.agreement:.6f}", ""),
        "widest margin where not": (f"{result.margin:.2e}", _verdict(result.margin <= _DELTA)),
        "seconds": (f"{spent:.1f}", _verdict(spent <= seconds)),
        "peak RSS, loaded, GiB": (f"{loaded / 2**30:.2f}", ""),
        "peak RSS, rotated, GiB": (f"{peak / 2**30:.2f}", _verdict(peak <= gibibytes * 2**30)),
    }
    table = Table(title=source.name, show_header=False, title_justify="left")
    for label, cells in checks.items():
        table.add_row(label, *cells)
    for name, count in counts.items():
        table.add_row(name, str(count), "")
    for code, count in Counter(d.code for d in compilation.diagnostics).items():
        table.add_row(code, str(count), "")
    console.print(table)
    console.print(f"evaluated on {about}")
    sys.exit(any(verdict == "FAIL" for _, verdict in checks.values()))


def _verdict(fits: bool) -> str:
    return "pass" if fits else "FAIL"


def _rotations(config: CompileConfig) -> list[Pass]:
    passes: list[Pass] = [FoldNormScale(), FuseRotation(seed=config.seed)]
    return [*passes, InsertHadamard(config.online, config.seed)] if config.online else passes


def _canonical(path: Path, config: CompileConfig) -> Compilation:
    compilation = Compilation(load_onnx(path))
    _run(canonical_passes(config), compilation)
    return compilation


def _run(passes: list[Pass], compilation: Compilation) -> dict[str, int]:
    return run_passes(passes, compilation, after_pass=lambda done: None)


def _compare(before: ir.Model, after: ir.Model, windows: TokenWindows) -> Equivalence:
    feeds = windows.feeds(before.graph.inputs)
    losses: tuple[list[Array], list[Array]] = ([], [])
    delta = peak = margin = 0.0
    agreed: list[float] = []
    pairs = zip(_logits(before, feeds), _logits(after, feeds), strict=True)
    for feed, (old, new) in zip(feeds, pairs, strict=True):
        ids = feed["input_ids"][0]
        for kept, logits in zip(losses, (old, new), strict=True):
            kept.append(next_token_loss(logits, ids))
        delta = max(delta, float(np.abs(old - new).max()))
        peak = max(peak, float(np.abs(old).max()))
        first, second = old.argmax(-1), new.argmax(-1)
        agreed.append(float((first == second).mean()))
        for row in np.flatnonzero(first != second):
            margin = max(margin, float(old[row, first[row]] - old[row, second[row]]))
    first_value, second_value = (Perplexity.of(kept) for kept in losses)
    agreement = float(np.mean(agreed))
    return Equivalence(first_value, second_value, delta / peak, agreement, margin / peak)


def _logits(model: ir.Model, feeds: Sequence[Feeds]) -> Iterator[Array]:
    """(tokens, vocabulary) of one window after the other."""
    for step in SegmentRunner(model, feeds).stream({LOGITS}):
        if LOGITS in step.values:
            yield step.values[LOGITS][0]


if __name__ == "__main__":
    typer.run(main)
