"""Two processes that learn together give what one gives with the same batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.commands import BIN, call

WORK = ("--scheme", "w4a8", "--learn", "end-to-end", "--seq-len", "16", "--quiet")
SIZES = ("--calib-windows", "4", "--learn-windows", "12", "--learn-steps", "8")
TWO = ("torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint")
PLACE = "localhost:0"


@pytest.fixture(scope="module")
def alone(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process gives with batches of two."""
    folder = tmp_path_factory.mktemp("alone")
    options = (tiny_file, *WORK, *SIZES, "--learn-batch", "2", "--out", "out")
    done = call("qnpu-compile", *options, folder=folder)
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "encodings.json").read_text())["tensors"]
    return found


def codes(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.qdq.onnx")
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize("more", [(), ("--learn-sharded",)], ids=["replicated", "sharded"])
def test_two_processes_learn_what_one_does(
    alone: Path, tiny_file: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Sums in another order differ by rounding: scales to 1e-4, and at most 1 code in 1,000."""
    command: tuple[str | Path, ...] = (
        *TWO,
        PLACE,
        BIN / "qnpu-compile",
        tiny_file,
        *WORK,
        *SIZES,
        "--learn-batch",
        "2",
        *more,
    )
    done = call(*command, "--out", "out", folder=tmp_path, OMP_NUM_THREADS="1")
    assert done.exit_code == 0, done.stderr
    expected, found = tensors(alone), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.allclose(expected[name]["scale"], found[name]["scale"], rtol=1e-4), name
    one, two = codes(alone), codes(tmp_path / "out")
    different = sum(int((one[n] != two[n]).sum()) for n in one if one[n].dtype.itemsize == 1)
    assert different <= 1e-3 * sum(one[n].size for n in one if one[n].dtype.itemsize == 1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in alone.iterdir()
    )


def test_processes_share_end_to_end_learning_alone(tiny_file: Path, tmp_path: Path) -> None:
    for learn, batch in (("blockwise", "2"), ("end-to-end", "3")):
        options = ("--learn", learn, "--learn-batch", batch, "--out", "out")
        done = call("qnpu-compile", tiny_file, *options, folder=tmp_path, WORLD_SIZE="2", RANK="0")
        assert done.codes == ["QN503"]
    assert not (tmp_path / "out").exists()
