"""How fast graphs run beside each other on ONNX Runtime: interleaved, medians, two threads.

    python -m bench.int_speed float=model.onnx integer=out/model.int.onnx static=static.onnx
    python -m bench.int_speed float=cached/model.onnx integer=chat/decode.int.onnx --past 511
    python -m bench.int_speed … --profile integer        # where its time goes, by operator

Each graph gets what it takes: token ids for ``input_ids``, positions, a mask of ones, zeros else.
Each run of a round is of another graph, so that what else the machine does meets all alike. Where
memory lies depends on which graph is opened first, and that alone is worth 5 to 10 % of a decode:
so all are opened anew in every order that a rotation gives, and medians are over all of those.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

from bench.open_feeds import open_feeds


def main(
    graphs: Annotated[list[str], typer.Argument(help="NAME=FILE; the first is compared with.")],
    rounds: Annotated[int, typer.Option(help="Timed runs of each graph, in each order.")] = 9,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime.")] = 2,
    tokens: Annotated[int, typer.Option(help="Where a graph leaves that open.")] = 1,
    past: Annotated[int, typer.Option(help="Tokens in caches, where that is open.")] = 0,
    profile: Annotated[str, typer.Option(help="Name of a graph to profile.")] = "",
) -> None:
    """Time graphs."""
    files = dict(item.split("=", 1) for item in graphs)
    names = list(files)
    times: dict[str, list[float]] = {name: [] for name in names}
    for first in range(len(names)):
        rotated = {name: files[name] for name in (*names[first:], *names[:first])}
        for name, found in _times(rotated, rounds, threads, tokens, past).items():
            times[name] += found
    medians = {name: float(np.median(found)) for name, found in times.items()}
    compared = next(iter(medians.values()))
    title = f"{rounds} rounds in each of {len(files)} orders, {threads} threads"
    table = Table(title=title, title_justify="left")
    for heading in ("graph", "median ms", "least ms", "speed"):
        table.add_column(heading, justify="left" if heading == "graph" else "right")
    for name, median in medians.items():
        least = min(times[name]) * 1e3
        table.add_row(name, f"{median * 1e3:.1f}", f"{least:.1f}", f"{compared / median:.2f}")
    console = Console(soft_wrap=True)
    console.print(table)
    if profile:
        console.print(_profile(files[profile], threads, tokens, past))


def _times(
    files: dict[str, str], rounds: int, threads: int, tokens: int, past: int
) -> dict[str, list[float]]:
    """Opens graphs in this order, and runs them in turn; what each run took, s."""
    sessions = {name: _open(file, threads) for name, file in files.items()}
    feeds = {name: open_feeds(session, tokens, past) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for index in range(rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feeds[name])
            if index:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return times


def _open(file: str, threads: int, prefix: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait for more work would take the cores from the graph that comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if prefix:
        options.enable_profiling, options.profile_file_prefix = True, prefix
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _profile(file: str, threads: int, tokens: int, past: int) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        session = _open(file, threads, str(Path(folder, "profile")))
        feeds = open_feeds(session, tokens, past)
        for _ in range(2):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    last = [event for event in events if event["name"] == "model_run"][-1]
    spent: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["ts"] >= last["ts"] and "dur" in event:
            made = event["args"].get("output_type_shape", [])
            kind = json.dumps(made[0]) if made else ""
            spent[event["args"]["op_name"], kind] += event["dur"]
    table = Table(title=f"{last['dur'] / 1e3:.0f} ms in one run", title_justify="left")
    for heading in ("operator", "first result", "ms"):
        table.add_column(heading, justify="right" if heading == "ms" else "left")
    for (operator, kind), duration in spent.most_common(30):
        table.add_row(operator, kind, f"{duration / 1e3:.1f}")
    return table


if __name__ == "__main__":
    typer.run(main)
