"""Sessions: three modes, models from path, proto and memory, failures as QN116."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.integer_cpu import Cpu, mark_cpu
from qnpu.runtime_check import session as sessions
from qnpu.runtime_check.session import (
    Mode,
    adds_in_32_bits,
    check_cpu,
    cpu_flags,
    input_dtypes,
    open_session,
    run,
    session_options,
)
from tests.conftest import normal, parse

TEXT = """
    g (float[1, 4] x) => (float[1, 2] y, float[1, 2] z)
    <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { y = MatMul(x, w)  z = Neg(y) }
"""


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("form", ["path", "proto", "memory"])
def test_every_form_gives_the_same_numbers(form: str, mode: Mode, tmp_path: Path) -> None:
    model = parse(TEXT)
    source: Path | onnx.ModelProto | ir.Model = model
    if form == "path":
        source = tmp_path / "m.onnx"
        ir.save(model, source, external_data="weights.bin")
    elif form == "proto":
        source = ir.to_proto(model)
    x = normal(1, 4)
    y, z = run(open_session(source, mode), None, {"x": x})
    np.testing.assert_array_equal(y, -z)
    np.testing.assert_allclose(y, x @ np.arange(1, 9, dtype=np.float32).reshape(4, 2), rtol=1e-6)


def test_weights_beside_a_proto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    proto = ir.to_proto(parse(TEXT))
    for field in ("raw_data", "float_data"):
        proto.graph.initializer[0].ClearField(field)
    array = normal(2, 4).T  # as a transposed weight is held
    session = open_session(proto, weights={"w": ir.tensor(array), "unknown": ir.tensor(array)})
    assert not list(tmp_path.iterdir())
    x = normal(1, 4)
    np.testing.assert_allclose(run(session, ["y"], {"x": x})[0], x @ array, rtol=1e-6)


def test_opening_leaves_the_model_alone() -> None:
    model = parse(TEXT)
    tensor = model.graph.initializers["w"].const_value
    open_session(model)
    assert model.graph.initializers["w"].const_value is tensor


def test_outputs_by_name() -> None:
    session = open_session(parse(TEXT))
    assert len(run(session, ["z"], {"x": normal(1, 4)})) == 1


def test_options_of_the_modes() -> None:
    reference, optimized, stock = map(session_options, (Mode.REFERENCE, Mode.OPTIMIZED, Mode.STOCK))
    off = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert reference.graph_optimization_level == off
    assert optimized.graph_optimization_level != off
    assert reference.get_session_config_entry("session.disable_quant_qdq") == "1"
    for options in (reference, optimized):
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
        entry = options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level")
        assert entry == "1"
    with pytest.raises(RuntimeError):  # as it comes: nothing is set
        stock.get_session_config_entry("session.x64quantprecision")


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("asked", "threads"),
    [
        (None, 0),
        ("1", 1),
        ("1,4", 1),
        ("", 0),
        ("0", 0),
        ("many", 0),
        ("10000000000", os.cpu_count()),
    ],
)
def test_as_many_threads_as_asked_for(
    mode: Mode, asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert session_options(mode).intra_op_num_threads == threads


def test_reference_runs_node_by_node(tmp_path: Path) -> None:
    """What the optimizer would fuse away is still there."""
    model = parse("g (float[4] x) => (float[4] y) { a = Identity(x)  b = Identity(a)  y = Neg(b) }")
    kept = {}
    for mode in (Mode.REFERENCE, Mode.OPTIMIZED):
        path = tmp_path / f"{mode.value}.onnx"
        options = session_options(mode)
        options.optimized_model_filepath = str(path)
        proto = ir.to_proto(model).SerializeToString()
        ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        kept[mode] = len(onnx.load(path).graph.node)
    assert kept == {Mode.REFERENCE: 3, Mode.OPTIMIZED: 1}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1] x) => (float[1] y) { y = Mystery(x) }",
        "g (float[2] x) => (float[1] y) <float[3, 1] w = {0, 0, 0}> { y = MatMul(x, w) }",
        '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'
        " g (float[1] x) => (float[1] y) { y = acme.Mystery(x) }",
    ],
)
def test_a_graph_that_does_not_open(text: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        open_session(parse(text))
    assert caught.value.codes == ["QN116"]


@pytest.mark.parametrize("content", [b"", b"not onnx at all", None])
def test_a_file_that_does_not_open(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DiagnosticError) as caught:
        open_session(path)
    assert caught.value.codes == ["QN116"]


def test_feeds_that_do_not_fit() -> None:
    session = open_session(
        parse(
            "g (int64[1] i) => (float[1, 2] y) <float[3, 2] t = {1, 2, 3, 4, 5, 6}>"
            "{ y = Gather(t, i) }"
        )
    )
    for bad in (np.array([3]), np.array([0, 1]), np.array([0.0], np.float32)):
        with pytest.raises(DiagnosticError) as caught:
            run(session, None, {"i": bad})
        assert caught.value.codes == ["QN116"]


def test_input_types() -> None:
    session = open_session(
        parse("g (int64[1] a, float[1] b, bool[1] c, int32[1] d) => (float[1] y) { y = Neg(b) }")
    )
    assert input_dtypes(session) == {
        "a": np.dtype(np.int64),
        "b": np.dtype(np.float32),
        "c": np.dtype(np.bool_),
        "d": np.dtype(np.int32),
    }


def test_cpu_flags_are_a_list_in_a_fixed_order() -> None:
    assert cpu_flags() == cpu_flags()
    assert all(isinstance(flag, str) for flag in cpu_flags())


def test_whether_sums_of_products_saturate() -> None:
    """What ONNX Runtime's sources say of x86; elsewhere all kernels add in 32 bits."""
    flags = set(cpu_flags())
    if "avx2" in flags:
        assert adds_in_32_bits() == bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    else:
        assert adds_in_32_bits()


@pytest.mark.parametrize("form", ["path", "proto", "memory"])
def test_a_graph_for_other_cpus_is_refused(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse(TEXT)
    mark_cpu(model, Cpu.VNNI)
    ir.save(model, tmp_path / "m.onnx")
    sources: dict[str, Path | onnx.ModelProto | ir.Model]
    sources = {"path": tmp_path / "m.onnx", "proto": ir.to_proto(model), "memory": model}
    source = sources[form]
    monkeypatch.setattr(sessions, "adds_in_32_bits", lambda: True)
    open_session(source)
    monkeypatch.setattr(sessions, "adds_in_32_bits", lambda: False)
    with pytest.raises(DiagnosticError) as caught:
        open_session(source)
    assert caught.value.codes == ["QN403"]
    check_cpu(Cpu.ANY)
    open_session(parse(TEXT))
