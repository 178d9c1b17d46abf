"""Runs the real commands as a user would, for tests of the command line."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
_CODE = re.compile(r"\[(QN\d{3})\]")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def codes(self) -> list[str]:
        """Codes of the errors on standard error, in order."""
        errors = [line for line in self.stderr.splitlines() if line.startswith("error[")]
        return [code for line in errors for code in _CODE.findall(line)]


def start(
    *command: str | Path,
    folder: Path,
    before: Callable[[], None] | None = None,
    **variables: str,
) -> subprocess.Popen[str]:
    """Starts a command, such as ``qnpu-compile``, in a folder, as a process of its own.

    Args:
        command: the first word is a console script beside this Python, or an absolute path.
        folder: working directory.
        before: called in the new process first, e.g. to set a limit.
        variables: added to the environment.
    """

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test may run under nohup
        if before is not None:
            before()

    return subprocess.Popen(
        [BIN / command[0], *command[1:]],
        cwd=folder,
        env=os.environ | variables,
        preexec_fn=prepare,  # noqa: PLW1509  (this process starts no thread)
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Done:
    """Waits for a command."""
    stdout, stderr = process.communicate(timeout=300)
    return Done(process.returncode, stdout, stderr)


def call(
    *command: str | Path,
    folder: Path,
    before: Callable[[], None] | None = None,
    file_limit: int | None = None,
    **variables: str,
) -> Done:
    """Runs a command to its end.

    One of ours runs in a fork of a process that has done the imports (fork_server.py). What acts on
    the start of a process, ``before`` and variables, has one of its own.

    Args:
        command: as ``start`` takes it.
        folder: working directory.
        before: called in the new process first, e.g. to set a limit.
        file_limit: greatest size that a file can grow to, bytes; for ours alone.
        variables: added to the environment.
    """
    if before is None and not variables and str(command[0]).startswith("qnpu-"):
        return _fork([str(word) for word in command], folder, file_limit)
    return finish(start(*command, folder=folder, before=before, **variables))


def _fork(command: list[str], folder: Path, file_limit: int | None) -> Done:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    job = {"command": command, "folder": str(folder), "file_limit": file_limit}
    server.stdin.write(json.dumps(job | {"environment": dict(os.environ)}) + "\n")
    server.stdin.flush()
    return Done(*json.loads(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """See fork_server.py; one for all tests of this process."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
        text=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    if server.stdin is not None:
        server.stdin.close()
    server.wait()


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: relative path → SHA-256, link target or "folder"."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
