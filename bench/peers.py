"""Tools that quantize ONNX language models, side by side: writes bench/peers.md.

    python -m bench.peers --model model.onnx --calib wiki.valid.tokens --text wiki.test.raw \\
        --lambada lambada_openai.jsonl --piqa piqa.jsonl --venvs VENVS --work WORK
    python -m bench.peers … --only aimet                # one row, or those whose name holds this

Every tool gets the same float ONNX file and the same calibration tokens, and runs in an
environment of its own, which is made where there is none. What comes out is evaluated by qnpu-eval
and qnpu-check alone, node by node, with the Python that runs this. A tool that fails has its last
words in the table.

The model should be of opset 21, which all tools know:

    from qnpu.models.export import export_dynamo
    from qnpu.models.load import load_torch, resolve
    export_dynamo(load_torch(resolve("smollm2-135m")), "model.onnx", sequence_length=512, opset=21)

What was measured is kept in a small file for each row, step by step, so that an interrupted run
goes on; delete a file to measure its row again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import psutil
import typer
from rich.console import Console

from bench.measured import RESULTS
from qnpu.compiler.inputs import text_windows
from qnpu.models.load import load_onnx, load_tokenizer

_HERE = Path(__file__).parent
_BIN = Path(sys.executable).parent
_TARGET = "qnn-htp-v75"
_POLL_SECONDS = 0.2

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A peer.

    Attributes:
        name: of it and of its environment.
        script: in bench/peer_tools.
        pins: what to install.
    """

    name: str
    script: Path
    pins: tuple[str, ...]


_SCRIPTS = _HERE / "peer_tools"
_TORCH = "torch==2.13.0"
_OLIVE = ("olive-ai==0.13.0", "onnxruntime==1.32.0", "onnx==1.23.2", _TORCH, "requests")
"""Olive imports the last one and does not ask for it."""
_AIMET = ("aimet-onnx==2.42.0", "onnxruntime==1.32.0", "onnx==1.23.2", "torch==2.14.1")
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("onnxruntime", _SCRIPTS / "ort_static.py", ("onnxruntime==1.32.0", "onnx==1.23.2")),
        Tool("aimet-onnx", _SCRIPTS / "aimet.py", _AIMET),
        Tool(
            "amd-quark",
            _SCRIPTS / "quark_onnx.py",
            ("amd-quark==0.13", "onnxruntime==1.28.0", _TORCH),
        ),
        Tool(
            "olive-ai",
            _SCRIPTS / "olive_recipe.py",
            _OLIVE,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured.

    Attributes:
        tool: of ``TOOLS``, or ``qnpu``; ``float`` for the model itself.
        scheme: as the table shows it.
        options: of the tool's script, or of qnpu-compile.
    """

    tool: str
    scheme: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.tool} {self.scheme}".strip()


FLOAT = Row("float", "")
OURS = "qnpu"


def _bits(scheme: str) -> tuple[str, ...]:
    weights, activations = scheme.removeprefix("W").split("A")
    return ("--weights", weights, "--activations", activations)


def _ours(scheme: str, *options: str, how: str = "") -> Row:
    words = ("--scheme", scheme.lower(), "--target", _TARGET, *options)
    return Row(OURS, f"{scheme}{how}", words)


_SCHEMES = {
    "onnxruntime": ("W8A8", "W8A16"),
    "aimet-onnx": ("W8A8", "W4A16", "W4A8"),
    "amd-quark": ("W8A8", "W8A16"),
    "olive-ai": ("W8A8", "W8A16", "W4A16"),
}
_RECIPE = ("--recipe", "default")
ROWS = (
    FLOAT,
    *(Row(tool, s, _bits(s)) for tool, schemes in _SCHEMES.items() for s in schemes),
    _ours("W8A8"),
    _ours("W8A16"),
    _ours("W4A16"),
    _ours("W4A8"),
    *(_ours(s, *_RECIPE, how=", learned") for s in ("W8A8", "W4A16", "W4A8")),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: None where it was stopped for its time.
        stdout: what it printed there.
        message: the last line of its error; empty where there was none.
        seconds: of wall time.
        peak_rss_bytes: of all its processes together, looked at five times a second.
    """

    exit_code: int | None
    stdout: str
    message: str
    seconds: float
    peak_rss_bytes: int

    @property
    def failure(self) -> Found:
        """What a row keeps of a command that failed."""
        return {
            "exit": self.exit_code,
            "message": self.message,
            "seconds": round(self.seconds, 1),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def run_limited(
    command: Sequence[str | Path], log: Path, minutes: float, **variables: str
) -> Ended:
    """Runs a command with all its processes in a group that ends with it, or when time is up.

    Args:
        command: with its arguments.
        log: file for standard error; standard output goes to a file beside it.
        minutes: limit.
        variables: added to the environment.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    printed = log.with_suffix(".out")
    started = time.perf_counter()
    with log.open("wb") as errors, printed.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=os.environ | variables,
            start_new_session=True,
        )
        peak, late = 0, False
        try:
            while process.poll() is None and not late:
                peak = max(peak, _tree_rss(process.pid))
                time.sleep(_POLL_SECONDS)
                late = time.perf_counter() - started > 60 * minutes
        finally:  # Ctrl-C does not reach another session
            _end_group(process)
    seconds = time.perf_counter() - started
    code = None if late else process.returncode
    message = f"stopped after {minutes:g} minutes" if late else ""
    if code:
        words = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        message = _last_line(log) or _last_line(printed) or words
    return Ended(code, printed.read_text("utf-8", errors="replace"), message, seconds, peak)


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and of all below it; shared pages count for each."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in tree:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(file: Path) -> str:
    """Of what a command printed; of one of ours the last error, which has help behind it."""
    text = file.read_text("utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    coded = [line for line in lines if line.startswith("error[")]
    return (coded or lines or [""])[-1]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all rows have in common.

    Attributes:
        model: float ONNX file, its tokenizer beside it.
        calib, calib_windows, seq_len: text to calibrate on, how much of it.
        text, windows: text to measure perplexity on, how much of it.
        tasks: task → its items, a .jsonl file.
        items: of each task.
        venvs: folder of environments.
        work: folder for tokens, models and logs.
        minutes: limit of each command.
    """

    model: Path
    calib: str
    calib_windows: int
    seq_len: int
    text: str
    windows: int
    tasks: dict[str, Path]
    items: int
    venvs: Path
    work: Path
    minutes: float

    @property
    def on(self) -> Found:
        """Names of files, without folders, and numbers: what rows are told apart by."""
        return {
            "model": self.model.name,
            "bytes": _size(self.model),
            "calib": Path(self.calib).name,
            "calib_windows": self.calib_windows,
            "seq_len": self.seq_len,
            "text": Path(self.text).name,
            "windows": self.windows,
            "tasks": {task: file.name for task, file in self.tasks.items()},
            "items": self.items,
        }

    @property
    def tokens(self) -> Path:
        """Calibration inputs for all tools."""
        return self.work / "tokens.npz"


class Bench:
    """Measures rows, and keeps what was measured of each in a file of its own.

    Args:
        setting: what to run on.
        tools: by name.
        folder: for results.
    """

    def __init__(self, setting: Setting, tools: dict[str, Tool], folder: Path) -> None:
        self._setting = setting
        self._tools = tools
        self._folder = folder

    def measure(self, row: Row) -> Found:
        """All of a row that is not in its file yet; what failed is not tried again."""
        steps, found = self._steps(), self.load(row)
        gone = not self._file(row).exists() and not steps.keys() <= found.keys()
        if "make" not in found or (gone and "message" not in found["make"]):
            found = self._keep(row, "make", self._make(row))
        for name, step in steps.items():
            if name not in found and "message" not in found["make"]:
                found = self._keep(row, name, step(row))
        return found

    def load(self, row: Row) -> Found:
        """What the file of a row holds; only what it is about where there is none."""
        path = self._path(row)
        about = {"row": row.name, "options": list(row.options), "on": self._setting.on}
        return about | (json.loads(path.read_text("utf-8")) if path.exists() else {})

    def _path(self, row: Row) -> Path:
        key = json.dumps([row.name, row.options, self._setting.on])
        words = "-".join(row.name.lower().replace(",", "").split())
        return self._folder / f"{words}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"

    def _keep(self, row: Row, step: str, measured: Found) -> Found:
        found = self.load(row) | {step: measured}
        path = self._path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        part.replace(path)
        return found

    def _steps(self) -> dict[str, Callable[[Row], Found]]:
        """What is measured of a file, by name; the tasks take longest."""
        tasks = {task: partial(self._task, task) for task in self._setting.tasks}
        return {"perplexity": self._perplexity, "check": self._check, **tasks}

    def _folder_of(self, row: Row) -> Path:
        return self._setting.work / self._path(row).stem

    def _file(self, row: Row) -> Path:
        if row == FLOAT:
            return self._setting.model
        name = "model.qdq.onnx" if row.tool == OURS else "model.onnx"
        return self._folder_of(row) / name

    def _make(self, row: Row) -> Found:
        file, folder = self._file(row), self._folder_of(row)
        if row == FLOAT:
            return {"bytes": _size(file), "notes": []}
        shutil.rmtree(folder, ignore_errors=True)
        if row.tool != OURS:
            failure = self._install(self._tools[row.tool])
            if failure:
                return failure
        ended = self._run("make", row, self._command(row, folder), **self._variables(row))
        if ended.message or not file.exists():
            return ended.failure | {"message": ended.message or f"wrote no {file.name}"}
        notes = folder / "notes.json"
        return {
            "seconds": round(ended.seconds, 1),
            "peak_rss_bytes": ended.peak_rss_bytes,
            "bytes": _size(file),
            "notes": json.loads(notes.read_text("utf-8")) if notes.exists() else [],
        }

    def _command(self, row: Row, folder: Path) -> list[str | Path]:
        setting = self._setting
        if row.tool != OURS:
            tool = self._tools[row.tool]
            python = _python(setting.venvs / tool.name)
            return [python, tool.script, setting.model, setting.tokens, folder, *row.options]
        windows = str(setting.calib_windows)
        command: list[str | Path] = [_BIN / "qnpu-compile", setting.model, *row.options]
        command += ["--calib", setting.tokens, "--calib-windows", windows]
        command += ["--learn-windows", windows, "--seq-len", str(setting.seq_len)]
        return [*command, "--eval-windows", "0", "--out", folder, "--json", "--quiet"]

    def _install(self, tool: Tool) -> Found | None:
        """Makes a tool's environment where there is none; what went wrong, if anything did."""
        folder = self._setting.venvs / tool.name
        if _python(folder).exists():
            return None
        log, minutes = self._setting.work / "logs" / f"{tool.name}.install", self._setting.minutes
        commands: tuple[list[str | Path], ...] = (
            [sys.executable, "-m", "venv", folder],
            [_python(folder), "-m", "pip", "install", *tool.pins],
        )
        complete = False
        try:
            for command in commands:
                ended = run_limited(command, log, minutes)
                if ended.message:
                    return ended.failure
            complete = True
        finally:
            if not complete:  # half an environment would be taken for a whole one next time
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _perplexity(self, row: Row) -> Found:
        setting = self._setting
        options: list[str | Path] = ["--text", setting.text, "--windows", str(setting.windows)]
        return self._evaluate("perplexity", row, [*options, "--window", str(setting.seq_len)])

    def _task(self, task: str, row: Row) -> Found:
        data = self._setting.tasks[task]
        options: list[str | Path] = ["--task", task, "--task-data", data]
        options += ["--items", str(self._setting.items)]
        return self._evaluate(task, row, options)

    def _evaluate(self, step: str, row: Row, options: list[str | Path]) -> Found:
        tokenizer = self._setting.model.parent
        command: list[str | Path] = [_BIN / "qnpu-eval", self._file(row), *options]
        command += ["--bos", "none", "--tokenizer", tokenizer, "--json", "--quiet"]
        ended = self._run(step, row, command)
        if ended.message:
            return ended.failure
        answer = json.loads(ended.stdout)
        return {key: answer[key] for key in ("perplexity", "metrics", "seconds") if key in answer}

    def _check(self, row: Row) -> Found:
        command: list[str | Path] = [_BIN / "qnpu-check", self._file(row), "--target", _TARGET]
        ended = self._run("check", row, [*command, "--oracle", "htp", "--json"])
        try:
            answer = json.loads(ended.stdout)
        except json.JSONDecodeError:
            return ended.failure | {"message": ended.message or "qnpu-check printed nothing"}
        layers = answer.get("layers", {}).values()
        counts: Counter[str] = Counter()
        for layer in layers:
            counts.update(layer)
        oracle = answer.get("oracle")
        if oracle is not None:
            oracle |= {key: len(oracle[key]) for key in ("float", "inserted")}
        errors = [d for d in answer["diagnostics"] if d["severity"] == "error"]
        return {
            "kind": answer.get("kind"),
            "profile": answer.get("verdict"),
            "nodes": dict(counts),
            "float_nodes": None if counts else float_nodes(self._file(row)),
            "oracle": oracle,
            "errors": [f"{error['code']}: {error['message']}" for error in errors[:1]],
        }

    def _run(self, step: str, row: Row, command: Sequence[str | Path], **variables: str) -> Ended:
        log = self._setting.work / "logs" / f"{self._path(row).stem}.{step}.log"
        return run_limited(command, log, self._setting.minutes, **variables)

    def _variables(self, row: Row) -> dict[str, str]:
        """Where a tool's environment keeps what torch builds the first time, as Quark has it do.

        A build that was killed leaves a lock, and all later ones would wait for it for ever.
        """
        if row.tool == OURS:
            return {}
        built = self._setting.venvs / row.tool / "torch_extensions"
        for lock in built.glob("*/lock"):
            lock.unlink()
        return {"TORCH_EXTENSIONS_DIR": str(built)}


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _size(file: Path) -> int:
    """Bytes of a model and of the weights beside it."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def float_nodes(file: Path) -> int:
    """How many nodes of a graph compute floats, whatever they take: conversions do not count.

    Args:
        file: .onnx; its weights are not read.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False))
    values = [*model.graph.value_info, *model.graph.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    convert = ("QuantizeLinear", "DequantizeLinear", "Constant")
    return sum(
        node.op_type not in convert and bool(floats & set(node.output)) for node in model.graph.node
    )


def write_tokens(setting: Setting) -> None:
    """Cuts the calibration text into windows once, for every tool: an array for each input."""
    tokenizer = load_tokenizer(str(setting.model))
    windows, _ = text_windows(
        setting.calib, "calibration", tokenizer, setting.seq_len, setting.calib_windows, "none"
    )
    runs = windows.feeds(load_onnx(setting.model).graph.inputs)
    arrays: dict[str, Any] = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    setting.work.mkdir(parents=True, exist_ok=True)
    np.savez(setting.tokens, **arrays)


_HEADINGS = (
    "tool",
    "scheme",
    "perplexity",
    "÷ float",
    "LAMBADA",
    "PIQA",
    "min",
    "GiB",
    "MB",
    "float nodes",
    "HTP: compiler; profile",
    "notes",
)


def table(rows: Sequence[tuple[Row, Found]]) -> list[str]:
    """Lines of Markdown; what is not measured is left empty, what failed says why."""
    first = next((found for row, found in rows if row == FLOAT), {})
    base = first.get("perplexity", {}).get("perplexity")
    lines = [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
    return lines + [_line(_cells(row, found, base)) for row, found in rows]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cells(row: Row, found: Found, base: float | None) -> list[str]:
    made = found.get("make", {})
    perplexity = found.get("perplexity", {}).get("perplexity")
    ratio = f"{perplexity / base:.4f}" if perplexity is not None and base else ""
    seconds, peak, size = (made.get(key) for key in ("seconds", "peak_rss_bytes", "bytes"))
    return [
        row.tool,
        row.scheme,
        f"{perplexity:.3f}" if perplexity is not None else "",
        ratio,
        *(_accuracy(found.get(task, {})) for task in ("lambada", "piqa")),
        f"{seconds / 60:.1f}" if seconds is not None else "",
        f"{peak / 2**30:.2f}" if peak is not None else "",
        f"{size / 1e6:.0f}" if size is not None else "",
        _floats(found.get("check", {})),
        _verdict(found.get("check", {})),
        "; ".join([*made.get("notes", []), *_failures(found)]),
    ]


def _accuracy(found: Found) -> str:
    figures = found.get("metrics", {}).get("acc")
    if figures is None:
        return ""
    error = figures["stderr"]
    return f"{figures['value']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _floats(check: Found) -> str:
    """Nodes that compute on floats, of all that compute."""
    counts = check.get("nodes")
    if counts:
        return f"{counts.get('float', 0)} of {sum(counts.values())}"
    alone = check.get("float_nodes")
    return "" if alone is None else f"{alone}"


def _verdict(check: Found) -> str:
    oracle, profile = check.get("oracle"), check.get("profile")
    judged = f"; {profile}" if profile else ""
    if oracle is not None:
        return f"{oracle['verdict']}, {oracle['float']} of {oracle['operations']} in float{judged}"
    return "; ".join(check.get("errors", [])) + judged


def _failures(found: Found) -> list[str]:
    """What went wrong, step by step, in the tools' own words."""
    return [
        f"{step}: {measured['message']} (exit {measured.get('exit')})"
        for step, measured in found.items()
        if isinstance(measured, dict) and "message" in measured
    ]


def _about(setting: Setting) -> list[str]:
    names = {name: Path(file).name for name, file in (("c", setting.calib), ("t", setting.text))}
    pins = "; ".join(f"{tool.name}: {', '.join(tool.pins)}" for tool in TOOLS.values())
    return [
        "# Tools side by side",
        "",
        f"Written by `python -m bench.peers`. Model {setting.model.name}; calibrated on the first "
        f"{setting.calib_windows} windows of {setting.seq_len} tokens of {names['c']}, the same "
        f"for all; perplexity of the first {setting.windows} windows of {names['t']}, no BOS; "
        f"LAMBADA and PIQA: accuracy on the first {setting.items} items. Evaluated by qnpu-eval on "
        "ONNX Runtime, node by node. Time and memory are those of the tool, from the float file to "
        "the quantized one, all its processes together, with whatever else the machine did; a "
        f"command is stopped after {setting.minutes:g} minutes. Float nodes and the last but one "
        f"column: qnpu-check for {_TARGET}, what Qualcomm's compiler says, then our profile.",
        "",
        f"Installed: {pins}.",
        "",
    ]


def main(
    model: Annotated[Path, typer.Option(help="Float ONNX file, its tokenizer beside it.")],
    calib: Annotated[str, typer.Option(help="Text to calibrate on.")],
    text: Annotated[str, typer.Option(help="Text to measure perplexity on.")],
    venvs: Annotated[Path, typer.Option(help="Folder of the tools' environments.")],
    work: Annotated[Path, typer.Option(help="Folder for tokens, models and logs.")],
    lambada: Annotated[Path | None, typer.Option(help="Its items, .jsonl.")] = None,
    piqa: Annotated[Path | None, typer.Option(help="Its items, .jsonl.")] = None,
    calib_windows: Annotated[int, typer.Option(help="To calibrate and learn on.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window, as the graph takes them.")] = 512,
    windows: Annotated[int, typer.Option(help="To measure perplexity on.")] = 8,
    items: Annotated[int, typer.Option(help="Of each task.")] = 200,
    limit_minutes: Annotated[float, typer.Option(help="For each command.")] = 120,
    only: Annotated[
        str, typer.Option(help="Measure the row of this name, else those whose name holds it.")
    ] = "",
    folder: Annotated[Path, typer.Option(help="For results.")] = RESULTS / "peers",
    out: Annotated[Path, typer.Option(help="Table to write.")] = _HERE / "peers.md",
) -> None:
    """Measure what is missing, then write the table of all that is there."""
    console = Console(soft_wrap=True)
    tasks = {"lambada": lambada, "piqa": piqa}
    setting = Setting(
        model=model,
        calib=calib,
        calib_windows=calib_windows,
        seq_len=seq_len,
        text=text,
        windows=windows,
        tasks={task: file for task, file in tasks.items() if file is not None},
        items=items,
        venvs=venvs.absolute(),
        work=work.absolute(),
        minutes=limit_minutes,
    )
    write_tokens(setting)
    bench = Bench(setting, TOOLS, folder)
    rows: list[tuple[Row, Found]] = []
    named = [row for row in ROWS if row.name == only] or [row for row in ROWS if only in row.name]
    for row in ROWS:
        if row in named:
            console.print(row.name)
            bench.measure(row)
        found = bench.load(row)
        if "make" in found:
            rows.append((row, found))
    out.write_text("\n".join([*_about(setting), *table(rows)]) + "\n", "utf-8")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
