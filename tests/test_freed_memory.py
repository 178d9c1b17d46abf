"""Freed memory is handed out again, without fresh pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

_WORK = """
import resource, sys, torch
from qnpu.runtime_check.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way")
def test_large_tensors_take_no_fresh_pages() -> None:
    faults = {}
    for choice in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", _WORK, choice], capture_output=True, text=True, check=True
        )
        faults[choice] = int(done.stdout)
    pages = 2**24 * 4 // 4096
    assert faults["leave"] - faults["keep"] > 20 * pages
