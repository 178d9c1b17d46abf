"""Runs our commands as a user would and keeps what they print, so that tables can be made of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMANDS = Path(sys.executable).parent


def run_command(command: Sequence[str]) -> dict[str, Any]:
    """Runs one of our commands, its progress shown; returns the JSON it prints."""
    done = subprocess.run(
        [_COMMANDS / command[0], *command[1:]], check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@dataclass(frozen=True, slots=True)
class Texts:
    """What is compiled, learned and measured on.

    Attributes:
        model: float ONNX file.
        calib: text to calibrate and learn on.
        text: text of the same kind to measure perplexity on.
        other: text of another kind.
        windows: of the text of the same kind.
        other_windows: of the other.
        bos: as for qnpu-compile.
    """

    model: str
    calib: str
    text: str
    other: str
    windows: int
    other_windows: int
    bos: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What one row came to.

    Attributes:
        text, other: perplexity relative to the float model's.
        seconds: of the compile, its checks left out.
        gib: peak RSS.
        command: what was run.
    """

    text: float
    other: float
    seconds: float
    gib: float
    command: str


class Bench:
    """Measures rows, each once: what is in the folder is not run again.

    Args:
        texts: what to run on.
        folder: for results and compiled files.
    """

    def __init__(self, texts: Texts, folder: Path) -> None:
        self._texts = texts
        self._folder = folder

    def measure(self, options: Sequence[str]) -> Measured:
        """Compiles with options, and evaluates on both texts."""
        texts, out = self._texts, self._folder / f"out-{os.getpid()}"  # several may run at once
        command = ["qnpu-compile", texts.model, *options, "--calib", texts.calib]
        command += ["--eval-text", texts.text, "--eval-windows", str(texts.windows)]
        command += ["--bos", texts.bos, "--out", str(out), "--json"]
        done = self._once(command)
        floats = [self._perplexity(texts.model, text) for text in (texts.text, texts.other)]
        other = done["other"]
        return Measured(
            text=done["perplexity"]["qdq"] / floats[0],
            other=other / floats[1],
            seconds=done["seconds"]["compile"],
            gib=done["peak_rss_bytes"] / 2**30,
            command=" ".join(["qnpu-compile", "model.onnx", *options]),
        )

    def is_done(self, options: Sequence[str]) -> bool:
        """The row is in the folder."""
        return self._file([*options, repr(self._texts)]).exists()

    def _once(self, command: list[str]) -> dict[str, Any]:
        options = command[2 : command.index("--calib")]
        file = self._file([*options, repr(self._texts)])
        if not file.exists():
            result = run_command(command)
            result["other"] = self._evaluate(result["out"] + "/model.qdq.onnx", self._texts.other)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1), "utf-8")
        loaded: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return loaded

    def _perplexity(self, model: str, text: str) -> float:
        file = self._file([model, text, repr(self._texts)])
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"perplexity": self._evaluate(model, text)}), "utf-8")
        return float(json.loads(file.read_text("utf-8"))["perplexity"])

    def _evaluate(self, model: str, text: str) -> float:
        texts = self._texts
        tokenizer = str(Path(texts.model).parent)
        windows = texts.windows if text == texts.text else texts.other_windows
        command = ["qnpu-eval", model, "--text", text, "--windows", str(windows)]
        done = run_command([*command, "--bos", texts.bos, "--tokenizer", tokenizer, "--json"])
        return float(done["perplexity"])

    def _file(self, words: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
        return self._folder / f"{key}.json"
