"""Writing results: complete or not at all, and never over what an earlier compile did not write."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from qnpu.compiler import move_files
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import CannotWrite, WouldOverwrite

REPORT_NAME, PAGE_NAME = "report.json", "report.html"
_PROTOBUF_LIMIT = 2**31 - 2**20
_CHUNK = 2**22
_SCRATCH = ".qnpu-scratch-"  # what is being written
_READY = ".qnpu-ready-"  # what is complete, and on its way to its place

Writer = Callable[[Path], None]
"""Writes one file, under the path given, and whatever belongs beside it."""

Page = Callable[[Mapping[str, object], Path], None]
"""Writes a file that tells what a report holds, under the path given."""


def save_model(model: ir.Model, path: Path) -> None:
    """Writes an ONNX file; weights go to ``<name>.data`` beside it from 2 GB on."""
    tensors = [v.const_value for v in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{path.name}.data" if size > _PROTOBUF_LIMIT else None
    if external is None:
        # A lazily loaded weight must be stored inside, not as a reference to the input's file.
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=external)


def write_json(value: object, path: Path) -> None:
    """Writes JSON with sorted-as-given keys and a final newline; the same value, the same bytes.

    Infinity and NaN, which JSON lacks, become null.
    """
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Finds out before the work whether output can be written at all; makes nothing.

    Raises:
        DiagnosticError: QN901 the folder, or the first one above it that exists, is a file or
            read-only.
    """
    with _reported(folder):
        places = (folder, *folder.absolute().parents)
        nearest = next(path for path in places if _is_there(path))
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(nearest))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "", str(nearest))


def _is_there(path: Path) -> bool:
    """Also of a link to nowhere.

    Raises:
        OSError: nothing can have such a name.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_overwrite(folder: Path, names: list[str]) -> None:
    """Checks that files to be written are absent or an earlier compile's, unchanged.

    A compile that was killed while its files moved into place is brought to its end first.

    Raises:
        DiagnosticError: QN902 for each file that is not; QN901 no permission.
    """
    if any(folder.glob(f"{_READY}*")):
        with _reported(folder), locked(folder) as lock:
            if lock is not None:
                _finish(folder, lock)
    _check_overwrite(folder, names)


def _check_overwrite(folder: Path, names: list[str]) -> None:
    ours = _written_before(folder)
    faults = [
        WouldOverwrite(str(folder / name)).at(file=str(folder / name))
        for name in names
        if os.path.lexists(folder / name)
        and not (name == REPORT_NAME and ours)
        and not (
            name in ours and (folder / name).is_file() and ours[name] == hash_file(folder / name)
        )
    ]
    if faults:
        raise DiagnosticError(faults)


def _written_before(folder: Path) -> dict[str, str]:
    """File name → SHA-256, as the folder's report.json lists them; empty where there is none."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text("utf-8"))
        outputs = report["outputs"]
        return {str(name): str(entry["sha256"]) for name, entry in outputs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_outputs(
    folder: Path,
    writers: Mapping[str, Writer],
    report: dict[str, object],
    page: Page | None = None,
) -> None:
    """Writes all files beside their final place, then moves them into it, the report last.

    On any failure, Ctrl-C included, the folder is left as it was. A process that is killed leaves
    it as it was too, but for hidden files which the next compile removes; or, if another process
    has begun to move them, all new files. Only where that one is killed within the moment that it
    takes, as when power fails, is there a mixture, with the rest in a hidden folder, from which
    the next compile moves it on. Adds ``outputs`` (size and hash of each file) to the report.

    Args:
        folder: made if absent.
        writers: file name → what writes it.
        report: becomes report.json.
        page: writes report.html of it; None: there is none.

    Raises:
        DiagnosticError: QN901 no space, no permission, a read-only or missing parent; QN902.
    """
    check_overwrite(folder, [*writers, *([PAGE_NAME] if page else []), REPORT_NAME])
    with _reported(folder), _scratch_folder(folder) as (scratch, lock):
        for name, write in writers.items():
            write(scratch / name)
        files = sorted(path.name for path in scratch.iterdir())
        _check_overwrite(folder, files)
        outputs = {name: _entry(scratch / name) for name in files}
        report["outputs"] = outputs
        if page is not None:  # it tells of all other files
            page(report, scratch / PAGE_NAME)
            files.append(PAGE_NAME)
            outputs[PAGE_NAME] = _entry(scratch / PAGE_NAME)
        write_json(report, scratch / REPORT_NAME)
        for path in scratch.iterdir():
            _flush(path)
        with _signals_held():
            name = scratch.name.replace(_SCRATCH, _READY)
            _move(scratch.rename(scratch.with_name(name)), lock)


def _move(ready: Path, lock: int | None) -> None:
    """Moves files out of a hidden folder into the one that holds it, the report last.

    Until then the old report is there, which tells which old files are ours. The process that
    moves them holds the lock as well: nobody writes here before it has ended, whoever started it.
    """
    names = sorted(path.name for path in ready.iterdir())
    names.sort(key=lambda name: name == REPORT_NAME)
    moved = subprocess.run(
        [sys.executable, "-I", "-S", move_files.__file__, str(ready.absolute()), *names],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,  # a signal to our group is not for it
        pass_fds=() if lock is None else (lock,),
    )
    if number := moved.stdout.strip():
        raise OSError(int(number), "")
    if moved.returncode:
        reason = moved.stderr.strip() or f"its process ended with {moved.returncode}"
        raise OSError(f"files were being moved: {reason}; the next compile moves the rest")


def _finish(folder: Path, lock: int) -> None:
    """Ends the moves of processes that were killed at it."""
    for ready in folder.glob(f"{_READY}*"):
        _check_overwrite(folder, [path.name for path in ready.iterdir()])
        _move(ready, lock)


def _entry(path: Path) -> dict[str, object]:
    """What a report says of a file."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[tuple[Path, int | None]]:
    """A hidden folder inside ``folder``, and the lock of the latter, as ``locked`` gives it.

    Both folders go again on failure if this call made them.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as lock:
            if lock is not None:  # then the process that made these was killed
                for stale in folder.glob(f"{_SCRATCH}*"):
                    shutil.rmtree(stale, ignore_errors=True)
                _finish(folder, lock)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
                yield Path(scratch), lock
        done = True
    finally:
        if not done:
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Waits until no other process writes here.

    Yields:
        Descriptor that holds the lock; None where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            lock = descriptor
        except OSError:
            lock = None
        yield lock
    finally:
        os.close(descriptor)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait until the body is through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: held.append(number))
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for waiting in held:
            signal.raise_signal(waiting)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Turns a failure to write into QN901."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if is_full(error):
            reason += "; nothing was left behind"
        raise DiagnosticError(CannotWrite(str(folder), reason).at(file=str(folder))) from error


def is_full(error: BaseException) -> bool:
    """True for the errors of a full disk or an exhausted quota."""
    return isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
