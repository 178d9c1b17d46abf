"""Runs our commands as a user would and keeps what they print, so that tables can be made of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COMMANDS = Path(sys.executable).parent
RESULTS = Path(__file__).parent / "results"
"""What was measured before, a small file for each row: delete one to measure it again."""


def run_command(command: Sequence[str]) -> dict[str, Any]:
    """Runs one of our commands, its progress shown; returns the JSON it prints."""
    done = subprocess.run(
        [_COMMANDS / command[0], *command[1:]], check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def kept(
    folder: Path,
    words: Sequence[str],
    on: Mapping[str, object],
    work: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What was measured with some options on something: from its file, which is made if need be.

    Args:
        folder: of files.
        words: options.
        on: names of models and texts, without folders; numbers of windows.
        work: measures.
    """
    file = _file_of(folder, words, on)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        measured = {"options": list(words), "on": dict(on)} | work()
        file.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    loaded: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return loaded


def _file_of(folder: Path, words: Sequence[str], on: Mapping[str, object]) -> Path:
    key = json.dumps([*words, dict(on)])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


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
        folder: for results, a small file each; they are told apart by options and names of files.
    """

    def __init__(self, texts: Texts, folder: Path) -> None:
        self._texts = texts
        self._folder = folder

    def measure(self, options: Sequence[str]) -> Measured:
        """Compiles with options, and evaluates on both texts."""
        texts = self._texts
        floats = [self._float_perplexity(text) for text in (texts.text, texts.other)]
        done = self._once(options, lambda: self._compile(options))
        return Measured(
            text=done["perplexity"] / floats[0],
            other=done["other"] / floats[1],
            seconds=done["seconds"],
            gib=done["peak_rss_bytes"] / 2**30,
            command=" ".join(["qnpu-compile", "model.onnx", *options]),
        )

    def is_done(self, options: Sequence[str]) -> bool:
        """The row is in the folder."""
        return self._file(options).exists()

    def _compile(self, options: Sequence[str]) -> dict[str, Any]:
        texts = self._texts
        with tempfile.TemporaryDirectory() as folder:
            command = ["qnpu-compile", texts.model, *options, "--calib", texts.calib]
            command += ["--eval-text", texts.text, "--eval-windows", str(texts.windows)]
            command += ["--bos", texts.bos, "--out", f"{folder}/out", "--json"]
            done = run_command(command)
            other = self._evaluate(f"{folder}/out/model.qdq.onnx", texts.other)
        return {
            "perplexity": done["perplexity"]["qdq"],
            "other": other,
            "seconds": done["seconds"]["compile"],
            "peak_rss_bytes": done["peak_rss_bytes"],
        }

    def _float_perplexity(self, text: str) -> float:
        name = Path(text).name
        done = self._once(
            ["float", name], lambda: {"perplexity": self._evaluate(self._texts.model, text)}
        )
        return float(done["perplexity"])

    def _evaluate(self, model: str, text: str) -> float:
        texts = self._texts
        tokenizer = str(Path(texts.model).parent)
        windows = texts.windows if text == texts.text else texts.other_windows
        command = ["qnpu-eval", model, "--text", text, "--windows", str(windows)]
        done = run_command([*command, "--bos", texts.bos, "--tokenizer", tokenizer, "--json"])
        return float(done["perplexity"])

    def _once(self, words: Sequence[str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return kept(self._folder, words, self._names(), work)

    def _names(self) -> dict[str, object]:
        """What rows are measured on, without folders."""
        found = asdict(self._texts)
        return {k: Path(v).name if k in _FILES else v for k, v in found.items()}

    def _file(self, words: Sequence[str]) -> Path:
        return _file_of(self._folder, words, self._names())


_FILES = ("model", "calib", "text", "other")
