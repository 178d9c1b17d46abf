"""A compile that learns is killed, and goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest

from tests.commands import call, finish, start

SIZES = ("--seq-len", "16", "--calib-windows", "4", "--learn-windows", "8", "--learn-steps", "100")
LEARN = ("--scheme", "w4a8", "--learn", "blockwise", "--quiet", *SIZES, "--out", "out")
PATIENCE_S = 120.0
REPORTED = ("learning", "diagnostics", "perplexity", "tensors")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for(path: Path) -> None:
    last = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < last, f"{path} was not written"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing was killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert call("qnpu-compile", tiny_file, *LEARN, folder=folder).exit_code == 0
    return folder / "out"


def test_what_was_learned_so_far_is_gone_once_it_is_written(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "model.qdq.onnx",
        "bit_plan.json",
        "encodings.json",
        "report.html",
        "report.json",
    }


def test_killed_between_two_blocks_it_goes_on_to_the_same_file(
    whole: Path, tiny_file: Path, tmp_path: Path
) -> None:
    process = start("qnpu-compile", tiny_file, *LEARN, folder=tmp_path)
    first = tmp_path / "out" / ".qnpu-learning" / "part-0001.npz"
    wait_for(first)
    process.send_signal(signal.SIGKILL)
    assert finish(process).exit_code == -signal.SIGKILL
    assert not (tmp_path / "out" / "model.qdq.onnx").exists()
    assert first.exists()
    before = first.stat().st_mtime_ns
    process = start("qnpu-compile", tiny_file, *LEARN, "--resume", folder=tmp_path)
    wait_for(first.with_name("part-0002.npz"))
    assert first.stat().st_mtime_ns == before  # it was read, not learned again
    assert finish(process).exit_code == 0
    for name in ("model.qdq.onnx", "encodings.json"):
        assert digest(tmp_path / "out" / name) == digest(whole / name)
    assert not first.exists()
    one, two = (json.loads((f / "report.json").read_text()) for f in (whole, tmp_path / "out"))
    assert one["learning"]
    assert [two[key] for key in REPORTED] == [one[key] for key in REPORTED]


def test_resume_without_a_record_starts_anew(whole: Path, tiny_file: Path, tmp_path: Path) -> None:
    done = call("qnpu-compile", tiny_file, *LEARN, "--resume", folder=tmp_path)
    assert done.exit_code == 0
    assert digest(tmp_path / "out" / "model.qdq.onnx") == digest(whole / "model.qdq.onnx")


def test_killed_end_to_end_it_goes_on_to_the_same_file(tiny_file: Path, tmp_path: Path) -> None:
    options = (*LEARN, "--learn", "end-to-end", "--learn-steps", "64", "--out")
    command = ("qnpu-compile", tiny_file, *options)
    assert call(*command, "whole", folder=tmp_path).exit_code == 0
    process = start(*command, "out", folder=tmp_path)
    wait_for(tmp_path / "out" / ".qnpu-learning" / "part-0000.npz")
    process.send_signal(signal.SIGKILL)
    assert finish(process).exit_code == -signal.SIGKILL
    assert not (tmp_path / "out" / "model.qdq.onnx").exists()
    assert call(*command, "out", "--resume", folder=tmp_path).exit_code == 0
    for name in ("model.qdq.onnx", "encodings.json"):
        assert digest(tmp_path / "out" / name) == digest(tmp_path / "whole" / name)
    one, two = (json.loads((tmp_path / f / "report.json").read_text()) for f in ("whole", "out"))
    assert one["learning"]
    assert [two[key] for key in REPORTED] == [one[key] for key in REPORTED]
