"""bench/peers.py without the tools: scripts that really run, fail, dawdle and write."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import psutil
import pytest
from onnx import numpy_helper

from bench.peer_tools import common
from bench.peers import (
    FLOAT,
    Bench,
    Row,
    Setting,
    Tool,
    float_nodes,
    run_limited,
    table,
    write_tokens,
)
from qnpu.models.token_data import load_arrays
from tests.commands import BIN

_COPY = """
import json, shutil, sys
from pathlib import Path
model, tokens, out, *options = sys.argv[1:]
out = Path(out)
out.mkdir(parents=True)
for file in Path(model).parent.glob("model.onnx*"):
    shutil.copy(file, out)
(out / "notes.json").write_text(json.dumps(["copied", *options]))
"""
_FAIL = 'print("step 1")\nraise RuntimeError("no kernel for Foo")\n'
_TEXT = "Peers are measured side by side. " * 60


def setting_of(tiny_file: Path, folder: Path) -> Setting:
    text = folder / "text.txt"
    text.write_text(_TEXT, "utf-8")
    return Setting(
        model=tiny_file,
        calib=str(text),
        calib_windows=3,
        seq_len=16,
        text=str(text),
        windows=1,
        tasks={},
        items=1,
        venvs=folder / "venvs",
        work=folder / "work",
        minutes=1,
    )


def tool_of(folder: Path, name: str, code: str) -> Tool:
    """A tool whose environment is there already: this Python."""
    script = folder / f"{name}.py"
    script.write_text(code, "utf-8")
    python = folder / "venvs" / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return Tool(name, script, ())


def runs(pid: int) -> bool:
    """Not ended, nor waiting for its end to be noticed."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def bench(tiny_file: Path, tmp_path: Path) -> Bench:
    tools = [tool_of(tmp_path, "copy", _COPY), tool_of(tmp_path, "fail", _FAIL)]
    setting = setting_of(tiny_file, tmp_path)
    write_tokens(setting)
    return Bench(setting, {tool.name: tool for tool in tools}, tmp_path / "results")


def test_tokens_are_the_first_windows_of_the_text(tiny_file: Path, tmp_path: Path) -> None:
    setting = setting_of(tiny_file, tmp_path)
    write_tokens(setting)
    first = load_arrays(setting.tokens)["input_ids"]
    assert first.shape == (3, 16)
    write_tokens(replace(setting, calib_windows=2))
    np.testing.assert_array_equal(load_arrays(setting.tokens)["input_ids"], first[:2])


def test_a_row_is_measured_once_and_is_evaluated_as_the_float_model_is(
    bench: Bench, tmp_path: Path
) -> None:
    row = Row("copy", "W8A8", ("--weights", "8"))
    plain, found = bench.measure(FLOAT), bench.measure(row)
    assert found["perplexity"]["perplexity"] == plain["perplexity"]["perplexity"]
    assert found["make"]["notes"] == ["copied", "--weights", "8"]
    assert found["make"]["bytes"] == plain["make"]["bytes"] > 100_000
    assert found["make"]["peak_rss_bytes"] > 0
    assert found["check"]["kind"] == "float"
    assert found["check"]["float_nodes"] > 50
    files = sorted((tmp_path / "results").iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    assert bench.measure(row) == found
    assert [file.stat().st_mtime_ns for file in files] == before
    lines = table([(FLOAT, plain), (row, found)])
    assert len({line.count("|") for line in lines}) == 1
    assert "| copy | W8A8 |" in lines[3]
    assert "| 1.0000 |" in lines[3]


def test_an_interrupted_row_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    row = Row("copy", "W8A8")
    whole = bench.measure(row)
    (file,) = (tmp_path / "results").iterdir()
    kept = {key: value for key, value in whole.items() if key != "perplexity"}
    kept["make"]["notes"] = ["made before"]
    file.write_text(json.dumps(kept), "utf-8")
    again = bench.measure(row)
    assert again["make"]["notes"] == ["made before"]
    assert again["perplexity"]["perplexity"] == whole["perplexity"]["perplexity"]
    file.write_text(json.dumps(kept), "utf-8")
    for model in (tmp_path / "work").rglob("model.onnx"):
        model.unlink()
    assert bench.measure(row)["make"]["notes"] == ["copied"]  # made anew, to go on with


def test_a_build_that_was_killed_is_not_waited_for(tiny_file: Path, tmp_path: Path) -> None:
    setting = setting_of(tiny_file, tmp_path)
    code = (
        _COPY
        + """
import os
(out / "notes.json").write_text(json.dumps(os.listdir(os.environ["TORCH_EXTENSIONS_DIR"] + "/op")))
"""
    )
    tool = tool_of(tmp_path, "builds", code)
    built = setting.venvs / "builds" / "torch_extensions" / "op"
    built.mkdir(parents=True)
    for name in ("lock", "op.so"):
        (built / name).touch()
    write_tokens(setting)
    found = Bench(setting, {"builds": tool}, tmp_path / "results").measure(Row("builds", "W8A8"))
    assert found["make"]["notes"] == ["op.so"]


def test_other_texts_are_other_rows(bench: Bench, tiny_file: Path, tmp_path: Path) -> None:
    row = Row("fail", "W8A8")
    bench.measure(row)
    more = replace(setting_of(tiny_file, tmp_path), calib_windows=4)
    other = Bench(more, {}, tmp_path / "results")
    assert "make" in bench.load(row)
    assert "make" not in other.load(row)


def test_a_tool_that_fails_has_its_last_words_in_the_table(bench: Bench) -> None:
    row = Row("fail", "W8A8")
    found = bench.measure(row)
    assert found["make"]["exit"] == 1
    assert found["make"]["message"] == "RuntimeError: no kernel for Foo"
    assert "perplexity" not in found
    assert "make: RuntimeError: no kernel for Foo (exit 1)" in table([(row, found)])[2]


def test_a_tool_that_writes_nothing_has_failed(
    bench: Bench, tiny_file: Path, tmp_path: Path
) -> None:
    tools = {"idle": tool_of(tmp_path, "idle", "pass\n")}
    idle = Bench(setting_of(tiny_file, tmp_path), tools, tmp_path / "results")
    assert "wrote no model.onnx" in idle.measure(Row("idle", "W8A8"))["make"]["message"]


def test_a_tool_that_cannot_be_installed_has_failed(tiny_file: Path, tmp_path: Path) -> None:
    tool = Tool("gone", tmp_path / "gone.py", ("./no-such-folder",))
    bench = Bench(setting_of(tiny_file, tmp_path), {"gone": tool}, tmp_path / "results")
    found = bench.measure(Row("gone", "W8A8"))
    assert "no-such-folder" in found["make"]["message"]
    assert not (tmp_path / "venvs" / "gone").exists()


def test_time_is_limited_for_all_processes_of_a_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    ended = run_limited([sys.executable, "-c", code], tmp_path / "a.log", minutes=6 / 60)
    assert ended.exit_code is None
    assert ended.message == "stopped after 0.1 minutes"
    assert 6 <= ended.seconds < 40
    time.sleep(0.2)
    assert not runs(int(pid.read_text()))


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    hold = "import time; block = bytearray(b'1' * 80_000_000); time.sleep(2)"
    code = (
        "import subprocess, sys\n"
        f"children = [subprocess.Popen([sys.executable, '-c', {hold!r}]) for _ in range(2)]\n"
        "[child.wait() for child in children]\n"
    )
    ended = run_limited([sys.executable, "-c", code], tmp_path / "a.log", minutes=1)
    assert ended.exit_code == 0
    assert ended.message == ""
    assert ended.peak_rss_bytes > 150_000_000


def test_of_our_own_commands_the_error_is_told_not_the_help(tmp_path: Path) -> None:
    ended = run_limited([BIN / "qnpu-eval", tmp_path / "no.onnx"], tmp_path / "a.log", minutes=1)
    assert ended.exit_code == 1
    assert ended.message.startswith("error[QN")


def test_signals_are_named(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    ended = run_limited([sys.executable, "-c", code], tmp_path / "a.log", minutes=1)
    assert ended.message == "killed by signal 9"


def test_a_table_shows_what_the_compiler_and_the_profile_say() -> None:
    check = {
        "nodes": {"int": 90, "float": 6, "reject": 4},
        "profile": "reject",
        "oracle": {"verdict": "int", "float": 2, "operations": 80, "inserted": 0},
    }
    tasks = {"lambada": {"metrics": {"acc": {"value": 0.25, "stderr": 0.031}}}}
    made = {"seconds": 90.0, "peak_rss_bytes": 2**30, "bytes": 5_000_000, "notes": ["a|b"]}
    found = {"make": made, "check": check, "perplexity": {"perplexity": 12.0}, **tasks}
    line = table([(FLOAT, {"perplexity": {"perplexity": 10.0}}), (Row("x", "W8A8"), found)])[3]
    cells = "12.000 | 1.2000 | 0.250 ± 0.031 |  | 1.5 | 1.00 | 5 | 6 of 100"
    assert f"| x | W8A8 | {cells} | int, 2 of 80 in float; reject | a\\|b |" == line


def test_nodes_that_compute_floats_are_counted(tmp_path: Path) -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[2] ids) => (float[2] y) <float s = {0.5}, uint8 z = {3}, float[4] t = {1, 2, 3, 4}> {
        a = Gather(t, ids)
        q = QuantizeLinear(a, s, z)
        d = DequantizeLinear(q, s, z)
        twice = Add(ids, ids)
        y = Relu(d)
    }"""
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "g.onnx")
    assert float_nodes(tmp_path / "g.onnx") == 2


def test_peers_get_a_mask_without_infinities(tmp_path: Path) -> None:
    graph = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[3] x) => (float[3] y) <float[3] mask = {0, -3.4e38, -5}, float[1] w = {-9000}> {
        low = Constant<value = float[1] {-3.0e38}>()
        a = Add(x, mask)
        b = Max(a, low)
        y = Add(b, w)
    }"""
    path = tmp_path / "g.onnx"
    onnx.save(onnx.parser.parse_model(graph), path)
    model = common.float_model(path)
    found = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    np.testing.assert_array_equal(found["mask"], np.array([0, -50, -5], np.float32))
    np.testing.assert_array_equal(found["w"], np.array([-9000], np.float32))
    np.testing.assert_array_equal(
        numpy_helper.to_array(model.graph.node[0].attribute[0].t), np.array([-50], np.float32)
    )
    common.save(model, tmp_path / "out" / "model.onnx")
    common.save(model, tmp_path / "out" / "model.onnx")
    assert onnx.load(tmp_path / "out" / "model.onnx").graph == model.graph


def test_windows_come_one_by_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", input_ids=np.arange(6).reshape(3, 2), position_ids=np.ones((3, 2)))
    feeds = common.feeds(tmp_path / "t.npz")
    assert len(feeds) == 3
    np.testing.assert_array_equal(feeds[1]["input_ids"], [[2, 3]])
    assert feeds[2]["position_ids"].shape == (1, 2)
