"""qnpu-eval: a graph and a text → perplexity; or a task's questions → accuracy → print."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.caches import CACHED_INPUTS, past_length
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.console import (
    DebugOption,
    JsonOption,
    QuietOption,
    VersionOption,
    application,
    command,
    peak_rss_bytes,
    print_json,
    progress_bars,
)
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.inputs import text_windows
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.pass_base import Compilation, ProgressCallback
from qnpu.compiler.pipeline import LOGITS
from qnpu.compiler.rules import InvalidConfig, NoCalibrationData
from qnpu.models.load import load_onnx, load_tokenizer, resolve
from qnpu.models.tokenizer import Tokenizer
from qnpu.passes.freeze_shapes import FreezeShapes
from qnpu.runtime_check.decoded_constants import decode_constants
from qnpu.runtime_check.perplexity import measure_perplexity
from qnpu.runtime_check.session import Mode, open_session
from qnpu.runtime_check.zero_shot import (
    Metric,
    Scored,
    Task,
    TokenGraph,
    item_windows,
    metrics_of,
    read_items,
    score_items,
    static_length,
    token_inputs,
)

_DEFAULTS = CompileConfig()
_WINDOWS = 40
_TASK = (
    "Answer a zero-shot task instead, as lm-evaluation-harness 0.4 does without examples. "
    "Each answer is a run of the graph: one of a static length costs the same whatever it reads."
)
_TASK_DATA = (
    "The task's items, .jsonl, with the fields of the harness's data set or those of "
    "llm-foundry's files."
)


@command
def _evaluate(
    model: Annotated[
        str, typer.Argument(help="An .onnx file: float, QDQ or integer.", show_default=False)
    ],
    text: Annotated[
        str | None, typer.Option(help="UTF-8 text or data set. Default: built-in text.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help=f"Windows, from the start; 0: all. Default: {_WINDOWS}.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window; with --task, what a graph of dynamic length takes at most, "
            f"where longer texts lose their beginning. Default: {_DEFAULTS.seq_len}."
        ),
    ] = None,
    bos: Annotated[str, typer.Option(help="BOS token: auto, none, stream, window.")] = "auto",
    task: Annotated[Task | None, typer.Option(help=_TASK, show_default=False)] = None,
    task_data: Annotated[Path | None, typer.Option(help=_TASK_DATA, show_default=False)] = None,
    items: Annotated[
        int | None, typer.Option(help="Items of the task, from the start. Default: all.", min=1)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, tokenizer.json or id. Default: beside the model.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help=f"ONNX Runtime: {', '.join(m.value for m in Mode)}.")
    ] = Mode.REFERENCE.value,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    version: VersionOption = False,
) -> None:
    """Measure perplexity: exp(mean NLL of all but the first token of each window).

    With --task, how many of a task's questions the model answers right.
    """
    del debug, version  # for the decorator, and for what comes before
    started = time.perf_counter()
    settings = CompileConfig(seq_len=window or _DEFAULTS.seq_len, bos=bos)
    if mode not in [m.value for m in Mode]:
        raise DiagnosticError(InvalidConfig("--mode", f"`{mode}` is not a mode").at())
    of_texts: dict[str, object] = {"--text": text, "--windows": windows}
    of_tasks: dict[str, object] = {"--task-data": task_data, "--items": items}
    _refuse_idle_options(task, of_texts, of_tasks, bos)
    source = _Source(Path(model), tokenizer, Mode(mode))
    with progress_bars(shown=not quiet) as progress:
        if task is not None and task_data is not None:
            found = _zero_shot(source, task, task_data, items, window, settings, progress)
        else:
            count = _WINDOWS if windows is None else windows
            found = _perplexity(source, text or "", count, settings, progress)
    summary = {
        "model": model,
        **found,
        "mode": mode,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if json:
        print_json(summary)
    elif task is not None:
        _print_task(summary)
    else:
        _print_perplexity(summary)


def _refuse_idle_options(
    task: Task | None, of_texts: dict[str, object], of_tasks: dict[str, object], bos: str
) -> None:
    """Options that would have no effect are faults, found before the work."""
    data = of_tasks["--task-data"]
    if (task is None) != (data is None):
        option, needed = ("--task-data", "--task") if task is None else ("--task", "--task-data")
        raise DiagnosticError(InvalidConfig(option, f"has no effect without {needed}").at())
    idle, reason = (of_tasks, "without --task") if task is None else (of_texts, "with --task")
    for option, value in idle.items():
        if value is not None:
            raise DiagnosticError(InvalidConfig(option, f"has no effect {reason}").at())
    if task is not None and bos == "stream":
        raise DiagnosticError(InvalidConfig("--bos", "a task is no stream of text").at())


@dataclass(frozen=True, slots=True)
class _Source:
    """What to evaluate, and how to run it.

    Attributes:
        path: of the model.
        tokenizer: as the user gave it; None: beside the model.
        mode: of ONNX Runtime.
    """

    path: Path
    tokenizer: str | None
    mode: Mode

    def words(self) -> Tokenizer | None:
        return load_tokenizer(self.tokenizer or resolve(str(self.path)))

    def open(self, model: ir.Model, *, changed: bool) -> ort.InferenceSession:
        """A session of a model that was loaded from the file; it is changed.

        Args:
            model: see above.
            changed: whether the file holds something else.
        """
        if self.mode is Mode.REFERENCE and decode_constants(model):
            return open_session(model, self.mode, pack=False)
        return open_session(model if changed else self.path, self.mode)


def _perplexity(
    source: _Source, text: str, windows: int, settings: CompileConfig, progress: ProgressCallback
) -> dict[str, Any]:
    loaded = load_onnx(source.path)
    model = with_real_io(loaded)
    kept = CACHED_INPUTS if past_length(model.graph.inputs) else ()
    freeze = FreezeShapes(sequence_length=settings.seq_len, keep_inputs=kept)
    frozen = freeze.run(Compilation(model))
    data, description = text_windows(
        text, "evaluation", source.words(), settings.seq_len, windows or None, settings.bos
    )
    feeds = data.feeds(model.graph.inputs)
    session = source.open(model, changed=bool(frozen) or model is not loaded)
    del model, loaded
    measured = measure_perplexity(session, feeds, logits_name=LOGITS, progress=progress)
    return {
        "perplexity": measured.value,
        "data": description,
        "tokens": measured.tokens,
        "nll": list(measured.nll),
    }


def _print_perplexity(summary: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    console.print(f"perplexity {summary['perplexity']:.4f}  ({summary['tokens']} tokens predicted)")
    console.print(_about(summary))


def _zero_shot(
    source: _Source,
    task: Task,
    data: Path,
    count: int | None,
    window: int | None,
    settings: CompileConfig,
    progress: ProgressCallback,
) -> dict[str, Any]:
    loaded = load_onnx(source.path)
    model = with_real_io(loaded)
    words = source.words()
    if words is None:
        raise DiagnosticError(NoCalibrationData("no tokenizer was found with the model").at())
    items = read_items(data, task, count)
    bos = settings.bos == "window" or (settings.bos == "auto" and words.adds_bos)
    if bos and words.bos_token_id is None:
        raise DiagnosticError(InvalidConfig("--bos", "the tokenizer has no BOS token").at())
    inputs = token_inputs(model.graph.inputs)
    static = static_length(inputs)
    if window is not None and static not in (None, window):
        raise DiagnosticError(InvalidConfig("--window", f"the graph takes {static} tokens").at())
    longest = static or settings.seq_len
    windows = item_windows(items, words, longest, bos=bos, file=str(data))
    session = source.open(model, changed=model is not loaded)
    del model, loaded
    graph = TokenGraph(session, inputs, LOGITS)
    scored = score_items(graph, items, windows, progress=progress)
    cut = sum(entry.cut for entry in scored)
    place = "window" if bos else "none"
    return {
        "task": task.value,
        "metrics": {metric.name: _figures(metric) for metric in metrics_of(task, scored)},
        "data": f"{data}; {len(items)} items, {cut} cut to {longest} tokens, BOS {place}",
        "items": len(items),
        "cut": cut,
        "answers": [_answer(entry) for entry in scored],
    }


def _figures(metric: Metric) -> dict[str, float | None]:
    return {"value": metric.value, "stderr": metric.stderr}


def _answer(entry: Scored) -> dict[str, object]:
    return {
        "line": entry.item.line,
        "gold": entry.item.gold,
        "log_likelihoods": list(entry.log_likelihoods),
        "greedy": list(entry.greedy),
    }


def _print_task(summary: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    table = Table(title=f"{summary['model']}: {summary['task']}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, figures in summary["metrics"].items():
        error = figures["stderr"]
        shown = "of one item none" if error is None else f"{error:.4f}"
        table.add_row(name, f"{figures['value']:.4f}", shown)
    console.print(table)
    console.print(_about(summary))


def _about(summary: dict[str, Any]) -> str:
    return f"data: {summary['data']}; session: {summary['mode']}; {summary['seconds']:.0f} s"


eval_app = application(
    _evaluate,
    """
qnpu-eval out/model.qdq.onnx --tokenizer smollm2-135m --windows 8
qnpu-eval model.onnx --text wiki.test.raw --window 512 --windows 40 --bos none
qnpu-eval out/model.int.onnx --tokenizer smollm2-135m --task piqa --task-data piqa.jsonl --items 100
""",
)
