"""What became of an input: right or wrong, and by which line."""

from __future__ import annotations

import enum
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnpu.compiler.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from bench.fuzz_targets import Target

SECONDS = 10.0
"""Time that reading one input may take."""

BYTES = 4 * 2**30
"""Memory that it may take."""

SECRET = "secret.bin"
"""A file beside an input's folder, which no input may have read."""

_KEPT = 3
_ROOT = Path(__file__).resolve().parent.parent
_WRITES = frozenset(
    ["os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
     "os.symlink", "os.truncate", "os.utime", "shutil.rmtree", "shutil.move"]
)  # fmt: skip


class Outcome(enum.StrEnum):
    """What became of one input."""

    ACCEPTED = "accepted"
    CODED = "coded"
    TRACEBACK = "traceback"
    HANG = "hang"
    CRASH = "crash"
    MEMORY = "memory"
    OUTSIDE = "outside"

    @property
    def right(self) -> bool:
        return self in (Outcome.ACCEPTED, Outcome.CODED)


@dataclass(frozen=True, slots=True)
class Result:
    """How an input ended.

    Attributes:
        outcome: its class.
        place: of a fault: exception and line; alike ones are counted together.
        detail: traceback, or what else there is to say.
        seconds: wall time.
    """

    outcome: Outcome
    place: str = ""
    detail: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Tally:
    """All results for one kind of file."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    seconds: float = 0.0

    def add(self, result: Result) -> bool:
        """Counts a result; True for a fault of which few were seen so far, worth keeping."""
        self.outcomes[result.outcome] += 1
        self.slowest = max(self.slowest, result.seconds)
        if result.outcome is Outcome.CODED:
            self.codes[result.place] += 1
        if result.outcome.right:
            return False
        self.places[f"{result.outcome}: {result.place}"] += 1
        return self.places[f"{result.outcome}: {result.place}"] <= _KEPT


class Watch:
    """Notes each write outside a folder, and each look at the secret file, by audit events.

    Args:
        folder: where writing is allowed.
        reads: looking at the secret is, too: a configuration may name any file.
    """

    def __init__(self, folder: Path, *, reads: bool) -> None:
        self._folder = str(folder.resolve())
        self._secret = "" if reads else str(folder.resolve().parent / SECRET)
        self.strays: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        elif event in _WRITES:
            path, writes = arguments[0], True
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        full = os.path.realpath(os.fsdecode(path))
        inside = full == self._folder or full.startswith(self._folder + os.sep)
        if (writes and not inside and full != os.devnull) or full == self._secret:
            self.strays.append(f"{event} {full}")


def enter(target: Target, case: Path, seeds: Path, watch: Watch) -> Result:
    """Reads the file that lies there."""
    watch.strays.clear()
    started = time.perf_counter()
    outcome, place, detail = Outcome.ACCEPTED, "", ""
    try:
        target.enter(case, seeds)
    except DiagnosticError as error:
        outcome, place = Outcome.CODED, ",".join(sorted(set(error.codes)))
        if _has_memory_error(error):
            outcome, detail = Outcome.MEMORY, traceback.format_exc()
    except MemoryError as error:
        outcome, place, detail = Outcome.MEMORY, place_of(error), traceback.format_exc()
    except Exception as error:
        outcome, place, detail = Outcome.TRACEBACK, place_of(error), traceback.format_exc()
    if watch.strays:
        outcome, place, detail = Outcome.OUTSIDE, watch.strays[0], "\n".join(watch.strays)
    return Result(outcome, place, detail, time.perf_counter() - started)


def _has_memory_error(error: BaseException | None) -> bool:
    """A diagnostic that covers up an allocation that failed."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def place_of(error: BaseException) -> str:
    """The exception's type and the innermost line of ours in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    ours = [frame for frame in ours if Path(frame.filename).parent.parent == _ROOT] or frames[-1:]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {where}"


def keep(folder: Path, file: str, content: bytes, result: Result, how: str) -> None:
    """A fault's input, what was wrong, and how to see it again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    (folder / "fault.txt").write_text(f"{how}\n{result.outcome}: {result.place}\n{result.detail}")
