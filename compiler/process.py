"""Which of several processes this is: torchrun tells by its environment."""

from __future__ import annotations

import os


def process_index() -> int:
    """This process's number; 0 where there is one alone (RANK)."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many work together (WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))
