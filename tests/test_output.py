"""Files: complete or not at all, and nothing of the user's is replaced."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qnpu.compiler import move_files, output
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.output import (
    REPORT_NAME,
    check_folder,
    check_overwrite,
    hash_file,
    save_model,
    write_json,
    write_outputs,
)
from qnpu.runtime_check.session import open_session, run
from tests.conftest import normal, parse


def text(content: str) -> output.Writer:
    def write(path: Path) -> None:
        path.write_text(content, "utf-8")

    return write


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def codes(folder: Path, **writers: output.Writer) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        write_outputs(folder, writers, {})
    return caught.value.codes


def test_files_and_their_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    report: dict[str, Any] = {"format": "test"}
    write_outputs(folder, {"a": text("one"), "b": text("two")}, report)
    assert set(contents(folder)) == {"a", "b", REPORT_NAME}
    assert json.loads((folder / REPORT_NAME).read_text()) == report
    assert report["outputs"]["a"] == {"bytes": 3, "sha256": hash_file(folder / "a")}
    assert hash_file(folder / "a").startswith("7692c3ad3540bb80")  # sha256 of "one"


def test_a_writer_may_leave_a_second_file(tmp_path: Path) -> None:
    def both(path: Path) -> None:
        path.write_text("graph")
        path.with_name(f"{path.name}.data").write_text("weights")

    report: dict[str, Any] = {}
    write_outputs(tmp_path, {"m": both}, report)
    assert set(contents(tmp_path)) == {"m", "m.data", REPORT_NAME}
    assert set(report["outputs"]) == {"m", "m.data"}


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


@pytest.mark.parametrize("failure", [Interrupted(), ValueError("x")])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_writer_that_fails_leaves_the_folder_as_it_was(
    failure: BaseException, earlier: bool, tmp_path: Path
) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise failure

    folder = tmp_path / "new" / "out"
    if earlier:
        write_outputs(folder, {"a": text("old"), "b": text("old")}, {})
        (folder / "mine.txt").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(type(failure)):
        write_outputs(folder, {"a": text("new"), "b": fails}, {})
    assert contents(tmp_path) == before
    assert (tmp_path / "new").exists() == earlier


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_what_the_system_refuses(number: int, tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        raise OSError(number, "refused", str(path))

    assert codes(tmp_path / "out", a=fails) == ["QN901"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert codes(tmp_path / "out", a=text("x")) == ["QN901"]
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_while_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(output, "_flush", refuse)
    assert codes(tmp_path / "out", a=text("x")) == ["QN901"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    before = contents(tmp_path)
    assert codes(tmp_path, a=text("x"), b=text("y")) == ["QN902"]
    assert contents(tmp_path) == before


def test_a_report_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / REPORT_NAME).write_text('{"tool": "another"}')
    assert codes(tmp_path, a=text("x")) == ["QN902"]


def test_a_dangling_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    assert codes(tmp_path, a=text("x")) == ["QN902"]


def test_an_unforeseen_second_file_is_not_replaced(tmp_path: Path) -> None:
    """Which files a writer leaves is known only after it has run."""

    def both(path: Path) -> None:
        path.write_text("graph")
        path.with_name("a.data").write_text("weights")

    (tmp_path / "a.data").write_text("mine")
    assert codes(tmp_path, a=both) == ["QN902"]
    assert contents(tmp_path) == {"a.data": b"mine"}


def test_unchanged_output_of_before_is_replaced(tmp_path: Path) -> None:
    write_outputs(tmp_path, {"a": text("old")}, {})
    write_outputs(tmp_path, {"a": text("new")}, {})
    assert (tmp_path / "a").read_text() == "new"
    check_overwrite(tmp_path, ["a", REPORT_NAME])


def test_changed_output_of_before_is_not_replaced(tmp_path: Path) -> None:
    write_outputs(tmp_path, {"a": text("old"), "b": text("old")}, {})
    (tmp_path / "b").write_text("edited")
    before = contents(tmp_path)
    assert codes(tmp_path, a=text("new"), b=text("new")) == ["QN902"]
    assert contents(tmp_path) == before


def test_a_folder_in_place_of_output_is_not_replaced(tmp_path: Path) -> None:
    write_outputs(tmp_path, {"a": text("old")}, {})
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    assert codes(tmp_path, a=text("new")) == ["QN902"]


def test_every_file_in_the_way_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(DiagnosticError) as caught:
        check_overwrite(tmp_path, ["a", "b", "c"])
    assert caught.value.codes == ["QN902", "QN902"]


def test_json_is_the_same_each_time(tmp_path: Path) -> None:
    value = {"b": 1, "a": [0.1, "é"]}
    for name in ("one", "two"):
        write_json(value, tmp_path / name)
    first = (tmp_path / "one").read_bytes()
    assert first == (tmp_path / "two").read_bytes()
    assert first.endswith(b"\n")
    assert json.loads(first) == value
    assert "é" in first.decode()


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_json_is_valid_where_a_number_is_not_finite(number: float, tmp_path: Path) -> None:
    """JSON has no Infinity; a tensor without error has an infinite SQNR."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    write_json({"tensors": [{"sqnr_db": number}]}, tmp_path / "x")
    plain = json.loads((tmp_path / "x").read_text(), parse_constant=refuse)
    assert plain == {"tensors": [{"sqnr_db": None}]}


MODEL = """
    g (float[1, 8] x) => (float[1, 8] y) <float[8, 8] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6,
    7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6,
    7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul(x, w) }
"""


@pytest.mark.parametrize("limit", [255, 256])
def test_weights_go_outside_from_the_limit_on(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_PROTOBUF_LIMIT", limit)
    model = parse(MODEL)
    report: dict[str, Any] = {}
    write_outputs(tmp_path, {"m.onnx": lambda path: save_model(model, path)}, report)
    outside = limit < 256
    assert (tmp_path / "m.onnx.data").exists() == outside
    assert ("m.onnx.data" in report["outputs"]) == outside
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    x = normal(1, 8)
    expected = x @ (np.arange(64, dtype=np.float32).reshape(8, 8) % 8 + 1)
    np.testing.assert_allclose(
        run(open_session(tmp_path / "m.onnx"), None, {"x": x})[0], expected, rtol=1e-6
    )
    np.testing.assert_allclose(run(open_session(model), None, {"x": x})[0], expected, rtol=1e-6)


def test_weights_read_from_elsewhere_are_stored_inside(tmp_path: Path) -> None:
    import onnx_ir as ir  # noqa: PLC0415

    source = tmp_path / "source"
    source.mkdir()
    ir.save(parse(MODEL), source / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    save_model(ir.load(source / "m.onnx"), tmp_path / "m.onnx")
    for path in source.iterdir():
        path.unlink()
    assert run(open_session(tmp_path / "m.onnx"), None, {"x": normal(1, 8)})[0].shape == (1, 8)


MOVER = f"""
import os, runpy, signal, time
real, done = os.replace, 0
def replace(*paths):
    global done
    {{}}
    done += 1
    real(*paths)
os.replace = replace
runpy.run_path({move_files.__file__!r}, run_name="__main__")
"""


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_moves_that_were_cut_off_are_brought_to_an_end(
    moves: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed between two renames: the next compile finds a whole result, not a mixture."""
    write_outputs(tmp_path, {"a": text("old"), "b": text("old")}, {"n": 1})
    other = tmp_path_factory.mktemp("other")
    write_outputs(other, {"a": text("new"), "b": text("new")}, {"n": 2})
    _cut_off(tmp_path, moves, tmp_path_factory)
    assert any(name.startswith(".qnpu-ready-") for name in contents(tmp_path)) == (moves < 3)
    check_overwrite(tmp_path, ["a", "b", REPORT_NAME])
    assert contents(tmp_path) == contents(other)
    write_outputs(tmp_path, {"a": text("newer"), "b": text("newer")}, {})
    assert (tmp_path / "b").read_text() == "newer"


def test_moves_that_were_cut_off_replace_nothing_of_the_users(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_outputs(tmp_path, {"a": text("old"), "b": text("old")}, {})
    _cut_off(tmp_path, 1, tmp_path_factory)
    (tmp_path / "b").write_text("edited")
    before = contents(tmp_path)
    with pytest.raises(DiagnosticError) as caught:
        check_overwrite(tmp_path, ["a", "b"])
    assert caught.value.codes == ["QN902"]
    assert contents(tmp_path) == before


def _cut_off(folder: Path, moves: int, made: pytest.TempPathFactory) -> None:
    """Writes new results; the process that moves them is killed after so many."""
    script = made.mktemp("mover") / "killed.py"
    end = f"if done == {moves}: os.kill(os.getpid(), signal.SIGKILL)"
    script.write_text(MOVER.format(end))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move_files, "__file__", str(script))
        if moves < 3:
            with pytest.raises(DiagnosticError, match=r"ended with -9; the next compile moves"):
                write_outputs(folder, {"a": text("new"), "b": text("new")}, {"n": 2})
        else:
            write_outputs(folder, {"a": text("new"), "b": text("new")}, {"n": 2})


def test_a_compile_killed_while_files_move_leaves_the_new_ones(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its whole group is killed, as a shell would; whoever writes next waits for the moves."""
    old, new = "old", "new"
    write_outputs(tmp_path, {name: text(old) for name in "abcd"}, {"n": 1})
    scripts = tmp_path_factory.mktemp("mover")
    (scripts / "slow.py").write_text(MOVER.format("time.sleep(0.2)"))
    compile_ = f"""
from pathlib import Path
from qnpu.compiler import move_files, output
move_files.__file__ = {str(scripts / "slow.py")!r}
writers = {{name: lambda path: path.write_text({new!r}) for name in "abcd"}}
output.write_outputs(Path({str(tmp_path)!r}), writers, {{"n": 2}})
"""
    process = subprocess.Popen([sys.executable, "-c", compile_], start_new_session=True)
    while process.poll() is None and (tmp_path / "a").read_text() == old:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "d").read_text() == old
    with output.locked(tmp_path):
        assert {(tmp_path / name).read_text() for name in "abcd"} == {new}
        assert set(contents(tmp_path)) == {*"abcd", REPORT_NAME}


def test_moves_that_the_system_refuses(tmp_path: Path) -> None:
    """A folder has come where a file is to go, since it was looked at."""
    write_outputs(tmp_path, {"a": text("old")}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_check_overwrite", lambda folder, names: None)
        (tmp_path / "b").mkdir()
        with pytest.raises(DiagnosticError, match="Is a directory") as caught:
            write_outputs(tmp_path, {"b": text("new")}, {})
    assert caught.value.codes == ["QN901"]


@pytest.mark.parametrize("target", ["gone", "out"])
def test_a_folder_that_is_a_link_to_nowhere(target: str, tmp_path: Path) -> None:
    """Found before the work; ``out`` links to itself."""
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(DiagnosticError) as caught:
        check_folder(tmp_path / "out")
    assert caught.value.codes == ["QN901"]


def test_a_link_to_what_an_earlier_compile_wrote_is_replaced_not_its_target(
    tmp_path: Path,
) -> None:
    write_outputs(tmp_path / "out", {"a": text("old")}, {})
    (tmp_path / "out" / "a").rename(tmp_path / "kept")
    (tmp_path / "out" / "a").symlink_to(tmp_path / "kept")
    write_outputs(tmp_path / "out", {"a": text("new")}, {})
    assert (tmp_path / "kept").read_text() == "old"
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert not (tmp_path / "out" / "a").is_symlink()
