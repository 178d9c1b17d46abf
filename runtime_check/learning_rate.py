"""How the learning rate goes, of both ways of learning."""

from __future__ import annotations

import math

_WARMUP = 5


def rate_at(step: int, steps: int) -> float:
    """Part of the learning rate at a step: a short warm-up, then half a cosine."""
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))
