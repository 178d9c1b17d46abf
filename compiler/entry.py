"""Console scripts: signals and streams are set up first, the slow imports come after."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def compile_main() -> None:
    _run("cli", "compile_app")


def export_main() -> None:
    _run("cli", "export_app")


def eval_main() -> None:
    _run("cli", "eval_app")


def check_main() -> None:
    _run("cli_check", "check_app")


def run_main() -> None:
    _run("cli_run", "run_app")


def _run(module: str, app: str) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _leave)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    # ONNX Runtime would report its use to Microsoft, and keep a database of that under ~/.cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Threads that spin while they wait slow each other down where other work runs, torch's by far.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()  # the imports make no garbage; to look for some takes a third of their time
    commands = importlib.import_module(f"qnpu.compiler.{module}")
    gc.freeze()
    gc.enable()
    getattr(commands, app)()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Leaves by an exception, so that temporary files are removed; later signals wait for that.

    The exit code is 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    os.write(2, b"\ninterrupted\n")  # sys.stderr may be redirected just now
    sys.exit(128 + number)
