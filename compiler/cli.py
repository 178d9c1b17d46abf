"""qnpu-compile, qnpu-export: options → config → model → work → print."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.bit_choices import read_plan
from qnpu.compiler.bit_plan import SCHEMES
from qnpu.compiler.bit_search import SEARCH_FILES, SENSITIVITIES
from qnpu.compiler.cached_decoder import (
    FILES,
    GRAPHS,
    CachedDecoder,
    compile_cached,
    tokenizer_writers,
    write_cached,
)
from qnpu.compiler.config import CompileConfig, read_config
from qnpu.compiler.console import (
    EXIT_FAULT,
    DebugOption,
    JsonOption,
    QuietOption,
    VersionOption,
    application,
    command,
    error_console,
    peak_rss_bytes,
    print_diagnostics,
    print_json,
    progress_bars,
)
from qnpu.compiler.diagnostics import DiagnosticError, Severity
from qnpu.compiler.emit import EMISSIONS, check_emissions, emission
from qnpu.compiler.graph_checks import is_quantized
from qnpu.compiler.graph_edit import static_shape
from qnpu.compiler.handoff import HANDOFF_NAME, handoff_writers
from qnpu.compiler.handout import make_handout
from qnpu.compiler.inputs import OpenedModel, calibration_data, export, open_model, text_windows
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_model import INTEGER_NAME, PARITY_NAME
from qnpu.compiler.output import PAGE_NAME, REPORT_NAME, check_folder, check_overwrite
from qnpu.compiler.pass_base import ProgressCallback
from qnpu.compiler.pipeline import (
    BIT_PLAN_NAME,
    ENCODINGS_NAME,
    LOGITS,
    MODEL_NAME,
    CheckResult,
    CompileResult,
    check_result,
    compile_model,
    find_topology,
    write_result,
)
from qnpu.compiler.process import process_count, process_index
from qnpu.compiler.quantized_model import legalize_model, write_legalized
from qnpu.compiler.recipes import read_recipe, recipe_names
from qnpu.compiler.rules import InvalidConfig, WouldOverwrite
from qnpu.compiler.target import TargetProfile, load_target, target_names
from qnpu.compiler.topology import describe
from qnpu.models.load import resolve
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.learning_record import LEARNING_FOLDER, LearningRecord
from qnpu.runtime_check.loss_record import LOSSES_FOLDER, LossRecord
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.oracle import random_feeds
from qnpu.runtime_check.session import Feeds, check_cpu

_MODEL = (
    "An .onnx or .gguf file, a Hugging Face id or folder, or a built-in name: "
    "smollm2-135m, gemma3-270m, tiny, tiny-llama, tiny-qwen2 …"
)

ModelArgument = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]

_DEFAULTS = CompileConfig()


# ---------------------------------------------------------------------------------- qnpu-compile


@command
def _compile(
    model: ModelArgument,
    scheme: Annotated[
        str | None,
        typer.Option(
            help=f"Bits: {', '.join(SCHEMES)}, or auto: chosen under a --budget. "
            f"Default: {_DEFAULTS.scheme}."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="For scheme auto: latency=80ms (modelled, of --workload), size=90MB (weights and "
            "caches), ppl=1.05 (times the float model's), or a,b for several."
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help="PROMPT/DECODE tokens that latency is modelled for. "
            f"Default: {_DEFAULTS.workload}."
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help=f"For scheme auto, how single tensors are measured: {', '.join(SENSITIVITIES)}. "
            f"Default: {_DEFAULTS.sensitivity}."
        ),
    ] = None,
    search_windows: Annotated[
        int | None,
        typer.Option(
            help=f"Windows to measure losses of tensors on. Default: {_DEFAULTS.search_windows}."
        ),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            help="Folder that keeps measured losses for other budgets. "
            f"Default: {LOSSES_FOLDER} in --out."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Options that belong together: {', '.join(recipe_names())}; others win. "
            "default: the best we measured, up to an hour; paper: Quant.npu as published."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help=f"NPU: {', '.join(target_names())}. Default: {_DEFAULTS.target}."),
    ] = None,
    emit: Annotated[
        str | None,
        typer.Option(help=f"Further files: {', '.join(e.name for e in EMISSIONS)}; a,b for two."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(
        "qnpu-out"
    ),
    calib: Annotated[
        str | None,
        typer.Option(help="Text file, Hugging Face data set, or .npz. Default: built-in text."),
    ] = None,
    calib_windows: Annotated[
        int | None, typer.Option(help=f"Windows of text. Default: {_DEFAULTS.calib_windows}.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help=f"Tokens per run. Default: {_DEFAULTS.seq_len}.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a cache and a run hold: write a prefill graph, of --seq-len tokens, "
            "and a decode graph, for qnpu-run. Default: no cache."
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="With --context, names of caches: those of the source, or ai-hub "
            f"(past_key_0_in, past_key_0_out). Default: {_DEFAULTS.names}."
        ),
    ] = None,
    range_method: Annotated[
        str | None,
        typer.Option(
            help=f"Activation ranges: {', '.join(m.value for m in RangeMethod)}. "
            f"Default: {_DEFAULTS.range_method}."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Rounding of weights: gptq (4 bits), seqmse (4 and 8 bits) or nearest. "
            "Default: gptq."
        ),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(
            help="Learn scales and 4-bit codes: none, blockwise or end-to-end. Default: none."
        ),
    ] = None,
    learn_windows: Annotated[
        int | None,
        typer.Option(
            help=f"Windows to round weights and learn on. Default: {_DEFAULTS.learn_windows}."
        ),
    ] = None,
    learn_steps: Annotated[
        int | None, typer.Option(help="Steps, per block (60) or end to end (160).")
    ] = None,
    learn_batch: Annotated[
        int | None, typer.Option(help=f"Windows per step. Default: {_DEFAULTS.learn_batch}.")
    ] = None,
    learn_weights: Annotated[
        str | None,
        typer.Option(
            help="Of weights learn codes, or scales and rotations (the paper's way, end to end). "
            f"Default: {_DEFAULTS.learn_weights}."
        ),
    ] = None,
    learn_tensors: Annotated[
        str | None,
        typer.Option(help="Learn inputs of rotated linears, or all. Default: rotated."),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="Part of the end-to-end loss that is KL to the float model, the rest is "
            f"cross-entropy. Default: {_DEFAULTS.distill}."
        ),
    ] = None,
    local_loss: Annotated[
        float | None,
        typer.Option(help="Part of end-to-end steps with a loss of each activation. Default: 0."),
    ] = None,
    learn_dtype: Annotated[
        str | None,
        typer.Option(
            help="End to end, compute in float32, bfloat16, or auto: the latter where it is fast."
        ),
    ] = None,
    learn_device: Annotated[
        str | None,
        typer.Option(
            help="End to end, on cpu, cuda, or auto: a GPU if there is one. Default: cpu."
        ),
    ] = None,
    learn_sharded: Annotated[
        bool | None,
        typer.Option(
            "--learn-sharded/--learn-replicated",
            help="Under torchrun, share what is learned out between processes (FSDP).",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="A bit_plan.json, perhaps edited: bits of each linear and cache."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a killed run had learned.")
    ] = False,
    down_bits: Annotated[
        int | None, typer.Option(help="Inputs of down projections: 8 or 16. Default: 16.")
    ] = None,
    gate_bits: Annotated[
        int | None,
        typer.Option(
            help="What activation functions give in front of down projections: 8 or 16. "
            "Default: 16."
        ),
    ] = None,
    query_bits: Annotated[
        int | None, typer.Option(help="Queries where scores are computed: 8 or 16. Default: 16.")
    ] = None,
    logits_bits: Annotated[
        int | None, typer.Option(help="Results of the last linear: 8 or 16. Default: 16.")
    ] = None,
    weight_block: Annotated[
        int | None,
        typer.Option(
            help="Input features that share a scale of 4-bit weights: 16, 32, 64 or 128 (LPBQ, for "
            "qnn-htp); with --budget a choice for each weight. Default: 0, one scale per output "
            "channel."
        ),
    ] = None,
    promote: Annotated[
        float | None,
        typer.Option(
            help="Share of down projections that keep 16 bits at --down-bits 8 or --gate-bits 8. "
            "Default: 0."
        ),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option("--rotate/--no-rotate", help="Fuse rotations into a decoder's weights."),
    ] = None,
    online: Annotated[
        str | None,
        typer.Option(help="Rotations to run online: r3 (queries, keys), r4 (down inputs), r3,r4."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Tokens in front of every text, as constants: none, auto, or ids a,b. "
            f"Default: {_DEFAULTS.prefix}."
        ),
    ] = None,
    rotate_caches: Annotated[
        bool | None,
        typer.Option(
            "--rotate-caches/--no-rotate-caches", help="Rotate values that a cache holds, too."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the rotations. Default: 0.")] = None,
    explain_topology: Annotated[
        bool, typer.Option("--explain-topology", help="Print the decoder as found, and stop.")
    ] = False,
    mask_value: Annotated[
        float | None,
        typer.Option(help="Attention mask constant. Default: the target's, such as -50."),
    ] = None,
    integer_io: Annotated[
        bool | None,
        typer.Option(
            "--integer-io/--real-io",
            help="Inputs and outputs are codes, or real numbers. Default: real.",
        ),
    ] = None,
    integer: Annotated[
        bool | None,
        typer.Option(
            "--integer/--no-integer",
            help="Write model.int.onnx as well: the same on integers alone. Default: no.",
        ),
    ] = None,
    cpu: Annotated[
        str | None,
        typer.Option(
            help="What integer graphs are right on: any, or vnni (x86 with VNNI or AMX, Arm), "
            "where they are faster, in part by ONNX Runtime's own operators. Default: any."
        ),
    ] = None,
    freeze_dim: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE or INPUT:AXIS=SIZE; may be repeated.")
    ] = None,
    keep_input: Annotated[
        list[str] | None, typer.Option(help="Input that must stay an input; may be repeated.")
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="A pass of your own, MODULE:CLASS[key=value, …] or the name of an entry point; "
            "may be repeated.",
        ),
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Text for perplexity. Default: built-in text, other part.")
    ] = None,
    eval_windows: Annotated[
        int | None,
        typer.Option(help=f"Windows to evaluate; 0: none. Default: {_DEFAULTS.eval_windows}."),
    ] = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(help="Exit 1 where perplexity is more than this many times float's."),
    ] = None,
    bos: Annotated[
        str | None, typer.Option(help="BOS token: auto, none, stream, window. Default: auto.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, tokenizer.json or id. Default: beside the model.")
    ] = None,
    exporter: Annotated[
        str | None, typer.Option(help="dynamo or optimum, for torch models. Default: dynamo.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these options as keys; options win.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    version: VersionOption = False,
) -> None:
    """Compile a float language model into a fully static QDQ file.

    Writes model.qdq.onnx, encodings.json, bit_plan.json, report.json, for a vendor's target
    HANDOFF.md, and what --emit asks for: all or none of them. With --context, a prefill and a
    decode graph in place of one, Q/DQ and on integers, that share weights.bin.

    A file with Q/DQ pairs keeps its encodings: --target alone decides what is rewritten.
    """
    started = time.perf_counter()
    options = {
        "scheme": scheme or (read_plan(Path(plan))[0] if plan else None),
        "budget": budget,
        "workload": workload,
        "sensitivity": sensitivity,
        "search_windows": search_windows,
        "losses": losses,
        "plan": plan,
        "target": target,
        "emit": tuple(emit.split(",") if emit else ()) if emit is not None else None,
        "calib": calib,
        "calib_windows": calib_windows,
        "seq_len": seq_len,
        "context": context,
        "names": names,
        "range_method": range_method,
        "weights": weights,
        "learn": learn,
        "learn_windows": learn_windows,
        "learn_steps": learn_steps,
        "learn_batch": learn_batch,
        "learn_weights": learn_weights,
        "learn_tensors": learn_tensors,
        "distill": distill,
        "local_loss": local_loss,
        "learn_dtype": learn_dtype,
        "learn_device": learn_device,
        "learn_sharded": learn_sharded,
        "down_bits": down_bits,
        "gate_bits": gate_bits,
        "query_bits": query_bits,
        "logits_bits": logits_bits,
        "weight_block": weight_block,
        "promote": promote,
        "rotate": rotate,
        "rotate_caches": rotate_caches,
        "online": tuple(online.split(",") if online else ()) if online is not None else None,
        "prefix": prefix,
        "seed": seed,
        "mask_value": mask_value,
        "integer_io": integer_io,
        "integer": integer,
        "cpu": cpu,
        "freeze_dims": _parse_dims(freeze_dim) if freeze_dim else None,
        "keep_inputs": tuple(keep_input) if keep_input else None,
        "passes": tuple(pass_) if pass_ else None,
        "eval_text": eval_text,
        "eval_windows": eval_windows,
        "max_ratio": max_ratio,
        "bos": bos,
        "tokenizer": tokenizer,
        "exporter": exporter,
    }
    from_file = read_recipe(recipe) if recipe else {}
    from_file |= read_config(config) if config else {}
    given = from_file | {k: v for k, v in options.items() if v is not None}
    settings = CompileConfig(**given)
    settings.check_processes(process_count())
    check_cpu(Cpu(settings.cpu))
    if explain_topology:
        _print_topology(model, settings, quiet)
        return
    profile = load_target(settings.target)
    check_emissions(settings.emit, profile)
    more = [emission(name).file for name in settings.emit] + [HANDOFF_NAME] * bool(profile.handoff)
    check_folder(out)
    more += [INTEGER_NAME, PARITY_NAME] * settings.integer
    charts = list(SEARCH_FILES) * bool(settings.budget)
    one = [MODEL_NAME, BIT_PLAN_NAME, ENCODINGS_NAME, *more]
    check_overwrite(out, [*(FILES if settings.context else one), *charts, PAGE_NAME, REPORT_NAME])
    times: dict[str, float] = {}

    with (
        progress_bars(shown=not quiet and process_index() == 0) as progress,
        open_model(model, settings, progress) as opened,
    ):
        _refuse_own_input(opened, out)
        if is_quantized(opened.model.graph):
            _refuse_idle_options(given, profile, model)
            summary = _legalize(opened, settings, profile, out, started)
            print_json(summary) if json else _print_legalized(opened.name, summary)
            return
        calibration, data = calibration_data(settings, opened.tokenizer)
        times["load"] = time.perf_counter() - started
        record = LearningRecord(out / LEARNING_FOLDER, resume)
        known = LossRecord(Path(settings.losses) if settings.losses else out / LOSSES_FOLDER)
        made = _work(opened, settings, calibration, progress, record, known)
        result = made.prefill if isinstance(made, CachedDecoder) else made
        times["compile"] = time.perf_counter() - started - times["load"]
        if process_index() > 0:
            return  # the first of several processes writes
        batch = calibration.feeds(result.float_model.graph.inputs)[0]
        evaluation, evaluated = _evaluation(settings, opened, result.float_model.graph)
        checks = check_result(result, batch, evaluation, progress, settings.max_ratio)
        times["check"] = time.perf_counter() - started - sum(times.values())
        about: dict[str, object] = {
            "command": ["qnpu-compile", *sys.argv[1:]],
            "config": settings.to_json(),
            "input": {"name": opened.name, "sha256": opened.sha256},
            "calibration": data,
            "evaluation": evaluated,
            "seed": settings.seed,
        }
        report = _write(out, made, checks, about, opened, settings)
        record.discard()
    times["total"] = time.perf_counter() - started
    print_diagnostics(result.diagnostics, model)
    summary = _summary(out, report, checks, times, result.seconds)
    if json:
        print_json(summary)
    else:
        _print_summary(opened.name, settings.scheme, summary)
    if any(item.severity is Severity.ERROR for item in result.diagnostics):
        sys.exit(EXIT_FAULT)  # the files are there, to be looked at


def _work(
    opened: OpenedModel,
    settings: CompileConfig,
    calibration: FeedSource,
    progress: ProgressCallback,
    record: LearningRecord,
    losses: LossRecord,
) -> CompileResult | CachedDecoder:
    compiled = compile_cached if settings.context else compile_model
    return compiled(opened.model, settings, calibration, progress, record, losses)


def _write(
    out: Path,
    made: CompileResult | CachedDecoder,
    checks: CheckResult,
    about: dict[str, object],
    opened: OpenedModel,
    settings: CompileConfig,
) -> dict[str, object]:
    if isinstance(made, CachedDecoder):
        return write_cached(out, made, checks, about, tokenizer_writers(opened.tokenizer))
    handout = make_handout(made.model)
    profile = load_target(settings.target)
    files = handoff_writers(handout, settings.emit, profile, settings.mask_constant)
    return write_result(out, made, handout, checks, about, files)


def _print_topology(model: str, settings: CompileConfig, quiet: bool) -> None:
    with (
        progress_bars(shown=not quiet) as progress,
        open_model(model, settings, progress) as opened,
    ):
        topology = find_topology(opened.model, settings)
    if topology is None:
        error_console().print(f"{model}: no decoder: no embedding feeds a norm or a linear")
        sys.exit(EXIT_FAULT)
    table = Table(title=f"{opened.name}: stream of {topology.stream.width}", title_justify="left")
    for heading in ("role", "node", "weight, or why not"):
        table.add_column(heading)
    for row in describe(topology):
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


def _parse_dims(items: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in items:
        name, _, size = item.rpartition("=")
        if not name or not size.isdecimal():
            raise DiagnosticError(InvalidConfig("--freeze-dim", f"`{item}` is not NAME=SIZE").at())
        sizes[name] = int(size)
    return sizes


def _refuse_own_input(opened: OpenedModel, out: Path) -> None:
    """A model compiled into its own place would lose its source."""
    for place in (out / name for name in (MODEL_NAME, *GRAPHS)):
        if place.exists() and place.resolve() == opened.file:
            raise DiagnosticError(WouldOverwrite(str(place)).at(file=str(place)))


def _evaluation(
    settings: CompileConfig, opened: OpenedModel, graph: ir.Graph
) -> tuple[list[Feeds], str]:
    """Feeds to measure perplexity on; none for a graph that does not turn token ids to logits."""
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    shape = static_shape(ids) if ids is not None else None
    predicts = any(value.name == LOGITS for value in graph.outputs)
    if not (settings.eval_windows and opened.tokenizer and predicts and shape):
        return [], ""
    windows, description = text_windows(
        settings.eval_text,
        "evaluation",
        opened.tokenizer,
        shape[-1],
        settings.eval_windows,
        settings.bos,
    )
    return windows.feeds(graph.inputs), description


# ---------------------------------------------------- qnpu-compile, of a file quantized already

_FOR_QUANTIZED = ("bos", "calib", "cpu", "emit", "freeze_dims", "integer", "integer_io",
                  "keep_inputs", "seq_len", "target", "tokenizer")  # fmt: skip


def _refuse_idle_options(given: dict[str, Any], target: TargetProfile, model: str) -> None:
    """Options that say how to quantize, and a target that asks for nothing, are faults."""
    idle = [key for key in given if key not in _FOR_QUANTIZED]
    if idle:
        reason = f"has no effect: {model} is quantized already"
        raise DiagnosticError([InvalidConfig(key, reason).at(file=model) for key in idle])
    asked = given.get("integer_io") or given.get("integer")
    if not (asked or any(rule.legalize for rule in target.rules)):
        reason = "is quantized already; --target, such as qnn-htp-v75, rewrites it for an NPU"
        raise DiagnosticError(InvalidConfig("MODEL", reason).at(file=model))


def _legalize(
    opened: OpenedModel, settings: CompileConfig, target: TargetProfile, out: Path, started: float
) -> dict[str, Any]:
    """Rewrites, compares, writes; returns what to print."""
    compared = settings.calib or "random numbers, seed 0"

    def feeds(graph: ir.Graph) -> Feeds:
        if settings.calib:
            return calibration_data(settings, opened.tokenizer)[0].feeds(graph.inputs)[0]
        return random_feeds(graph)

    result = legalize_model(opened.model, settings, feeds)
    handout = make_handout(result.model)
    about: dict[str, object] = {
        "command": ["qnpu-compile", *sys.argv[1:]],
        "config": {
            key: value for key, value in settings.to_json().items() if key in _FOR_QUANTIZED
        },
        "input": {"name": opened.name, "sha256": opened.sha256},
        "compared": compared,
    }
    more = handoff_writers(handout, settings.emit, target, mask_value=None)
    report = write_legalized(out, result, handout, about, more)
    print_diagnostics(result.diagnostics, str(opened.file))
    return {
        "out": str(out),
        "outputs": report["outputs"],
        "compared": compared,
        "legalized": dict(Counter(item.rewrite for item in result.legalized)),
        "verdicts": report["verdicts"],
        "changes": report["changes"],
        "parity": report["parity"],
        "seconds": {"total": round(time.perf_counter() - started, 2)},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _print_legalized(name: str, summary: dict[str, Any]) -> None:
    table = Table(title=f"{name} → legal", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for when, counts in summary["verdicts"].items():
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        table.add_row(f"nodes {when}", text or "not judged: the target has no rules")
    for rewrite, count in summary["legalized"].items():
        table.add_row("rewritten", f"{count} x {rewrite}")
    for change in summary["changes"]:
        lsb = "" if change["max_lsb"] is None else f", up to {change['max_lsb']} LSB"
        table.add_row("output changed", f"{change['name']}: {change['max_abs_error']:.3g}{lsb}")
    _add_parity(table, summary["parity"])
    table.add_row("compared on", summary["compared"])
    for file, entry in summary["outputs"].items():
        table.add_row("wrote", f"{Path(summary['out'], file)}  {entry['bytes'] / 1e6:.1f} MB")
    table.add_row("wrote", str(Path(summary["out"], REPORT_NAME)))
    table.add_row("time", f"{summary['seconds']['total']:.0f} s")
    table.add_row("peak RSS", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB")
    Console(soft_wrap=True).print(table)


def _summary(
    out: Path,
    report: dict[str, Any],
    checks: CheckResult,
    times: dict[str, float],
    passes: dict[str, float],
) -> dict[str, Any]:
    worst = sorted(checks.tensors, key=lambda tensor: tensor.sqnr_db)[:5]
    return {
        "out": str(out),
        "outputs": report["outputs"],
        "perplexity": {name: value.value for name, value in checks.perplexity.items()},
        "source_error": checks.source_error,
        "parity": report["parity"],
        "cost": report["cost"],
        "search": _brief(report["search"]),
        "evaluation": report["evaluation"],
        "calibration": report["calibration"],
        "lowest_sqnr_db": {tensor.name: round(tensor.sqnr_db, 2) for tensor in worst},
        "seconds": {name: round(value, 2) for name, value in times.items()},
        "passes": {name: round(value, 2) for name, value in passes.items()},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _print_summary(name: str, scheme: str, summary: dict[str, Any]) -> None:
    table = Table(title=f"{name} → {scheme}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # a path or name that is cut short is of no use
    for label, value in summary["perplexity"].items():
        table.add_row(f"perplexity, {label}", f"{value:.3f}")
    if {"float", "qdq"} <= set(summary["perplexity"]):
        ratio = summary["perplexity"]["qdq"] / summary["perplexity"]["float"]
        table.add_row("quantized / float", f"{ratio:.4f}")
        table.add_row("measured on", summary["evaluation"])
    _add_parity(table, summary["parity"])
    _add_cost(table, summary["cost"])
    _add_search(table, summary["search"])
    table.add_row("calibrated on", summary["calibration"])
    table.add_row("float graph against source", f"{summary['source_error']:.1e} of max |output|")
    for tensor, sqnr in list(summary["lowest_sqnr_db"].items())[:3]:
        table.add_row("lowest SQNR", f"{sqnr:.1f} dB  {tensor}")
    for file, entry in summary["outputs"].items():
        table.add_row("wrote", f"{Path(summary['out'], file)}  {entry['bytes'] / 1e6:.1f} MB")
    table.add_row("wrote", str(Path(summary["out"], REPORT_NAME)))
    seconds = summary["seconds"]
    steps = ", ".join(f"{step} {value:.0f} s" for step, value in seconds.items() if step != "total")
    table.add_row("time", f"{seconds['total']:.0f} s ({steps})")
    table.add_row("peak RSS", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB")
    Console(soft_wrap=True).print(table)


def _brief(search: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a search is printed: not each tensor."""
    return {k: v for k, v in search.items() if k != "tensors"} if search is not None else None


def _add_cost(table: Table, cost: dict[str, Any] | None) -> None:
    """Time and size on the target, where its profile has figures."""
    if cost is None:
        return
    parts = f"prefill {cost['prefill_s'] * 1e3:.4g}, decode {cost['decode_s'] * 1e3:.4g}"
    where = f"{cost['workload']} tokens on {cost['target']}"
    table.add_row("latency, modelled", f"{cost['seconds'] * 1e3:.4g} ms ({parts}), {where}")
    table.add_row("weights and caches", f"{cost['bytes'] / 1e6:.4g} MB")


def _add_search(table: Table, search: dict[str, Any] | None) -> None:
    """The plan that a search chose."""
    if search is None:
        return
    chosen, count = search["chosen"], len(search["trials"])
    loss = f"{chosen['expected']:.4g} expected, {chosen['measured']:.4g} measured"
    table.add_row("loss, nats per token", f"{loss}; {count} plan{'s'[: count > 1]} tried")
    table.add_row("from the best sum", f"{search['gap']:.2g} at most, proven")


def _add_parity(table: Table, kinds: list[dict[str, Any]]) -> None:
    """How far the integer graph is from the QDQ graph, by kind of operator."""
    for kind in kinds:
        off = f"{1 - kind['equal']:.1e} of codes off, {kind['max_lsb']} LSB at most"
        table.add_row(
            f"integer, {kind['kind']}",
            f"{kind['tensors']} tensors: {off if kind['max_lsb'] else 'all codes equal'}",
        )


# ----------------------------------------------------------------------------------- qnpu-export


@command
def _export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .onnx file to write.")] = Path(
        "model.onnx"
    ),
    seq_len: Annotated[int, typer.Option(help="Tokens per run (dynamo).")] = _DEFAULTS.seq_len,
    exporter: Annotated[
        str, typer.Option(help="dynamo: static prefill; optimum: dynamic axes and a KV cache.")
    ] = _DEFAULTS.exporter,
    cache: Annotated[
        bool, typer.Option("--cache", help="Dynamic axes and a KV cache from dynamo, too.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    version: VersionOption = False,
) -> None:
    """Export a torch model to float ONNX, with its tokenizer beside it."""
    started = time.perf_counter()
    settings = CompileConfig(seq_len=seq_len, exporter=exporter)
    if out.exists() and not force:
        raise DiagnosticError(WouldOverwrite(str(out)).at(file=str(out)))
    source = resolve(model)
    if source.kind == "onnx":
        raise DiagnosticError(InvalidConfig("MODEL", "is an ONNX file already").at(file=model))
    with progress_bars(shown=not quiet) as progress:
        export(source, out, settings, progress, cached=cache)
    seconds = round(time.perf_counter() - started, 2)
    peak = peak_rss_bytes()
    summary = {"out": str(out), "seconds": seconds, "peak_rss_bytes": peak}
    if json:
        print_json(summary)
    else:
        Console(soft_wrap=True).print(
            f"wrote {out} in {seconds:.0f} s, {peak / 2**30:.2f} GiB peak"
        )


# ---------------------------------------------------------------------------------- applications

compile_app = application(
    _compile,
    """
qnpu-compile smollm2-135m --scheme w8a16 --out out
qnpu-compile model.onnx --scheme w4a8 --calib my.txt --tokenizer my-model/
qnpu-compile cnn.onnx --scheme w8a8 --calib images.npz --freeze-dim N=1
qnpu-compile model.onnx --config compile.toml --json
qnpu-compile model.onnx --scheme auto --budget latency=250ms --target qnn-htp-v75
qnpu-compile model.onnx --target qnn-htp-v75 --emit encodings-1.0.0,float
qnpu-compile model.qdq.onnx --target qnn-htp-v75
qnpu-compile smollm2-135m --scheme w8a8 --seq-len 128 --context 512 --out chat
qnpu-compile model.onnx --pass "my_passes:Trim[share=0.1]"
qnpu-compile model.onnx --explain-topology
""",
)
export_app = application(
    _export,
    """
qnpu-export smollm2-135m --seq-len 512 --out smollm2.onnx
qnpu-export org/model --cache --out model.onnx
qnpu-export org/model --exporter optimum --out model.onnx
""",
)
