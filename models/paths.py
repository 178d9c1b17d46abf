"""Questions about paths that users name, of which some are no paths at all."""

from __future__ import annotations

import os
from pathlib import Path


def exists(path: str | Path) -> bool:
    """As ``Path.exists``; False for a name that no file can have, for which that raises."""
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    """As ``Path.is_dir``; False for a name that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """As ``Path.is_file``; False for a name that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113
