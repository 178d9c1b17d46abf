"""The five commands as a user runs them: help, JSON, configuration, exit codes, equal files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from qnpu.compiler.cli import compile_app, export_app
from qnpu.compiler.cli_check import check_app
from qnpu.compiler.cli_eval import eval_app
from qnpu.compiler.cli_run import run_app
from qnpu.compiler.output import save_model
from qnpu.compiler.rules import all_rules
from qnpu.models.load import load_onnx
from qnpu.passes.lower_io import LowerIo
from tests.commands import BIN, Done, call, snapshot
from tests.test_bad_input import CALIBRATION, GOOD, graph, node, put

COMMANDS = ("qnpu-compile", "qnpu-export", "qnpu-eval", "qnpu-check", "qnpu-run")
OUTPUTS = {"model.qdq.onnx", "encodings.json", "bit_plan.json", "report.html", "report.json"}
TOKENS = "16"
TINY = ["tiny.onnx", "--seq-len", TOKENS, "--calib-windows", "2", "--eval-windows", "2", "--quiet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built-in tiny model, exported by the command, and its result in ``out``."""
    folder = tmp_path_factory.mktemp("home")
    options = ["--seq-len", TOKENS, "--out", "tiny.onnx", "--quiet", "--json"]
    exported = call("qnpu-export", "tiny", *options, folder=folder)
    assert exported.exit_code == 0, exported.stderr
    assert json.loads(exported.stdout)["out"] == "tiny.onnx"
    done = call("qnpu-compile", *TINY, "--out", "out", "--json", folder=folder)
    assert done.exit_code == 0, done.stderr
    (folder / "stdout.json").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def report(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return result


# -------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_in_reasonable_time(command: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    done = call(command, "--help", folder=tmp_path, COLUMNS="100")
    assert done.exit_code == 0
    assert time.perf_counter() - started < 30  # about 1 s, or many where much else runs
    assert done.stderr == ""
    assert "Examples" in done.stdout
    assert f"$ {command} " in done.stdout
    assert "--json" in done.stdout


def test_version() -> None:
    for app in (compile_app, export_app, eval_app, check_app, run_app):
        done = CliRunner().invoke(app, ["--version"])  # ahead of what must be given
        assert (done.exit_code, done.stdout) == (0, f"qnpu {metadata.version('qnpu')}\n")


def test_help_needs_no_torch() -> None:
    code = "import sys, qnpu.compiler.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_option_is_wrong_use(tmp_path: Path) -> None:
    done = call("qnpu-compile", "--frobnicate", folder=tmp_path)
    assert done.exit_code == 2
    assert "--frobnicate" in done.stderr
    assert done.stdout == ""


# ----------------------------------------------------------------------------------- qnpu-compile


def test_json_is_complete(home: Path) -> None:
    result = json.loads((home / "stdout.json").read_text())
    assert set(result["outputs"]) == OUTPUTS - {"report.json"}
    for name, entry in result["outputs"].items():
        assert entry["bytes"] == (home / "out" / name).stat().st_size
        assert entry["sha256"] == snapshot(home / "out")[name]
    assert set(result["perplexity"]) == {"float", "qdq"}
    assert result["perplexity"]["qdq"] / result["perplexity"]["float"] < 1.01
    assert result["seconds"]["total"] > result["seconds"]["compile"] > 0
    assert result["peak_rss_bytes"] > 2**26
    assert "2 x 16 tokens" in result["calibration"]
    assert "help topics, evaluation" in result["evaluation"]
    assert result["source_error"] < 1e-5
    assert result["lowest_sqnr_db"]


def test_peak_memory_is_not_that_of_the_process_before() -> None:
    """Linux' getrusage counts that of whoever started it, which here is large."""
    ours = bytearray(2**29)
    script = "from qnpu.compiler.console import peak_rss_bytes; print(peak_rss_bytes())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 2**24 < int(done.stdout) < len(ours)


def test_the_report_tells_how_it_was_made(home: Path) -> None:
    result = report(home / "out")
    assert result["config"]["seq_len"] == 16
    assert result["config"]["scheme"] == "w8a16"
    assert result["input"]["sha256"] == snapshot(home)["tiny.onnx"]
    assert {"qnpu", "numpy", "onnx", "onnxruntime"} <= set(result["versions"])
    assert set(snapshot(home / "out")) == OUTPUTS


def test_quiet_prints_the_result_alone(home: Path, tmp_path: Path) -> None:
    done = call("qnpu-compile", *_in(home), "--out", tmp_path / "out", folder=home)
    assert done.exit_code == 0
    assert "%" not in done.stderr
    assert "perplexity, qdq" in done.stdout
    cells = [line.strip("│\n").split("│")[-1].strip() for line in done.stdout.splitlines()]
    assert str(tmp_path / "out" / "model.qdq.onnx") in "".join(cells)


def test_progress_goes_to_standard_error(home: Path, tmp_path: Path) -> None:
    options = [option for option in TINY if option != "--quiet"]
    out = tmp_path / "out"
    done = call("qnpu-compile", *options, "--out", out, "--json", folder=home)
    assert "calibrate" in done.stderr
    assert set(json.loads(done.stdout)["outputs"]) == OUTPUTS - {"report.json"}


def test_options_win_over_the_configuration(home: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'scheme = "w4a16"\nseq_len = 16\ncalib_windows = 3\neval_windows = 0\nmask_value = -40\n'
    )
    options = ["--config", str(tmp_path / "c.toml"), "--calib-windows", "1", "--quiet", "--json"]
    options.append("--no-rotate-caches")
    done = call("qnpu-compile", "tiny.onnx", *options, "--out", tmp_path / "out", folder=home)
    assert done.exit_code == 0, done.stderr
    config = report(tmp_path / "out")["config"]
    assert (config["scheme"], config["calib_windows"], config["mask_value"]) == ("w4a16", 1, -40)
    assert (config["rotate"], config["rotate_caches"]) == (True, False)
    assert json.loads(done.stdout)["perplexity"] == {}


@pytest.mark.parametrize(("limit", "exit_code"), [("0.5", 1), ("1.5", 0)])
def test_a_perplexity_beyond_the_limit_fails_but_is_written(
    home: Path, tmp_path: Path, limit: str, exit_code: int
) -> None:
    out = tmp_path / "out"
    options = ["--max-ratio", limit, "--target", "qnn-htp-v75", "--out", str(out), "--json"]
    done = call("qnpu-compile", *_in(home), *options, folder=home)
    assert done.exit_code == exit_code, done.stderr
    assert set(json.loads(done.stdout)["outputs"]) == set(snapshot(out)) - {"report.json"}
    assert done.codes == ["QN404"] * exit_code
    found = [item["code"] for item in report(out)["diagnostics"] if item["severity"] == "error"]
    assert found == ["QN404"] * exit_code
    page = (out / "report.html").read_text("utf-8")
    assert ("No check failed." in page) == (exit_code == 0)
    assert sum(report(out)["verdicts"]["after"].values()) > 50


@pytest.mark.parametrize("options", [["-1"], ["nan"], ["1.5", "--eval-windows", "0"]])
def test_limits_that_mean_nothing(home: Path, tmp_path: Path, options: list[str]) -> None:
    given = [*_in(home), "--out", str(tmp_path / "out"), "--max-ratio", *options]
    done = call("qnpu-compile", *given, folder=home)
    assert (done.exit_code, done.codes) == (1, ["QN503"])


def test_the_same_command_writes_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """From another folder, with another hash seed, other environment and a file already there."""
    for name in ("tiny.onnx", "tiny.onnx.data", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / name, tmp_path)
    for seed in ("1", "2"):  # the second time over its own result
        done = call(
            "qnpu-compile",
            *TINY,
            "--out",
            "out",
            "--json",
            folder=tmp_path,
            PYTHONHASHSEED=seed,
            LC_ALL="C",
            TZ="Asia/Tokyo",
        )
        assert done.exit_code == 0, done.stderr
        assert snapshot(tmp_path / "out") == snapshot(home / "out")


def test_an_edited_result_is_not_replaced(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "out", tmp_path / "out")
    (tmp_path / "out" / "encodings.json").write_text("{}")
    done = call("qnpu-compile", *_in(home), "--out", tmp_path / "out", folder=home)
    assert done.codes == ["QN902"]
    assert (tmp_path / "out" / "encodings.json").read_text() == "{}"


def _in(home: Path) -> list[str]:
    return [str(home / TINY[0]), *TINY[1:]]


# ------------------------------------------------------------------------------------ qnpu-export


def test_export_replaces_a_file_only_by_force(home: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_text("mine")
    command = ["qnpu-export", "tiny", "--seq-len", TOKENS, "--out", "tiny.onnx", "--quiet"]
    refused = call(*command, folder=tmp_path)
    assert (refused.exit_code, refused.codes) == (1, ["QN902"])
    assert snapshot(tmp_path).keys() == {"tiny.onnx"}
    assert (tmp_path / "tiny.onnx").read_text() == "mine"
    forced = call(*command, "--force", folder=tmp_path, PYTHONHASHSEED="3")
    assert forced.exit_code == 0, forced.stderr
    assert "wrote tiny.onnx" in forced.stdout
    made, first = snapshot(tmp_path), snapshot(home)
    assert {"tiny.onnx", "tiny.onnx.data", "tokenizer.json"} <= made.keys()
    assert made == {name: first[name] for name in made}  # and the same bytes as elsewhere


def test_further_files_and_the_page_about_all(tmp_path: Path) -> None:
    GOOD(tmp_path)
    CALIBRATION(tmp_path)
    (tmp_path / "c.toml").write_text('emit = ["float"]\n')
    command = ["qnpu-compile", "model.onnx", "--calib", "data.npz", "--scheme", "w8a8", "--json"]
    vendor = [*command, "--target", "qnn-htp-v75", "--config", "c.toml"]
    done = call(*vendor, "--emit", "encodings-2.0.0,float", "--out", "out", folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    more = {"model.2.0.0.encodings", "model.float.onnx", "HANDOFF.md"}
    assert set(snapshot(tmp_path / "out")) == OUTPUTS | more
    assert set(json.loads(done.stdout)["outputs"]) == (OUTPUTS | more) - {"report.json"}
    assert "model.2.0.0.encodings" in (tmp_path / "out" / "HANDOFF.md").read_text("utf-8")
    done = call(*vendor, "--out", "by-config", folder=tmp_path)
    assert set(snapshot(tmp_path / "by-config")) == OUTPUTS | {"model.float.onnx", "HANDOFF.md"}
    assert report(tmp_path / "by-config")["config"]["emit"] == ["float"]


def test_a_page_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    GOOD(tmp_path)
    CALIBRATION(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "HANDOFF.md").write_text("mine")
    command = ["qnpu-compile", "model.onnx", "--calib", "data.npz", "--scheme", "w8a8"]
    assert call(*command, "--out", "out", "--quiet", folder=tmp_path).exit_code == 0
    vendor = call(*command, "--out", "out", "--target", "qnn-htp-v75", folder=tmp_path)
    assert vendor.codes == ["QN902"]
    assert (tmp_path / "out" / "HANDOFF.md").read_text() == "mine"


@pytest.mark.parametrize("emit", ["pdf", "float,", "epcontext"])
def test_a_file_that_cannot_be_made_is_known_at_once(emit: str, tmp_path: Path) -> None:
    done = call("qnpu-compile", "no-such-model.onnx", "--emit", emit, folder=tmp_path)
    assert done.codes == ["QN503"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("online", ["r2", "r3,", "R4"])
def test_an_online_rotation_that_does_not_exist(online: str, tmp_path: Path) -> None:
    done = call("qnpu-compile", "no-such-model.onnx", "--online", online, folder=tmp_path)
    assert done.codes == ["QN503"]


def test_no_online_rotation_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('online = ["r5"]', "utf-8")
    arguments = ["qnpu-compile", "no-such-model.onnx", "--config", "c.toml"]
    assert call(*arguments, folder=tmp_path).codes == ["QN503"]
    assert call(*arguments, "--online", "", folder=tmp_path).codes == ["QN102"]


def test_integers_in_and_out(tmp_path: Path) -> None:
    GOOD(tmp_path)
    CALIBRATION(tmp_path)
    (tmp_path / "c.toml").write_text("integer_io = true\n")
    command = ["qnpu-compile", "model.onnx", "--calib", "data.npz", "--config", "c.toml", "--json"]
    for options, dtype in ([], "UINT16"), (["--real-io"], "FLOAT"):
        done = call(*command, *options, "--out", dtype, folder=tmp_path)
        assert done.exit_code == 0, done.stderr
        graph = load_onnx(tmp_path / dtype / "model.qdq.onnx").graph
        assert {str(value.dtype) for value in (*graph.inputs, *graph.outputs)} == {dtype}
        assert ("lower-io" in report(tmp_path / dtype)["rewrites"]) == (dtype != "FLOAT")


# -------------------------------------------------------------------------------------- qnpu-eval


def test_all_modes_agree_on_a_float_file(home: Path) -> None:
    """A float graph has no Q/DQ to fuse: only the order of sums differs, 1e-4 of perplexity."""
    values = []
    for mode in ("reference", "optimized", "stock"):
        options = ["--window", TOKENS, "--windows", "2", "--mode", mode, "--quiet", "--json"]
        done = call("qnpu-eval", "tiny.onnx", *options, folder=home)
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["mode"] == mode
        assert result["tokens"] == 30
        assert len(result["nll"]) == 2
        assert result["perplexity"] == pytest.approx(np.exp(np.mean(result["nll"])), rel=1e-6)
        values.append(result["perplexity"])
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


def test_eval_repeats_what_compile_measured(home: Path) -> None:
    options = ["--window", TOKENS, "--windows", "2", "--tokenizer", "tiny", "--json", "--quiet"]
    done = call("qnpu-eval", "out/model.qdq.onnx", *options, folder=home)
    assert done.exit_code == 0, done.stderr
    measured = json.loads(done.stdout)["perplexity"]
    compiled = json.loads((home / "stdout.json").read_text())["perplexity"]["qdq"]
    assert measured == pytest.approx(compiled, rel=1e-6)


def test_eval_turns_codes_back(home: Path, tmp_path: Path) -> None:
    model = load_onnx(home / "out" / "model.qdq.onnx")
    assert LowerIo()(model).modified
    save_model(model, tmp_path / "integer.onnx")
    options = ["--window", TOKENS, "--windows", "2", "--tokenizer", "tiny", "--json", "--quiet"]
    done = call("qnpu-eval", "integer.onnx", *options, folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    measured = json.loads(done.stdout)["perplexity"]
    compiled = json.loads((home / "stdout.json").read_text())["perplexity"]["qdq"]
    assert measured == pytest.approx(compiled, rel=1e-6)


# ------------------------------------------------------------------------------------- qnpu-check


def test_check_passes_both_forms(home: Path) -> None:
    for path, kind in (("tiny.onnx", "float"), ("out/model.qdq.onnx", "QDQ")):
        done = call("qnpu-check", path, "--json", folder=home)
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["kind"], result["diagnostics"]) == (kind, [])
        assert result["nodes"] > 10


def test_check_lists_all_faults_and_exits_with_1(tmp_path: Path) -> None:
    put(graph(node("Frobnicate", "x", out="a"), node("Relu", "a"), x=["rows", 4]))(tmp_path)
    done = call("qnpu-check", "model.onnx", "--json", folder=tmp_path)
    assert done.exit_code == 1
    assert done.codes == ["QN101", "QN106"]
    found = json.loads(done.stdout)["diagnostics"]
    assert [item["code"] for item in found] == ["QN101", "QN106"]
    assert {"code", "name", "severity", "message", "help", "location"} <= found[0].keys()


def test_check_as_sarif(tmp_path: Path) -> None:
    put(graph(node("Frobnicate", "x", out="a"), node("Relu", "a"), x=["rows", 4]))(tmp_path)
    done = call("qnpu-check", "model.onnx", "--format", "sarif", folder=tmp_path)
    assert (done.exit_code, done.codes) == (1, ["QN101", "QN106"])
    log = json.loads(done.stdout)
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == ["QN101", "QN106"]


def test_check_as_sarif_of_no_model(tmp_path: Path) -> None:
    """For a code host that waits for the log."""
    done = call("qnpu-check", "absent.onnx", "--ignore", "QN1", "--format=sarif", folder=tmp_path)
    assert (done.exit_code, done.codes) == (1, ["QN102"])
    (result,) = json.loads(done.stdout)["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("QN102", "error")


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        (["--select", "QN3,qn101", "--select", "QN106", "--ignore", "QN101"], ["QN106"]),
        (["--ignore", "QN1"], []),
    ],
)
def test_check_of_chosen_codes(options: list[str], codes: list[str], tmp_path: Path) -> None:
    put(graph(node("Frobnicate", "x", out="a"), node("Relu", "a"), x=["rows", 4]))(tmp_path)
    done = call("qnpu-check", "model.onnx", *options, "--json", folder=tmp_path)
    assert done.codes == codes
    assert [item["code"] for item in json.loads(done.stdout)["diagnostics"]] == codes
    assert done.exit_code == int(bool(codes))


@pytest.mark.parametrize(
    "options",
    [["--format", "xml"], ["--select", "QN1,QN7"], ["--ignore", "QN1,"]],
)
def test_check_of_unknown_codes_or_formats_is_wrong_use(options: list[str], tmp_path: Path) -> None:
    GOOD(tmp_path)
    done = call("qnpu-check", "model.onnx", *options, folder=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert options[0] in done.stderr


def test_check_without_arguments_is_wrong_use(tmp_path: Path) -> None:
    for arguments in ([], ["--explain", "QN000"]):
        done = call("qnpu-check", *arguments, folder=tmp_path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr


@pytest.mark.parametrize("code", ["QN101", "qn902", all_rules()[-1].code])
def test_explain(code: str, tmp_path: Path) -> None:
    done = call("qnpu-check", "--explain", code, folder=tmp_path)
    assert done.exit_code == 0
    assert done.stdout.startswith(code.upper())
    for section in ("What it checks", "Why it matters", "Example", "How to fix"):
        assert section in done.stdout


# ------------------------------------------------------------------------------------ the terminal


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    done = _shell(f"{BIN / 'qnpu-check'} --explain QN101 | head -c 5", tmp_path)
    assert (done.exit_code, done.stdout) == (0, "QN101")
    assert done.stderr == ""


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    GOOD(tmp_path)
    CALIBRATION(tmp_path)
    command = ["qnpu-compile", "model.onnx", "--calib", "data.npz", "--scheme", "w8a8"]
    done = call(*command, folder=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.exit_code == 0, done.stderr
    assert "w8a8" in done.stdout


def _shell(line: str, folder: Path) -> Done:
    done = subprocess.run(
        ["sh", "-c", line], check=False, cwd=folder, capture_output=True, text=True
    )
    return Done(done.returncode, done.stdout, done.stderr)
