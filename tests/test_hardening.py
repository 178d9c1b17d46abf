"""Files made to do harm: they end in a coded diagnostic, soon, and within little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_ir.passes import common

from qnpu.compiler.bit_choices import read_plan
from qnpu.compiler.config import CompileConfig, read_config
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_checks import unknown_operators
from qnpu.compiler.user_passes import load_pass
from qnpu.models.onnx_file import load_onnx
from qnpu.models.token_data import load_arrays
from qnpu.runtime_check.segments import SegmentRunner, cut_segments
from tests.commands import Done, call, finish, snapshot, start
from tests.test_bad_input import (
    FLOAT,
    READY,
    TEXT_MODEL,
    WEIGHT,
    all_of,
    graph,
    node,
    put,
)

LONG = "n" * 10_000
TERA = 10**12


def codes(path: Path) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        load_onnx(path)
    return caught.value.codes


def model(folder: Path, content: bytes) -> Path:
    put(content)(folder)
    return folder / "model.onnx"


# ---------------------------------------------------------------------------------- whole commands


def value_of_shape(*shape: int) -> bytes:
    """y = x + zeros of a shape that takes terabytes."""
    sizes = np.array(shape)
    return graph(
        node("ConstantOfShape", "s", out="z"), node("Add", "x", "z"), constants={"s": sizes}
    )


def expanded(*shape: int) -> bytes:
    return graph(node("Expand", "x", "s"), constants={"s": np.array(shape)})


def npz_that_promises(shape: str, written: int) -> Callable[[Path], None]:
    """An array of few bytes whose header says it is huge."""

    def build(folder: Path) -> None:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
        with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", header + bytes(written))

    return build


COMPILE = "qnpu-compile model.onnx --calib data.npz --out out --quiet --json"
CHECK = "qnpu-check model.onnx --json"
FAULTS = {
    # name: (code, command, what makes the files)
    "constant of terabytes": ("QN116", COMPILE, all_of(READY, put(value_of_shape(10**6, 10**6)))),
    "expansion to terabytes": ("QN116", COMPILE, all_of(READY, put(expanded(10**6, 10**6, 4)))),
    "input of terabytes": ("QN301", COMPILE, all_of(READY, put(graph(x=[TERA, 4])))),
    "npz of terabytes": ("QN302", COMPILE, all_of(READY, npz_that_promises(f"({TERA}, 4)", 64))),
    "model name": ("QN102", f"qnpu-check {LONG}.onnx", READY),
    "model to compile": ("QN113", f"qnpu-compile {LONG}", READY),
    "calibration name": (
        "QN102",
        f"qnpu-compile model.onnx --calib {LONG}.txt --out out",
        TEXT_MODEL,
    ),
    "array name": ("QN102", f"qnpu-compile model.onnx --calib {LONG}.npz --out out", READY),
    "tokenizer name": ("QN113", f"qnpu-compile model.onnx --tokenizer {LONG}", READY),
    "plan name": ("QN102", f"qnpu-compile model.onnx --plan {LONG}", READY),
    "configuration name": ("QN102", f"qnpu-compile model.onnx --config {LONG}", READY),
    "output name": ("QN901", f"{COMPILE} --out {LONG}", READY),
    "no end": ("QN103", "qnpu-check /dev/zero --json", READY),
    "seed": ("QN503", f"{COMPILE} --seed -1", READY),
    "window of 2^70 tokens": ("QN503", f"{COMPILE} --seq-len {2**70}", READY),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, tmp_path: Path) -> None:
    code, command, build = FAULTS[name]
    home = tmp_path / "home"
    home.mkdir()
    build(home)
    before = snapshot(tmp_path)
    done = call(*command.split(), folder=home)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert (set(done.codes), done.exit_code) == ({code}, 1), done.stderr[-3000:]
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------ ONNX files


def test_a_tensor_of_numbers_that_promises_terabytes(tmp_path: Path) -> None:
    """Inline data listed as numbers, none of which are there."""
    huge = TensorProto(name="w", data_type=FLOAT, dims=[TERA, 4])
    assert codes(model(tmp_path, graph(constants={}, tensors=[huge]))) == ["QN103"]


def test_a_file_larger_than_protobuf_can_hold(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(100 * 2**30)  # takes no space
    assert codes(tmp_path / "model.onnx") == ["QN103"]


@pytest.mark.parametrize("field", ["float_data", "int32_data", "uint64_data", "double_data"])
def test_numbers_of_another_type_than_the_tensor(field: str, tmp_path: Path) -> None:
    wrong = TensorProto(name="w", data_type=TensorProto.INT64, dims=[4, 4])
    getattr(wrong, field).extend([1] * 16)
    assert codes(model(tmp_path, graph(constants={}, tensors=[wrong]))) == ["QN103"]


KINDS = [FLOAT, TensorProto.DOUBLE, TensorProto.COMPLEX64, TensorProto.INT4, TensorProto.UINT16,
         TensorProto.INT64, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.UINT64]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_as_the_onnx_helper_lists_them(kind: int, tmp_path: Path) -> None:
    listed = helper.make_tensor("t", kind, [3, 5], [1] * 15)
    content = graph(tensors=[listed])
    assert "t" in load_onnx(model(tmp_path, content)).graph.initializers


@pytest.mark.parametrize("first", ["raw_data", "float_data"])
def test_data_of_two_kinds(first: str, tmp_path: Path) -> None:
    both = TensorProto(name="w", data_type=FLOAT, dims=[4, 4], int64_data=[1] * 16)
    if first == "raw_data":
        both.raw_data = WEIGHT.tobytes()
    else:
        both.float_data.extend([1.0] * 16)
    assert codes(model(tmp_path, graph(constants={}, tensors=[both]))) == ["QN103"]


def pair(first: onnx.NodeProto, second: onnx.NodeProto) -> bytes:
    return graph(first, second, constants={})


def test_nodes_in_another_order_are_sorted(tmp_path: Path) -> None:
    content = pair(node("Relu", "h"), node("Exp", "x", out="h"))
    nodes = [item.op_type for item in load_onnx(model(tmp_path, content)).graph]
    assert nodes == ["Exp", "Relu"]


def branches(taken: str) -> bytes:
    """y = If(x > 0) of two graphs that take a value."""
    result = helper.make_tensor_value_info("r", FLOAT, None)
    inner = helper.make_graph([node("Relu", taken, out="r")], "branch", [], [result])
    choice = helper.make_node("If", ["c"], ["y"], "choose", then_branch=inner, else_branch=inner)
    return graph(node("IsNaN", "x", out="c"), choice, constants={})


MALFORMED = {
    "two nodes take each other's result": pair(node("Add", "x", "y", out="h"), node("Relu", "h")),
    "a node takes its own result": graph(node("Add", "x", "y"), constants={}),
    "a branch takes its own node's result": branches("y"),
    "a node takes what nothing makes": graph(node("Add", "x", "q"), constants={}),
    "a branch takes what nothing makes": branches("q"),
    "nothing makes the output": graph(node("Relu", "x", out="h"), constants={}),
    "two nodes make one value": pair(node("Relu", "x"), node("Exp", "x")),
    "an attribute of another type": graph(
        helper.make_node("Softmax", ["x"], ["y"], axis=[1.0, 2.0]), constants={}
    ),
    "an attribute of another type, of an opset that is not imported": graph(
        helper.make_node("DequantizeLinear", ["x", "x"], ["y"], domain="com.microsoft", axis=[1]),
        constants={},
    ),
    "a name that is not UTF-8": graph(constants={"w_name": WEIGHT}).replace(
        b"w_name", b"w_\xff\xfeme"
    ),
    "an operator that is not UTF-8": graph(node("Relu", "x")).replace(b"Relu", b"R\xff\xfeu"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_graphs(name: str, tmp_path: Path) -> None:
    assert codes(model(tmp_path, MALFORMED[name])) == ["QN103"]


@pytest.mark.parametrize("version", [-(2**63), -1, 2**31, 2**63 - 1])
def test_opset_versions_that_do_not_exist(version: int, tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(graph())
    proto.opset_import[0].version = version
    loaded = load_onnx(model(tmp_path, proto.SerializeToString()))
    unknown = {item.code for item in unknown_operators(loaded)}
    assert unknown == (set() if version > 0 else {"QN106"})


def test_a_model_behind_a_link(tmp_path: Path) -> None:
    """It is read; what it names is looked for beside the link, and may not leave that folder."""
    (tmp_path / "real").mkdir()
    put(graph())(tmp_path / "real")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    assert len(load_onnx(tmp_path / "model.onnx").graph) == 2


def test_a_model_behind_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").symlink_to("model.onnx")
    assert codes(tmp_path / "model.onnx") == ["QN102"]


NAMES = ["é\N{SNOWMAN}\N{GRINNING FACE}", "[bold]x[/]", "\x1b[31m", "a/b", "../../x", " ", LONG]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_any_kind(name: str, tmp_path: Path) -> None:
    """They come out of a compile as they went in."""
    product = helper.make_node("MatMul", [name, f"{name}w"], ["y"], name=f"{name}n")
    content = graph(product, name=name, constants={f"{name}w": WEIGHT})
    put(content)(tmp_path)
    np.savez(tmp_path / "data.npz", x=np.ones((2, 4), np.float32))
    with zipfile.ZipFile(tmp_path / "data.npz") as old:
        (array,) = (old.read(entry) for entry in old.namelist())
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as new:
        new.writestr(f"{name}.npy", array)
    done = call(*COMPILE.split(), folder=tmp_path)
    assert done.exit_code == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "data.npz", "out"}
    compiled = onnx.load(tmp_path / "out" / "model.qdq.onnx")
    assert [value.name for value in compiled.graph.input] == [name]
    assert name in json.loads((tmp_path / "out" / "encodings.json").read_bytes())["tensors"]


def chain(length: int) -> bytes:
    """x → Relu → Exp → … → y."""
    names = ["x", *(f"v{i}" for i in range(length - 1)), "y"]
    kinds = ("Relu", "Sigmoid", "Neg")
    nodes = [
        helper.make_node(kinds[i % 3], [names[i]], [names[i + 1]], name=f"n{i}")
        for i in range(length)
    ]
    return graph(*nodes, constants={})


def limit_memory() -> None:
    """4 GiB of address space, ONNX Runtime's and Python's own included."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))


def test_a_graph_of_a_hundred_thousand_nodes_is_checked(tmp_path: Path) -> None:
    put(chain(100_000))(tmp_path)
    done = call("qnpu-check", "model.onnx", folder=tmp_path, before=limit_memory)
    assert done.exit_code == 0, done.stderr[-2000:]
    assert "100000 nodes, 0 errors" in done.stdout


def test_statistics_of_long_graphs_are_not_held_all_at_once() -> None:
    """Half a megabyte of each node's outputs: 50 GB in the end."""
    long = ir.from_proto(onnx.ModelProto.FromString(chain(5000)))
    common.ShapeInferencePass()(long)  # no cut goes through a value of unknown type
    segments = cut_segments(long.graph)
    assert max(len(segment.nodes) for segment in segments) <= 1001
    assert sum(len(segment.nodes) for segment in segments) == 5000


def test_arrays_and_values_larger_than_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    READY(tmp_path)
    long = ir.from_proto(onnx.ModelProto.FromString(graph()))
    for value in (value for item in long.graph for value in item.outputs):
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([10, 10])
    free = SimpleNamespace(available=50)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(DiagnosticError) as arrays:
        load_arrays(tmp_path / "data.npz")
    with pytest.raises(DiagnosticError) as values:
        SegmentRunner(long, [])
    assert [*arrays.value.codes, *values.value.codes] == ["QN302", "QN116"]
    free.available = 400
    assert load_arrays(tmp_path / "data.npz")["x"].shape == (4, 4)
    SegmentRunner(long, [])


# -------------------------------------------------------------------------- documents of all kinds

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.just(LONG)
WHOLE = st.integers() | st.sampled_from([0, 1, 8, 16, 2**31, 2**63, -(2**63) - 1, 10**400])
SCALAR = st.none() | st.booleans() | WHOLE | st.floats() | TEXT
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8
)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_options_of_any_value(data: st.DataObject) -> None:
    """Of the right types, as a configuration file's are checked to be; with two changed."""
    kinds: dict[type, st.SearchStrategy[Any]] = {
        str: TEXT | st.sampled_from(["auto", "none", "w4a8", "1,2", "latency=1e999s", "9" * 5000]),
        bool: st.booleans(),
        int: WHOLE,
        float: st.floats() | WHOLE,
        tuple: st.lists(TEXT, max_size=3).map(tuple),
        dict: st.dictionaries(TEXT, WHOLE, max_size=3),
        type(None): WHOLE,
    }
    defaults = CompileConfig().to_json()
    names = data.draw(st.lists(st.sampled_from(sorted(defaults)), min_size=1, max_size=2))
    given_values: dict[str, Any] = {name: data.draw(kinds[type(defaults[name])]) for name in names}
    try:
        config = CompileConfig(**given_values)
        json.dumps(config.to_json())
        _ = config.all_windows, config.snaps_scales, config.mask_constant, config.bit_choices
    except DiagnosticError as error:
        assert set(error.codes) <= {"QN102", "QN501", "QN502", "QN503", "QN540"}


@settings(max_examples=50, deadline=None)
@given(
    plan=st.fixed_dictionaries(
        {},
        optional={
            "format": st.just("qnpu-bit-plan") | VALUE,
            "version": st.just(2) | VALUE,
            "scheme": st.just("w8a8") | VALUE,
            "linears": VALUE,
            "caches": VALUE,
            "more": VALUE,
        },
    )
)
def test_plans_of_any_value(plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_text(json.dumps(plan))
    try:
        scheme, choices = read_plan(path)
    except DiagnosticError as error:
        assert error.codes == ["QN540"]
    else:
        assert plan["scheme"] == scheme
        assert set(choices.linears) == set(plan["linears"])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "a = " + "[" * 50_000 + "]" * 50_000,
        "a = " + '{"a" = ' * 5000 + "1" + "}" * 5000,
        "seq_len = " + "9" * 5000,
        "seq_len = 1979-05-27",
        "freeze_dims = {a = " + "9" * 400 + "}",
        "\0",
    ],
)
def test_configurations_that_are_deep_or_long(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(DiagnosticError) as caught:
        CompileConfig(**read_config(tmp_path / "c.toml"))
    assert caught.value.codes == ["QN503"]


@pytest.mark.parametrize("options", ["x=" + "[" * 50_000, "x=" + "9" * 5000, "x=", "]", "\0=1"])
def test_options_of_a_pass_that_are_deep_or_long(options: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        load_pass(f"qnpu.passes.canonicalize:Canonicalize[{options}]")
    assert caught.value.codes == ["QN542"]


# ---------------------------------------------------------------------------------- where to write


def outcome(folder: Path) -> str:
    """The scheme whose files lie there; each must be whole, and all of one compile."""
    report = json.loads((folder / "report.json").read_bytes())
    found = snapshot(folder)
    assert {name: entry["sha256"] for name, entry in report["outputs"].items()} == {
        name: digest for name, digest in found.items() if name != "report.json"
    }
    plan = json.loads((folder / "bit_plan.json").read_bytes())
    assert plan["scheme"] == report["config"]["scheme"]
    return str(plan["scheme"])


def test_two_different_compiles_into_one_folder(tmp_path: Path) -> None:
    """Both succeed, one after the other; nothing of the first is left among the second's."""
    READY(tmp_path)
    schemes = ("w8a8", "w8a16")
    runs = [start(*COMPILE.split(), "--scheme", name, folder=tmp_path) for name in schemes]
    done: list[Done] = [finish(run) for run in runs]
    assert [item.exit_code for item in done] == [0, 0], [item.stderr for item in done]
    assert outcome(tmp_path / "out") in schemes


def test_a_read_only_file_system(tmp_path: Path) -> None:
    """Root may write into a read-only folder, but not here."""
    READY(tmp_path)
    (tmp_path / "out").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "out")]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        done = call(*COMPILE.split(), folder=tmp_path)
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)
    assert (done.codes, done.exit_code) == (["QN901"], 1)
