"""Does SIGKILL, whenever it comes, leave the old files or the new ones? On compiles of a decoder.

    python -m bench.kill_moments                      # 50 moments
    python -m bench.kill_moments --count 200 --seed 1

Each compile starts in a folder with an earlier compile's files and one of the user's. Moments are
drawn from three spans: the whole run, the time from the first temporary file on, and the time from
the last temporary file on, when files move to their places. After each, once no process writes any
more, every file of a compile must be there, all old or all new; then a compile must succeed, clean
up, and leave what it leaves in an empty folder. Killed processes are forks of one that has done the
imports, without which most moments would lie within those. Exit code 1 where anything else was
found.
"""

from __future__ import annotations

import enum
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler import cli
from qnpu.compiler.output import locked
from qnpu.models.export import export_dynamo
from qnpu.models.load import LoadedModel
from qnpu.models.tiny_decoder import tiny_decoder
from qnpu.models.tokenizer import ByteTokenizer
from tests.commands import snapshot

_TOKENS = 8
_OPTIONS = [
    "model.onnx", "--scheme", "w8a8", "--seq-len", str(_TOKENS), "--calib-windows", "1",
    "--eval-windows", "0", "--out", "out", "--quiet", "--json",
]  # fmt: skip
_LONG_ENOUGH = 600.0
_POLL = 0.0005
_MOVING = 0.15  # s in which files have moved, also beside other jobs


class Span(enum.StrEnum):
    """When a moment may lie."""

    RUN = "whole run"
    WRITING = "writing files"
    MOVING = "moving files"


@dataclass(frozen=True, slots=True)
class Times:
    """Of one whole run, s from its start.

    Attributes:
        writing: first temporary file.
        moving: last temporary file.
        end: of the process.
    """

    writing: float
    moving: float
    end: float


def export(folder: Path) -> None:
    """Writes model.onnx, a decoder of one layer, and its tokenizer."""
    decoder = tiny_decoder("llama", layers=1, hidden=32)
    loaded = LoadedModel(decoder, ByteTokenizer(), "tiny")
    export_dynamo(loaded, folder / "model.onnx", sequence_length=_TOKENS)


def begin(folder: Path, seed: int) -> int:
    """Starts a compile in a fork; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.argv = ["qnpu-compile", *_OPTIONS, "--seed", str(seed)]
        cli.compile_app()
    except SystemExit as request:
        os._exit(request.code if isinstance(request.code, int) else 0)
    finally:
        os._exit(1)


def wait_for(found: Callable[[], bool], child: int) -> bool:
    """Looks until there is something, or the process has ended; True for the former."""
    started = time.monotonic()
    while time.monotonic() - started < _LONG_ENOUGH:
        if found():
            return True
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(_POLL)
    raise TimeoutError(f"a compile takes more than {_LONG_ENOUGH:g} s")


def is_writing(out: Path) -> bool:
    return any(out.glob(".qnpu-scratch-*/*")) or any(out.glob(".qnpu-ready-*"))


def is_moving(out: Path) -> bool:
    return any(out.glob(".qnpu-scratch-*/report.json")) or any(out.glob(".qnpu-ready-*"))


def timed(folder: Path, seed: int) -> Times:
    """Runs a whole compile."""
    started = time.monotonic()
    child = begin(folder, seed)
    marks = []
    for found in (is_writing, is_moving):
        wait_for(lambda found=found: found(folder / "out"), child)  # type: ignore[misc]
        marks.append(time.monotonic() - started)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a compile fails: {os.waitstatus_to_exitcode(status)}")
    return Times(*marks, time.monotonic() - started)


def kill_within(span: Span, times: Times, folder: Path, seed: int, random: Random) -> None:
    """Starts a compile, kills it at a random moment of a span; it may have ended before."""
    child = begin(folder, seed)
    out = folder / "out"
    match span:
        case Span.RUN:
            delay = random.uniform(0, times.end)
        case Span.WRITING:
            wait_for(lambda: is_writing(out), child)
            delay = random.uniform(0, times.moving - times.writing)
        case Span.MOVING:
            wait_for(lambda: is_moving(out), child)
            delay = random.uniform(0, min(times.end - times.moving, _MOVING))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(out):  # waits for a process that moves files, which outlives the compile
        pass


def whole(found: dict[str, str], old: dict[str, str], new: dict[str, str]) -> str:
    """``old``, ``new``, or ``mixed`` of what lies under the names of files; hidden ones aside."""
    visible = {name: digest for name, digest in found.items() if not name.startswith(".qnpu-")}
    return "old" if visible == old else "new" if visible == new else "mixed"


def left_over(found: dict[str, str]) -> str:
    """What hidden folders are there: ``none``, ``scratch`` or ``ready``."""
    kinds = {name.split("-")[1] for name in found if name.startswith(".qnpu-")}
    return " and ".join(sorted(kinds)) or "none"


def main(
    count: Annotated[int, typer.Option(help="Of moments.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill compiles, look at what is left, print one table."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its thread does not survive a fork
    for module in ("torch", "matplotlib.backends.backend_svg", "qnpu.compiler.report_page"):
        importlib.import_module(module)
    random, seen, wrong = Random(seed), Counter[tuple[str, str, str]](), 0
    with tempfile.TemporaryDirectory(prefix="qnpu-kill-") as temporary:
        folder = Path(temporary)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(export, folder).result()  # its threads would not survive a fork
        states: list[dict[str, str]] = []
        for number in (1, 2):
            shutil.rmtree(folder / "out", ignore_errors=True)
            times = timed(folder, number)
            (folder / "out" / "mine.txt").write_text("the user's")
            states.append(snapshot(folder / "out"))
        for index in range(count):
            old, new = states if index % 2 else states[::-1]  # what the run before left
            span = list(Span)[index % 3]
            kill_within(span, times, folder, 2 if index % 2 else 1, random)
            found = snapshot(folder / "out")
            state = whole(found, old, new)
            again = timed(folder, 2 if index % 2 else 1) and snapshot(folder / "out")
            healed = "yes" if again == new else "no"
            seen[span, f"{state}, hidden: {left_over(found)}", healed] += 1
            wrong += state == "mixed" or healed == "no"
    table = Table(title=f"{count} kills, seed {seed}; {times}", title_justify="left")
    for heading in ("moment", "files", "next run whole", "times"):
        table.add_column(heading)
    for (span_name, state, healed), times_seen in sorted(seen.items()):
        table.add_row(span_name, state, healed, str(times_seen))
    Console(soft_wrap=True).print(table)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    typer.run(main)
