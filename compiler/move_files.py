"""Moves files to their places in a process of its own, which goes on where the compile is killed.

    python move_files.py FOLDER NAME…

``write_outputs`` starts it by its path, so it imports nothing of qnpu. The names move, in their
order, from a folder into the one that holds it; then the folder goes. Where the system refuses, the
number of its error is printed, and the exit code is 1.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path


def main(folder: Path, names: list[str]) -> int:
    """Moves files; 0 or the number of the system's error."""
    try:
        for name in names:
            (folder / name).replace(folder.parent / name)
        folder.rmdir()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


if __name__ == "__main__":
    refused = main(Path(sys.argv[1]), sys.argv[2:])
    if refused:
        print(refused)
    sys.exit(refused > 0)
