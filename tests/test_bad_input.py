"""What goes wrong for a user ends in a coded diagnostic, and leaves the user's files alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.commands import Done, call, finish, snapshot, start

Shape = list[int | str]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
OUTPUTS = ("model.qdq.onnx", "encodings.json", "bit_plan.json", "report.html", "report.json")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


# ------------------------------------------------------------------------------------- ingredients


def graph(
    *nodes: onnx.NodeProto,
    x: Shape | None = None,
    dtype: int = FLOAT,
    name: str = "x",
    result: str = "y",
    constants: dict[str, NDArray[Any]] | None = None,
    tensors: list[TensorProto] | None = None,
    output: int = FLOAT,
) -> bytes:
    """A model of ``name`` → ``result``; by default y = Relu(x · w) of shape [1, 4]."""
    arrays = {"w": WEIGHT} if constants is None else constants
    if not nodes:
        nodes = (
            helper.make_node("MatMul", [name, "w"], ["h"], name="project"),
            helper.make_node("Relu", ["h"], ["y"], name="activate"),
        )
    initializers = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
    proto = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, x or [1, 4])],
        [helper.make_tensor_value_info(result, output, None)],
        [*initializers, *(tensors or [])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def node(kind: str, *inputs: str, out: str = "y", domain: str = "") -> onnx.NodeProto:
    return helper.make_node(kind, [*inputs], [out], name=kind.lower(), domain=domain)


def external(**entries: str) -> bytes:
    """A model whose weight lies in another file."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return graph(constants={}, tensors=[tensor])


def token_model() -> bytes:
    """logits = table[input_ids], a text model without a tokenizer."""
    lookup = node("Gather", "table", "input_ids", out="logits")
    return graph(
        lookup,
        x=[1, "tokens"],
        dtype=INT64,
        name="input_ids",
        result="logits",
        constants={"table": np.ones((300, 4), np.float32)},
    )


def npz(folder: Path, **arrays: NDArray[Any]) -> None:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]


def put(content: bytes | str, name: str = "model.onnx") -> Callable[[Path], None]:
    """Writes one file; ``model.onnx`` unless named."""

    def build(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def all_of(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for step in steps:
            step(folder)

    return build


def link_outside(folder: Path) -> None:
    """data.bin → a file beside the folder."""
    (folder.parent / "secret.bin").write_bytes(WEIGHT.tobytes())
    (folder / "data.bin").symlink_to(folder.parent / "secret.bin")


def tokenizer(folder: Path) -> None:
    """Copies a tokenizer with byte tokens beside the model."""
    from qnpu.models.tokenizer import ByteTokenizer  # noqa: PLC0415

    ByteTokenizer().save(folder)


GOOD = put(graph())
CALIBRATION = partial(npz, x=np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4))
READY = all_of(GOOD, CALIBRATION)
TEXT_MODEL = all_of(put(token_model()), tokenizer)


# -------------------------------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Case:
    """A command that must fail.

    Attributes:
        name: of the test.
        code: of the one diagnostic expected.
        arguments: after the command; ``--out out --json --quiet`` is added for qnpu-compile.
        build: makes the input files.
        command: which.
        file_limit: largest file that can be written, bytes.
    """

    name: str
    code: str
    arguments: str = "model.onnx --calib data.npz"
    build: Callable[[Path], object] = READY
    command: str = "qnpu-compile"
    file_limit: int | None = None


def _with(content: bytes, **arrays: NDArray[Any]) -> Callable[[Path], None]:
    return all_of(put(content), (lambda folder: npz(folder, **arrays)) if arrays else CALIBRATION)


_NAN = WEIGHT.copy()
_NAN[1, 2] = np.nan
_INF = WEIGHT.copy()
_INF[3, 3] = -np.inf
_ROWS = np.ones((4, 4), np.float32)
_TWO_IDS = "model.onnx --seq-len 8 --calib "

CASES = [
    # the file
    Case("missing file", "QN102", "absent.onnx"),
    Case("not ONNX", "QN103", build=all_of(put("hello world, " * 50), CALIBRATION)),
    Case("empty file", "QN103", build=all_of(put(b""), CALIBRATION)),
    Case("truncated", "QN103", build=_with(graph()[:-25])),
    Case("half a file", "QN103", build=_with(graph()[: len(graph()) // 2])),
    Case("Git LFS pointer", "QN103", build=_with(LFS.encode())),
    Case("folder without model", "QN113", ".", build=CALIBRATION),
    Case("unknown name", "QN113", "smolm2-135m"),
    Case("truncated GGUF", "QN113", "m.gguf", build=put(b"GGUF\3\0\0\0" + b"\1" * 40, "m.gguf")),
    # external data
    Case("external data missing", "QN104", build=_with(external(location="data.bin"))),
    Case(
        "external data too short",
        "QN104",
        build=all_of(_with(external(location="data.bin")), put(b"\0" * 60, "data.bin")),
    ),
    Case(
        "external data is an LFS pointer",
        "QN104",
        build=all_of(_with(external(location="data.bin")), put(LFS[:50], "data.bin")),
    ),
    Case("external data absolute", "QN105", build=_with(external(location="/etc/hostname"))),
    Case("external data climbs", "QN105", build=_with(external(location="../secret.bin"))),
    Case(
        "external data linked outside",
        "QN105",
        build=all_of(_with(external(location="data.bin")), link_outside),
    ),
    # the graph
    Case("unknown operator", "QN106", build=_with(graph(node("Frobnicate", "x")))),
    Case("unknown domain", "QN106", build=_with(graph(node("Relu", "x", domain="acme")))),
    Case("NaN weight", "QN107", build=_with(graph(constants={"w": _NAN}))),
    Case("infinite weight", "QN107", build=_with(graph(constants={"w": _INF}))),
    Case(
        "half precision",
        "QN108",
        build=_with(
            graph(
                constants={"w": WEIGHT.astype(np.float16)},
                dtype=TensorProto.FLOAT16,
                output=TensorProto.FLOAT16,
            )
        ),
    ),
    Case("dynamic dimension", "QN101", build=_with(graph(x=["rows", 4]))),
    Case("shapes do not fit", "QN116", build=_with(graph(x=[1, 5]), x=np.ones((2, 5), np.float32))),
    Case(
        "already quantized",
        "QN503",
        build=_with(
            graph(node("QuantizeLinear", "x", "s"), constants={"s": np.ones((), np.float32)})
        ),
    ),
    Case(
        "activation becomes infinite",
        "QN304",
        build=_with(graph(node("Div", "x", "zero"), constants={"zero": np.zeros(1, np.float32)})),
    ),
    Case("activation becomes NaN", "QN304", build=_with(graph(node("Log", "x")))),
    # options
    Case("freeze-dim without size", "QN503", "model.onnx --freeze-dim batch"),
    Case("freeze-dim with a word", "QN503", "model.onnx --freeze-dim batch=two"),
    Case("freeze-dim negative", "QN503", "model.onnx --freeze-dim batch=-1"),
    Case("freeze-dim of no input", "QN503", "model.onnx --calib data.npz --freeze-dim rows=2"),
    Case("keep-input of no input", "QN503", "model.onnx --calib data.npz --keep-input z"),
    Case("unknown scheme", "QN501", "model.onnx --scheme w3a8"),
    Case("unknown target", "QN502", "model.onnx --target nokia-3310"),
    Case("unknown range method", "QN503", "model.onnx --range-method best"),
    Case("mask value positive", "QN503", "model.onnx --mask-value 5"),
    Case("sequence too short", "QN503", "model.onnx --seq-len 1"),
    Case("no windows", "QN503", "model.onnx --calib-windows 0"),
    # the configuration file
    Case("no config", "QN102", "model.onnx --config absent.toml"),
    Case(
        "unknown key",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put("schema = 'w8a8'", "c.toml")),
    ),
    Case(
        "wrong type",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put("seq_len = 'long'", "c.toml")),
    ),
    Case(
        "list of numbers for names",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put("keep_inputs = [1]", "c.toml")),
    ),
    Case(
        "size that is no number",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put("freeze_dims = {batch = '1'}", "c.toml")),
    ),
    Case(
        "not TOML",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put("seq_len: 3", "c.toml")),
    ),
    Case(
        "config not UTF-8",
        "QN503",
        "model.onnx --config c.toml",
        build=all_of(READY, put(b"calib = '\xff'", "c.toml")),
    ),
    # calibration arrays
    Case("wrong shape", "QN301", build=all_of(GOOD, partial(npz, x=np.ones((4, 5), np.float32)))),
    Case("wrong rank", "QN301", build=all_of(GOOD, partial(npz, x=np.ones(4, np.float32)))),
    Case("wrong name", "QN301", build=all_of(GOOD, partial(npz, z=_ROWS))),
    Case("surplus array", "QN301", build=all_of(GOOD, partial(npz, x=_ROWS, z=_ROWS))),
    Case("integers for floats", "QN301", build=all_of(GOOD, partial(npz, x=_ROWS.astype(int)))),
    Case("strings", "QN301", build=all_of(GOOD, partial(npz, x=_ROWS.astype(str)))),
    Case("complex numbers", "QN301", build=all_of(GOOD, partial(npz, x=_ROWS * 1j))),
    Case("no samples", "QN301", build=all_of(GOOD, partial(npz, x=_ROWS[:0]))),
    Case("NaN in the data", "QN304", build=all_of(GOOD, partial(npz, x=_NAN))),
    Case("empty npz", "QN302", build=all_of(GOOD, npz)),
    Case("pickled npz", "QN302", build=all_of(GOOD, partial(npz, x=np.array([{}, None])))),
    Case("npz is text", "QN302", build=all_of(GOOD, put("x = 1", "data.npz"))),
    Case("no npz", "QN102", build=GOOD),
    # calibration text
    Case("no text", "QN102", f"{_TWO_IDS}absent.txt", build=TEXT_MODEL),
    Case("short text", "QN302", f"{_TWO_IDS}t.txt", build=all_of(TEXT_MODEL, put("hi", "t.txt"))),
    Case("empty text", "QN302", f"{_TWO_IDS}t.txt", build=all_of(TEXT_MODEL, put("\n", "t.txt"))),
    Case(
        "text in Latin-1",
        "QN302",
        f"{_TWO_IDS}t.txt",
        build=all_of(TEXT_MODEL, put("naïve café ".encode("latin-1") * 40, "t.txt")),
    ),
    Case(
        "binary as text",
        "QN302",
        f"{_TWO_IDS}t.txt",
        build=all_of(TEXT_MODEL, put(bytes(range(256)) * 4, "t.txt")),
    ),
    Case("folder as text", "QN302", f"{_TWO_IDS}.", build=TEXT_MODEL),
    Case(
        "short evaluation text",
        "QN302",
        f"{_TWO_IDS}t.txt --eval-text e.txt",
        build=all_of(TEXT_MODEL, put("text " * 40, "t.txt"), put("hi", "e.txt")),
    ),
    Case("no tokenizer", "QN305", "model.onnx --seq-len 8", build=put(token_model())),
    Case(
        "tokenizer is not one",
        "QN113",
        "model.onnx --seq-len 8",
        build=all_of(put(token_model()), put("{}", "tokenizer.json")),
    ),
    Case("tokenizer missing", "QN102", "model.onnx --tokenizer absent/tokenizer.json"),
    Case("no data for a model without text", "QN305", "model.onnx"),
    Case(
        "ids past the vocabulary",
        "QN116",
        "model.onnx --seq-len 8 --calib data.npz",
        build=_with(token_model(), input_ids=np.full((2, 8), 300)),
    ),
    # where to write
    Case("output folder is a file", "QN901", "model.onnx --calib data.npz --out model.onnx"),
    Case("parent is a file", "QN901", "model.onnx --calib data.npz --out data.npz/a/b"),
    Case("nowhere to write", "QN901", "model.onnx --calib data.npz --out /proc/qnpu/out"),
    Case("full disk, one byte", "QN901", file_limit=1),
    Case("full disk, 100 bytes", "QN901", file_limit=100),
    Case("full disk, 1 kB", "QN901", file_limit=1000),
    *(
        Case(f"foreign {name}", "QN902", build=all_of(READY, put("mine", f"out/{name}")))
        for name in OUTPUTS
    ),
    Case(
        "folder of that name",
        "QN902",
        build=all_of(READY, put("mine", "out/encodings.json/notes.txt")),
    ),
    Case(
        "report is a foreign one",
        "QN902",
        build=all_of(READY, put('{"outputs": 3}', "out/report.json")),
    ),
    Case(
        "model is its own output",
        "QN902",
        "out/model.qdq.onnx --calib data.npz",
        build=all_of(CALIBRATION, put(graph(), "out/model.qdq.onnx")),
    ),
    # the other commands
    Case("check: missing", "QN102", "absent.onnx", command="qnpu-check"),
    Case("check: not ONNX", "QN103", "data.npz", command="qnpu-check"),
    Case("export: unknown name", "QN113", "no-such-model --out m2.onnx", command="qnpu-export"),
    Case("export: of ONNX", "QN503", "model.onnx --out m2.onnx", command="qnpu-export"),
    Case("export: over a file", "QN902", "tiny --out model.onnx", command="qnpu-export"),
    Case("eval: missing", "QN102", "absent.onnx", command="qnpu-eval"),
    Case("eval: no tokenizer", "QN305", "model.onnx", command="qnpu-eval"),
    Case("eval: unknown mode", "QN503", "model.onnx --mode fast", command="qnpu-eval"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_fault(case: Case, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    case.build(home)
    put("my notes", "out/notes.txt")(home)
    before = snapshot(tmp_path)
    command = [case.command, *case.arguments.split(), "--json"]
    if case.command == "qnpu-compile":
        command += ["--quiet", *([] if "--out" in command else ["--out", "out"])]
    done = call(*command, folder=home, file_limit=case.file_limit)
    assert "Traceback" not in done.stderr, done.stderr
    assert set(done.codes) == {case.code}, done.stderr
    assert done.stderr.count("help: ") == len(done.codes)
    assert done.exit_code == 1
    if case.command == "qnpu-check":  # faults are its result
        listed = json.loads(done.stdout)["diagnostics"]
        assert [item["code"] for item in listed] == [case.code]
    else:
        assert done.stdout == ""
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------- signals

# Runs a command that stops at one place: it makes the file `mark`, then sleeps.
STALL = """
import builtins, importlib, pathlib, sys, time
place, mark, *sys.argv = sys.argv[1:]
def stall(*_, **__):
    pathlib.Path(mark).touch()
    time.sleep(100)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == place: stall()
from qnpu.compiler import entry
if ":" in place:
    module, _, names = place.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(module)
    for step in owners: owner = getattr(owner, step)
    setattr(owner, name, stall)
else:
    sys.meta_path.insert(0, Finder())
entry.compile_main()
"""
PLACES = {
    "imports": "onnx_ir",
    "calibration": "qnpu.runtime_check.observer:Observer.look",
    "check": "qnpu.compiler.cli:check_result",
    "writing": "os:fsync",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and a finished result in ``out``."""
    folder = tmp_path_factory.mktemp("compiled")
    READY(folder)
    done = call("qnpu-compile", *COMPILE, folder=folder)
    assert done.exit_code == 0, done.stderr
    assert set(OUTPUTS) == {path.name for path in (folder / "out").iterdir()}
    return folder


COMPILE = ["model.onnx", "--calib", "data.npz", "--out", "out", "--quiet", "--json"]


def stop_at(place: str, number: signal.Signals, folder: Path, out: str) -> Done:
    """Starts a compile, waits until it has come to a place, sends a signal."""
    mark = folder.parent / "mark"
    mark.unlink(missing_ok=True)
    arguments = [*COMPILE, "--out", out]
    process = start(
        sys.executable, "-c", STALL, PLACES[place], mark, "qnpu-compile", *arguments, folder=folder
    )
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    done = finish(process)
    mark.unlink(missing_ok=True)
    return done


@pytest.mark.parametrize(
    ("place", "number", "out"),
    [
        ("imports", signal.SIGINT, "out"),
        ("calibration", signal.SIGINT, "out"),
        ("calibration", signal.SIGTERM, "new/deep"),
        ("check", signal.SIGHUP, "out"),
        ("writing", signal.SIGINT, "out"),
        ("writing", signal.SIGTERM, "new/deep"),
    ],
)
def test_a_signal_leaves_nothing_behind(
    place: str, number: signal.Signals, out: str, compiled: Path
) -> None:
    before = snapshot(compiled)
    done = stop_at(place, number, compiled, out)
    assert done.exit_code == 128 + number, done.stderr
    assert done.stderr.strip() == "interrupted"
    assert done.stdout == ""
    assert snapshot(compiled) == before


def test_after_a_kill_old_output_is_whole_and_the_next_run_cleans_up(
    compiled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(compiled, folder)
    before = snapshot(folder)
    assert stop_at("writing", signal.SIGKILL, folder, "out").exit_code == -signal.SIGKILL
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert any(".qnpu-scratch-" in name for name in after)
    (folder / "out" / ".qnpu-notes").write_text("not ours")
    done = call("qnpu-compile", *COMPILE, folder=folder)
    assert done.exit_code == 0, done.stderr
    (folder / "out" / ".qnpu-notes").unlink()
    assert snapshot(folder) == before


def test_a_second_compile_into_the_same_folder_waits(compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(compiled, folder)
    before = snapshot(folder)
    runs = [start("qnpu-compile", *COMPILE, folder=folder) for _ in range(2)]
    assert [finish(run).exit_code for run in runs] == [0, 0]
    assert snapshot(folder) == before


@pytest.mark.parametrize("seconds", [0.2, 0.3, 0.4, 0.6, 1.2])
def test_a_signal_at_any_moment(seconds: float, compiled: Path) -> None:
    """All or nothing, whatever it was doing; the result may already be complete.

    While Python itself starts or ends there is no handler, and the signal ends it at once.
    """
    before = snapshot(compiled)
    process = start("qnpu-compile", *COMPILE, folder=compiled)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.exit_code in (0, 128 + signal.SIGTERM, -signal.SIGTERM), done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(compiled) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(compiled: Path) -> None:
    (compiled / "locked").mkdir(mode=0o555)
    done = call("qnpu-compile", *COMPILE, "--out", "locked", folder=compiled)
    assert done.codes == ["QN901"]
    (compiled / "locked").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_full(compiled: Path, tmp_path: Path) -> None:
    """ENOSPC from a file system of 8 kB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed")
    try:
        before = snapshot(compiled)
        done = call("qnpu-compile", *COMPILE, "--out", tmp_path / "out", folder=compiled)
        assert (done.exit_code, done.codes) == (1, ["QN901"]), done.stderr
        assert "No space left" in done.stderr
        assert snapshot(compiled) == before
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
