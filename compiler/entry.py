"""Console scripts: signals and streams are set up first, the slow imports come after."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from qnpu.runtime_check.freed_memory import keep_freed_memory

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_INTERRUPTED = b"\ninterrupted\n"  # written to 2: sys.stderr may be redirected just then


def compile_main() -> None:
    _run("cli", "compile_app")


def export_main() -> None:
    _run("cli", "export_app")


def eval_main() -> None:
    _run("cli_eval", "eval_app")


def check_main() -> None:
    _run("cli_check", "check_app")


def run_main() -> None:
    _run("cli_run", "run_app")


def _run(module: str, app: str) -> None:
    _handle_signals(_leave_at_once)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    # ONNX Runtime would report its use to Microsoft, and keep a database of that under ~/.cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Threads that spin while they wait slow each other down where other work runs, torch's by far.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    gc.disable()  # the imports make no garbage; to look for some takes a third of their time
    commands = importlib.import_module(f"qnpu.compiler.{module}")
    gc.freeze()
    gc.enable()
    _handle_signals(_leave)
    getattr(commands, app)()


def _handle_signals(handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handler)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """While modules load there is nothing to clean up, and extensions turn exceptions to others.

    The exit code is 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    os.write(2, _INTERRUPTED)
    os._exit(128 + number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Leaves by an exception, so that temporary files are removed; later signals wait for that."""
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    os.write(2, _INTERRUPTED)
    sys.exit(128 + number)
