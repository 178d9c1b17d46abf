"""Options: what is accepted, from TOML and directly, and what is an error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qnpu.compiler.config import CompileConfig, read_config
from qnpu.compiler.diagnostics import DiagnosticError

FILE = """
scheme = "w4a8"
target = "qnn-htp-v75"
calib = "data.npz"
seq_len = 64
mask_value = -40
keep_inputs = ["attention_mask"]
online = ["r4", "r3"]
emit = ["float", "encodings-2.0.0"]

[freeze_dims]
N = 1
"x:1" = 28
"""


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "compile.toml"
    path.write_text(text, "utf-8")
    return read_config(path)


def test_a_file_with_every_kind_of_value(tmp_path: Path) -> None:
    config = CompileConfig(**read(tmp_path, FILE))
    assert config == CompileConfig(
        scheme="w4a8",
        target="qnn-htp-v75",
        calib="data.npz",
        seq_len=64,
        mask_value=-40,
        keep_inputs=("attention_mask",),
        online=("r4", "r3"),
        emit=("float", "encodings-2.0.0"),
        freeze_dims={"N": 1, "x:1": 28},
    )


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert CompileConfig(**read(tmp_path, "")) == CompileConfig()


@pytest.mark.parametrize(
    "text",
    [
        'shceme = "w8a8"',
        "scheme = 8",
        'seq_len = "512"',
        "seq_len = 512.0",
        "seq_len = true",
        'mask_value = "-50"',
        'keep_inputs = "attention_mask"',
        'online = "r3"',
        "online = [3]",
        'emit = "float"',
        "freeze_dims = 3",
        "[freeze_dims]\nN = 1.5",
        "[freeze_dims]\nN = true",
        "scheme = w8a8",
        "[[[",
    ],
)
def test_faults_of_a_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read(tmp_path, text)
    assert caught.value.codes == ["QN503"]
    assert caught.value.diagnostics[0].location.file == str(tmp_path / "compile.toml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "compile.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DiagnosticError) as caught:
        read_config(path)
    assert caught.value.codes == ["QN503"]


@pytest.mark.parametrize("name", ["no-such.toml", "."])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_config(tmp_path / name)
    assert caught.value.codes == ["QN102"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"scheme": "w3a8"}, "QN501"),
        ({"target": "nokia-3310"}, "QN502"),
        ({"range_method": "guess"}, "QN503"),
        ({"down_bits": 4}, "QN503"),
        ({"gate_bits": 4}, "QN503"),
        ({"query_bits": 4}, "QN503"),
        ({"integer": True, "cpu": "6502"}, "QN503"),
        ({"cpu": "vnni"}, "QN503"),  # for no integer graph
        ({"logits_bits": 32}, "QN503"),
        ({"down_bits": 8, "promote": -0.1}, "QN503"),
        ({"down_bits": 8, "promote": 1.1}, "QN503"),
        ({"down_bits": 8, "promote": float("nan")}, "QN503"),
        ({"promote": 0.1}, "QN503"),  # all have 16 bits already
        ({"bos": "maybe"}, "QN503"),
        ({"prefix": "often"}, "QN503"),
        ({"prefix": "1,"}, "QN503"),
        ({"prefix": "-1"}, "QN503"),
        ({"prefix": ""}, "QN503"),
        ({"exporter": "by-hand"}, "QN503"),
        ({"online": ("r2",)}, "QN503"),
        ({"online": ("r3", "")}, "QN503"),
        ({"emit": ("float", "pdf")}, "QN503"),
        ({"calib_windows": 0}, "QN503"),
        ({"eval_windows": -1}, "QN503"),
        ({"seq_len": 1}, "QN503"),
        ({"context": 512}, "QN503"),  # as many as the prefill graph reads alone
        ({"context": -1}, "QN503"),
        ({"context": 1024, "prefix": "1"}, "QN503"),
        ({"context": 1024, "emit": ("float",)}, "QN503"),
        ({"mask_value": 0.0}, "QN503"),
        ({"mask_value": 1.0}, "QN503"),
        ({"mask_value": -1e4}, "QN503"),
        ({"mask_value": float("nan")}, "QN503"),
        ({"mask_value": float("-inf")}, "QN503"),
        ({"freeze_dims": {"N": -1}}, "QN503"),
    ],
)
def test_values_that_cannot_be_meant(options: dict[str, Any], code: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        CompileConfig(**options)
    assert caught.value.codes == [code]


@pytest.mark.parametrize(
    "options",
    [
        {"eval_windows": 0},
        {"seq_len": 2},
        {"context": 513},
        {"mask_value": -9999.0},
        {"freeze_dims": {"N": 0}},
        {"down_bits": 8, "promote": 1},
        {"prefix": "auto"},
        {"prefix": "none"},
        {"prefix": "0,17, 3"},
    ],
)
def test_values_at_the_edge(options: dict[str, Any]) -> None:
    CompileConfig(**options)


def test_json_names_every_option() -> None:
    plain = json.loads(json.dumps(CompileConfig(freeze_dims={"N": 1}).to_json()))
    assert set(plain) == {field.name for field in dataclasses.fields(CompileConfig)}
    assert plain["freeze_dims"] == {"N": 1}


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompileConfig().scheme = "w8a8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"scheme": "w8a16"}, "QN543"),
        ({"target": "xdna2"}, "QN543"),
        ({"weight_block": 31}, "QN503"),
        ({"emit": ("encodings-0.6.1",)}, "QN314"),
        ({"plan": "bit_plan.json"}, "QN503"),
        ({"learn": "end-to-end", "learn_weights": "rotations"}, "QN503"),
    ],
)
def test_blocks_that_there_are_not(options: dict[str, Any], code: str) -> None:
    asked: dict[str, Any] = {"scheme": "w4a16", "weight_block": 32} | options
    with pytest.raises(DiagnosticError) as caught:
        CompileConfig(**asked)
    assert caught.value.codes == [code]


def test_blocks_as_a_choice() -> None:
    config = CompileConfig(scheme="auto", budget="size=1MB", target="qnn-htp-v75", weight_block=32)
    assert config.weight_block == 32


@pytest.mark.parametrize("target", ["onnxruntime", "qnn-htp-v68", "qnn-htp-v81"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_blocks_that_there_are(target: str, block: int) -> None:
    config = CompileConfig(scheme="w4a8", target=target, weight_block=block)
    assert config.bits_by_role.block == block
