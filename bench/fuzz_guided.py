"""Inputs for ``bench.fuzz`` guided by coverage; runs in a process of its own, which it ends.

    python -m bench.fuzz_guided KIND SECONDS SEED FOLDER FAULTS

Half of the inputs are libFuzzer's changes to bytes, half are ours of keys, values and messages. The
tally is pickled to ``FOLDER/KIND.pickle`` every second.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from bench.fuzz_outcome import BYTES, SECONDS, Tally, Watch, enter, keep

_INSTRUMENTED = ["qnpu", "onnx_ir", "tomllib"]


def main(name: str, seconds: int, seed: int, folder: Path, faults: Path) -> None:
    """Reads inputs of one kind until the time is over."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=_INSTRUMENTED):
        targets = importlib.import_module("bench.fuzz_targets")
    target, case, tally = targets.TARGETS[name], folder / "case", Tally()
    seeds = target.seeds(folder / "seeds")
    corpus = folder / f"corpus-{name}"
    corpus.mkdir()
    for index, content in enumerate(seeds):
        (corpus / str(index)).write_bytes(content)
    os.chdir(case)
    sys.dont_write_bytecode = True
    watch = Watch(case, reads=name == "config")
    written = 0.0

    def change(data: bytes, size: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return bytes(atheris.Mutate(data, size))
        try:
            changed: bytes = target.mutate(data, seeds, random)
        except Exception:  # the bytes are no whole file any more
            changed = target.mutate(random.choice(seeds), seeds, random)
        return changed[:size]

    def read(content: bytes) -> None:
        nonlocal written
        if not target.takes(content):
            return
        (case / target.file).write_bytes(content)
        watch.strays.clear()
        result = enter(target, case, folder / "seeds", watch)
        watch.strays.clear()
        if tally.add(result):
            place = faults / f"{name}-guided-{tally.outcomes.total()}"
            keep(place, target.file, content, result, "found by atheris")
        if time.monotonic() > written + 1:
            written = time.monotonic()
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(tally))

    faults.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed + 1}",  # 0 stands for any
        f"-timeout={SECONDS:g}",
        f"-rss_limit_mb={BYTES >> 20}",
        f"-artifact_prefix={faults}/{name}-",
        f"-max_len={2 * max(map(len, seeds))}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    kind, *numbers, into, kept = sys.argv[1:]
    main(kind, *map(int, numbers), Path(into), Path(kept))
