"""qnpu-check: options → model → faults of the graph, on the target, by the oracle → print."""

from __future__ import annotations

import enum
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from rich.console import Console
from rich.table import Table

from qnpu.compiler.console import (
    EXIT_FAULT,
    EXIT_USAGE,
    DebugOption,
    VersionOption,
    application,
    command,
    error_console,
    print_diagnostics,
    print_json,
)
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, Severity, selected
from qnpu.compiler.layer_summary import verdicts_by_layer
from qnpu.compiler.model_check import ModelCheck, check_model
from qnpu.compiler.rules import (
    InvalidConfig,
    all_rules,
    manual_page,
)
from qnpu.compiler.sarif import sarif_log
from qnpu.compiler.target import DEFAULT_TARGET, TargetProfile, Verdict, load_target, target_names
from qnpu.compiler.target_rules import OracleFailed
from qnpu.models.load import load_onnx
from qnpu.models.token_data import load_arrays
from qnpu.runtime_check.htp import HtpCompiler, HtpError, require_htp
from qnpu.runtime_check.oracle import (
    OracleAnswer,
    OutputDifference,
    ask_htp,
    random_feeds,
    run_on_htp,
)

_KINDS = {"qdq": "QDQ", "qlinear": "QLinear"}


class CheckFormat(enum.StrEnum):
    """What ``qnpu-check`` prints on standard output."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"


class Oracle(enum.StrEnum):
    """Compilers that can be asked."""

    HTP = "htp"


def _codes(value: list[str] | None) -> list[str]:
    """Beginnings of codes, from one option or several; each must be one of a rule's."""
    prefixes = [part.strip().upper() for item in value or [] for part in item.split(",")]
    for prefix in prefixes:
        if not prefix or not any(rule.code.startswith(prefix) for rule in all_rules()):
            raise typer.BadParameter(f"no rule's code begins with `{prefix}`")
    return prefixes


@command
def _check(
    model: Annotated[
        str | None, typer.Argument(help="An .onnx file, float or quantized.", show_default=False)
    ] = None,
    target: Annotated[
        str,
        typer.Option(help=f"Judge every node for an NPU: {', '.join(target_names())}."),
    ] = DEFAULT_TARGET,
    oracle: Annotated[
        Oracle | None, typer.Option(help="Ask the vendor's own compiler too.", show_default=False)
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Execute on the vendor's emulator, compare in LSB.")
    ] = False,
    feeds: Annotated[
        Path | None, typer.Option(help="Inputs for --run, .npz. Default: random, seed 0.")
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="CODE", help="Print the manual page of a rule and stop.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="Codes to report, or their beginnings: QN1,QN303.", callback=_codes),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Codes to leave out; the longer beginning wins.", callback=_codes),
    ] = None,
    output_format: Annotated[
        CheckFormat, typer.Option("--format", help="What to print on standard output.")
    ] = CheckFormat.TEXT,
    json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    debug: DebugOption = False,
    version: VersionOption = False,
) -> None:
    """Check an ONNX file. Exit code 0: no error; 1: errors, all listed; 2: wrong use."""
    if explain is not None:
        _explain(explain)
        return
    if model is None:
        error_console().print("name an .onnx file, or a rule with --explain")
        sys.exit(EXIT_USAGE)
    profile = load_target(target)
    _refuse_idle_options(profile, oracle, run, feeds)
    about: dict[str, object] = {"model": model, "target": target}
    check: ModelCheck | None = None
    answer: OracleAnswer | None = None
    differences: list[OutputDifference] = []
    faults: list[Diagnostic] = []
    try:
        loaded = load_onnx(Path(model))
        check = check_model(loaded, profile)
        about |= {"kind": _KINDS.get(check.form, check.form), "nodes": loaded.graph.num_nodes()}
        faults += check.diagnostics
        if oracle is not None:
            answer, differences, found = _ask(Path(model), loaded, profile, run, feeds)
            faults += found
        faults = selected(faults, select or [], ignore or [])
    except DiagnosticError as error:  # not to be ignored: the check did not get through
        faults += error.diagnostics
    print_diagnostics(faults, model)
    errors = sum(fault.severity is Severity.ERROR for fault in faults)
    match CheckFormat.JSON if json else output_format:
        case CheckFormat.JSON:
            about |= _as_json(check, answer, differences)
            print_json({**about, "diagnostics": [fault.to_json() for fault in faults]})
        case CheckFormat.SARIF:
            print_json(sarif_log(faults, model))
        case _ if check is not None:
            _print_tables(check, answer, differences)
            line = "{model}: {kind} graph, {nodes} nodes, {errors} errors"
            Console(soft_wrap=True).print(line.format(**about, errors=errors))
    if errors:
        sys.exit(EXIT_FAULT)


def _explain(code: str) -> None:
    page = manual_page(code)
    if page is None:
        error_console().print(f"no rule {code}")
        sys.exit(EXIT_USAGE)
    Console(soft_wrap=True, highlight=False, markup=False).print(page)


def _refuse_idle_options(
    profile: TargetProfile, oracle: Oracle | None, run: bool, feeds: Path | None
) -> None:
    """Options that would have no effect are faults, found before the work."""
    if (run and oracle is None) or (feeds is not None and not run):
        option, needed = ("--run", "--oracle") if run else ("--feeds", "--run")
        raise DiagnosticError(InvalidConfig(option, f"has no effect without {needed}").at())
    if oracle is not None and profile.vendor.oracle != oracle.value:
        reason = f"{profile.id} is not compiled by it; try --target qnn-htp-v75"
        raise DiagnosticError(InvalidConfig("--oracle", reason).at())
    if oracle is not None:
        require_htp()


def _ask(
    path: Path, model: ir.Model, profile: TargetProfile, run: bool, feeds: Path | None
) -> tuple[OracleAnswer, list[OutputDifference], list[Diagnostic]]:
    try:
        with HtpCompiler() as htp:
            answer = ask_htp(htp, path, profile)
            if not run or answer.graph.refusal:
                return answer, [], answer.faults
            arrays = load_arrays(feeds) if feeds else random_feeds(model.graph)
            differences, faults = run_on_htp(htp, model, profile, arrays)
            return answer, differences, [*answer.faults, *faults]
    except HtpError as error:
        raise DiagnosticError(OracleFailed(str(error)).at()) from error


def _as_json(
    check: ModelCheck | None, answer: OracleAnswer | None, differences: list[OutputDifference]
) -> dict[str, object]:
    """What the check says besides diagnostics."""
    result: dict[str, object] = {}
    if check is not None and check.report is not None:
        result["verdict"] = check.report.verdict.value
        result["layers"] = {
            layer: {verdict.value: count for verdict, count in counts.items()}
            for layer, counts in verdicts_by_layer(check.report).items()
        }
    if answer is not None:
        result["oracle"] = answer.to_json()
        result["emulator"] = [asdict(difference) for difference in differences]
    return result


def _print_tables(
    check: ModelCheck, answer: OracleAnswer | None, differences: list[OutputDifference]
) -> None:
    console = Console(soft_wrap=True)
    if check.report is not None:
        table = Table(title=f"nodes on {check.report.profile.id}", title_justify="left")
        shown = [v for v in Verdict if any(node.verdict is v for node in check.report.nodes)]
        table.add_column("layer")
        for verdict in shown:
            table.add_column(verdict.value, justify="right")
        for layer, counts in verdicts_by_layer(check.report).items():
            table.add_row(layer, *(str(counts[verdict] or "") for verdict in shown))
        console.print(table)
    if answer is not None:
        graph = answer.graph
        inserted = f", {len(graph.inserted)} conversions inserted" if graph.inserted else ""
        console.print(
            f"compiler for {graph.arch}: {graph.verdict.value}, "
            f"{len(graph.ops_within)} operations, "
            f"{len(graph.float_ops)} in float{inserted}, {graph.seconds:.1f} s"
        )
    for item in differences:
        console.print(
            f"emulator: {item.name} up to {item.largest} LSB from ONNX Runtime, "
            f"mean {item.mean:.3f}, {item.share:.1%} of elements differ"
        )


check_app = application(
    _check,
    """
qnpu-check out/model.qdq.onnx
qnpu-check out/model.qdq.onnx --target qnn-htp-v75
qnpu-check out/model.qdq.onnx --target qnn-htp-v75 --oracle htp --run
qnpu-check model.onnx --select QN1 --ignore QN101 --format sarif > qnpu.sarif
qnpu-check --explain QN101
""",
)
