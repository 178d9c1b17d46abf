"""What becomes of memory that large tensors leave."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # of glibc's malloc.h
_LARGEST = 2**28  # bytes; blocks larger than that go back to the system at once


def keep_freed_memory() -> None:
    """Has glibc hand freed blocks out again instead of giving them back to the system.

    Else each large tensor is made of fresh pages: a compile takes a quarter longer, a step of
    learning a third. It costs a quarter of a GiB or more, for the rest of the process. Other C
    libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 4 * _LARGEST)
        mallopt(_TOP_PAD, _LARGEST // 4)
