"""load_onnx: whole models load lazily, everything else is refused with a code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.models.load import load_onnx
from qnpu.models.onnx_file import MAX_REPORTED

Entries = dict[str, str]


def external(name: str, entries: Entries, *, shape: tuple[int, ...] = (4,)) -> TensorProto:
    """A float32 tensor that says its data lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_with(*initializers: TensorProto) -> onnx.ModelProto:
    """y = x + w, with further initializers as given."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    name = initializers[0].name if initializers else "x"
    node = helper.make_node("Add", ["x", name], ["y"], name="add")
    graph = helper.make_graph([node], "g", [x], [y], initializer=[*initializers])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def codes(path: Path) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        load_onnx(path)
    return caught.value.codes


def test_inline_weights_load(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    model = load_onnx(write(tmp_path, model_with(weight)))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [0, 1, 2, 3])


def test_external_weights_survive_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "sub" / "w.bin").write_bytes(values.tobytes())
    write(tmp_path, model_with(external("w", {"location": "sub/w.bin", "offset": "8"})))
    monkeypatch.chdir(tmp_path)
    model = load_onnx("model.onnx")
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), values[2:])
    assert tensor.tobytes() == values[2:].tobytes()


def test_external_tensor_of_a_function_is_found_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    constant = helper.make_node("Constant", [], ["c"], value=external("c", {"location": "w.bin"}))
    opset = [helper.make_opsetid("", 23)]
    function = helper.make_function("acme", "One", [], ["c"], [constant], opset)
    model = model_with()
    model.functions.append(function)
    loaded = load_onnx(write(tmp_path, model))
    (node,) = loaded.functions[("acme", "One", "")]
    np.testing.assert_array_equal(node.attributes["value"].as_tensor().numpy(), np.ones(4))


def test_memory_does_not_grow_by_external_weights(tmp_path: Path) -> None:
    size = 256 << 20
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(size)
    tensor = external("w", {"location": "w.bin"}, shape=(size // 4,))
    path = write(tmp_path, model_with(tensor))
    process = psutil.Process()
    before = process.memory_info().rss
    model = load_onnx(path)
    assert process.memory_info().rss - before < size // 8
    assert model.graph.initializers["w"].shape == ir.Shape([size // 4])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"  \n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"GGUF\x03\0\0\0" + bytes(32),
        b"<!doctype html>",
        b"\xff" * 64,
        onnx.ModelProto(ir_version=10).SerializeToString(),
    ],
)
def test_other_content_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert codes(path) == ["QN103"]


def test_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DiagnosticError, match="git lfs pull"):
        load_onnx(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    whole = model_with(weight).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert codes(path) == ["QN103"], length


def test_folder_is_not_onnx(tmp_path: Path) -> None:
    assert codes(tmp_path) == ["QN103"]


def test_missing_file(tmp_path: Path) -> None:
    assert codes(tmp_path / "none.onnx") == ["QN102"]


def test_inline_data_of_the_wrong_length(tmp_path: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], raw_data=bytes(15))
    assert codes(write(tmp_path, model_with(weight))) == ["QN103"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2])
@pytest.mark.parametrize("outside", [False, True])
def test_codes_of_six_bits_that_have_more(tmp_path: Path, kind: int, outside: bool) -> None:
    """Found by bench.fuzz: a zero point of that type with the code 128."""
    tensor = TensorProto(name="w", data_type=kind, dims=[1])
    path = write(tmp_path, model_with(tensor))
    assert codes(path) == ["QN103"]
    if outside:
        (tmp_path / "w.bin").write_bytes(b"\x80")
        tensor = external("w", {"location": "w.bin"}, shape=(1,))
        tensor.data_type = kind
    else:
        tensor.int32_data.append(128)
    assert codes(write(tmp_path, model_with(tensor))) == ["QN103"]


def test_an_attribute_of_a_function_outside_of_one(tmp_path: Path) -> None:
    """Found by bench.fuzz."""
    model = model_with()
    reference = model.graph.node[0].attribute.add(name="axis", ref_attr_name="axis")
    reference.type = onnx.AttributeProto.INT
    assert codes(write(tmp_path, model)) == ["QN103"]
    function = helper.make_function("own", "F", ["a"], ["b"], [], [helper.make_opsetid("", 23)])
    node = function.node.add(op_type="Softmax", input=["a"], output=["b"])
    node.attribute.append(reference)
    function.attribute.append("axis")
    model = model_with()
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    load_onnx(write(tmp_path, model))  # within one it is as it should be


@pytest.mark.parametrize(("kind", "dims"), [(999, [4]), (1, [-4]), (0, [4])])
def test_impossible_tensor(tmp_path: Path, kind: int, dims: list[int]) -> None:
    weight = TensorProto(name="w", data_type=kind, dims=dims, raw_data=bytes(16))
    assert codes(write(tmp_path, model_with(weight))) == ["QN103"]


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"location": "absent.bin"},
        {"location": "folder"},
        {"location": "w\0.bin"},
        {"location": "w.bin", "offset": "-4"},
        {"location": "w.bin", "offset": "four"},
        {"location": "w.bin", "offset": "8"},
        {"location": "w.bin", "length": "20"},
        {"location": "w.bin", "length": "12"},
    ],
)
def test_external_data_missing_or_short(tmp_path: Path, entries: Entries) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16))
    assert codes(write(tmp_path, model_with(external("w", entries)))) == ["QN104"]


@pytest.mark.parametrize(
    "location",
    ["/etc/hostname", "../w.bin", "a/../../w.bin", "a/../w.bin", "C:\\w.bin", "..\\w.bin", "link"],
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "w.bin")
    assert codes(write(folder, model_with(external("w", {"location": location})))) == ["QN105"]


def test_link_within_the_folder_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    (tmp_path / "link").symlink_to("w.bin")
    model = load_onnx(write(tmp_path, model_with(external("w", {"location": "link"}))))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.ones(4))


def test_hard_link_is_refused_at_load(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    os.link(tmp_path / "w.bin", tmp_path / "second.bin")
    path = write(tmp_path, model_with(external("w", {"location": "second.bin"})))
    assert codes(path) == ["QN105"]


def in_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_sparse(model: onnx.ModelProto, tensor: TensorProto) -> None:
    indices = numpy_helper.from_array(np.arange(4), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [8]))


def in_subgraph(model: onnx.ModelProto, tensor: TensorProto) -> None:
    output = helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, [4])
    branch = helper.make_graph([], "branch", [], [output], initializer=[tensor])
    node = helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)


def in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    opset = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("acme", "F", [], ["c"], [constant], opset))


def in_training(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


@pytest.mark.parametrize("place", [in_attribute, in_sparse, in_subgraph, in_function, in_training])
def test_every_place_of_a_tensor_is_checked(
    tmp_path: Path, place: Callable[[onnx.ModelProto, TensorProto], None]
) -> None:
    model = model_with()
    place(model, external("w", {"location": "../secret"}))
    assert set(codes(write(tmp_path, model))) == {"QN105"}


def test_faults_are_reported_together_and_located(tmp_path: Path) -> None:
    bad = [external("a", {"location": "/x"}), external("b", {"location": "absent"})]
    path = write(tmp_path, model_with(*bad))
    with pytest.raises(DiagnosticError) as caught:
        load_onnx(path)
    assert caught.value.codes == ["QN105", "QN104"]
    assert [d.location.value for d in caught.value.diagnostics] == ["a", "b"]
    assert {d.location.file for d in caught.value.diagnostics} == {str(path)}


def test_reports_are_capped(tmp_path: Path) -> None:
    bad = [external(f"w{i}", {"location": "absent"}) for i in range(MAX_REPORTED + 5)]
    assert codes(write(tmp_path, model_with(*bad))) == ["QN104"] * MAX_REPORTED
