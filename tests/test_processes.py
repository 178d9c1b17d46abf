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


def test_two_processes_find_the_plan_that_one_does(tiny_file: Path, tmp_path: Path) -> None:
    """Each measures some of the tensors; sums are of the same numbers, and the plan is the same."""
    scheme = ("--scheme", "auto", "--budget", "ppl=1.5", "--target", "qnn-htp-v75")
    learn = ("--learn", "end-to-end", "--learn-batch", "2", "--learn-steps", "1")
    few = ("--seq-len", "16", "--calib-windows", "4", "--learn-windows", "12", "--quiet")
    work = (BIN / "qnpu-compile", tiny_file, *scheme, *learn, *few)
    one = call(*work, "--losses", "one", "--out", "alone", folder=tmp_path, OMP_NUM_THREADS="1")
    assert one.exit_code == 0, one.stderr
    together = (*TWO, PLACE, *work, "--losses", "two", "--out", "together")
    two = call(*together, folder=tmp_path, OMP_NUM_THREADS="1")
    assert two.exit_code == 0, two.stderr
    measured = [losses(tmp_path / folder) for folder in ("one", "two")]
    assert measured[0].keys() == measured[1].keys()
    singles = [key for key in measured[0] if key.startswith("kl ")]
    assert len(singles) > 10
    for key in singles:
        assert len(measured[0][key]) == len(measured[1][key]) == 1  # none twice
        assert measured[0][key] == pytest.approx(measured[1][key], rel=1e-4)
    plans = [(tmp_path / folder / "bit_plan.json").read_bytes() for folder in ("alone", "together")]
    assert plans[0] == plans[1]


def losses(folder: Path) -> dict[str, list[float]]:
    """What was measured, by key, as often as it was."""
    found: dict[str, list[float]] = {}
    (file,) = folder.iterdir()
    for line in file.read_text().splitlines():
        key, number = json.loads(line)
        found.setdefault(key, []).append(number)
    return found


def test_processes_learn_on_processors(tiny_file: Path, tmp_path: Path) -> None:
    options = ("--learn", "end-to-end", "--learn-batch", "2", "--learn-device", "auto")
    work = (tiny_file, *options, "--out", "out")
    done = call("qnpu-compile", *work, folder=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.codes == ["QN503"] and "learn_device" in done.stderr


def test_processes_share_end_to_end_learning_alone(tiny_file: Path, tmp_path: Path) -> None:
    for learn, batch in (("blockwise", "2"), ("end-to-end", "3")):
        options = ("--learn", learn, "--learn-batch", batch, "--out", "out")
        done = call("qnpu-compile", tiny_file, *options, folder=tmp_path, WORLD_SIZE="2", RANK="0")
        assert done.codes == ["QN503"]
    assert not (tmp_path / "out").exists()
