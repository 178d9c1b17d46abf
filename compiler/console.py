"""What the commands share: progress bars, printed diagnostics, exit codes."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qnpu.compiler.diagnostics import (
    Diagnostic,
    DiagnosticError,
    Rule,
    Severity,
    first_line,
)
from qnpu.compiler.output import is_full
from qnpu.compiler.pass_base import ProgressCallback
from qnpu.compiler.rules import CannotWrite, InternalError

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an internal error.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"qnpu {importlib.metadata.version('qnpu')}\n")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print qnpu's version, no more."
    ),
]

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 141

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold cyan"}
_MOST_ALIKE = 3


def application(body: Callable[..., None], examples: str) -> typer.Typer:
    """A one-command application with examples under its help."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    lines = [f"[dim]$[/dim] {line}" for line in examples.strip().splitlines()]
    app.command(epilog="[bold]Examples[/bold]\n\n" + "\n\n".join(lines))(body)
    return app


def error_console() -> Console:
    """Standard error. Holds the stream itself: exporters redirect ``sys.stderr`` meanwhile."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def print_diagnostics(diagnostics: Sequence[Diagnostic], file: str = "") -> None:
    """Prints diagnostics to standard error; of notes and warnings alike only the first three.

    Args:
        diagnostics: in order.
        file: printed with those that name no file.
    """
    console = error_console()
    printed: Counter[str] = Counter()
    for diagnostic in diagnostics:
        printed[diagnostic.code] += 1
        if diagnostic.severity is not Severity.ERROR and printed[diagnostic.code] > _MOST_ALIKE:
            continue
        style = _STYLES[diagnostic.severity]
        rule, location = diagnostic.rule, diagnostic.location
        console.print(
            Text(f"{diagnostic.severity.value}[{rule.code}]", style),
            Text(f"{rule.name}: {rule.message()}"),
        )
        place = [location.file or file, str(location) if not location.file else ""]
        if location.file:
            place = [str(location)]
        if any(place):
            console.print(Text("  --> " + ": ".join(part for part in place if part)))
        console.print(Text(f"  help: {rule.help()}"))
    repeated = {d.code for d in diagnostics if d.severity is not Severity.ERROR}
    for code in sorted(repeated):
        if printed[code] > _MOST_ALIKE:
            console.print(Text(f"… and {printed[code] - _MOST_ALIKE} more {code}", "dim"))


def print_json(value: object) -> None:
    """Prints JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[ProgressCallback]:
    """A callback that draws one bar per step, with the time left, on standard error.

    Args:
        shown: False for a callback that does nothing.
    """
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=error_console(), disable=not shown) as bars:

        def show(step: str, fraction: float) -> None:
            name = step.partition(": ")[0]  # what follows is said beside the same bar
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=fraction, description=step)

        yield show


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, file-backed pages included.

    Linux counts that of the process which started this one in getrusage, but not in VmHWM.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def command(body: Callable[..., None]) -> Callable[..., None]:
    """Makes a command end with a coded diagnostic and exit code 1, never with a traceback.

    ``debug=True`` among the arguments lets the traceback of an internal error through.
    """

    @functools.wraps(body)
    def wrapped(**options: object) -> None:
        logging.disable(logging.WARNING)  # what libraries log is no diagnostic of ours
        try:
            body(**options)
            sys.stdout.flush()
        except DiagnosticError as error:
            print_diagnostics(error.diagnostics, str(options.get("model") or ""))
            sys.exit(EXIT_FAULT)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_BROKEN_PIPE)
        except Exception as error:
            if options.get("debug"):
                traceback.print_exc()
            print_diagnostics([_fault(error).at()], str(options.get("model") or ""))
            sys.exit(EXIT_FAULT)

    return wrapped


def _fault(error: Exception) -> Rule:
    """What an exception means that no rule was made for where it was raised."""
    if is_full(error):
        return CannotWrite(tempfile.gettempdir(), first_line(error))
    return InternalError(type(error).__name__, first_line(error))
