"""Silence for chatty third-party calls, and coded errors for packages that are not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import MissingPackage


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop prints, progress bars, warnings and log records of the body.

    ``sys.stdout`` and ``sys.stderr`` are replaced meanwhile: a live display that runs in another
    thread must hold its own stream object (``rich.Console(file=sys.stderr)``). Exceptions pass.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def require(*modules: str, install: str = "qnpu[export]") -> None:
    """Check that top-level modules are installed without importing them.

    Args:
        modules: import names.
        install: what ``pip install`` needs to be given for them.

    Raises:
        DiagnosticError: QN114, one diagnostic for each absent module.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise DiagnosticError(MissingPackage(name, install).at() for name in absent)
