"""The real compiler and its emulator, and the reading of what it dumps."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import constant_array, set_constant
from qnpu.runtime_check.htp import (
    HtpCompiler,
    HtpError,
    HtpGraph,
    HtpVerdict,
    compare_on_emulator,
    is_available,
    parse_qnn_graph,
    soc_models,
)
from qnpu.runtime_check.session import open_session
from tests.conftest import normal, shared_file
from tests.htp_cases import build_case
from tests.htp_random import random_cases
from tests.htp_sweep import sweep
from tests.qdq_cases import matmul_const, matmul_dynamic, unary

needs_compiler = pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")

# One of each kind and fate; their verdicts on two architectures are the compiler's.
KNOWN = {
    "MatMul_const/u16xs4/per_channel": ("int", "int"),
    "MatMul_const/u16xs16/per_channel": ("reject", "int"),
    "MatMul_const/u16xs4/block64": ("reject", "float"),
    "MatMul_const/u8xs2/per_channel": ("reject", "reject"),
    "MatMul_dyn/u16xu16": ("int", "int"),
    "MatMul_dyn/u16xs8->u8": ("float", "float"),
    "Add/u16+u8": ("float", "float"),
    "Add/u16/rank6": ("reject", "reject"),
    "Reshape/u16/diff_enc": ("float", "float"),
    "RMSNormalization(op23)/u16xu16": ("int", "int"),
    "RotaryEmbedding(op23)/u16": ("reject", "float"),
    "Gather_embed/u16/diff_enc": ("reject", "float"),
    "Abs/s16": ("reject", "reject"),
    "int_io/u8": ("int", "int"),
}


@pytest.fixture(scope="module")
def htp() -> Iterator[HtpCompiler]:
    with HtpCompiler(timeout=120) as compiler:
        yield compiler


def texts(graph: HtpGraph) -> list[str]:
    return sorted(op.text for op in graph.inner_ops)


# ------------------------------------------------------------------ the dump, without the compiler


def tensor(data_type: int, kind: int, encoding: int | None = None) -> dict[str, Any]:
    """An entry as the dump has it."""
    undefined = 0x7FFFFFFF
    params = {
        "definition": undefined if encoding is None else 1,
        "encoding": undefined if encoding is None else encoding,
        "scale_offset": {"offset": -128, "scale": 0.5},
    }
    return {"data_type": data_type, "dims": [2, 3], "quant_params": params, "type": kind}


def dump(middle: int) -> dict[str, Any]:
    """x → Quantize → a → Relu → b → Dequantize → y, where a and b have the type given."""
    encoding = None if middle == 0x0216 else 0
    tensors = {
        "x": tensor(0x0232, 0),
        "a": tensor(middle, 3, encoding),
        "b": tensor(middle, 3, encoding),
        "y": tensor(0x0232, 1),
    }
    nodes = {
        "last": {"type": "Dequantize", "input_names": ["b"], "output_names": ["y"]},
        "first": {"type": "Quantize", "input_names": ["x"], "output_names": ["a"]},
        "relu": {"type": "Relu", "input_names": ["a"], "output_names": ["b"]},
    }
    return {"graph": {"tensors": tensors, "nodes": nodes}}


def test_reads_types_encodings_and_order() -> None:
    ops = parse_qnn_graph(dump(0x0408), {"relu": ("Relu_7",)})
    assert [op.name for op in ops] == ["first", "relu", "last"]
    assert [op.text for op in ops] == [
        "Quantize(F32)->UF8",
        "Relu(UF8)->UF8",
        "Dequantize(UF8)->F32",
    ]
    assert ops[1].sources == ("Relu_7",)
    read = ops[1].inputs[0]
    assert (read.shape, read.role, read.scale, read.zero_point) == ((2, 3), "native", 0.5, 128)


@pytest.mark.parametrize(
    ("middle", "verdict"), [(0x0408, HtpVerdict.INT), (0x0216, HtpVerdict.FLOAT)]
)
def test_a_float_between_the_borders_is_a_float_graph(middle: int, verdict: HtpVerdict) -> None:
    graph = HtpGraph("v75", tuple(parse_qnn_graph(dump(middle))))
    assert graph.verdict is verdict
    assert ("relu" in {op.name for op in graph.float_ops}) == (verdict is HtpVerdict.FLOAT)


def test_a_float_between_dequantize_and_quantize_counts() -> None:
    found = dump(0x0408)
    found["graph"]["nodes"]["relu"]["type"] = "Dequantize"
    found["graph"]["tensors"]["b"] = tensor(0x0232, 3)
    found["graph"]["nodes"]["last"]["type"] = "Quantize"
    graph = HtpGraph("v75", tuple(parse_qnn_graph(found)))
    assert graph.verdict is HtpVerdict.FLOAT
    assert graph.ops_within == graph.float_ops == graph.ops[1:]  # of all but the first Quantize


def test_only_a_single_scale_is_read() -> None:
    found = dump(0x0308)
    found["graph"]["tensors"]["a"] = tensor(0x0308, 4, 3)
    relu = parse_qnn_graph(found)[1]
    assert relu.inputs[0].text == "SF8e3"
    assert (relu.inputs[0].scale, relu.inputs[0].zero_point) == (None, None)


def test_a_refused_graph_is_no_integer_graph() -> None:
    assert HtpGraph("v75", (), "no").verdict is HtpVerdict.REJECT


# --------------------------------------------------------------------------- the cases themselves


def test_recorded_names_are_known() -> None:
    """Needs no compiler: every case builds, and is a valid model unless its types are too new."""
    for name in json.loads(shared_file("design/htp_verdicts.json").read_text("utf-8"))["cases"]:
        model = onnx.shape_inference.infer_shapes(build_case(name))
        if "xs2/" not in name and not name.startswith(("Simplified", "MatMulNBits")):
            onnx.checker.check_model(model)


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(KeyError):
        build_case("Nonsense/u8")


def test_cases_are_the_same_at_each_call() -> None:
    first, second = (list(islice(sweep(), 100)) for _ in range(2))
    assert [case.key for case in first] == [case.key for case in second]
    assert [case.build() for case in first] == [case.build() for case in second]


def test_names_of_the_sweep_are_unique() -> None:
    names = Counter(case.name for case in sweep())
    assert len(names) > 3800
    assert names.most_common(1)[0][1] == 1


def test_random_cases_depend_on_seed_and_index_alone() -> None:
    few, many = list(random_cases(7, 20)), list(random_cases(7, 60))
    assert few == many[:20]
    assert {case.key for case in few}.isdisjoint(case.key for case in random_cases(8, 20))


def test_random_cases_run_on_the_cpu() -> None:
    for case in random_cases(7, 60):
        open_session(case.build())


def test_random_cases_differ_and_hold_every_family() -> None:
    cases = list(random_cases(7, 1000))
    assert len({case.key for case in cases}) > 990
    families = {case.name.split("/")[2] for case in cases}
    assert {"MatMul_const", "Conv", "RMSNormalization", "attention", "silu-mul"} <= families
    assert sum(len(case.steps) > 1 for case in cases) > 150


# -------------------------------------------------------------------------------- the real thing


@needs_compiler
@pytest.mark.parametrize("name", KNOWN)
def test_verdicts(htp: HtpCompiler, name: str) -> None:
    found = tuple(htp.compile(build_case(name), arch).verdict.value for arch in ("v68", "v75"))
    assert found == KNOWN[name]


@needs_compiler
@pytest.mark.parametrize("arch", ["v69", "v81"])
def test_recorded_verdicts_and_operations(htp: HtpCompiler, arch: str) -> None:
    """One in twenty of the recorded cases, with the operations they become."""
    recorded = json.loads(shared_file("design/htp_verdicts.json").read_text("utf-8"))["cases"]
    for name in list(recorded)[::20]:
        graph = htp.compile(build_case(name), arch)
        wanted = recorded[name][arch]
        assert graph.verdict.value == wanted["verdict"], name
        assert texts(graph) == sorted(wanted["qnn_ops"]), name


def test_the_chips_are_those_of_the_profiles() -> None:
    assert soc_models() == {"v68": 30, "v69": 36, "v73": 43, "v75": 57, "v79": 69, "v81": 87}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", soc_models())
def test_all_recorded_verdicts(htp: HtpCompiler, arch: str) -> None:
    if "QNPU_ALL_HTP_CASES" not in os.environ:
        pytest.skip("set QNPU_ALL_HTP_CASES to compile all cases for all architectures")
    recorded = json.loads(shared_file("design/htp_verdicts.json").read_text("utf-8"))["cases"]
    found = {name: htp.compile(build_case(name), arch).verdict.value for name in recorded}
    assert found == {name: by_arch[arch]["verdict"] for name, by_arch in recorded.items()}


@needs_compiler
def test_what_was_made_of_which_node(htp: HtpCompiler) -> None:
    graph = htp.compile(build_case("MatMul_dyn/u16xu16"), "v75")
    assert [op.text for op in graph.inserted] == ["Convert(UF16)->UF8"]
    product = next(op for op in graph.ops if op.kind == "MatMul")
    assert "s0_MatMul" in product.sources


@needs_compiler
def test_a_refusal_names_node_and_reason(htp: HtpCompiler) -> None:
    graph = htp.compile(build_case("Abs/s16"), "v75")
    assert graph.unsupported == ("s0_Abs",)
    assert "ElementWiseAbs" in graph.refusal
    assert "\n" not in graph.refusal


@needs_compiler
def test_an_old_dump_in_the_folder_is_not_read(htp: HtpCompiler, tmp_path: Path) -> None:
    for _ in range(2):
        graph = htp.compile(build_case("Add/u16"), "v75", tmp_path)
        assert texts(graph) == ["ElementWiseAdd(UF16,UF16)->UF16"]
    graph = htp.compile(build_case("Abs/s16"), "v75", tmp_path)
    assert graph.ops == ()


@needs_compiler
def test_without_the_binary_late_refusals_are_missed(htp: HtpCompiler) -> None:
    model = build_case("Gather_embed/u16/diff_enc")
    assert htp.compile(model, "v68", finalize=False).verdict is HtpVerdict.FLOAT
    assert htp.compile(model, "v68").verdict is HtpVerdict.REJECT


@needs_compiler
@pytest.mark.parametrize(("dtype", "verdict"), [("s16", "reject"), ("s8", "int")])
def test_second_operands_straight_from_codes(htp: HtpCompiler, dtype: str, verdict: str) -> None:
    """A 16-bit one is refused only late, and only as a graph input without QuantizeLinear."""
    case = matmul_dynamic("u16", dtype)
    assert htp.compile(case.build(), "v75").verdict is HtpVerdict.INT
    assert htp.compile(replace(case, io="int").build(), "v75").verdict.value == verdict


@needs_compiler
@pytest.mark.parametrize("form", ["proto", "bytes", "ir", "path"])
def test_forms_of_a_model(htp: HtpCompiler, form: str, tmp_path: Path) -> None:
    proto = build_case("MatMul_const/u8xs8/per_tensor")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    forms: dict[str, Any] = {
        "proto": proto,
        "bytes": proto.SerializeToString(),
        "ir": ir.from_proto(proto),
        "path": path,
    }
    assert htp.compile(forms[form], "v75").verdict is HtpVerdict.INT


@needs_compiler
def test_the_emulator_runs_what_the_graph_says(htp: HtpCompiler) -> None:
    case = matmul_const("u8", "s8", "channel", scale=0.002)
    model = ir.from_proto(case.build())
    feeds = {"s0_in0_f": normal(1, 8, 64)}
    codes = compare_on_emulator(htp, model, "v75", feeds)["s0_out0"]
    assert codes.shape == (1, 8, 32)
    assert np.abs(codes).max() <= 1  # measured: 1


@needs_compiler
def test_two_bit_weights_are_accepted_and_wrong(htp: HtpCompiler) -> None:
    """Accepted as integer from opset 25 on, but the packed codes are misread."""
    case = matmul_const("u16", "s2", "channel", opset=25)
    model = ir.from_proto(case.build())
    assert htp.compile(model, "v75").verdict is HtpVerdict.INT
    codes = compare_on_emulator(htp, model, "v75", {"s0_in0_f": normal(1, 8, 64)})["s0_out0"]
    assert np.abs(codes).mean() > 1000


@needs_compiler
def test_block_scales_above_sixteen_are_misread(htp: HtpCompiler) -> None:
    """LPBQ as two DequantizeLinear: the codes of the block scales have four bits, 1 to 16."""
    model = ir.from_proto(matmul_const("u16", "s4", "lpbq32", scale=0.005).build())
    feeds = {"s0_in0_f": normal(1, 8, 64)}
    assert np.abs(compare_on_emulator(htp, model, "v75", feeds)["s0_out0"]).max() <= 2
    codes, scales = (model.graph.initializers[f"s0_in1_s{part}"] for part in "qs")
    for value, factor in ((codes, 4), (scales, 0.25)):  # the same weights
        old = constant_array(value)
        assert old is not None
        set_constant(value, (old * factor).astype(old.dtype))
    assert htp.compile(model, "v75").verdict is HtpVerdict.INT
    assert np.abs(compare_on_emulator(htp, model, "v75", feeds)["s0_out0"]).mean() > 100


@needs_compiler
def test_a_refused_model_does_not_run(htp: HtpCompiler) -> None:
    with pytest.raises(HtpError, match="ElementWiseAbs"):
        htp.run(build_case("Abs/s16"), "v75", {"s0_in0_f": normal(1, 4, 8, 16)})


@needs_compiler
def test_artefacts(htp: HtpCompiler, tmp_path: Path) -> None:
    model = build_case("MatMul_const/u16xs4/per_channel")
    for _ in range(2):  # the second overwrites
        htp.emit_context(model, "v75", tmp_path / "context.onnx")
        htp.emit_dlc(model, "v75", tmp_path / "model.dlc")
    context = onnx.load(tmp_path / "context.onnx")
    assert [node.op_type for node in context.graph.node] == ["EPContext"]
    binary = next(a.s for a in context.graph.node[0].attribute if a.name == "ep_cache_context")
    assert (tmp_path / binary.decode()).stat().st_size > 1000
    assert (tmp_path / "model.dlc").stat().st_size > 1000


@needs_compiler
def test_a_dead_process_is_replaced() -> None:
    model = unary("Relu", "u8").build()
    with HtpCompiler(timeout=60) as htp:
        assert htp.compile(model, "v75").verdict is HtpVerdict.INT
        process = htp._process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert htp.compile(model, "v75").verdict is HtpVerdict.INT
        assert htp._process is not process


@needs_compiler
def test_a_hanging_process_is_given_up() -> None:
    with HtpCompiler(timeout=0.01) as htp, pytest.raises(HtpError, match="did not answer"):
        htp.compile(unary("Relu", "u8").build(), "v75")


def test_an_unknown_architecture_is_an_error() -> None:
    with HtpCompiler() as htp, pytest.raises(HtpError):
        htp.compile(unary("Relu", "u8").build(), "v99")


def test_a_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_available()
    with HtpCompiler() as htp, pytest.raises(HtpError, match="not installed"):
        htp.compile(unary("Relu", "u8").build(), "v75")
