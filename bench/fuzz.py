"""Do broken files end in a coded diagnostic? Random changes to valid files, by the thousand.

    python -m bench.fuzz                                     # 100,000 inputs, all kinds of files
    python -m bench.fuzz --only loader --inputs 5000 --seed 1
    python -m bench.fuzz --only loader --seed 1 --at 4711    # one input again, with its traceback
    python -m bench.fuzz --engine atheris --seconds 300      # by coverage; pip install atheris

The kinds are: ONNX files, as qnpu-check reads them; configurations; target profiles, with a graph
judged by each; encodings files; bit plans. Inputs are read in a process that is forked once and
kept. It may take 10 s and 4 GiB for each input, and write nothing but the input's own folder; one
that breaks a limit or dies is replaced. Right outcomes are ``accepted`` and ``coded``. All others
are kept in a folder, with the traceback, up to three of a kind. Exit code 1 where there is any.
"""

from __future__ import annotations

import enum
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.fuzz_outcome import BYTES, SECONDS, SECRET, Outcome, Result, Tally, Watch, enter, keep
from bench.fuzz_targets import TARGETS, WEIGHTS, Target, make_seeds
from qnpu.compiler.diagnostics import DiagnosticError

_ROOT = Path(__file__).resolve().parent.parent
_SHARES = {"loader": 0.3, "config": 0.2, "profile": 0.15, "encodings": 0.15, "plan": 0.2}


class Engine(enum.StrEnum):
    """What makes inputs."""

    RANDOM = "random"
    ATHERIS = "atheris"


Kind = enum.StrEnum("Kind", list(TARGETS))  # type: ignore[misc]


# ----------------------------------------------------------------------------------------- inputs


def make_input(target: Target, seeds: list[bytes], key: str) -> bytes:
    """One changed file; the same key, the same file."""
    random = Random(key)
    return target.mutate(random.choice(seeds), seeds, random)


def prepare(folder: Path) -> None:
    """Makes seeds, and what inputs may name: weights beside them, a file that is not theirs."""
    (folder / "seeds").mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(make_seeds, folder / "seeds").result()  # its threads would not survive a fork
    (folder / "case").mkdir()
    (folder / "case" / WEIGHTS).write_bytes(bytes(64))
    (folder / "case" / "bit_plan.json").write_bytes(
        (folder / "seeds" / "out" / "bit_plan.json").read_bytes()
    )
    (folder / SECRET).write_bytes(bytes(64))


# ----------------------------------------------------------------------------------------- worker


def work(name: str, seed: int, indices: range, folder: Path, pipe: Connection) -> None:
    """Reads one input after the other and sends a result for each, until it is stopped."""
    sys.dont_write_bytecode = True
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target, case = TARGETS[name], folder / "case"
    seeds = target.seeds(folder / "seeds")
    os.chdir(case)
    watch = Watch(case, reads=name == "config")
    logging.disable(logging.WARNING)  # as the commands do
    warnings.simplefilter("ignore")
    for index in indices:
        content = make_input(target, seeds, f"{seed}/{name}/{index}")
        (case / target.file).write_bytes(content)
        pipe.send(None)  # the clock starts
        pipe.send(enter(target, case, folder / "seeds", watch))


# ------------------------------------------------------------------------------------------- pool


def results(name: str, seed: int, count: int, folder: Path) -> Iterator[tuple[int, Result]]:
    """A result for each input, in order; a worker that is lost is replaced behind its input."""
    context = multiprocessing.get_context("fork")
    next_one = 0
    while next_one < count:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(name, seed, range(next_one, count), folder, theirs)
        )
        process.start()
        theirs.close()
        try:
            while next_one < count:
                result = _receive(ours, process.pid or 0)
                if result.outcome in (Outcome.HANG, Outcome.CRASH):
                    process.kill()
                    process.join()
                    if result.outcome is Outcome.CRASH:
                        result = _crashed(process.exitcode)
                yield next_one, result
                next_one += 1
                if result.outcome in (Outcome.HANG, Outcome.CRASH, Outcome.MEMORY):
                    break  # a fresh worker, with nothing left over
        finally:
            process.kill()
            process.join()
            ours.close()


def _receive(pipe: Connection, pid: int) -> Result:
    """What a worker says; it may be slow to start, but not to read an input."""
    pipe.recv()  # EOFError: it did not come to an input, so the fault is not the input's
    try:
        if not pipe.poll(SECONDS):
            return Result(Outcome.HANG, f"more than {SECONDS:g} s", seconds=SECONDS)
        result: Result = pipe.recv()
        peak = psutil.Process(pid).memory_info().rss
    except (EOFError, ConnectionError, psutil.NoSuchProcess):
        return Result(Outcome.CRASH)
    if peak > BYTES:
        return Result(Outcome.MEMORY, f"{peak / 2**30:.1f} GiB")
    return result


def _crashed(code: int | None) -> Result:
    name = signal.Signals(-code).name if code is not None and code < 0 else str(code)
    return Result(Outcome.CRASH, f"ended by {name}")


# -------------------------------------------------------------------------------------- reporting


def print_table(tallies: dict[str, Tally]) -> None:
    table = Table(title="inputs by outcome", title_justify="left")
    for heading in ("kind", *Outcome, "inputs", "slowest s", "s"):
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    for name, tally in tallies.items():
        counts = [str(tally.outcomes[outcome]) for outcome in Outcome]
        total = str(sum(tally.outcomes.values()))
        table.add_row(name, *counts, total, f"{tally.slowest:.2f}", f"{tally.seconds:.0f}")
    console = Console(soft_wrap=True)
    console.print(table)
    for name, tally in tallies.items():
        codes = ", ".join(f"{code} {count}" for code, count in tally.codes.most_common(8))
        console.print(f"{name}: {codes}", highlight=False)
        for place, count in tally.places.most_common():
            console.print(f"  {count} x {place}", highlight=False)


def fuzz(name: str, seed: int, count: int, folder: Path, faults: Path) -> Tally:
    """Random inputs of one kind."""
    target, tally = TARGETS[name], Tally()
    seeds = target.seeds(folder / "seeds")
    started = time.perf_counter()
    for index, result in results(name, seed, count, folder):
        if tally.add(result):
            content = make_input(target, seeds, f"{seed}/{name}/{index}")
            how = f"python -m bench.fuzz --only {name} --seed {seed} --at {index}"
            keep(faults / f"{name}-{seed}-{index}", target.file, content, result, how)
    tally.seconds = time.perf_counter() - started
    return tally


def again(name: str, seed: int, index: int, folder: Path) -> None:
    """Reads one input in this process; a fault ends in its traceback."""
    target, case = TARGETS[name], folder / "case"
    seeds = target.seeds(folder / "seeds")
    (case / target.file).write_bytes(make_input(target, seeds, f"{seed}/{name}/{index}"))
    os.chdir(case)
    try:
        target.enter(case, folder / "seeds")
    except DiagnosticError as error:
        print(error)


def guided(name: str, seconds: int, seed: int, folder: Path, faults: Path) -> Tally:
    """Inputs that atheris makes; see ``bench.fuzz_guided``."""
    arguments = [name, str(seconds), str(seed), str(folder.resolve()), str(faults.resolve())]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.fuzz_guided", *arguments],
        check=False,
        capture_output=True,
        cwd=_ROOT,
        text=True,
    )
    tally = Tally()
    report = folder / f"{name}.pickle"
    if report.exists():
        tally = pickle.loads(report.read_bytes())
    tally.seconds = time.perf_counter() - started
    if done.returncode:  # libFuzzer's own: a hang, too much memory, a signal
        tally.add(Result(Outcome.CRASH, done.stderr[-500:].strip()))
    return tally


def main(
    inputs: Annotated[int, typer.Option(help="Of all kinds together.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the changes.")] = 0,
    only: Annotated[Kind | None, typer.Option(help="One kind; it gets all inputs.")] = None,
    at: Annotated[int | None, typer.Option(help="Read this input of --only alone.")] = None,
    engine: Annotated[Engine, typer.Option(help="What makes inputs.")] = Engine.RANDOM,
    seconds: Annotated[int, typer.Option(help="Of atheris, for all kinds together.")] = 300,
    faults: Annotated[Path, typer.Option(help="Folder for what went wrong.")] = Path("fuzz-out"),
) -> None:
    """Read broken files, print one table."""
    shares = {only.value: 1.0} if only is not None else _SHARES
    if at is not None and only is None:
        raise typer.BadParameter("--at needs --only")
    with tempfile.TemporaryDirectory(prefix="qnpu-fuzz-") as temporary:
        folder = Path(temporary)
        prepare(folder)
        if at is not None and only is not None:
            again(only.value, seed, at, folder)
            return
        tallies = {
            name: fuzz(name, seed, round(inputs * share), folder, faults)
            if engine is Engine.RANDOM
            else guided(name, round(seconds * share), seed, folder, faults)
            for name, share in shares.items()
        }
    print_table(tallies)
    right = all(outcome.right for tally in tallies.values() for outcome in tally.outcomes)
    sys.exit(not right)


if __name__ == "__main__":
    typer.run(main)
