"""Runs commands in forks of one process that has done the imports: some seconds less for each.

Reads one JSON job a line, of ``command``, ``folder``, ``environment`` and ``file_limit``, and
answers with ``[exit code, stdout, stderr]``. A child runs what the console script runs. Telemetry
of ONNX Runtime must be off: its thread does not survive a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from threading import Thread
from typing import Any, NoReturn

IMPORTED = (
    "matplotlib.backends.backend_svg",
    "onnxscript.optimizer",
    "qnpu.compiler.cli",
    "qnpu.compiler.cli_check",
    "qnpu.compiler.cli_eval",
    "qnpu.compiler.cli_run",
    "qnpu.compiler.report_page",
    "qnpu.models.export",
    "torch",
    "transformers.models.auto.modeling_auto",
)
"""Modules that are slow to import."""
SECONDS = 300.0
"""What a command may take."""


def main() -> None:
    from qnpu.compiler import entry  # noqa: PLC0415

    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        pipes = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            _become(job, pipes[0][1], pipes[1][1])
            _run(getattr(entry, f"{job['command'][0].removeprefix('qnpu-')}_main"))
        texts = ["", ""]
        readers = [
            Thread(target=_read, args=(pipe, texts, i), daemon=True) for i, pipe in enumerate(pipes)
        ]
        for reader in readers:
            reader.start()
        readers[0].join(SECONDS)
        if readers[0].is_alive():
            os.kill(child, signal.SIGKILL)
        for reader in readers:
            reader.join()
        status = os.waitpid(child, 0)[1]
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


def _become(job: dict[str, Any], stdout: int, stderr: int) -> None:
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stdout), (2, stderr)):
        os.dup2(source, target)
    os.closerange(3, 64)
    sys.stdout, sys.stderr = (os.fdopen(target, "w", encoding="utf-8") for target in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test may run under nohup
    if job["file_limit"] is not None:  # a disk that is full: writing on fails with EFBIG
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    sys.argv = job["command"]


def _run(command: Callable[[], None]) -> NoReturn:
    """Ends at once: to tear down an interpreter with all that torch loaded takes a second."""
    code = 1
    try:
        command()
        code = 0
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read(pipe: tuple[int, int], texts: list[str], index: int) -> None:
    os.close(pipe[1])
    with os.fdopen(pipe[0], encoding="utf-8") as stream:
        texts[index] = stream.read()


if __name__ == "__main__":
    main()
