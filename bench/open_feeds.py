"""What graphs of language models take, whatever lengths they leave open."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from qnpu.runtime_check.session import Array

_KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}


def open_feeds(session: ort.InferenceSession, tokens: int, past: int) -> dict[str, Array]:
    """Seeded tokens, positions 0 and up, a mask that hides nothing; zeros for caches.

    Args:
        session: of the graph.
        tokens: where it leaves that open.
        past: tokens in its caches, where that is open.
    """
    found: dict[str, Array] = {}
    for item in session.get_inputs():
        open_size = {"input_ids": tokens, "position_ids": tokens, "attention_mask": past + tokens}
        size = open_size.get(item.name, past)
        shape = [axis if isinstance(axis, int) else size for axis in item.shape]
        zeros = np.zeros(shape, _KINDS[item.type])
        if item.name == "input_ids":
            zeros[:] = np.random.default_rng(0).integers(0, 1000, shape)
        elif item.name == "position_ids":
            zeros[:] = np.arange(shape[-1])
        elif item.name == "attention_mask":
            zeros[:] = 1
        found[item.name] = zeros
    return found
